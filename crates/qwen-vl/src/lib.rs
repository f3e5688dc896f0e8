//! Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631): a vision
//! tower for images of any size and videos, M-RoPE positions over (time, height, width), and, in
//! Qwen3-VL, DeepStack features for the first decoder layers.

mod config;
mod error;
mod model;
mod names;
mod positions;
mod taps;

pub use config::{QwenVlConfig, QwenVlHfConfig};
pub use error::QwenVlError;
pub use model::{QwenSample, QwenVl};
pub use names::{NAMES, TIED_HEAD, file_name};
pub use positions::{Modality, MropePositions};
