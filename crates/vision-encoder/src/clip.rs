//! The CLIP vision transformer (arXiv 2103.00020), as LLaVA uses it.

mod config;
mod preprocess;
mod tower;

pub use config::{ClipConfig, ClipVisionConfig};
pub use preprocess::{ClipPreprocessor, ClipPreprocessorConfig, Pixels, to_tensor};
pub use tower::{ClipLayer, ClipVisionTower};
