//! Images to visual tokens: exact preprocessing and vision transformers.
//!
//! [`decode`] → [`RgbImage`], and from there
//! - [`VitPreprocessor`] → [`Pixels`] → [`to_tensor`] → [`vit::VitTower`], or
//! - [`qwen::QwenPreprocessor`] → [`qwen::PatchPixels`] → [`qwen::pack`] → [`qwen::QwenVisionTower`].

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
pub mod vit;

pub use error::VisionError;
pub use geometry::Geometry;
pub use grid::Grid;
pub use image::{DecodeLimits, RgbImage, decode};
pub use inspect::Inspected;
pub use output::VisionOutput;
pub use qwen::{PatchPixels, pack};
pub use resize::{Canvas, Resample, Window, resize, resize_bicubic};
pub use vit::{Pixels, VitPreprocessor, VitPreprocessorConfig, to_tensor};
