//! A folder of files, on disk or in memory, out of which no name and no link leads.

use std::fmt;
use std::fs::File;
use std::io::{self, Cursor, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::de::DeserializeOwned;

use crate::shards::{Shards, is_weights_file};
use crate::{CONFIG, CheckpointError, gguf, hub};

/// Largest `config.json` and similar settings file that is read, in bytes.
pub const CONFIG_MAX_BYTES: u64 = 1 << 20;
/// Largest `model.safetensors.index.json` that is read, in bytes.
pub const INDEX_MAX_BYTES: u64 = 16 << 20;
/// Largest `tokenizer.json` that is read, in bytes.
pub const TOKENIZER_MAX_BYTES: u64 = 64 << 20;
/// Largest chat template that is read, in bytes.
pub const TEMPLATE_MAX_BYTES: u64 = 1 << 20;

/// The files of one checkpoint.
#[derive(Debug, Clone)]
pub struct Folder(Place);

#[derive(Debug, Clone)]
enum Place {
    Disk {
        /// As the caller wrote it, for messages.
        given: PathBuf,
        /// Canonical.
        root: PathBuf,
        /// Canonical; where the links of a Hugging Face cache snapshot point.
        blobs: Option<PathBuf>,
    },
    Memory(Files),
}

/// Names and contents.
#[derive(Debug, Clone)]
enum Files {
    Embedded(&'static [(&'static str, &'static [u8])]),
    Owned(Arc<[(String, Bytes)]>),
    Made(Arc<Made>),
}

/// Files that were made of others, which have the weights.
#[derive(Debug)]
struct Made {
    /// What of, for messages.
    of: String,
    files: Vec<(String, Bytes)>,
    weights: Shards,
}

impl Files {
    fn iter(&self) -> impl Iterator<Item = (&str, Bytes)> {
        let (embedded, owned) = match self {
            Self::Embedded(files) => (*files, &[][..]),
            Self::Owned(files) => (&[][..], &files[..]),
            Self::Made(made) => (&[][..], &made.files[..]),
        };
        let embedded = embedded
            .iter()
            .map(|(name, bytes)| (*name, Bytes::Embedded(bytes)));
        let owned = owned
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.clone()));
        embedded.chain(owned)
    }
}

