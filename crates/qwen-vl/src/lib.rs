//! Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631): one tower,
//! one decoder, three generations.
//!
//! | file | what of the family |
//! |---|---|
//! | `config.rs` | `config.json` |
//! | `family.rs` | [`FamilyConfig`](reroute_family::FamilyConfig): slots, template, boxes, memory |
//! | `model.rs` | the network, [`FamilyModel`](reroute_family::FamilyModel) |
//! | `names.rs` | what checkpoints call its weights |
//! | `positions.rs` | M-RoPE |
//! | `preprocess.rs` | images and videos |
//! | `taps.rs` | what methods may see of the vision tower |

mod config;
mod family;
mod model;
mod names;
mod positions;
mod preprocess;
mod taps;

pub use config::{QwenVlConfig, QwenVlHfConfig};
pub use family::{QWEN2_DIALECT, QWEN3_DIALECT};
pub use model::QwenVl;
pub use names::NAMES;
pub(crate) use names::file_name;
pub use preprocess::{QwenVlPreprocessor, patch_seconds};
