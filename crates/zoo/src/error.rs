use llava::LlavaError;
use qwen_vl::QwenVlError;
use reducers::ReducerError;
use reroute::RerouteError;
use reroute_checkpoint::CheckpointError;
use vision_encoder::VisionError;

/// Why a checkpoint could not be opened or a question not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZooError {
    /// The folder or its weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// config.json names a family that the zoo does not have.
    #[error("config.json says model_type \"{found}\"; this zoo opens: {known}")]
    UnknownFamily {
        /// What config.json says.
        found: String,
        /// What can be opened.
        known: &'static str,
    },
    /// LLaVA.
    #[error(transparent)]
    Llava(#[from] LlavaError),
    /// Qwen-VL.
    #[error(transparent)]
    Qwen(#[from] QwenVlError),
    /// LLaVA has never seen a video.
    #[error("this model takes images only, no videos; give single frames as images")]
    NoVideos,
    /// Pixel tensors of another family.
    #[error("the pixels are {given}, this model takes {wanted}")]
    WrongPixels {
        /// What was given.
        given: &'static str,
        /// What the model takes.
        wanted: &'static str,
    },
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
    /// The preprocessor cannot make what the model wants.
    #[error(
        "preprocessor_config.json makes {made} pixel images, the vision tower wants {wanted}: the files do not belong together"
    )]
    ImageSize {
        /// Size the preprocessor makes.
        made: String,
        /// Size the tower wants.
        wanted: String,
    },
    /// A video without a frame rate has no times.
    #[error("{fps} is no frame rate: times in the video need frames per second, greater than zero")]
    FrameRate {
        /// Frames per second.
        fps: f64,
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
    /// An option that has no meaning for the model.
    #[error("{option} is for {meant} models, this one {instead}; leave it out")]
    Option {
        /// The option.
        option: &'static str,
        /// The family that it is for.
        meant: &'static str,
        /// What this model does.
        instead: &'static str,
    },
    /// A bound of no pixels.
    #[error("max_pixels is 0: a picture has one pixel at least")]
    NoPixels,
    /// A reduction that looks at the question has none.
    #[error(
        "this reduction before the decoder reads the question, which prepared tensors do not have: \
         ask it instead, or use one that looks at pictures alone"
    )]
    NoQuestion,
}
