//! The routed decoder: one LLaMA-style decoder for every family, and the stage executor that sends
//! only the selected visual tokens through its layers.
//!
//! - [`Decoder`]: blocks, [`KvCache`] with a length of its own per layer, rotary positions from
//!   explicit position tensors, grouped-query attention.
//! - [`Router`]: at each decision layer of a [`reducers::Schedule`], scores the candidates with one
//!   query row, selects, and parks the deferred rows untouched so that they stand again at the next
//!   decision (Reroute, arXiv 2606.12412) or forgets them (FastV, PyramidDrop).
//! - [`generate`]: greedy and sampled generation with streaming.
//!
//! Activations are feature-major and packed, see [`reroute_layers`]: `[hidden_size, rows]`, the rows of all
//! samples side by side, no padding anywhere.

mod attention;
mod block;
mod cache;
mod config;
mod decision;
mod decoder;
mod drift;
mod error;
mod generate;
mod host;
mod kv_error;
mod pool;
mod prefill;
mod prompt;
mod recompute;
mod rope;
mod router;
mod sampling;
mod shortcut;
mod trace;

pub use attention::SelfAttention;
pub use block::{DecoderLayer, Mlp};
pub use cache::KvCache;
pub use config::{DecoderConfig, MAX_HEAD_DIM};
pub use decoder::{Decoder, check_kv_type};
pub use drift::Drift;
pub use error::{Place, RerouteError};
pub use generate::{Batch, Chosen, FinishReason, Generation, GenerationOptions, Step, generate};
pub use kv_error::KvError;
pub use prefill::{HiddenStates, Prefill, PrefillOptions, Prefilling};
pub use prompt::{KeptRows, Prompt, SampleLayout, interleave};
pub use recompute::Kept;
pub use rope::{RopeConfig, RopeDefaults, RopeError, RopeFields, RopeReading, RopeScaling};
pub use router::{Routed, Router};
pub use sampling::{Sampler, SamplingOptions, TokenLogprobs};
pub use shortcut::{Shortcut, Shortcuts, Waited};
pub use trace::{Decision, RoutingTrace};
