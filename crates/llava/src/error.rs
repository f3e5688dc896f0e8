use reroute::RerouteError;
use vision_encoder::VisionError;

/// What can go wrong in building or running LLaVA.
#[derive(Debug, thiserror::Error)]
pub enum LlavaError {
    /// config.json asks for something that this model does not do, or contradicts itself.
    #[error("config.json: {0}")]
    Config(String),
    /// The prompt has another number of image slots than there are visual tokens.
    #[error(
        "the prompts have {slots} image slots but the images give {visual} visual tokens \
         ({per_image} per image): write one <image> slot per image, in the same order"
    )]
    ImageSlots {
        /// Slots in all prompts.
        slots: usize,
        /// Visual tokens of all images.
        visual: usize,
        /// Visual tokens of one image.
        per_image: usize,
    },
    /// Vision tower or preprocessing.
    #[error(transparent)]
    Vision(#[from] VisionError),
    /// Decoder or routing.
    #[error(transparent)]
    Reroute(#[from] RerouteError),
}
