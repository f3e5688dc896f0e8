//! The front door: open any checkpoint folder, ask about images, get text, boxes and a trace.
//!
//! ```no_run
//! use reducers::presets;
//! use reroute::GenerationOptions;
//! use vision_encoder::{DecodeLimits, decode};
//! use reroute_zoo::{Folder, OpenOptions, Question, Vlm};
//!
//! fn answer<B: burn::tensor::backend::Backend>(device: &B::Device) -> Result<String, Box<dyn std::error::Error>> {
//!     let folder = Folder::open("llava-1.5-7b-hf")?;
//!     let vlm = Vlm::<B>::open(&folder, &OpenOptions::default(), device)?;
//!     let image = decode(&std::fs::read("photo.jpg")?, &DecodeLimits::default())?;
//!     let question = Question::about(vec![image], "What is this?");
//!     let schedule = presets::find("reroute-pdrop@192")?.schedule(vlm.decoder_config().num_layers)?;
//!     let options = GenerationOptions { max_new_tokens: 64, ..vlm.generation_defaults() };
//!     Ok(vlm.ask(&question, &schedule, &options, |_| {})?.text)
//! }
//! ```
//!
//! Fine-tuning through a routed prefill: a [`Model`] is a Burn [`Module`](burn::module::Module), and
//! [`Vlm::logits`] are those behind each token of a known answer.
//!
//! ```
//! use burn::optim::{GradientsParams, Optimizer};
//! use burn::tensor::activation::log_softmax;
//! use burn::tensor::backend::AutodiffBackend;
//! use burn::tensor::{Int, Tensor};
//! use reducers::Schedule;
//! use reroute_zoo::{Model, Question, Vlm, ZooError};
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

mod answer;
mod checkup;
mod conversation;
mod dialect;
mod error;
mod family;
pub mod grounding;
mod memory;
pub mod messages;
mod reduction;
mod routing;
mod template;
mod tensors;
mod tokenizer;
mod training;
mod visual;
mod vlm;

pub use answer::{Answer, Question, Timings};
pub use checkup::{Checkup, Outline, Parameters, Part, Problem};
pub use conversation::Conversation;
pub use dialect::Dialect;
pub use error::ZooError;
pub use family::{Model, ModelConfig};
pub use grounding::Grounding;
pub use memory::{Memory, Numbers, Picture};
pub use reduction::Kept;
pub use reroute_checkpoint::Folder;
pub use routing::{EncoderStep, Routing};
pub use template::ChatTemplate;
pub use tensors::{TensorInputs, TensorOutputs};
pub use tokenizer::{TextStream, Tokenizer};
pub use visual::{
    Leftover, PixelTensors, Prepared, Preprocessor, Video, VideoTime, View, Visual, VisualTokens,
};
pub use vlm::{OpenOptions, Vlm};
