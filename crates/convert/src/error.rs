//! Everything that can stop a conversion.

use std::io;
use std::path::{Path, PathBuf};

use reroute_checkpoint::{CheckpointError, Dtype, LayoutError};

/// What went wrong, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The weights are quantised in a way that is not read.
    #[error(
        "{} is quantised by {how}, whose weights are not read, so that nothing could open what it became; convert the \
         checkpoint that it was made from",
        path.display()
    )]
    Quantised {
        /// The folder.
        path: PathBuf,
        /// What config.json calls it.
        how: String,
    },

    /// The source is no checkpoint that can be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),

    /// The files cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),

    /// A file or folder cannot be read or written.
    #[error("{}: {source}; check the permissions and the disk", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },

    /// Reading a pickle was not allowed.
    #[error(
        "{} has its weights in pickles; if you trust their author, add --allow-pickle",
        folder.display()
    )]
    PickleNotAllowed {
        /// The folder.
        folder: PathBuf,
    },

    /// A pickle cannot be read.
    #[error("{}: {problem}", path.display())]
    Pickle {
        /// The file, or the folder that lacks one.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// An original LLaVA checkpoint cannot be understood.
    #[error("{}: {problem}", path.display())]
    Original {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// The parts of a model cannot be assembled.
    #[error("{}: {problem}", path.display())]
    Assembly {
        /// The file or folder of a part.
        path: PathBuf,
        /// What is wrong with it, and what to give instead.
        problem: String,
    },

    /// Two tensors would get the same name.
    #[error("tensor {name:?} is there twice; is the vision tower already in the checkpoint?")]
    Duplicate {
        /// Its name.
        name: String,
    },

    /// Finite values would become infinite.
    #[error(
        "tensor {name:?} has {values} values beyond the range of {dtype}; --dtype bf16 or f32 keeps them, \
         --clamp makes the largest value of the type of them"
    )]
    Overflow {
        /// The tensor.
        name: String,
        /// How many.
        values: u64,
        /// The type.
        dtype: Dtype,
    },

    /// Numbers that codes cannot stand for.
    #[error(
        "tensor {name:?} holds numbers that are not finite, or too large for the scales of {format}; --dtype bf16 \
         or f32 keeps them"
    )]
    NotCoded {
        /// The tensor.
        name: String,
        /// The format.
        format: &'static str,
    },

    /// The target is the source, or it holds something else.
    #[error("{} is already there; choose another --to, or remove it", path.display())]
    Occupied {
        /// The file that is there.
        path: PathBuf,
    },

    /// A file of the source is not what it was when the conversion began.
    #[error("{} has changed since the conversion began; convert again when it is finished", path.display())]
    SourceChanged {
        /// The file.
        path: PathBuf,
    },

    /// `--to` and `--format` do not fit together.
    #[error("{}: {problem}", path.display())]
    Target {
        /// As given.
        path: PathBuf,
        /// The contradiction, and what to write instead.
        problem: String,
    },

    /// Another program holds the journal.
    #[error("{} is in use: another conversion writes there; wait for it", path.display())]
    Busy {
        /// The journal.
        path: PathBuf,
    },

    /// The disk is too full.
    #[error(
        "{} has {available} bytes free, {needed} are needed; free some, or choose another --to",
        path.display()
    )]
    DiskFull {
        /// The folder.
        path: PathBuf,
        /// Bytes to be written.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },

    /// A file does not hold what was written to it.
    #[error(
        "{} does not hold what was written ({what}), and has been removed; check the disk, then convert again",
        path.display()
    )]
    Damaged {
        /// The temporary file.
        path: PathBuf,
        /// The length, the header, the first tensor that differs, or all of a small file.
        what: String,
    },
}

impl ConvertError {
    /// Adds the path to what the system says.
    pub(crate) fn io(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        |source| Self::Io {
            path: path.to_path_buf(),
            source,
        }
    }
}
