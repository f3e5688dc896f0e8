//! Measures a model under several routings: RefCOCO, RefCOCO+, RefCOCOg, POPE, GQA and TextVQA as lmms-eval's
//! organisation lays them out in Parquet files, or lines of JSON of one's own.
//!
//! [`Data::open`] reads questions and answers, [`run()`] asks them in one running batch and leaves a record of every
//! sample, [`summaries`] makes numbers of records, with intervals by a paired bootstrap over pictures, and
//! [`report::write`] tables and a plot. [`merge()`] joins what shards have left.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use std::path::Path;
//!
//! use reroute_eval::{Data, GroundingPrompt, OnError, Reckoning, Settings, Shard, Task, report, run, summaries};
//! use reroute_zoo::Vlm;
//!
//! fn measure<B: burn::tensor::backend::Backend>(vlm: &Vlm<B>) -> Result<String, Box<dyn std::error::Error>> {
//!     let data = Data::open(Task::RefCoco, "val", Path::new("RefCOCO"))?;
//!     let named = |name: &str| Ok::<_, reroute_zoo::ZooError>((name.to_string(), vlm.plan(name)?));
//!     let settings = Settings {
//!         routings: vec![named("dense")?, named("fastv@128")?, named("reroute-fastv@128")?],
//!         limit: Some(500),
//!         shard: Shard::default(),
//!         prompt: GroundingPrompt::Family,
//!         max_new_tokens: None,
//!         batch: 8,
//!         on_error: OnError::Stop,
//!         resume: true,
//!         model: "llava-1.5-7b-hf, bf16".into(),
//!     };
//!     let records = run(vlm, &data, &settings, Path::new("refcoco-val"), &mut |_| ControlFlow::Continue(()))?;
//!     let found = summaries(&records, &Reckoning::default())?;
//!     report::write(Path::new("refcoco-val"), &records, &found)?;
//!     Ok(report::table(&records, &found))
//! }
//! ```

pub mod bootstrap;
mod data;
mod error;
mod hub;
mod merge;
mod own;
mod plot;
pub mod record;
pub mod report;
mod run;
mod sample;
pub mod score;
mod summary;
mod table;
mod task;

pub use data::{Data, Fingerprint, Pictures};
pub use error::EvalError;
pub use merge::merge;
pub use record::{Header, Record, Records};
pub use run::{Event, OnError, Settings, Shard, run};
pub use sample::{PictureAt, Sample, Truth};
pub use score::Score;
pub use summary::{DENSE, Difference, Metric, Reckoning, Summary, YesNo, summaries};
pub use task::{GroundingPrompt, Task};
