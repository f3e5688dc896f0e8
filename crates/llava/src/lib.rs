//! LLaVA-1.5 (arXiv 2310.03744): a CLIP tower, a two-layer projector, a LLaMA decoder.
//!
//! | file | what of the family |
//! |---|---|
//! | `config.rs` | `config.json` |
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

pub use config::{LlavaConfig, LlavaHfConfig};
pub use family::DIALECT;
pub use model::Llava;
pub use names::NAMES;
pub use preprocess::LlavaPreprocessor;
pub use projector::Projector;
