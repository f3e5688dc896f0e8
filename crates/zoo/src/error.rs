use reducers::ReducerError;
use reroute::RerouteError;
use reroute_checkpoint::{AdapterError, CheckpointError, SaveError};
use reroute_family::FamilyError;
use vision_encoder::VisionError;

/// Why a checkpoint could not be opened or a question not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZooError {
    /// The folder or its weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model could not be written; what it would have replaced is unharmed.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A model is to be saved like one of another family.
    #[error(
        "{like} describes a model of another family; save it like the folder that it was opened from"
    )]
    OtherFamily {
        /// The folder.
        like: String,
    },
    /// config.json names a family that the zoo does not have.
    #[error("config.json says model_type \"{found}\"; this zoo opens: {known}")]
    UnknownFamily {
        /// What config.json says.
        found: String,
        /// What can be opened.
        known: String,
    },
    /// config.json describes a language model, which sees nothing.
    #[error(
        "this is a language model ({found}) without a vision tower: if it is GGUF, add --mmproj FILE, the tower that \
         was published with it; a tower and a language model become one by reroute convert --assemble llava"
    )]
    LanguageModel {
        /// What config.json says.
        found: String,
    },
    /// The family: its configuration, preprocessing or prompts.
    #[error(transparent)]
    Family(FamilyError),
    /// Adapters.
    #[error(transparent)]
    Adapter(AdapterError),
    /// Images.
    #[error(transparent)]
    Vision(#[from] VisionError),
    /// Decoder or routing.
    #[error(transparent)]
    Reroute(#[from] RerouteError),
    /// Schedules.
    #[error(transparent)]
    Reducer(#[from] ReducerError),
    /// The tokenizer is broken or does not fit the model.
    #[error("tokenizer.json: {reason}; take the tokenizer that belongs to this checkpoint")]
    Tokenizer {
        /// What is wrong.
        reason: String,
        /// The tokenizer library's error, if it has one.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The chat template cannot be rendered.
    #[error(
        "the chat template {name} fails: {source}; correct it or replace it by the one published with the model"
    )]
    Template {
        /// Which file it came from.
        name: String,
        /// The template engine's error.
        source: minijinja::Error,
    },
    /// The chat template is unusable, or what it renders is.
    #[error("the chat template {name} {reason}")]
    TemplateOutput {
        /// Which file it came from.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No box in an answer that should have one.
    #[error(
        "the answer \"{answer}\" has no box in it (four numbers in brackets){}",
        if *.cut_off { "; it is cut off: allow more tokens (max_new_tokens)" } else { "" }
    )]
    NoBox {
        /// What the model said.
        answer: String,
        /// Whether it was still speaking.
        cut_off: bool,
    },
    /// Something cannot be trained.
    #[error("{what} {reason}")]
    NotTrained {
        /// What was asked for.
        what: String,
        /// Why not.
        reason: String,
    },
    /// There is not enough memory, whatever else runs.
    #[error(
        "{what} would take {:.1} MiB of memory, of {:.1} MiB that there may be: {}",
        mebibytes(*.needed), mebibytes(*.available), smaller(what)
    )]
    Memory {
        /// Bytes needed.
        needed: u64,
        /// For what.
        what: &'static str,
        /// Bytes that are left for it when nothing else runs.
        available: u64,
    },
    /// Too many requests wait.
    #[error("{waiting} requests are waiting already: ask again later, or raise max_waiting")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// No answer is asked for, or more than there may be.
    #[error("{asked} answers are asked for: a request gets 1 to {most} (max_answers)")]
    Answers {
        /// How many are asked for.
        asked: usize,
        /// How many there may be.
        most: usize,
    },
    /// Nobody asks anything.
    #[error("the last turn of a request must be the user's: it is what gets an answer")]
    Turns,
    /// What is to be gone on from is not this model's.
    #[error(
        "the past of this request is another model's: leave it out, or ask the model that left it"
    )]
    Past,
    /// A session cannot go on with what it runs.
    #[error("the running batch has failed: {reason}; ask again")]
    Session {
        /// Why.
        reason: String,
    },
    /// A reduction that looks at the question has none.
    #[error(
        "this reduction before the decoder reads the question, which prepared tensors do not have: \
         ask it instead, or use one that looks at pictures alone"
    )]
    NoQuestion,
}

/// What takes less memory.
fn smaller(what: &str) -> &'static str {
    match what {
        "the weights" => "open the model in a smaller type (f16, bf16), or raise the limit",
        _ => {
            "shorten the prompt or the answer, reduce visual tokens (a routing with a smaller budget), \
             ask for fewer answers, or raise the limit"
        }
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A file of an adapter is a file as any other.
impl From<AdapterError> for ZooError {
    fn from(error: AdapterError) -> Self {
        match error {
            AdapterError::Checkpoint(error) => Self::Checkpoint(error),
            other => Self::Adapter(other),
        }
    }
}

/// What a family passes on keeps its own kind.
impl From<FamilyError> for ZooError {
    fn from(error: FamilyError) -> Self {
        match error {
            FamilyError::Checkpoint(error) => Self::Checkpoint(error),
            FamilyError::Vision(error) => Self::Vision(error),
            FamilyError::Reroute(error) => Self::Reroute(error),
            FamilyError::Reducer(error) => Self::Reducer(error),
            other => Self::Family(other),
        }
    }
}
