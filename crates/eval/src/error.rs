use std::io;
use std::path::PathBuf;

use reroute_zoo::ZooError;

/// Why nothing could be measured, or what was measured could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// No file of a split.
    #[error(
        "{path} has no {looked_for}; download the data (hf download --repo-type dataset {repository} --local-dir DIR) \
         and name that folder, or the hub's cache"
    )]
    NoFiles {
        /// Where they should be.
        path: PathBuf,
        /// What they may be called.
        looked_for: String,
        /// Where they come from.
        repository: &'static str,
    },
    /// Data that are in no folder.
    #[error(
        "{path} is no folder; name that of a copy of {repository}, one that has it, or the hub's cache"
    )]
    NoFolder {
        /// What was named.
        path: PathBuf,
        /// Where the data come from.
        repository: &'static str,
    },
    /// A folder of other data.
    #[error(
        "{path} is called as {given}, and this task is measured on {wanted}; name its folder, or one that has folders of \
         both"
    )]
    OtherData {
        /// The folder.
        path: PathBuf,
        /// The repository that it is a copy of, by its name.
        given: &'static str,
        /// That of the task.
        wanted: &'static str,
    },
    /// One of the parts of a split.
    #[error("{path} is missing: the split has {parts} parts, download all of them")]
    MissingPart {
        /// The part.
        path: PathBuf,
        /// How many there are.
        parts: usize,
    },
    /// A file that is none of a split's parts.
    #[error(
        "{path} is none of the {parts} parts of the split that lie beside it: remove those of the other download"
    )]
    ExtraPart {
        /// The file.
        path: PathBuf,
        /// How many there are.
        parts: usize,
    },
    /// A table that cannot be read.
    #[error("{path} cannot be read as Parquet: {reason}; download it again")]
    Table {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A table without a column.
    #[error(
        "{path} has no column {column} (it has {found}); check --task, or take the release that the task names"
    )]
    NoColumn {
        /// The file.
        path: PathBuf,
        /// The column.
        column: &'static str,
        /// Those that it has.
        found: String,
    },
    /// A value of another type.
    #[error(
        "{path}, row {row}, column {column}: it should be {wanted}; check --task, or convert the column"
    )]
    Value {
        /// The file.
        path: PathBuf,
        /// Counted from 0.
        row: usize,
        /// The column.
        column: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A line of one's own data.
    #[error("{path}, line {line}: {reason}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong, and how it should be.
        reason: String,
    },
    /// Nothing to ask.
    #[error("{path} has no samples for {what}")]
    NoSamples {
        /// The data.
        path: PathBuf,
        /// What of them was asked for.
        what: String,
    },
    /// A sample whose picture cannot be seen, or that the model cannot answer.
    #[error(
        "sample {sample} ({place}): {reason}; mend the data, or record such samples and go on (--on-error skip)"
    )]
    Sample {
        /// Its index in the split.
        sample: usize,
        /// Where its picture is.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// A picture that cannot be decoded.
    #[error("the picture cannot be decoded: {0}")]
    Picture(String),
    /// A box of one's own data that its picture does not have.
    #[error(
        "the box lies outside of its picture of {width} × {height} pixels; give x1, y1, x2, y2, not width and height"
    )]
    Beyond {
        /// Of the picture, in pixels.
        width: usize,
        /// Of the picture, in pixels.
        height: usize,
    },
    /// The model answers nothing any more.
    #[error(
        "the last {count} samples have all failed in the model, at last with: {reason}; once the device is well, --resume \
             tries them again"
    )]
    Failing {
        /// How many, one after the other.
        count: usize,
        /// What was wrong with the last.
        reason: String,
    },
    /// A setting that makes no sense.
    #[error("{setting} {reason}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// What it should be.
        reason: String,
    },
    /// There are records in the folder.
    #[error("{path} is there: go on with it (--resume), or name another folder")]
    Taken {
        /// The file.
        path: PathBuf,
    },
    /// The records were begun with something else.
    #[error(
        "{path} was begun with another {field}: {was}, now {now}; go on with the same, or name another folder"
    )]
    OtherRun {
        /// The file.
        path: PathBuf,
        /// What differs.
        field: String,
        /// In the file.
        was: String,
        /// Now.
        now: String,
    },
    /// A record that is none.
    #[error("{path}, line {line}: {reason}; restore the file, or remove it and measure again")]
    Record {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// Another process measures there.
    #[error("{path} is in use by another run: wait for it, or name another folder")]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// Shards that do not fit together.
    #[error("{reason}")]
    Merge {
        /// Which, and what to do.
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
    /// A plot.
    #[error("{path}: it cannot be drawn: {reason}")]
    Plot {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Whoever watches has stopped it.
    #[error("stopped after {records} records: --resume goes on behind them")]
    Stopped {
        /// Records that were written.
        records: usize,
    },
    /// The model.
    #[error(transparent)]
    Zoo(#[from] ZooError),
}

impl EvalError {
    /// An error of a file.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::Io { path, source }
    }
}
