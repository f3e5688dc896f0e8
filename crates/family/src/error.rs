use reducers::ReducerError;
use reroute::RerouteError;
use reroute_checkpoint::CheckpointError;
use vision_encoder::{Grid, VisionError};

use crate::Modality;

/// What can go wrong in configuring or running a model of a family.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FamilyError {
    /// config.json asks for something that the family does not do, or contradicts itself.
    #[error("config.json: {0}")]
    Config(String),
    /// The folder or a file of it.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A grid cannot be merged into visual tokens.
    #[error(
        "a grid of {}×{}×{} patches (time, height, width) gives no whole number of visual tokens: \
         height and width must be positive multiples of {merge} (spatial_merge_size)",
        .grid.t, .grid.h, .grid.w
    )]
    Grid {
        /// The grid.
        grid: Grid,
        /// Patches that become one token, along each side.
        merge: usize,
    },
    /// Slots and grid of one image, video or video frame differ.
    #[error(
        "the prompt has {slots} {modality} slots in a row from row {row} on, where an input of {tokens} visual \
         tokens stands: repeat each slot once per visual token, inputs in order of appearance"
    )]
    Slots {
        /// Of what.
        modality: Modality,
        /// Row of the first slot.
        row: usize,
        /// Slots found, at most `tokens`.
        slots: usize,
        /// Visual tokens of the input.
        tokens: usize,
    },
    /// The prompt has slots beyond the last input.
    #[error(
        "the prompt has {modality} slots from row {row} on for which there is no {modality}: \
         write one placeholder per {modality}"
    )]
    TooManySlots {
        /// Of what.
        modality: Modality,
        /// Row of the first slot.
        row: usize,
    },
    /// Inputs without slots.
    #[error(
        "the prompt has too few {modality} slots for {given} given: write one placeholder per {modality}"
    )]
    TooFewSlots {
        /// Of what.
        modality: Modality,
        /// Images or videos given.
        given: usize,
    },
    /// The durations of video patches are not one finite number per video.
    #[error(
        "second_per_grid_ts is {given:?} for {videos} videos: give the seconds that one temporal patch \
         lasts, finite and not negative, once per video, or none at all (1 second)"
    )]
    SecondsPerGrid {
        /// As given.
        given: Vec<f32>,
        /// Number of videos.
        videos: usize,
    },
    /// Visual tokens are of other inputs than the prompt's.
    #[error(
        "the prompts have {slots} {modality} slots but the {modality}s give {tokens} visual tokens: \
         write each slot once per visual token, and run the tower on the {modality}s of these prompts, in \
         order of appearance"
    )]
    VisualTokens {
        /// Of what.
        modality: Modality,
        /// Slots in all prompts.
        slots: usize,
        /// Visual tokens given.
        tokens: usize,
    },
    /// Visual tokens of two models cannot be joined.
    #[error(
        "visual tokens of another width, type or number of DeepStack layers cannot follow these: take both from \
         the same model"
    )]
    OtherTokens,
    /// Samples and what a reduction kept of them are not the same in number.
    #[error("{samples} samples come with the rows kept of {kept}: give one for each")]
    Samples {
        /// Samples.
        samples: usize,
        /// Entries of rows kept.
        kept: usize,
    },
    /// A family gives positions of other axes than its decoder turns by.
    #[error("positions have {found} axes, the decoder's rotary positions have {expected}")]
    Axes {
        /// As given.
        found: usize,
        /// What the decoder has.
        expected: usize,
    },
    /// What a tower shows does not belong together.
    #[error("the vision tower shows {shown} tokens of pictures that have {tokens}")]
    Look {
        /// Columns of its features.
        shown: usize,
        /// Tokens by the grids.
        tokens: usize,
    },
    /// A reduction reads the question of every picture, and they are not as many.
    #[error("{questions} questions were given for {pictures} pictures: give one for each")]
    Questions {
        /// Questions.
        questions: usize,
        /// Images, or videos.
        pictures: usize,
    },
    /// The model has never seen a video.
    #[error("this model takes images only, no videos; give single frames as images")]
    NoVideos,
    /// Pixels in a form that another tower takes.
    #[error("the pixels are {given}, this model takes {wanted}")]
    WrongPixels {
        /// What was given.
        given: &'static str,
        /// What the model takes.
        wanted: &'static str,
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
    /// An option that has no meaning for the model.
    #[error("{option} is not for this model, which {instead}; leave it out")]
    Option {
        /// The option.
        option: &'static str,
        /// What this model does.
        instead: &'static str,
    },
    /// A bound of no pixels.
    #[error("max_pixels is 0: a picture has one pixel at least")]
    NoPixels,
    /// A video without a frame rate has no times.
    #[error("{fps} is no frame rate: times in the video need frames per second, greater than zero")]
    FrameRate {
        /// Frames per second.
        fps: f64,
    },
    /// Vision tower or preprocessing.
    #[error(transparent)]
    Vision(#[from] VisionError),
    /// Decoder or routing.
    #[error(transparent)]
    Reroute(#[from] RerouteError),
    /// A method of reduction.
    #[error(transparent)]
    Reducer(#[from] ReducerError),
}
