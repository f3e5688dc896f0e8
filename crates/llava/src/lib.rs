//! LLaVA-1.5 (arXiv 2310.03744): a CLIP tower, a two-layer projector, a LLaMA decoder.

mod config;
mod error;
mod model;
mod names;
mod projector;
mod taps;

pub use config::{LlavaConfig, LlavaHfConfig};
pub use error::LlavaError;
pub use model::Llava;
pub use names::{NAMES, TIED_HEAD};
pub use projector::Projector;
