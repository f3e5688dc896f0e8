//! The CLIP vision transformer (arXiv 2103.00020), as LLaVA uses it.

mod config;
mod tower;

pub use config::{ClipConfig, ClipVisionConfig};
pub use tower::{ClipLayer, ClipVisionTower};
