//! Fine-tuning of vision-language models: a low-rank adapter, the projector, parts by name, or everything,
//! through a dense or a routed forward pass.
//!
//! [`data::read`] reads examples as people have them, [`tune`] trains: AdamW as in PyTorch, a warm-up and a
//! decay, gradients clipped together, several forward passes to a step, a validation, checkpoints from which a
//! killed run goes on with the same losses. ([`Trainer`] takes single steps, for a loop of one's own.) What it leaves is a model: [`Model::save_adapter`] writes its
//! adapter as PEFT does, [`Model::save`] all of it.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use std::path::Path;
//!
//! use burn::tensor::backend::AutodiffBackend;
//! use reroute_finetune::data::{OnBadLine, read};
//! use reroute_finetune::{Course, Event, Run, Settings, tune};
//! use reroute_zoo::{AdapterConfig, Vlm};
//!
//! fn tuned<B: AutodiffBackend>(vlm: Vlm<B>) -> Result<Vlm<B>, Box<dyn std::error::Error>> {
//!     let data = read(Path::new("train.jsonl"), Path::new("images"), OnBadLine::Stop)?;
//!     let settings = Settings {
//!         adapter: Some(AdapterConfig::new(["q_proj", "v_proj"], 16)),
//!         trained: Vec::new(),
//!         routings: vec!["dense".into(), "reroute-pdrop@128".into()],
//!         course: Course { steps: 500, accumulate: 8, ..Course::default() },
//!         optimizer: Default::default(),
//!     };
//!     let run = Run {
//!         settings: &settings,
//!         examples: &data.examples,
//!         validation: &[],
//!         skips: false,
//!         folder: Path::new("run"),
//!         resume: true,
//!     };
//!     let vlm = tune(vlm, &run, &mut |event| {
//!         if let Event::Step(step) = event {
//!             println!("{} {:.4}", step.step, step.loss);
//!         }
//!         ControlFlow::Continue(())
//!     })?;
//!     vlm.model().save_adapter("adapter")?;
//!     Ok(vlm)
//! }
//! ```
//!
//! [`Model::save_adapter`]: reroute_zoo::Model::save_adapter
//! [`Model::save`]: reroute_zoo::Model::save

mod begun;
mod calibrate;
pub mod data;
mod error;
mod feed;
mod gradients;
mod host;
mod log;
mod notation;
mod peers;
mod prepare;
mod run;
mod settings;
mod state;
mod trainer;

pub use calibrate::{Calibration, Fitted, Fitting, calibrate};
pub use error::TuneError;
pub use gradients::clip;
pub use log::{Line, Step, Validation};
pub use peers::{Alone, Peers};
#[cfg(feature = "collective")]
pub use peers::{Collective, tune_by_threads};
pub use prepare::{Preparation, Sought};
pub use run::{Event, Run, Watch, tune, tune_among};
pub use settings::{Course, Decay, OptimizerSettings, Settings};
pub use trainer::{Pass, Trainer};
