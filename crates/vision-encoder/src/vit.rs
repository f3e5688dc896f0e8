//! Plain vision transformers, as LLaVA uses them: one tower for CLIP (arXiv 2103.00020), SigLIP
//! (arXiv 2303.15343) and DINOv2 (arXiv 2304.07193).

mod config;
mod position;
mod preprocess;
mod tower;

pub use config::{VitActivation, VitConfig, VitHfConfig, VitKind};
pub use preprocess::{Pixels, VitPreprocessor, VitPreprocessorConfig, to_tensor};
pub use tower::{VitLayer, VitTower};
