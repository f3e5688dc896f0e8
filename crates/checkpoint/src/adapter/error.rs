//! Everything that can be wrong with an adapter.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::mismatch::{ModuleMismatch, list_of, quoted, shortened};
use crate::{CheckpointError, LayoutError};

/// What went wrong, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The rank is 0, or no lower than the map's own.
    #[error("rank {rank} does not fit {}, which takes 1 to {most}", quoted(name))]
    Rank {
        /// What was asked for.
        rank: usize,
        /// Name of the map.
        name: String,
        /// The most that means anything: the shorter side of the weight.
        most: usize,
    },

    /// The scale is none.
    #[error("alpha is {alpha}; give a finite number other than 0, such as the rank")]
    Alpha {
        /// What was asked for.
        alpha: f64,
    },

    /// Everything, or less than nothing, is left out.
    #[error("dropout is {dropout}; give a share of the inputs, from 0 to below 1")]
    Dropout {
        /// What was asked for.
        dropout: f64,
    },

    /// A stored number is none.
    #[error(
        "tensor {} of the adapter has NaN or infinity in it: its training has diverged",
        quoted(name)
    )]
    NotFinite {
        /// Name of the tensor.
        name: String,
    },

    /// Nothing is to be adapted.
    #[error("the adapter has no targets; name some, such as q_proj, or take all-linear")]
    NoTargets,

    /// No linear map has such a name.
    #[error(
        "no linear map of this model is meant by {}; give the end of a name, or a pattern with *; there are:\n  {}",
        list_of(targets),
        linears.join("\n  ")
    )]
    UnknownTarget {
        /// Targets that mean nothing.
        targets: Vec<String>,
        /// Names of the linear maps, indices left out.
        linears: Vec<String>,
    },

    /// A vocabulary table is no linear map.
    #[error(
        "{} means a vocabulary table, which takes no adapter; name linear maps, or take all-linear, which \
         leaves the tables out",
        list_of(targets)
    )]
    Vocabulary {
        /// Targets that mean a table.
        targets: Vec<String>,
    },

    /// The model has an adapter.
    #[error(
        "the model has an adapter already; merge it (merge_adapters) or take it off (without_adapters)"
    )]
    Adapted,

    /// Several are to change one parameter in ways that do not add up.
    #[error(
        "{} is changed by several adapters, by magnitudes (DoRA) or as a whole (modules_to_save), which do not \
         add up: merge them into the model one by one (load_adapter, merge_adapters)",
        quoted(name)
    )]
    Several {
        /// Path of the map or parameter.
        name: String,
    },

    /// It cannot be written as it is.
    #[error(
        "the adapter has {what}, which was put into the model when it was loaded: merge it (merge_adapters) \
         and save the model"
    )]
    PutIn {
        /// What was put in.
        what: &'static str,
    },

    /// The model has none.
    #[error("the model has no adapter that could be saved; add one (adapt)")]
    NotAdapted,

    /// The settings ask for what is not there.
    #[error(
        "adapter_config.json asks for {} = {}, which is not supported; merge the adapter with PEFT and open \
         the merged checkpoint",
        quoted(setting),
        shortened(value)
    )]
    Unsupported {
        /// Name of the setting.
        setting: String,
        /// Its value, as JSON.
        value: String,
    },

    /// The tensors are not those of an adapter of this model.
    #[error("{0}")]
    Mismatch(Box<AdapterMismatch>),

    /// A file cannot be written.
    #[error("{} cannot be written: {source}; check the permissions and the disk", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },

    /// A file of the folder.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),

    /// The file of tensors cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// How the tensors of an adapter and the parameters of a model differ.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdapterMismatch {
    /// Where the adapter is, and the model that it says it is for.
    pub adapter: String,
    /// What does not fit.
    pub mismatch: ModuleMismatch,
}

impl fmt::Display for AdapterMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = format!("the adapter {} does not fit this model", self.adapter);
        self.mismatch.describe(
            f,
            &[
                &whole,
                "tensors that change nothing in this model (is the adapter of another model?)",
                "tensors that are missing (is the copy complete?)",
                "tensors that are there more than once (save the adapter again)",
                "tensors of the wrong shape (is the adapter of a model of another size, or \
                 adapter_config.json of another adapter?)",
                "tensors that are not F32, F16 or BF16 (save the adapter as one of these)",
            ],
        )
    }
}
