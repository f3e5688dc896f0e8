//! The Hugging Face cache: `models--<owner>--<name>/snapshots/<revision>/`, full of links into
//! `models--<owner>--<name>/blobs/`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::{CheckpointError, Folder};

const REPOSITORY: &str = "models--";
/// Longest revision, in bytes.
const MAX_REVISION: u64 = 256;

impl Folder {
    /// Opens the current snapshot of a repository, `owner/name`, in the Hugging Face cache `cache`, which is
    /// the folder `hub` in `HF_HOME`. Nothing is downloaded.
    ///
    /// # Errors
    /// [`CheckpointError::NotCached`] if it is not there, with the command that downloads it;
    /// [`CheckpointError::CacheRoot`] if nothing says which of several snapshots is the current one.
    pub fn cached(cache: impl AsRef<Path>, repository: &str) -> Result<Self, CheckpointError> {
        Self::open(cached_path(cache, repository)?)
    }
}

/// Where a repository, `owner/name`, is in the Hugging Face cache: a path for [`Folder::open`].
///
/// # Errors
/// [`CheckpointError::NotCached`] if it is not there, with the command that downloads it.
pub fn cached_path(cache: impl AsRef<Path>, repository: &str) -> Result<PathBuf, CheckpointError> {
    let cache = cache.as_ref();
    let missing = || CheckpointError::NotCached {
        repository: repository.to_owned(),
        cache: cache.to_owned(),
    };
    if !is_repository(repository) {
        return Err(missing());
    }
    let folder = cache.join(format!("{REPOSITORY}{}", repository.replace('/', "--")));
    match folder.is_dir() {
        true if !snapshots(&folder).is_empty() => Ok(folder),
        _ => Err(missing()),
    }
}

/// Whether a text is the name of a repository on the hub: an owner and a name.
pub fn is_repository(text: &str) -> bool {
    let is_part = |part: &str| {
        let is_known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty()
            && part.len() <= 96
            && part.chars().all(is_known)
            && !part.starts_with(['.', '-'])
            && !part.contains("--")
            && !part.contains("..")
    };
    let parts = text.split_once('/');
    parts.is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

/// The repository that a folder of the cache is a snapshot of, as the hub calls it.
pub(crate) fn repository_of(root: &Path) -> Option<String> {
    let name = of_snapshot(root)?.file_name()?.to_str()?;
    let name = name.strip_prefix(REPOSITORY)?.replacen("--", "/", 1);
    is_repository(&name).then_some(name)
}

/// The folder that the links of a snapshot point into.
pub(crate) fn blobs(root: &Path) -> Option<PathBuf> {
    of_snapshot(root)?.join("blobs").canonicalize().ok()
}

/// The folder of the repository that a folder is a snapshot of.
fn of_snapshot(root: &Path) -> Option<&Path> {
    let snapshots = root.parent()?;
    let is_there = snapshots.ends_with("snapshots");
    is_there.then(|| snapshots.parent())?
}

/// The snapshot that `refs/main` names, or the only one.
pub(crate) fn current(repository: &Path) -> Option<PathBuf> {
    let mut snapshots = snapshots(repository);
    let main = main(repository);
    match main.filter(|main| snapshots.first() == Some(main)) {
        Some(main) => Some(main),
        None if snapshots.len() == 1 => snapshots.pop(),
        None => None,
    }
}

/// Where `refs/main` says that the current snapshot is.
fn main(repository: &Path) -> Option<PathBuf> {
    let revision = revision(&repository.join("refs").join("main"))?;
    Some(repository.join("snapshots").join(revision.trim()))
}

/// The snapshots of a repository, the current one first.
pub(crate) fn snapshots(repository: &Path) -> Vec<PathBuf> {
    let folder = repository.join("snapshots");
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let folders = entries.map(|entry| entry.path());
    let mut snapshots: Vec<PathBuf> = folders.filter(|path| path.is_dir()).collect();
    let current = main(repository);
    snapshots.sort_by_key(|path| (Some(path) != current.as_ref(), path.clone()));
    snapshots
}

/// What a ref says: forty letters, in a file that is one.
fn revision(file: &Path) -> Option<String> {
    let is_file = fs::metadata(file).ok()?.is_file();
    let file = is_file.then(|| fs::File::open(file).ok())??;
    let mut revision = String::new();
    file.take(MAX_REVISION).read_to_string(&mut revision).ok()?;
    Some(revision)
}

/// The snapshots of all repositories in the cache, the current one of each first.
pub(crate) fn all_snapshots(cache: &Path) -> Vec<PathBuf> {
    let entries = cache.read_dir().into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(REPOSITORY)).collect();
    names.sort();
    names
        .iter()
        .flat_map(|name| snapshots(&cache.join(name)))
        .collect()
}
