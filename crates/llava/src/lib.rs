//! LLaVA-1.5 (arXiv 2310.03744) and what else is saved as `llava`: a CLIP, SigLIP or DINOv2 tower, a
//! two-layer projector, a LLaMA, Mistral or Qwen2 decoder.
//!
//! | file | what of the family |
//! |---|---|
//! | `config.rs`, `text.rs` | `config.json`, and its text model |
//! | `family.rs` | [`FamilyConfig`](reroute_family::FamilyConfig): slots, template, boxes, memory |
//! | `model.rs` | the network, [`FamilyModel`](reroute_family::FamilyModel) |
//! | `names.rs` | what checkpoints call its weights |
//! | `preprocess.rs` | images |
//! | `taps.rs` | what methods may see of the vision tower |

mod config;
mod family;
mod model;
mod names;
mod preprocess;
mod projector;
mod taps;
mod text;

pub use config::{LlavaConfig, LlavaHfConfig};
pub use family::DIALECT;
pub use model::Llava;
pub use names::NAMES;
pub use preprocess::LlavaPreprocessor;
pub use projector::Projector;
