use std::ops::Range;

use burn::tensor::DType;
use reducers::{KvType, ReducerError};
use reroute_layers::LayerError;

use crate::RopeError;

/// What can go wrong between a prompt and its answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RerouteError {
    /// The resolved configuration contradicts itself.
    #[error("the decoder configuration is inconsistent: {0}; correct config.json")]
    Config(String),
    /// Rotary positions cannot be read.
    #[error(transparent)]
    Rope(#[from] RopeError),
    /// The prompt does not fit its own description.
    #[error("the prompt is malformed: {0}")]
    Prompt(String),
    /// A token id is not in the vocabulary.
    #[error(
        "token id {id} is outside the vocabulary of {vocab_size}: tokenizer and model do not match"
    )]
    TokenId {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// There is nothing to embed or to feed.
    #[error("there are no tokens; give at least one")]
    NoTokens,
    /// The prompt does not fit the context.
    #[error(
        "the prompt needs {needed} positions but the model has {available} \
         ({limit}): shorten the text or give fewer images"
    )]
    ContextLength {
        /// Positions the prompt occupies.
        needed: usize,
        /// Positions the model can be run for.
        available: usize,
        /// What limits them.
        limit: &'static str,
    },
    /// A sample is not in the cache.
    #[error("there is no sample {sample}: the cache has {samples}, counted from 0")]
    Sample {
        /// Index of the sample.
        sample: usize,
        /// Samples of the cache.
        samples: usize,
    },
    /// The cache was not made by this decoder, or for other prompts.
    #[error("the cache has {given}, expected {expected}: prefill the prompt with this decoder")]
    Cache {
        /// What the cache has.
        given: String,
        /// What fits the decoder and the prompt.
        expected: String,
    },
    /// Rows were forgotten, and nothing says where positions go on.
    #[error(
        "sample {sample} has been truncated: resume with the prompt that now holds, which says at \
         which position it goes on"
    )]
    Truncated {
        /// Index of the sample.
        sample: usize,
    },
    /// Positions with several axes cannot be numbered anew.
    #[error(
        "\"renumber\" gives visual tokens positions 0, 1, 2, …, but this model's have several axes \
         (time, height, width); use \"gap\" positions"
    )]
    Renumber,
    /// Rows of an earlier turn were numbered anew, those of this turn are not.
    #[error(
        "layer {layer} holds rows of sample {sample} that an earlier turn renumbered, and this turn \
         keeps positions as they are: go on under \"renumber\", or prefill the whole conversation"
    )]
    MixedPositions {
        /// Index of the sample.
        sample: usize,
        /// The first such layer.
        layer: usize,
    },
    /// A shortcut for rows that wait is not there, or does not fit.
    #[error("the shortcut from layer {} to layer {} {reason}", .layers.start, .layers.end)]
    Shortcut {
        /// The layers that it stands for.
        layers: Range<usize>,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Layers are not of this decoder's sizes.
    #[error("layer {layer} does not fit the decoder: its {what} is {given}, expected {expected}")]
    Layer {
        /// Index of the layer.
        layer: usize,
        /// The weight that does not fit.
        what: &'static str,
        /// Its shape.
        given: String,
        /// The shape that the configuration asks for.
        expected: String,
    },
    /// Something is of another type than the weights.
    #[error("{what} are {given:?}, but the decoder's weights {expected:?}: cast them")]
    Type {
        /// What was given.
        what: &'static str,
        /// Its type.
        given: DType,
        /// The type of the weights.
        expected: DType,
    },
    /// Keys and values cannot be kept in a type.
    #[error(
        "keys and values cannot be kept in {kv}: {reason}; keep them in the type of the weights"
    )]
    KvType {
        /// The type.
        kv: KvType,
        /// Why not.
        reason: &'static str,
    },
    /// A building block refused its input.
    #[error(transparent)]
    LayerInput(#[from] LayerError),
    /// The schedule does not fit the decoder, or scores cannot be ranked.
    #[error(transparent)]
    Reducer(#[from] ReducerError),
    /// A scorer of the caller's own gave scores for other rows.
    #[error("the scorer gave {given} scores for {expected} rows; give one for each")]
    Scores {
        /// Scores that it gave.
        given: usize,
        /// Rows that it was shown.
        expected: usize,
    },
    /// Logits are not numbers.
    #[error("the logits of sample {sample} contain NaN or infinity: {place}; {}", remedy(*.dtype, *.kv))]
    NotANumber {
        /// Index of the sample in the batch.
        sample: usize,
        /// Where numbers stop being finite.
        place: Place,
        /// The type that the decoder computes in.
        dtype: DType,
        /// The type that keys and values are kept in.
        kv: KvType,
    },
    /// A sampling option is out of range.
    #[error("{option} must be {range}, but is {value}")]
    Sampling {
        /// Name of the option.
        option: &'static str,
        /// Values it may take.
        range: &'static str,
        /// The value given.
        value: String,
    },
    /// Data could not be read back from the device.
    #[error("reading {what} back from the device failed: {reason}")]
    Readback {
        /// What was read.
        what: &'static str,
        /// The backend's explanation.
        reason: String,
    },
}

/// Where in the decoder numbers stop being finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Place {
    /// Before the first layer: the prompt's embeddings, or the norm that they enter by.
    #[error("what enters the first decoder layer is not finite")]
    Input,
    /// In a layer.
    #[error("hidden states stop being finite in decoder layer {0}")]
    Layer(usize),
    /// Behind the last layer.
    #[error("hidden states are finite to the last layer, and the product with the head is not")]
    Head,
}

fn remedy(dtype: DType, kv: KvType) -> &'static str {
    match (dtype, kv) {
        (DType::F16, _) => "numbers above 65504 do not fit into f16: use --dtype bf16 or f32",
        (_, KvType::F16) => "numbers above 65504 do not fit into f16: use --kv bf16 or auto",
        _ => "the weights or the inputs are not finite: look for a damaged checkpoint or picture",
    }
}
