//! Images to visual tokens: exact preprocessing and vision transformers.
//!
//! [`decode`] → [`RgbImage`], and from there
//! - [`ClipPreprocessor`] → [`Pixels`] → [`to_tensor`] → [`clip::ClipVisionTower`], or
//! - [`qwen::QwenPreprocessor`] → [`qwen::QwenPixels`] → [`qwen::pack`] → [`qwen::QwenVisionTower`].

pub mod clip;
mod error;
mod geometry;
mod image;
mod inspect;
mod normalise;
pub mod qwen;
mod resize;

pub use clip::{ClipPreprocessor, ClipPreprocessorConfig, Pixels, to_tensor};
pub use error::VisionError;
pub use geometry::Geometry;
pub use image::{DecodeLimits, RgbImage, decode};
pub use inspect::Inspected;
pub use resize::{Canvas, Window, resize_bicubic};
