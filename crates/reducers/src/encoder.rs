//! Reduction between the vision encoder and the decoder: fewer visual tokens from the first layer on.
//!
//! An [`EncoderReducer`] looks at one picture (one time step of a video) and says which tokens the
//! decoder gets, as a linear map: every token kept is a weighted sum of those that the encoder made.
//! Plain selection, merging and pooling are all of this form, so that the framework applies it to
//! whatever belongs to a token (features, DeepStack features) and owns the guards: the number of
//! tokens, their positions, batching.

mod baselines;
mod cd_pruner;
mod cosines;
mod div_prune;
mod faster_vlm;
mod hi_prune;
mod host;
mod methods;
mod mixture;
mod nuwa;
mod pru_merge;
mod vis_pruner;
mod vision_zip;
mod vscan;

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::ReducerError;

pub use baselines::{AveragePooling, RandomTokens, UniformGrid};
pub use cd_pruner::CdPruner;
pub use div_prune::DivPrune;
pub use faster_vlm::FasterVlm;
pub use hi_prune::HiPrune;
pub use methods::EncoderMethod;
pub use nuwa::{Nuwa, Pillars, Salience};
pub use pru_merge::PruMerge;
pub use vis_pruner::VisPruner;
pub use vision_zip::VisionZip;
pub use vscan::VScan;

/// Something of a picture that a method may look at. All are `[features, tokens]`, tokens row by row
/// of the grid that the decoder sees; where a token covers several patches (Qwen: 2 × 2), attention
/// is their mean.
///
/// Layers are counted from 0. Hidden states are counted as `transformers` does: number 0 is the
/// input of layer 0, number `i` the output of layer `i - 1`, without the final norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tap {
    /// What a reduction is applied to. LLaVA: the hidden states that the projector takes, of the
    /// patches, `[vision hidden_size, tokens]`; Qwen: the merger's output, `[hidden_size, tokens]`.
    Features,
    /// What the decoder would embed. LLaVA: the projector's output; Qwen: as [`Tap::Features`].
    Embeddings,
    /// The class token's hidden state beside [`Tap::Features`], `[vision hidden_size, 1]`.
    ClassToken,
    /// Attention probabilities of the class token over the patches, `[num_heads, tokens]`. The
    /// softmax runs over the class token too.
    ClassAttention {
        /// The layer.
        layer: usize,
    },
    /// Attention probability that a token receives, the mean over heads, summed over all queries
    /// of the picture (class token included), `[1, tokens]`.
    ReceivedAttention {
        /// The layer.
        layer: usize,
    },
    /// Queries of the class token as projected (bias included, not scaled), `[vision hidden_size, 1]`.
    ClassQuery {
        /// The layer.
        layer: usize,
    },
    /// Key of the class token as projected (bias included), `[vision hidden_size, 1]`.
    ClassKey {
        /// The layer.
        layer: usize,
    },
    /// Keys of the patches as attention meets them (bias included; Qwen: rotated), heads one below
    /// the other, `[vision hidden_size, tokens]`.
    Keys {
        /// The layer.
        layer: usize,
    },
    /// Mean of the hidden states `first ..= last`. LLaVA: `[vision hidden_size, tokens]`; Qwen: after
    /// the merger, `[hidden_size, tokens]`.
    MeanHidden {
        /// The first, as `transformers` counts.
        first: usize,
        /// The last, included.
        last: usize,
    },
    /// The same of Qwen, in the order in which the tower's windows lie side by side instead of that
    /// of the grid: only to reproduce a release that mistakes one for the other.
    MeanHiddenInWindows {
        /// The first, as `transformers` counts.
        first: usize,
        /// The last, included.
        last: usize,
    },
    /// Embeddings of the question's text, `[hidden_size, text tokens]`.
    Question,
}

/// What was seen.
pub type Taps<B> = BTreeMap<Tap, Tensor<B, 2>>;

/// The vision encoder that a method works behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderShape {
    /// Transformer layers.
    pub num_layers: usize,
    /// Number of the hidden states that become visual tokens, as `transformers` counts (LLaVA-1.5:
    /// 23 of 24; Qwen: `num_layers`).
    pub feature_layer: usize,
    /// Attention heads of a layer.
    pub num_heads: usize,
    /// Whether there is a class token (CLIP).
    pub class_token: bool,
}

