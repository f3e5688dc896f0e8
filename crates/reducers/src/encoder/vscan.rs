use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::cosines::nearest;
use super::host::{attention, feature_layer, others, ranked, read_mean};
use super::mixture::Mixture;
use super::{EncoderReducer, EncoderShape, Reduced, Seen, Tap};
use crate::{About, ReducerError, Support, top_k};

/// The first stage of VScan (arXiv 2505.22654): half the tokens by the attention of an early layer,
/// window by window, half by that of the last layer; all others are averaged into those most like
/// them.
///
/// Its second stage is a decision in the middle of the decoder, which a schedule says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VScan {
    /// The early layer, from 0. As released if absent: 5 of 24 behind CLIP, 7 of 32 behind Qwen (its
    /// first with full attention), in proportion for other depths.
    pub local_layer: Option<usize>,
}

impl VScan {
    /// What to know before comparing.
    pub const ABOUT: About = About {
        description: "early attention by windows, late attention, the rest averaged in (stage 1)",
        source: "arXiv 2505.22654; github.com/Tencent/SelfEvolvingAgent, VScan (LLaVA and Qwen2.5-VL)",
        exact: "layers, windows of 6 (LLaVA) and 4 tokens (Qwen), the limit per window, the merge",
        interpretation: "LLaVA: tokens are averaged before the projector, not after it, and late \
                         attention fills up what windows leave of the budget; the early layer of \
                         other depths, in proportion; grids smaller than a window are one window; \
                         Qwen pictures are reduced one by one",
        llava: Support::Yes,
        qwen: Support::Yes,
    };

    fn taps(&self, encoder: &EncoderShape) -> [Tap; 2] {
        let (released, of) = if encoder.class_token {
            (5, 24)
        } else {
            (7, 32)
        };
        let in_proportion = encoder.num_layers * released / of;
        [
            self.local_layer.unwrap_or(in_proportion),
            feature_layer(encoder),
        ]
        .map(|layer| attention(encoder, layer))
    }
}

impl<B: Backend> EncoderReducer<B> for VScan {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        match self.local_layer {
            Some(layer) if layer >= encoder.num_layers => Err(ReducerError::Unsupported {
                method: "vscan",
                reason: format!(
                    "local_layer {layer} is beyond the {} layers of this vision encoder",
                    encoder.num_layers
                ),
            }),
            _ => {
                let [local, global] = self.taps(encoder);
                Ok(vec![local, global, Tap::Embeddings])
            }
        }
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError> {
        let [early, late] = self.taps(&seen.encoder);
        let windows = match seen.encoder.class_token {
            true => Windows::new(seen.grid, 6),
            false => Windows::new(seen.grid, 4),
        };
        let half = keep / 2;
        let limit = match seen.encoder.class_token {
            true => half / windows.count(),
            false => half.div_ceil(windows.count()),
        };
        let mut chosen = windows.best(&read_mean(seen.get(early)?)?, limit, half);
        let mut scores = read_mean(seen.get(late)?)?;
        chosen
            .iter()
            .for_each(|&token| scores[token] = f32::NEG_INFINITY);
        chosen.extend(top_k(&scores, keep - chosen.len())?);
        chosen.sort_unstable();
        merge_rest(seen, chosen)
    }
}

/// The chosen tokens, each the mean of itself and of the others that are most like it.
fn merge_rest<B: Backend>(seen: &Seen<B>, chosen: Vec<usize>) -> Result<Reduced<B>, ReducerError> {
    let embeddings = seen.get(Tap::Embeddings)?;
    let device = embeddings.device();
    let rest = others(&chosen, seen.tokens());
    let assigned = nearest(embeddings, &rest, &chosen)?;
    let mut sizes = vec![1; chosen.len()];
    assigned.iter().for_each(|&token| sizes[token] += 1);

    let places = chosen.iter().copied().map(Some).collect();
    let mut mixture = Mixture::new(places, seen.tokens());
    let whole = chosen.iter().copied().zip(0..);
    for (source, token) in whole.chain(rest.into_iter().zip(assigned)) {
        mixture.add(token, source, 1.0 / sizes[token] as f32);
    }
    Ok(mixture.on(&device))
}

/// Square windows side by side; what is left at the far edges belongs to the last window.
struct Windows {
    size: usize,
    columns: usize,
    windows: [usize; 2],
}

impl Windows {
    fn new([rows, columns]: [usize; 2], size: usize) -> Self {
        Self {
            size,
            columns,
            windows: [(rows / size).max(1), (columns / size).max(1)],
        }
    }

    fn count(&self) -> usize {
        self.windows[0] * self.windows[1]
    }

    fn of(&self, token: usize) -> usize {
        let [row, column] = [token / self.columns, token % self.columns];
        let row = (row / self.size).min(self.windows[0] - 1);
        let column = (column / self.size).min(self.windows[1] - 1);
        row * self.windows[1] + column
    }

    /// The tokens with the highest scores, at most `limit` of a window and `most` of all.
    fn best(&self, scores: &[f32], limit: usize, most: usize) -> Vec<usize> {
        let mut tokens = ranked(scores);
        let mut taken = vec![0; self.count()];
        tokens.retain(|&token| {
            let taken = &mut taken[self.of(token)];
            *taken += 1;
            *taken <= limit
        });
        tokens.truncate(most);
        tokens
    }
}
