use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::encoder::cosines::nearest;
use crate::encoder::host::{others, ranked, read_mean, require_layer};
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Part, Reduction, Seen, Tap, Tower};
use crate::{About, ReducerError, top_k};

/// The first stage of VScan (arXiv 2505.22654): half the tokens by the attention of an early layer,
/// window by window, half by that of the last layer; all others are averaged into those most like
/// them.
///
/// Its second stage is a decision in the middle of the decoder, which a schedule says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VScan {
    /// The early layer, from 0. As released if absent: 5 of 24 behind CLIP, 7 of 32 behind Qwen-VL
    /// (its first with full attention), in proportion for other depths; behind other towers as behind
    /// CLIP.
    pub local_layer: Option<usize>,
}

impl BuiltIn for VScan {
    const ABOUT: About = About {
        description: "early attention by windows, late attention, the rest averaged in (stage 1)",
        source: "arXiv 2505.22654; github.com/Tencent/SelfEvolvingAgent, VScan (LLaVA and Qwen2.5-VL)",
        exact: "layers, windows of 6 (LLaVA) and 4 tokens (Qwen), the limit per window, the merge",
        interpretation: "LLaVA: tokens are averaged before the projector, not after it, and late \
                         attention fills up what windows leave of the budget; the early layer of \
                         other depths, in proportion; grids smaller than a window are one window; \
                         Qwen pictures are reduced one by one",
        towers: &[Tower::Clip, Tower::QwenVl],
    };
}

impl VScan {
    fn taps(&self, encoder: &EncoderShape) -> [Tap; 2] {
        let (released, of) = encoder.settings((5, 24), (7, 32));
        let in_proportion = encoder.in_proportion(released, of);
        let local = self.local_layer.unwrap_or(in_proportion);
        [local, encoder.last_layer()].map(|layer| encoder.attention(layer))
    }
}

impl<B: Backend> EncoderReducer<B> for VScan {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        require_layer(Self::NAME, "local_layer", self.local_layer, encoder)?;
        let [local, global] = self.taps(encoder);
        Ok(vec![local, global, Tap::Embeddings])
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let [early, late] = self.taps(&seen.encoder);
        let windows = Windows::new(seen.grid, seen.encoder.settings(6, 4));
        let half = keep / 2;
        let [at_most, at_least] = [half / windows.count(), half.div_ceil(windows.count())];
        let limit = seen.encoder.settings(at_most, at_least);
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
fn merge_rest<B: Backend>(
    seen: &Seen<B>,
    chosen: Vec<usize>,
) -> Result<Reduction<B>, ReducerError> {
    let rest = others(&chosen, seen.tokens());
    let assigned = nearest(seen.get(Tap::Embeddings)?, &rest, &chosen)?;
    let mut sizes = vec![1; chosen.len()];
    assigned.iter().for_each(|&token| sizes[token] += 1);

    let places = chosen.iter().copied().map(Some).collect();
    let whole = chosen.iter().copied().zip(0..);
    let part = |(source, token)| Part {
        token,
        source,
        weight: 1.0 / sizes[token] as f32,
    };
    let parts = whole.chain(rest.into_iter().zip(assigned)).map(part);
    Ok(Reduction::of_parts(places, parts.collect()))
}

/// Square windows side by side; what remains at the far edges belongs to the last window.
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