/// The contents of a file in memory.
#[derive(Clone)]
pub(crate) enum Bytes {
    Embedded(&'static [u8]),
    Owned(Arc<[u8]>),
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.as_ref().len())
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Embedded(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}

impl Folder {
    /// Opens a folder on disk: a downloaded checkpoint, a snapshot in the Hugging Face cache, or a
    /// repository there (`models--owner--name`), which is its current snapshot. A folder whose weights are
    /// GGUF, or a GGUF file, is as [`with_gguf`](Self::with_gguf) and [`open_gguf`](Self::open_gguf) have it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        match gguf::is_gguf(path) {
            true => Self::open_gguf(path, None),
            false => Self::on_disk(path)?.with_gguf(),
        }
    }

    /// A folder of this program's making, that has the weights of other files.
    pub(crate) fn made(of: String, files: Vec<(String, Vec<u8>)>, weights: Shards) -> Self {
        let owned = |(name, bytes): (String, Vec<u8>)| (name, Bytes::Owned(bytes.into()));
        let files = files.into_iter().map(owned).collect();
        Self(Place::Memory(Files::Made(Arc::new(Made {
            of,
            files,
            weights,
        }))))
    }

    /// The weights of a folder of this program's making.
    pub(crate) fn made_weights(&self) -> Option<&Shards> {
        match &self.0 {
            Place::Memory(Files::Made(made)) => Some(&made.weights),
            _ => None,
        }
    }

    /// Whether there are weights that go before GGUF files.
    pub(crate) fn has_weights(&self) -> bool {
        self.find(is_weights_file).is_some()
    }

    /// Opens a folder on disk as [`open`](Self::open) does, but for GGUF: such a file is one like others.
    pub fn on_disk(path: &Path) -> Result<Self, CheckpointError> {
        let mut given = path.to_path_buf();
        let mut root = canonical(&given)?;
        if !root.join(CONFIG).exists() {
            if let Some(current) = hub::current(&root) {
                (root, given) = (canonical(&current)?, current);
            } else {
                let mut snapshots = hub::snapshots(&root);
                snapshots.extend(hub::all_snapshots(&root));
                if !snapshots.is_empty() {
                    return Err(CheckpointError::CacheRoot {
                        path: given,
                        snapshots,
                    });
                }
            }
        }
        let blobs = hub::blobs(&root);
        Ok(Self(Place::Disk { given, root, blobs }))
    }

    /// A folder inside the program: names and contents, as `include_bytes!` gives them.
    pub const fn embedded(files: &'static [(&'static str, &'static [u8])]) -> Self {
        Self(Place::Memory(Files::Embedded(files)))
    }

    /// A folder in memory: names and contents. Of equal names the first counts.
    pub fn in_memory(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let owned = |(name, bytes): (String, Vec<u8>)| (name, Bytes::Owned(bytes.into()));
        Self(Place::Memory(Files::Owned(
            files.into_iter().map(owned).collect(),
        )))
    }

    /// Where this folder lies on disk, links resolved; an embedded one does not.
    pub fn root(&self) -> Option<&Path> {
        match &self.0 {
            Place::Disk { root, .. } => Some(root),
            Place::Memory(_) => None,
        }
    }

    /// Where this folder is, for messages.
    pub fn describe(&self) -> String {
        match &self.0 {
            Place::Disk { given, .. } => given.display().to_string(),
            Place::Memory(Files::Embedded(_)) => "the embedded checkpoint".to_owned(),
            Place::Memory(Files::Owned(_)) => "the checkpoint in memory".to_owned(),
            Place::Memory(Files::Made(made)) => made.of.clone(),
        }
    }

    /// Whether there is an entry of this name. Reading it may still fail.
    pub fn has(&self, name: &str) -> bool {
        match &self.0 {
            Place::Disk { root, .. } => {
                is_plain_name(name) && root.join(name).symlink_metadata().is_ok()
            }
            Place::Memory(files) => files.iter().any(|(file, _)| file == name),
        }
    }

    /// Reads a whole file that must not be longer than `max_bytes`.
    pub fn read(&self, name: &str, max_bytes: u64) -> Result<Vec<u8>, CheckpointError> {
        let failed = |source| self.read_error(name, source);
        let (reader, bytes) = self.locate(name)?.open().map_err(failed)?;
        // The file may grow while it is read: the limit holds for what comes, too.
        let mut content = Vec::new();
        if bytes <= max_bytes {
            let mut limited = reader.take(max_bytes.saturating_add(1));
            limited.read_to_end(&mut content).map_err(failed)?;
        }
        let bytes = bytes.max(content.len() as u64);
        if bytes > max_bytes {
            return Err(CheckpointError::TooLarge {
                file: self.path_of(name),
                bytes,
                max_bytes,
            });
        }
        Ok(content)
    }

    /// Reads and parses a JSON file that must not be longer than `max_bytes`.
    pub fn read_json<T: DeserializeOwned>(
        &self,
        name: &str,
        max_bytes: u64,
    ) -> Result<T, CheckpointError> {
        let content = self.read(name, max_bytes)?;
        let failed = |source| CheckpointError::Json {
            file: self.path_of(name),
            source,
        };
        let value = serde_json::from_slice(&content).map_err(failed)?;
        // It was read as the fields of a structure in their order.
        match content.trim_ascii_start().first() {
            Some(b'[') => Err(failed(serde::de::Error::custom(
                "it is a list, not an object",
            ))),
            _ => Ok(value),
        }
    }

    /// Where a file of this folder lies, links resolved: it is no pipe, and inside. An embedded folder
    /// has none.
    pub fn path(&self, name: &str) -> Result<PathBuf, CheckpointError> {
        match self.locate(name)? {
            Source::Disk(path) => Ok(path),
            Source::Memory(_) => Err(self.missing(name)),
        }
    }

    /// The file of this name, if it is one and lies inside.
    pub(crate) fn locate(&self, name: &str) -> Result<Source, CheckpointError> {
        let missing = || self.missing(name);
        match &self.0 {
            Place::Memory(files) => {
                let found = files.iter().find(|(file, _)| *file == name);
                Ok(Source::Memory(found.ok_or_else(missing)?.1))
            }
            Place::Disk { root, blobs, .. } => {
                if !is_plain_name(name) {
                    return Err(CheckpointError::FileName {
                        folder: self.describe(),
                        name: name.to_owned(),
                    });
                }
                let target = match root.join(name).canonicalize() {
                    Ok(target) => target,
                    Err(error) if error.kind() == ErrorKind::NotFound => return Err(missing()),
                    Err(source) => return Err(self.read_error(name, source)),
                };
                let file = self.path_of(name);
                let inside = |folder: &PathBuf| target.starts_with(folder);
                if !inside(root) && !blobs.as_ref().is_some_and(inside) {
                    return Err(CheckpointError::LinkOutside { file, target });
                }
                // A named pipe would block, a folder cannot be read.
                if !target.is_file() {
                    return Err(CheckpointError::NotAFile { file });
                }
                Ok(Source::Disk(target))
            }
        }
    }

    /// What is said where a file is not there.
    pub(crate) fn missing(&self, name: &str) -> CheckpointError {
        if name == CONFIG && self.has("adapter_config.json") {
            let folder = self.describe();
            return CheckpointError::IsAdapter { folder };
        }
        CheckpointError::MissingFile {
            folder: self.describe(),
            name: name.to_owned(),
            repository: self.repository(),
        }
    }

    /// The repository of the hub that this is a download of, if it lies in the Hugging Face cache.
    pub fn repository(&self) -> Option<String> {
        match &self.0 {
            Place::Disk { root, .. } => hub::repository_of(root),
            Place::Memory(_) => None,
        }
    }

    /// Path of a file in this folder, for messages.
    pub(crate) fn path_of(&self, name: &str) -> String {
        match &self.0 {
            Place::Disk { given, .. } => given.join(name).display().to_string(),
            Place::Memory(_) => format!("{name} of {}", self.describe()),
        }
    }

    /// The first entry, by name, that `wanted` accepts.
    pub(crate) fn find(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let names = self.names().into_iter();
        names.filter(|name| wanted(name)).min()
    }

    /// Names of all entries that are UTF-8; none of a folder that cannot be listed.
    pub(crate) fn names(&self) -> Vec<String> {
        match &self.0 {
            Place::Disk { root, .. } => {
                let entries = root.read_dir().into_iter().flatten().flatten();
                let names = entries.map(|entry| entry.file_name().into_string());
                names.filter_map(Result::ok).collect()
            }
            Place::Memory(files) => files.iter().map(|(name, _)| name.to_owned()).collect(),
        }
    }

    /// Name and length of every file that has a name in UTF-8; links count as what they lead to.
    pub(crate) fn files(&self) -> Result<Vec<(String, u64)>, CheckpointError> {
        match &self.0 {
            Place::Disk { given, root, .. } => {
                let entries = root
                    .read_dir()
                    .map_err(|source| CheckpointError::OpenFolder {
                        path: given.clone(),
                        source,
                    })?;
                let file = |entry: std::fs::DirEntry| {
                    let found = entry
                        .path()
                        .metadata()
                        .ok()
                        .filter(|found| found.is_file())?;
                    Some((entry.file_name().into_string().ok()?, found.len()))
                };
                Ok(entries.flatten().filter_map(file).collect())
            }
            Place::Memory(files) => {
                let file = |(name, content): (&str, Bytes)| {
                    (name.to_owned(), content.as_ref().len() as u64)
                };
                Ok(files.iter().map(file).collect())
            }
        }
    }

    /// When a file was written, where that is known.
    pub(crate) fn modified(&self, name: &str) -> Option<SystemTime> {
        match self.locate(name).ok()? {
            Source::Disk(path) => path.metadata().ok()?.modified().ok(),
            Source::Memory(_) => None,
        }
    }

    fn read_error(&self, name: &str, source: io::Error) -> CheckpointError {
        CheckpointError::Read {
            file: self.path_of(name),
            source,
        }
    }
}

