//! Reduction between the vision encoder and the decoder: fewer visual tokens from the first layer on.
//!
//! An [`EncoderReducer`] looks at one picture (one time step of a video) and says which tokens the
//! decoder gets, as a linear map: every token kept is a weighted sum of those that the encoder made.
//! Plain selection, merging and pooling are all of this form, so that the framework applies it to
//! whatever belongs to a token (features, DeepStack features) and owns the guards: the number of
//! tokens, their positions, batching.

mod cosines;
mod host;
mod methods;
mod reduction;
mod shape;

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::ReducerError;

pub(crate) use methods::InPresets;
pub use methods::{
    AveragePooling, BuiltIn, CdPruner, DivPrune, EncoderMethod, FasterVlm, HiPrune, Nuwa, Pillars,
    PruMerge, RandomTokens, Salience, UniformGrid, VScan, VisPruner, VisionZip,
};
pub use reduction::{Part, Reduction, Weights};
pub use shape::{EncoderShape, Tower};

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
    /// softmax runs over the class token too, and over register tokens (DINOv2).
    ClassAttention {
        /// The layer.
        layer: usize,
    },
    /// Attention probability that a token receives, the mean over heads, summed over all queries
    /// of the picture (class and register tokens included), `[1, tokens]`.
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

/// Most tokens of a picture.
const MAX_TOKENS: usize = 1 << 24;

/// What was seen.
pub type Taps<B> = BTreeMap<Tap, Tensor<B, 2>>;

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
        self.grid[0].saturating_mul(self.grid[1])
    }

    /// Whether there are tokens, and every tap shows as many.
    fn check(&self) -> Result<(), ReducerError> {
        let refuse = |reason| Err(ReducerError::Picture { reason });
        let tokens = self.tokens();
        if !(1..=MAX_TOKENS).contains(&tokens) {
            return refuse(format!(
                "a grid of {:?} has {tokens} tokens, of 1 to {MAX_TOKENS}",
                self.grid
            ));
        }
        for (tap, shown) in &self.taps {
            let [rows, columns] = shown.dims();
            let expected = match tap {
                Tap::Question => columns,
                Tap::ClassToken | Tap::ClassQuery { .. } | Tap::ClassKey { .. } => 1,
                _ => tokens,
            };
            if rows == 0 || columns != expected {
                return refuse(format!(
                    "{tap:?} is [{rows}, {columns}], expected {expected} columns"
                ));
            }
        }
        Ok(())
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

/// A method that reduces visual tokens before the decoder.
///
/// The method decides which tokens, and what they are made of. It need not care about positions,
/// batches or budgets: [`reduce`] checks what it returns.
pub trait EncoderReducer<B: Backend>: Send + Sync {
    /// What it must see of a picture; computed for it, and nothing else.
    ///
    /// # Errors
    /// [`ReducerError::Unsupported`] if it cannot work behind this encoder.
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError>;

    /// Chooses at most `keep` tokens of a picture, of at least one; `keep` is at most the number of
    /// tokens.
    ///
    /// # Errors
    /// [`ReducerError::NotSeen`] for what its needs do not name, [`ReducerError::NanScore`] if it
    /// cannot rank, [`ReducerError::Readback`] from the device.
    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError>;

    /// The method and all its settings: two of one fingerprint make the same of what they see, so that a
    /// cache may stand in for the second. `None`, the default, where nobody vouches for that.
    fn fingerprint(&self) -> Option<String> {
        None
    }
}

/// Reduces one picture to `keep` tokens, checks the result and brings it into the order of places.
///
/// # Errors
/// Those of the method; [`ReducerError::Picture`] if what was seen is not that of a picture of this
/// grid; [`ReducerError::Reduction`] if the result is not a reduction: more than `keep` tokens or
/// none, places twice or off the grid, weights of another shape.
pub fn reduce<B: Backend>(
    method: &dyn EncoderReducer<B>,
    seen: &Seen<B>,
    keep: usize,
) -> Result<Reduction<B>, ReducerError> {
    method.needs(&seen.encoder)?;
    seen.check()?;
    let tokens = seen.tokens();
    let keep = keep.clamp(1, tokens);
    let reduction = method.reduce(seen, keep)?;
    reduction.check(tokens, keep, seen.taps.contains_key(&Tap::ClassToken))?;
    Ok(reduction.in_order())
}
