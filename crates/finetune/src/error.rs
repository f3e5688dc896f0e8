use std::io;
use std::path::PathBuf;

use reroute_zoo::ZooError;

use crate::data::DataError;

/// Why a model could not be trained.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TuneError {
    /// The examples.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model.
    #[error(transparent)]
    Zoo(#[from] ZooError),
    /// An example that the model cannot learn.
    #[error(
        "{place}: {reason}; mend the example, or leave out those that cannot be used (--on-bad skip)"
    )]
    Example {
        /// Where it stands.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// None of the examples can be used.
    #[error("none of the {what} can be used; the last one: {reason}")]
    NoExample {
        /// Which.
        what: &'static str,
        /// What was wrong.
        reason: String,
    },
    /// A setting that makes no sense.
    #[error("{setting} {reason}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// What it may be.
        reason: &'static str,
    },
    /// The loss or its gradient is no number.
    #[error(
        "the {what} is {value} at step {step}: begin in a new folder with a smaller learning rate or a longer \
         warm-up, in f32 or bf16; the last checkpoint is unharmed"
    )]
    Diverged {
        /// The loss, the gradient, the validation loss, or the model.
        what: &'static str,
        /// Counted from 1.
        step: usize,
        /// What it is.
        value: f64,
    },
    /// The device does not give back what it computed.
    #[error("the device fails: {reason}")]
    Device {
        /// What it says.
        reason: String,
    },
    /// A file.
    #[error("{path}: {source}; check the path, the rights and the space that is left")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is a run in the folder.
    #[error("{path} has a run in it: go on with it (--resume), or name another folder")]
    Taken {
        /// The folder.
        path: PathBuf,
    },
    /// The run in the folder was begun with other settings.
    #[error("{path} was begun with another {what}: go on with the same, or name another folder")]
    OtherRun {
        /// The folder.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A checkpoint that cannot be read.
    #[error(
        "{path}: {reason}; remove this checkpoint's folder, and the one before is taken, or the beginning if there \
         is none"
    )]
    Checkpoint {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// What answered the validation best cannot be read.
    #[error(
        "{path}: {reason}; take that file from a copy, or train again in a new folder: what the last step left is \
         in the last checkpoint"
    )]
    Best {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The folder is somebody else's.
    #[error("{path} has files in it that are no run's: name a new folder, or an empty one")]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// Another process trains there.
    #[error("{path} is in use by another run: wait for it, or name another folder")]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// Peers of a run that are not there any more.
    #[error(
        "{peers} {reason}; the last checkpoint is unharmed: start all peers again, with --resume"
    )]
    PeersLost {
        /// Which.
        peers: String,
        /// What of them is known.
        reason: String,
    },
    /// Peers of a run that have something else than the first one.
    #[error(
        "{peers} and peer 0 have different {what}: start all with the same data, flags and model"
    )]
    PeersDiffer {
        /// Which.
        peers: String,
        /// Of what.
        what: &'static str,
    },
    /// A port that cannot be opened.
    #[error(
        "port {port} cannot be opened ({source}): name another --peer-port, the same for all peers"
    )]
    Port {
        /// Which.
        port: u16,
        /// What the system says.
        source: io::Error,
    },
    /// Whoever watches has stopped it.
    #[error("stopped after step {step}: --resume goes on from the last checkpoint")]
    Stopped {
        /// Steps that were done.
        step: usize,
    },
}

impl TuneError {
    /// An error of a file.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::Io { path, source }
    }
}