/// The folder at a path, links resolved.
fn canonical(path: &Path) -> Result<PathBuf, CheckpointError> {
    match path.canonicalize() {
        Ok(root) if root.is_dir() => Ok(root),
        Ok(_) => Err(CheckpointError::NotAFolder { path: path.into() }),
        Err(source) => Err(CheckpointError::OpenFolder {
            path: path.into(),
            source,
        }),
    }
}

/// Whether a name, possibly from outside, stays in its folder on every platform.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first = components.next();
    matches!(first, Some(Component::Normal(part)) if part == name)
        && components.next().is_none()
        && !name.contains(|c: char| matches!(c, '/' | '\\' | ':') || c.is_control())
}

/// Where the bytes of one file are.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Disk(PathBuf),
    Memory(Bytes),
}

/// What a [`Source`] opens as.
pub(crate) trait ReadSeek: Read + Seek {}
impl<T: Read + Seek> ReadSeek for T {}

impl Source {
    /// A reader at the start, and the length in bytes.
    pub(crate) fn open(&self) -> io::Result<(Box<dyn ReadSeek>, u64)> {
        let mut reader: Box<dyn ReadSeek> = match self {
            Self::Disk(path) => Box::new(File::open(path)?),
            Self::Memory(bytes) => Box::new(Cursor::new(bytes.clone())),
        };
        let bytes = reader.seek(SeekFrom::End(0))?;
        reader.rewind()?;
        Ok((reader, bytes))
    }
}
