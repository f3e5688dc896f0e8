//! Images to visual tokens: exact preprocessing and vision transformers.
//!
//! [`decode`] → [`RgbImage`], and from there
//! - [`ClipPreprocessor`] → [`Pixels`] → [`to_tensor`] → [`clip::ClipVisionTower`], or
//! - [`qwen::QwenPreprocessor`] → [`qwen::PatchPixels`] → [`qwen::pack`] → [`qwen::QwenVisionTower`].

pub mod clip;
mod error;
mod geometry;
mod grid;
mod image;
mod inspect;
mod jpeg;
mod normalise;
mod orientation;
mod output;
pub mod qwen;
mod resize;

pub use clip::{ClipPreprocessor, ClipPreprocessorConfig, Pixels, to_tensor};
pub use error::VisionError;
pub use geometry::Geometry;
pub use grid::Grid;
pub use image::{DecodeLimits, RgbImage, decode};
pub use inspect::Inspected;
pub use output::VisionOutput;
pub use qwen::{PatchPixels, pack};
pub use resize::{Canvas, Window, resize_bicubic};
