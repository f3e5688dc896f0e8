//! The vision transformers of Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and
//! Qwen3-VL (arXiv 2511.21631): images and videos of any size, packed side by side.
//!
//! One tower serves the three. Its parameters have one set of names, whatever the checkpoint says:
//! `patch_embed`, `pos_embed`, `blocks.{}.{norm1,attn.qkv,attn.proj,norm2}`,
//! `blocks.{}.mlp.{gate,fc1,fc2}` and, of each merger, `norm`, `fc1` and `fc2`.

mod arrangement;
mod block;
mod config;
mod merger;
mod norm;
mod position;
mod preprocess;
mod smart_resize;
mod tower;

pub use config::{QwenGeneration, QwenTowerConfig, QwenVisionConfig, WindowConfig};
pub use preprocess::{
    DEFAULT_MAX_PIXELS, PatchPixels, QwenPreprocessor, QwenPreprocessorConfig, pack,
};
pub use tower::QwenVisionTower;