/// One picture, or one time step of a video, as far as a method asked to see it.
#[derive(Debug, Clone)]
pub struct Seen<B: Backend> {
    /// Rows and columns of tokens.
    pub grid: [usize; 2],
    /// What the method's [`EncoderReducer::needs`] named.
    pub taps: Taps<B>,
    /// The encoder.
    pub encoder: EncoderShape,
}

impl<B: Backend> Seen<B> {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    /// What was seen.
    ///
    /// # Errors
    /// [`ReducerError::NotSeen`] if the method's needs did not name it.
    pub fn get(&self, tap: Tap) -> Result<Tensor<B, 2>, ReducerError> {
        self.taps
            .get(&tap)
            .cloned()
            .ok_or(ReducerError::NotSeen { tap })
    }
}

/// The tokens that the decoder gets of one picture.
#[derive(Debug, Clone)]
pub struct Reduced<B: Backend> {
    /// Where each token stands: the grid cell (row by row) whose position it takes. `None`: a token
    /// without a place, such as the class token; it stands before the first cell.
    pub places: Vec<Option<usize>>,
    /// `[sources, kept]`: each column makes one token as a weighted sum of [`Tap::Features`], whose
    /// columns are the sources; if the method sees [`Tap::ClassToken`], that is one more source,
    /// the last. `None`: every token is that of its own place, unchanged.
    pub weights: Option<Tensor<B, 2>>,
}

impl<B: Backend> Reduced<B> {
    /// The tokens of these cells, unchanged.
    pub fn selection(mut cells: Vec<usize>) -> Self {
        cells.sort_unstable();
        Self {
            places: cells.into_iter().map(Some).collect(),
            weights: None,
        }
    }

    /// The same tokens by place: first those without one.
    fn in_order(self) -> Self {
        if self.places.is_sorted() {
            return self;
        }
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.sort_by_key(|&at| self.places[at]);
        let places = order.iter().map(|&at| self.places[at]).collect();
        let order: Vec<i64> = order.into_iter().map(|at| at as i64).collect();
        let weights = self.weights.map(|weights| {
            let order = Tensor::from_data(order.as_slice(), &weights.device());
            weights.select(1, order)
        });
        Self { places, weights }
    }
}

/// A method that reduces visual tokens before the decoder.
///
/// The method decides which tokens, and what they are made of. It need not care about positions,
/// batches or budgets: [`reduce`] checks what it returns.
pub trait EncoderReducer<B: Backend> {
    /// What it must see of a picture; computed for it, and nothing else.
    ///
    /// # Errors
    /// [`ReducerError::Unsupported`] if it cannot work behind this encoder.
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError>;

    /// Chooses at most `keep` tokens of a picture, of at least one; `keep` is at most the number of
    /// tokens.
    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError>;
}

/// Reduces one picture to `keep` tokens, checks the result and brings it into the order of places.
///
/// # Errors
/// Those of the method, and [`ReducerError::Reduction`] if its result is not a reduction: more than
/// `keep` tokens or none, places twice or off the grid, weights of another shape.
pub fn reduce<B: Backend>(
    method: &dyn EncoderReducer<B>,
    seen: &Seen<B>,
    keep: usize,
) -> Result<Reduced<B>, ReducerError> {
    let tokens = seen.tokens();
    let keep = keep.clamp(1, tokens.max(1));
    let reduced = method.reduce(seen, keep)?;
    let refuse = |reason: String| Err(ReducerError::Reduction { reason });
    let kept = reduced.places.len();
    if kept == 0 || kept > keep {
        return refuse(format!(
            "it kept {kept} tokens of {tokens}, asked for {keep}"
        ));
    }
    let mut taken = vec![false; tokens];
    for &place in reduced.places.iter().flatten() {
        match taken.get_mut(place) {
            Some(taken) if !*taken => *taken = true,
            Some(_) => return refuse(format!("it put two tokens at place {place}")),
            None => return refuse(format!("place {place} is beyond the {tokens} tokens")),
        }
    }
    if let Some(weights) = &reduced.weights {
        let sources = tokens + usize::from(seen.taps.contains_key(&Tap::ClassToken));
        if weights.dims() != [sources, kept] {
            return refuse(format!(
                "its weights are {:?}, expected [{sources}, {kept}]",
                weights.dims()
            ));
        }
    } else if reduced.places.contains(&None) && !seen.taps.contains_key(&Tap::ClassToken) {
        return refuse("a token without a place has no weights either".into());
    }
    Ok(reduced.in_order())
}
