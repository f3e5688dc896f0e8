//! Images to visual tokens: exact preprocessing and vision transformers.
//!
//! [`decode`] → [`RgbImage`] → [`ClipPreprocessor`] → [`Pixels`] → [`to_tensor`] →
//! [`clip::ClipVisionTower`].

pub mod clip;
mod error;
mod image;
mod preprocess;
pub mod qwen;
mod resize;

pub use error::VisionError;
pub use image::{DecodeLimits, RgbImage, decode};
pub use preprocess::{ClipPreprocessor, ClipPreprocessorConfig, Pixels, to_tensor};
pub use resize::{Canvas, Window, resize_bicubic};
