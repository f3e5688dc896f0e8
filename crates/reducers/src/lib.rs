//! Which visual tokens matter.
//!
//! A vision-language model turns one photo into hundreds of *visual tokens*, and every decoder
//! layer works on all of them although the answer hangs on a few. A **reducer** decides which
//! tokens the layers work on. It can do so in two places:
//!
//! - *before the decoder*: [`encoder`], an [`encoder::EncoderReducer`] makes fewer tokens of a picture;
//! - *in the decoder*: a [`Schedule`] of decisions, each at a *decision layer*, whose [`Scorer`] ranks
//!   the candidates, whose [`Keep`] says how many go on ([`top_k`]: the highest scores, lower index
//!   first among equals), and whose [`Action`] says what becomes of the rest.
//!
//! A [`Plan`] is either or both, and [`presets`] is the registry of published ones and of their
//! budget-matched corrections. *Remove* forgets the losers: FastV (arXiv 2403.06764) decides once,
//! PyramidDrop (arXiv 2410.17247) several times, each time among those kept. *Reroute* (arXiv
//! 2606.12412) lets the losers bypass the layers of one stage with their hidden states frozen and asks
//! again at the next decision, so that a token dismissed early can come back; SwiftVLM (arXiv
//! 2602.03134) proposed the same bypass before it, and Mixture-of-Depths (arXiv 2404.02258) is the
//! trained ancestor of both.
//!
//! [`budget`] solves for keep ratios that hit a budget at any depth, and [`cost`] counts what a
//! schedule costs in floating-point operations and cache bytes. Nothing in this crate knows a decoder
//! or a file, and nothing in it prints.
//!
//! ```
//! use reducers::presets;
//!
//! let schedule = presets::find("reroute-pdrop@192")?.schedule(32)?;
//! assert_eq!(schedule.keep_counts(576), [259, 259, 129, 64]);
//! assert_eq!(format!("{:.2}", schedule.average_tokens(32, 576)), "191.47");
//! # Ok::<(), reducers::ReducerError>(())
//! ```
//!
//! # A method of one's own
//!
//! A rule is one function. Counts, positions, batches, compaction and the budget are not its
//! business: what it returns is checked. This one keeps, before the decoder, the tokens with the
//! longest features; in the decoder it ranks candidates by how far they are from the mean of all.
//!
//! ```
//! use burn::tensor::{Tensor, backend::Backend};
//! use reducers::encoder::{EncoderReducer, EncoderShape, Reduction, Seen, Tap};
//! use reducers::{DecisionView, ReducerError, Scorer, top_k};
//!
//! struct Longest;
//!
//! impl<B: Backend> EncoderReducer<B> for Longest {
//!     fn needs(&self, _: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
//!         Ok(vec![Tap::Features])
//!     }
//!
//!     fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
//!         let features = seen.get(Tap::Features)?;
//!         let lengths = (features.clone() * features).sum_dim(0).into_data();
//!         let lengths: Vec<f32> = lengths.iter().collect();
//!         Ok(Reduction::selection(top_k(&lengths, keep)?))
//!     }
//! }
//!
//! struct Unusual;
//!
//! impl<B: Backend> Scorer<B> for Unusual {
//!     fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
//!         let rows = view.hidden_states();
//!         let from_mean = rows.clone() - rows.mean_dim(1);
//!         Ok((from_mean.clone() * from_mean).sum_dim(0).squeeze_dim(0))
//!     }
//! }
//! ```
//!
//! They are used through `reroute_zoo::Routing { encoder, schedule, scorer }`, where a plan's own would stand.

mod about;
pub mod budget;
pub mod cost;
mod device;
pub mod encoder;
pub mod error;
pub mod keep;
mod kv;
pub mod plan;
pub mod presets;
pub mod schedule;
pub mod score;
pub mod topk;

pub use about::{About, Support};
pub use budget::Profile;
pub use cost::{Cost, DecoderShape};
pub use error::ReducerError;
pub use keep::Keep;
pub use kv::KvType;
pub use plan::{EncoderPlan, Plan, Rest};
pub use presets::{Method, Preset};
pub use schedule::{Action, HiddenLayout, Positions, Schedule, ScoreMemory, Stage, Waiting};
pub use score::{
    Attention, DecisionRows, DecisionView, Duplication, Embedded, HeadReduce, Heads, Query, Random,
    Score, ScoreDtype, ScoreLayer, Scorer, SoftmaxKeys, last_row_scores,
};
pub use topk::top_k;
