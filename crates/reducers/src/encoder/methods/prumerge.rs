use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Tensor};
use serde::{Deserialize, Serialize};

use crate::encoder::cosines::Cosines;
use crate::encoder::host::{others, read, require_class_token};
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Part, Reduction, Seen, Tap, Tower};
use crate::{About, ReducerError, top_k};

/// PruMerge and PruMerge+ (arXiv 2403.15388): the tokens whose class attention stands out, each with
/// the tokens most like it merged in, and one token that sums up the rest.
///
/// The default is PruMerge, [`PruMerge::plus`] is PruMerge+ at a fixed budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PruMerge {
    /// Whether tokens from all over the picture are kept beside those that stand out (PruMerge+).
    pub spatial: bool,
    /// Whether the picture says how many to keep, at most the budget; otherwise exactly the budget.
    pub adaptive: bool,
    /// Tokens merged into each token kept.
    pub neighbours: usize,
}

impl Default for PruMerge {
    fn default() -> Self {
        Self {
            spatial: false,
            adaptive: true,
            neighbours: 32,
        }
    }
}

impl BuiltIn for PruMerge {
    const ABOUT: About = About {
        description: "outliers of class attention, similar tokens merged in, one token for the rest",
        source: "arXiv 2403.15388; github.com/42Shawn/LLaVA-PruMerge",
        exact: "class attention of the last layer with all heads as one; outliers above Q3 + 1.5 IQR; \
                the 32 most similar keys added, weighted by attention; the sum of the rest; \
                PruMerge+ samples at a third of the mean distance between outliers",
        interpretation: "the budget is a bound for the adaptive variants, and counts the token for the \
                         rest; PruMerge+ at a fixed budget keeps half by attention and half evenly \
                         spaced among the others (the release's training variant may take a token \
                         twice); tokens stand in the order of the grid, the token for the rest first",
        towers: &[Tower::Clip],
    };

    fn works_behind(&self, encoder: &EncoderShape) -> Result<(), ReducerError> {
        require_class_token(Self::NAME, encoder)
    }
}

impl PruMerge {
    /// PruMerge+, with exactly as many tokens as the budget says.
    pub fn plus() -> Self {
        Self {
            spatial: true,
            adaptive: false,
            ..Self::default()
        }
    }

    /// The tokens kept beside the one for the rest, at most `room`.
    fn choose(&self, attention: &[f32], room: usize) -> Result<Vec<usize>, ReducerError> {
        let share = outlier_share(attention);
        let important = match (self.adaptive, self.spatial) {
            (true, _) => (attention.len() as f64 * share) as usize,
            (false, true) => room.div_ceil(2),
            (false, false) => room,
        };
        let mut chosen = top_k(attention, important.min(room))?;
        if self.spatial {
            let mut samples = others(&chosen, attention.len());
            if self.adaptive {
                // The release leaves out the last token, and stops if there is no outlier.
                let stride = ((1.0 / share) as usize / 3).max(1);
                samples.retain(|&token| token % stride == 0 && token + 1 < attention.len());
            }
            chosen.extend(evenly(&samples, room - chosen.len()));
        }
        Ok(chosen)
    }
}

impl<B: Backend> EncoderReducer<B> for PruMerge {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        self.works_behind(encoder)?;
        Ok(taps(encoder).to_vec())
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let tokens = seen.tokens();
        if keep == tokens && !self.adaptive {
            return Ok(Reduction::selection((0..tokens).collect()));
        }
        let [query, class_key, keys] = taps(&seen.encoder);
        let keys = seen.get(keys)?;
        let attention = class_attention(seen.get(query)?, seen.get(class_key)?, keys.clone())?;
        let chosen = self.choose(&attention, keep - 1)?;

        let places = [None].into_iter().chain(chosen.iter().copied().map(Some));
        let part = |token, source| Part {
            token,
            source,
            weight: attention[source],
        };
        let rest = others(&chosen, tokens).into_iter();
        let mut parts: Vec<Part> = rest.map(|source| part(0, source)).collect();
        let cosines = Cosines::new(keys)?;
        for (token, &place) in (1..).zip(&chosen) {
            let mut similarity = cosines.row(place)?.into_owned();
            similarity[place] = f32::NEG_INFINITY;
            parts.push(Part {
                weight: 1.0,
                ..part(token, place)
            });
            let neighbours = top_k(&similarity, self.neighbours.min(tokens - 1))?;
            parts.extend(neighbours.into_iter().map(|source| part(token, source)));
        }
        Ok(Reduction::of_parts(places.collect(), parts))
    }
}

fn taps(encoder: &EncoderShape) -> [Tap; 3] {
    let layer = encoder.num_layers.saturating_sub(1);
    [
        Tap::ClassQuery { layer },
        Tap::ClassKey { layer },
        Tap::Keys { layer },
    ]
}

/// Attention of the class token to every patch, all heads taken as one wide head.
fn class_attention<B: Backend>(
    query: Tensor<B, 2>,
    class_key: Tensor<B, 2>,
    keys: Tensor<B, 2>,
) -> Result<Vec<f32>, ReducerError> {
    let [hidden_size, tokens] = keys.dims();
    let keys = Tensor::cat(vec![keys, class_key], 1).cast(FloatDType::F32);
    let logits = query.cast(FloatDType::F32).transpose().matmul(keys);
    let probabilities = softmax(logits * (hidden_size as f64).powf(-0.5), 1);
    read(probabilities.narrow(1, 0, tokens))
}

/// The share of values above the third quartile by more than 1.5 times the range between quartiles.
fn outlier_share(values: &[f32]) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().map(f64::from).collect();
    sorted.sort_by(f64::total_cmp);
    let quantile = |share: f64| {
        let at = share * (sorted.len() - 1) as f64;
        let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
        low + (high - low) * at.fract()
    };
    let (first, third) = (quantile(0.25), quantile(0.75));
    let bound = third + 1.5 * (third - first);
    let outliers = sorted.iter().filter(|&&value| value > bound).count();
    outliers as f64 / sorted.len() as f64
}

/// At most `count` of the tokens, evenly spaced.
fn evenly(tokens: &[usize], count: usize) -> Vec<usize> {
    let count = count.min(tokens.len());
    let middle = |part: usize| tokens[(2 * part + 1) * tokens.len() / (2 * count)];
    (0..count).map(middle).collect()
}
