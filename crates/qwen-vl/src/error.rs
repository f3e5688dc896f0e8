use reroute::RerouteError;
use vision_encoder::VisionError;
use vision_encoder::qwen::Grid;

use crate::Modality;

/// What can go wrong in building or running Qwen-VL.
#[derive(Debug, thiserror::Error)]
pub enum QwenVlError {
    /// config.json asks for something that this model does not do, or contradicts itself.
    #[error("config.json: {0}")]
    Config(String),
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
    /// Inputs are left over.
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
    /// Vision features are of other inputs than the prompt's.
    #[error(
        "the prompts have {slots} {modality} slots but the vision tower gave {tokens} visual tokens: \
         run it on the {modality}s of these prompts, in order of appearance"
    )]
    VisualTokens {
        /// Of what.
        modality: Modality,
        /// Slots in all prompts.
        slots: usize,
        /// Visual tokens given.
        tokens: usize,
    },
    /// Vision tower or preprocessing.
    #[error(transparent)]
    Vision(#[from] VisionError),
    /// Decoder or routing.
    #[error(transparent)]
    Reroute(#[from] RerouteError),
}
