//! Checkpoints in another form: what `reroute convert` runs.
//!
//! Top-down:
//!
//! 1. [`Plan::new`] opens the source, names every tensor as it will be called, and lays out every
//!    file to the byte. Nothing has been written then: this is `--dry-run`.
//! 2. [`Plan::write`] streams tensor after tensor into files of a temporary name, reads them again,
//!    compares checksums and renames them. A run that was interrupted is taken up where it stopped.
//!
//! Everything is read and written in blocks of 1 MiB, so memory does not grow with the model; a matrix that is
//! transposed on the way is held in memory.
//!
//! With [`Codes`], weights become codes of fewer bits on the way, and the report says what they are off by.
//!
//! [`Assembly`] makes a model of a vision tower, ONNX or a folder, and of a language model.

mod assemble;
mod codes;
mod companions;
mod error;
mod journal;
mod mean;
mod original;
mod pickle;
mod plan;
mod random;
mod source;
mod write;

pub use assemble::Assembly;
pub use codes::Codes;
pub use error::ConvertError;
pub use plan::{Form, Job, Plan, PlannedFile};
pub use write::{Phase, Progress, Report};
