use reducers::ReducerError;

/// What can go wrong between a prompt and its answer.
#[derive(Debug, thiserror::Error)]
pub enum RerouteError {
    /// The resolved configuration contradicts itself.
    #[error("the decoder configuration is inconsistent: {0}; correct config.json")]
    Config(String),
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
    /// The prompt does not fit the context.
    #[error(
        "the prompt needs {needed} positions but the model has {available} \
         (max_position_embeddings): shorten the text or give fewer images"
    )]
    ContextLength {
        /// Positions the prompt occupies.
        needed: usize,
        /// Positions the model was made for.
        available: usize,
    },
    /// Positions with several axes cannot be numbered anew.
    #[error(
        "\"renumber\" gives visual tokens positions 0, 1, 2, …, but this model's have several axes \
         (time, height, width); use \"gap\" positions"
    )]
    Renumber,
    /// The schedule does not fit the decoder, or scores cannot be ranked.
    #[error(transparent)]
    Reducer(#[from] ReducerError),
    /// Logits are not numbers.
    #[error(
        "the logits of sample {sample} contain NaN: the weights or the inputs are not finite, \
         or the backend's precision is too low for this checkpoint"
    )]
    NotANumber {
        /// Index of the sample in the batch.
        sample: usize,
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
