//! Everything that can keep a model from being saved.

use std::io;
use std::path::PathBuf;

use burn::tensor::DType;
use safetensors::Dtype;

use crate::mismatch::{ModuleMismatch, quoted};
use crate::{CheckpointError, LayoutError};

/// What went wrong, and what to do about it. What was in the place before is there still.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The folder that the model is saved like cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),

    /// The files cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),

    /// The model is not the one that the folder describes: it has other parameters, adapters for instance.
    #[error("the model cannot be saved like {like}: {mismatch}")]
    OtherModel {
        /// The folder.
        like: String,
        /// The parameters, as they would be called in the files.
        mismatch: Box<ModuleMismatch>,
    },

    /// A file or folder cannot be written.
    #[error("{}: {source}; check the permissions and the disk, then save again", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },

    /// The disk is too full, or became full meanwhile.
    #[error(
        "{} has {available} bytes free, {needed} are needed beside what is there; free some, or save \
         elsewhere",
        path.display()
    )]
    DiskFull {
        /// The folder that the checkpoint would lie in.
        path: PathBuf,
        /// Bytes of the whole checkpoint.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },

    /// The path is not one that a checkpoint can be put at.
    #[error("{} {problem}", path.display())]
    Target {
        /// As given.
        path: PathBuf,
        /// What is wrong with it, and what to give instead.
        problem: &'static str,
    },

    /// The folder holds something that would be lost.
    #[error(
        "{} holds {}, and nothing of the checkpoint to be saved is called so; move it away, or save \
         elsewhere",
        path.display(),
        quoted(entry)
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// Name of a file or folder in it.
        entry: String,
    },

    /// Neither f32, f16 nor bf16 was asked for.
    #[error("weights can be saved as F32, F16 or BF16, not as {dtype:?}")]
    Dtype {
        /// Type that was asked for.
        dtype: DType,
    },

    /// A parameter has elements that are no weights.
    #[error(
        "parameter {} has elements of type {dtype:?}; dequantise the model before saving it",
        quoted(name)
    )]
    Elements {
        /// As it is called in the files.
        name: String,
        /// Its type.
        dtype: DType,
    },

    /// A parameter cannot be copied from its device.
    #[error("parameter {} cannot be read from its device: {problem}", quoted(name))]
    Device {
        /// As it is called in the files.
        name: String,
        /// What the backend says.
        problem: String,
    },

    /// Finite values would become infinite.
    #[error(
        "parameter {} has {values} values beyond the range of {dtype}; save the model as BF16 or F32, or as \
         F32 and clamp once and for all by reroute convert --clamp",
        quoted(name)
    )]
    Overflow {
        /// As it is called in the files.
        name: String,
        /// How many.
        values: u64,
        /// The type.
        dtype: Dtype,
    },
}
