//! Which visual tokens matter.
//!
//! A vision-language model turns one photo into hundreds of *visual tokens*, and every decoder
//! layer works on all of them although the answer hangs on a few. A **reducer** decides, at a few
//! *decision layers*, which visual tokens the layers from there on work on. It is made of four
//! small parts, and each is a file here:
//!
//! 1. a **score** for every candidate: how much the last prompt row attends to it
//!    ([`last_row_scores`]);
//! 2. a **keep count** for every decision: a share of the original visual tokens, or a number
//!    ([`Keep`]);
//! 3. a **selection**: the highest scores, lower index first among equals ([`top_k`]);
//! 4. a **schedule**: at which layers to decide, how many to keep, and what becomes of the rest
//!    ([`Schedule`]).
//!
//! What becomes of the rest is the [`Action`], and it is the difference between the families.
//! *Remove* forgets the losers: FastV (arXiv 2403.06764) decides once, PyramidDrop (arXiv
//! 2410.17247) several times, each time among the survivors. *Reroute* (arXiv 2606.12412) lets the
//! losers bypass the layers of one stage with their hidden states frozen and asks again at the next
//! decision, so that a token dismissed early can come back; SwiftVLM (arXiv 2602.03134) proposed
//! the same bypass before it, and Mixture-of-Depths (arXiv 2404.02258) is the trained ancestor of
//! both.
//!
//! Around these parts: [`presets`] names the published schedules and their budget-matched
//! corrections, [`budget`] solves for keep ratios that hit a budget at any depth, and [`cost`]
//! counts what a schedule costs in floating-point operations and cache bytes. Nothing in this crate
//! knows a decoder or a file, and nothing in it prints.
//!
//! ```
//! use reducers::presets;
//!
//! let schedule = presets::find("reroute-pdrop@192")?.schedule(32)?;
//! assert_eq!(schedule.keep_counts(576), [259, 259, 129, 64]);
//! assert_eq!(format!("{:.2}", schedule.average_tokens(32, 576)), "191.47");
//! # Ok::<(), reducers::ReducerError>(())
//! ```

mod about;
pub mod budget;
pub mod cost;
pub mod encoder;
pub mod error;
pub mod keep;
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
pub use plan::{EncoderPlan, Plan, Rest};
pub use presets::{Method, Preset};
pub use schedule::{Action, Layout, Positions, Schedule, Stage};
pub use score::{
    Attention, Duplication, Embedded, HeadReduce, Query, Random, Score, ScoreDtype, ScoreLayer,
    Scorer, SoftmaxKeys, Standing, last_row_scores,
};
pub use topk::top_k;
