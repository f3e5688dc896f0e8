//! The one crate to depend on: open any checkpoint folder, ask about images, get text, boxes and a trace.
//!
//! ```no_run
//! use reroute_zoo::{DecodeLimits, Folder, OpenOptions, Question, Vlm, decode};
//!
//! fn answer<B: burn::tensor::backend::Backend>(device: &B::Device) -> Result<String, Box<dyn std::error::Error>> {
//!     let folder = Folder::open("llava-1.5-7b-hf")?;
//!     let vlm = Vlm::<B>::open(&folder, &OpenOptions::default(), device)?;
//!     let image = decode(&std::fs::read("photo.jpg")?, &DecodeLimits::default())?;
//!     let question = Question::about(vec![image], "What is this?");
//!     let plan = vlm.plan("reroute-pdrop@192")?;
//!     Ok(vlm.ask(&question, &plan, &vlm.generation_defaults(), |_| {})?.text)
//! }
//! ```
//!
//! `B` is any backend of Burn; [`backend`] names those that the features of this crate bring, each with
//! what makes it fast. What lies below is re-exported whole: [`burn`], [`vision_encoder`], [`reducers`]
//! (methods, schedules, rules of one's own), [`reroute`] (the routed decoder), [`reroute_family`] (what a
//! family implements), [`llava`] and [`qwen_vl`].
//!
//! Those who embed the library see what it does in [`tracing`](https://docs.rs/tracing) spans: `loading`,
//! `saving`, `vision`, `prefill` (samples, rows), each `decision` (layer, candidates, kept), `decode`.
//!
//! Fine-tuning through a routed prefill: a [`Model`] is a Burn [`Module`](burn::module::Module), and
//! [`Vlm::logits`] are those behind each token of a known answer.
//!
//! ```
//! use burn::optim::{GradientsParams, Optimizer};
//! use burn::tensor::activation::log_softmax;
//! use burn::tensor::backend::AutodiffBackend;
//! use burn::tensor::{Int, Tensor};
//! use reroute_zoo::{Model, Question, Schedule, Vlm, ZooError};
//!
//! /// One step towards an answer; also the loss before it.
//! fn step<B: AutodiffBackend>(
//!     vlm: Vlm<B>,
//!     optimizer: &mut impl Optimizer<Model<B>, B>,
//!     question: &Question,
//!     answer: &str,
//!     schedule: &Schedule,
//! ) -> Result<(Vlm<B>, Tensor<B, 1>), ZooError> {
//!     let mut ids = vlm.tokenizer().encode(answer, false)?;
//!     let known = ids.clone();
//!     ids.extend(vlm.generation_defaults().stop_tokens.first());
//!     let logits = vlm.logits(question, &known, schedule)?.slice([0..ids.len()]);
//!     let expected: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
//!     let expected = Tensor::<B, 1, Int>::from_data(expected.as_slice(), vlm.device());
//!     let loss = -log_softmax(logits, 1).gather(1, expected.unsqueeze_dim(1)).mean();
//!     let gradients = GradientsParams::from_grads(loss.backward(), vlm.model());
//!     Ok((vlm.map_model(|model| optimizer.step(1e-4, model, gradients)), loss))
//! }
//! ```
//!
//! What has been learnt is written by [`Model::save`], as a folder that transformers and [`Vlm::open`] read:
//!
//! ```no_run
//! # fn save<B: burn::tensor::backend::Backend>(vlm: &reroute_zoo::Vlm<B>) -> Result<(), reroute_zoo::ZooError> {
//! use reroute_zoo::{Folder, SaveOptions};
//!
//! let folder = Folder::open("llava-1.5-7b-hf")?;
//! vlm.model().save("llava-of-mine", &folder, &SaveOptions::default())?;
//! # Ok(())
//! # }
//! ```
//!
//! To train less than everything, [`Model::adapt`] puts a low-rank adapter beside the weights and freezes
//! them; [`Model::save_adapter`] and [`Model::load_adapter`] keep it as PEFT does.

mod adapters;
mod answer;
pub mod backend;
mod checkup;
mod conversation;
#[cfg(feature = "embedded")]
pub mod embedded;
mod end_tokens;
mod error;
mod families;
pub mod grounding;
pub mod messages;
pub mod natural;
mod routing;
mod save;
pub mod session;
mod template;
mod tensors;
mod tokenizer;
mod told;
mod training;
mod vlm;
mod weights;

pub use answer::{Answer, Question, Timings};
pub use checkup::{Checkup, Outline, Parameters, Part, Problem};
pub use conversation::Conversation;
pub use error::ZooError;
pub use families::{Model, ModelConfig, model_types};
pub use grounding::Grounding;
pub use reducers::{KvType, Plan, Schedule, presets};
pub use reroute::{FinishReason, GenerationOptions, SamplingOptions, TokenLogprobs};
pub use reroute_checkpoint::{AdapterConfig, AdapterError, Folder, SaveError, Saved, Targets};
pub use reroute_family::{
    Arithmetic, Dialect, EncoderStep, FamilyConfig, FamilyError, FamilyModel, ImageOptions,
    KeptTokens, KeptVisuals, Memory, Modality, ModelType, Picture, Pictures, PixelTensors,
    Prepared, Preprocessor, Sample, Video, VideoTime, View, Visual, VisualTokens,
};
pub use reroute_layers::CodeFormat;
pub use routing::Routing;
pub use save::SaveOptions;
pub use template::ChatTemplate;
pub use tensors::{TensorInputs, TensorOutputs};
pub use tokenizer::{TextStream, Tokenizer};
pub use told::{StageStates, TokenState};
pub use training::{AnswerLogits, Lesson, Trained, Tutor};
pub use vision_encoder::{DecodeLimits, RgbImage, decode};
pub use vlm::{OpenOptions, SHORTCUTS, Vlm};
pub use weights::Weights;

pub use burn;
pub use families::crates::*;
pub use reducers;
pub use reroute;
pub use reroute_checkpoint;
pub use reroute_family;
pub use vision_encoder;
