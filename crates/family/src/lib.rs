//! What a family of vision-language models is: two traits that its crate implements, and whatever all
//! families share, written once.
//!
//! - [`FamilyConfig`]: what is known before a weight is read: the decoder, the vision tower as methods
//!   see it, names of weights, preprocessing, chat template, slots, positions, boxes, memory.
//! - [`FamilyModel`]: the network: what the tower shows of pictures, the projector, the decoder.
//!
//! On them stand [`see`], visual tokens of every picture, reduced or not, and [`prompt`], packed rows
//! of any samples. `docs/adding-a-family.md` walks through a new family.

mod dialect;
mod error;
mod family;
mod grounding;
mod memory;
mod pixels;
mod prompt;
mod reduction;
mod see;
mod taps;
mod visual;

pub use dialect::Dialect;
pub use error::FamilyError;
pub use family::{FamilyConfig, FamilyModel, Look, ModelType, SlotTokens};
pub use grounding::{
    BoundingBox, BoxNotation, BoxUnits, GroundingFormat, Named, Place, parse_box, parse_places,
};
pub use memory::{Arithmetic, LayerMemory, Memory, Picture};
pub use pixels::{Pictures, PixelTensors};
pub use prompt::{Modality, RowPositions, Sample, kept_rows, prompt};
pub use reduction::{EncoderStep, KeptTokens, KeptVisuals};
pub use see::{VisualTokens, see};
pub use taps::{MeanHidden, received_layers};
pub use visual::{ImageOptions, Prepared, Preprocessor, Video, VideoTime, View, Visual};
