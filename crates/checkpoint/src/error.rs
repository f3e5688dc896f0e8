//! Everything that can be wrong with a checkpoint folder.

use std::io;
use std::path::PathBuf;

use burn::tensor::DType;
use safetensors::SafeTensorError;

use crate::convert::TensorError;
use crate::mismatch::{IndexMismatch, ModuleMismatch, quoted};

/// What went wrong, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The folder does not exist or cannot be entered.
    #[error(
        "{} cannot be opened: {source}; give the folder that holds config.json, of an adapter \
         adapter_config.json",
        path.display()
    )]
    OpenFolder {
        /// As given.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },

    /// The path leads to a file.
    #[error(
        "{} is not a folder; give the folder that it lies in{}",
        path.display(),
        if path.extension().is_some_and(|end| end == "onnx") {
            "; a vision tower in ONNX becomes part of a model by reroute convert --assemble llava --vision-tower FILE"
        } else {
            ""
        }
    )]
    NotAFolder {
        /// As given.
        path: PathBuf,
    },

    /// The path leads to the Hugging Face cache, or to a repository in it.
    #[error(
        "{} is of the Hugging Face cache, where checkpoints lie in snapshots; give {}",
        path.display(),
        some(&snapshots.iter().map(|path| path.display().to_string()).collect::<Vec<_>>())
    )]
    CacheRoot {
        /// As given.
        path: PathBuf,
        /// The snapshots in it, the current one of each repository first.
        snapshots: Vec<PathBuf>,
    },

    /// A file name that might lead out of the folder.
    #[error(
        "{} is not a plain file name in {folder}; use a name without separators",
        quoted(name)
    )]
    FileName {
        /// The folder.
        folder: String,
        /// The refused name.
        name: String,
    },

    /// A link leads out of the folder.
    #[error(
        "{file} is a link to {}, outside the checkpoint; put the file itself there, or give the folder that holds it",
        target.display()
    )]
    LinkOutside {
        /// The link.
        file: String,
        /// Where it leads.
        target: PathBuf,
    },

    /// A file is not there.
    #[error(
        "{folder} has no {}; is it the folder {}, and the download complete?{}",
        quoted(name),
        if name.starts_with("adapter_") { "of an adapter" } else { "of a checkpoint" },
        finish(repository)
    )]
    MissingFile {
        /// The folder.
        folder: String,
        /// Name of the file.
        name: String,
        /// The repository of the hub that the folder is a download of, if that is known.
        repository: Option<String>,
    },

    /// The folder is that of an adapter, where a checkpoint was to be.
    #[error(
        "{folder} is an adapter, not a model: give the model that it was trained for to --model, and {folder} to \
         --adapter"
    )]
    IsAdapter {
        /// The folder.
        folder: String,
    },

    /// A repository of the hub is not in the cache.
    #[error(
        "{repository} is no folder, and not in the Hugging Face cache {}; download it: \
         hf download {repository}",
        cache.display()
    )]
    NotCached {
        /// Its owner and name.
        repository: String,
        /// The cache.
        cache: PathBuf,
    },

    /// The name belongs to a folder or a device.
    #[error("{file} is not a file; download the checkpoint again")]
    NotAFile {
        /// The path.
        file: String,
    },

    /// A file is longer than its kind ever is.
    #[error(
        "{file} has {bytes} bytes or more, {max_bytes} are allowed; download the checkpoint again"
    )]
    TooLarge {
        /// The file.
        file: String,
        /// Its length, as far as known.
        bytes: u64,
        /// The limit.
        max_bytes: u64,
    },

    /// Reading a file failed.
    #[error("{file} cannot be read: {source}; check the permissions and the disk")]
    Read {
        /// The file.
        file: String,
        /// What the system says.
        source: io::Error,
    },

    /// A file is not JSON, or not the JSON that was expected.
    #[error("{file} is not understood: {source}; download it again")]
    Json {
        /// The file.
        file: String,
        /// Where and why the parser stopped.
        source: serde_json::Error,
    },

    /// The folder holds no weights.
    #[error(
        "{folder} has none of model.bpk, model.safetensors and model.safetensors.index.json; \
         is the download complete?{}",
        finish(repository)
    )]
    NoWeights {
        /// The folder.
        folder: String,
        /// The repository of the hub that the folder is a download of, if that is known.
        repository: Option<String>,
    },

    /// A GGUF file is broken, or of a kind that is not read.
    #[error("{file} cannot be read as GGUF: {reason}")]
    Gguf {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },

    /// A file that was named is not there, or no file.
    #[error(
        "{} {}",
        path.display(),
        if path.is_dir() { "is a folder: name the file in it" } else { "is not there: check the path" }
    )]
    NoSuchFile {
        /// As given.
        path: PathBuf,
    },

    /// A tower in GGUF was named for a folder without GGUF.
    #[error(
        "{folder} has no language model in GGUF, which a tower (mmproj) goes with: leave --mmproj out"
    )]
    NoGguf {
        /// The folder.
        folder: String,
    },

    /// There are several GGUF files of a kind, and nothing says which to open.
    #[error(
        "{folder} has several {what}, {}: name the file itself, --model FILE --mmproj FILE",
        some(files)
    )]
    SeveralGguf {
        /// The folder.
        folder: String,
        /// What they are.
        what: &'static str,
        /// Names of the files.
        files: Vec<String>,
    },

    /// The GGUF files are towers without a language model.
    #[error(
        "{folder} has a vision tower (mmproj) and no language model: download the other file of the model"
    )]
    NoLanguageModel {
        /// The folder.
        folder: String,
    },

    /// An ONNX file is broken, or of a kind that is not read.
    #[error("{file} cannot be read as ONNX: {reason}")]
    Onnx {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },

    /// The weights are quantised in a way that is not known, or their parts do not fit.
    #[error(
        "{folder} is quantised (quantization_config in config.json), and {reason}; the checkpoint that it was made \
         from opens"
    )]
    Quantised {
        /// The folder.
        folder: String,
        /// What is wrong.
        reason: String,
    },

    /// The folder holds weights only as pickle, which runs code when it is opened.
    #[error(
        "{folder} has its weights in {}, a pickle, which can run any code when opened and is never read; \
         if you trust its author: reroute convert --allow-pickle",
        quoted(file)
    )]
    Pickle {
        /// The folder.
        folder: String,
        /// Name of the pickle.
        file: String,
    },

    /// The index lists a file that may not be opened.
    #[error(
        "{index} lists the shard {}; a shard must be a plain file name that ends in .safetensors: \
         do not trust this checkpoint, download it from its author",
        quoted(shard)
    )]
    ShardName {
        /// The index.
        index: String,
        /// The refused name.
        shard: String,
    },

    /// The index lists files that are not there.
    #[error(
        "{folder} lacks {} of its shards, {}; finish the download{}",
        shards.len(), some(shards), finish(repository)
    )]
    MissingShards {
        /// The folder.
        folder: String,
        /// Names of the files.
        shards: Vec<String>,
        /// The repository of the hub that the folder is a download of, if that is known.
        repository: Option<String>,
    },

    /// There are shards of several sets, and nothing says which to open.
    #[error(
        "{folder} has shards of several sets (of {}) and no model.safetensors.index.json, which says \
         which belong together; download it, or remove those that do not belong",
        counts.iter().map(u32::to_string).collect::<Vec<_>>().join(", of ")
    )]
    SeveralSets {
        /// The folder.
        folder: String,
        /// The numbers of shards that the names tell.
        counts: Vec<u32>,
    },

    /// A converted file lies beside weights that it was not converted from.
    #[error(
        "{folder} has {converted} beside {original}, but not converted from it as it is now: remove \
         {converted} to load {original} (and convert that again), or remove {original} to load {converted}"
    )]
    Stale {
        /// The folder.
        folder: String,
        /// Name of the converted file.
        converted: String,
        /// Name of a file beside it.
        original: String,
    },

    /// The index and the shards contradict each other.
    #[error("{0}")]
    Index(Box<IndexMismatch>),

    /// The header's length is impossible: the file is cut off, or no safetensors file at all.
    #[error(
        "{file} is not a safetensors file, or it is cut off: it announces a header of {header_bytes} bytes \
         where {available_bytes} bytes follow; download it again (if it is a Git LFS pointer: git lfs pull)"
    )]
    HeaderLength {
        /// The file.
        file: String,
        /// Length that the file claims.
        header_bytes: u64,
        /// Bytes that follow the claim.
        available_bytes: u64,
    },

    /// The header is not the JSON of a safetensors header.
    #[error("{file} has a broken header: {source}; download it again")]
    HeaderJson {
        /// The file.
        file: String,
        /// Where and why the parser stopped.
        source: serde_json::Error,
    },

    /// The header's offsets, shapes and types contradict each other.
    #[error("{file} has a contradictory header: {source}; download it again")]
    Header {
        /// The file.
        file: String,
        /// The contradiction.
        source: SafeTensorError,
    },

    /// The file does not begin as a Burnpack file does.
    #[error(
        "{file} is not a Burnpack file of version 1, or it is cut off; convert the checkpoint again"
    )]
    NotBurnpack {
        /// The file.
        file: String,
    },

    /// The header is not that of a Burnpack file.
    #[error("{file} has a broken header: {source}; convert the checkpoint again")]
    BurnpackHeader {
        /// The file.
        file: String,
        /// Where and why the parser stopped.
        source: ciborium::de::Error<io::Error>,
    },

    /// What the header says about one tensor is impossible.
    #[error(
        "{file} has a contradictory header: tensor {} {problem}; convert the checkpoint again",
        quoted(name)
    )]
    BurnpackTensor {
        /// The file.
        file: String,
        /// Name of the tensor.
        name: String,
        /// The contradiction.
        problem: String,
    },

    /// A Burnpack file cannot be mapped into memory.
    #[error(
        "{file} cannot be mapped into memory: {problem}; convert the checkpoint again, or to safetensors"
    )]
    Map {
        /// The file.
        file: String,
        /// What `burn-store` says.
        problem: String,
    },

    /// A name stands twice in a header or an index.
    #[error("{file} has the name {} twice; download it again", quoted(key))]
    DuplicateKey {
        /// The file.
        file: String,
        /// The name.
        key: String,
    },

    /// The file is longer or shorter than its header says.
    #[error(
        "{file} has {file_bytes} bytes where its header needs {expected_bytes}; \
         is the download complete? download it again"
    )]
    FileLength {
        /// The file.
        file: String,
        /// Length that the header implies.
        expected_bytes: u64,
        /// Length that the file has.
        file_bytes: u64,
    },

    /// There is no tensor of this name.
    #[error("the checkpoint has no tensor {}", quoted(name))]
    NoSuchTensor {
        /// Name of the tensor.
        name: String,
    },

    /// One tensor cannot be read.
    #[error("tensor {} of {file} cannot be loaded: {source}", quoted(name))]
    Tensor {
        /// Name of the tensor.
        name: String,
        /// The file it lies in.
        file: String,
        /// The reason.
        source: TensorError,
    },

    /// The backend does not compute with this type.
    #[error("this backend does not compute in {dtype:?}; load the weights as F32")]
    Backend {
        /// Type that was asked for.
        dtype: DType,
    },

    /// The weights and the module contradict each other.
    #[error("{0}")]
    Module(Box<ModuleMismatch>),

    /// The caller asked to stop.
    #[error("loading was stopped")]
    Stopped,
}

/// The first few names of a list.
fn some(names: &[String]) -> String {
    let mut shown: Vec<String> = names.iter().take(3).map(|name| quoted(name)).collect();
    if names.len() > shown.len() {
        shown.push("…".to_owned());
    }
    shown.join(", ")
}

/// The command that finishes a download.
fn finish(repository: &Option<String>) -> String {
    let command = |repository| format!(" (hf download {repository})");
    repository.as_ref().map_or_else(String::new, command)
}
