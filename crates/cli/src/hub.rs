//! Where a checkpoint is that is called by its folder, or by its name on the Hugging Face hub.

use std::env;
use std::path::{Path, PathBuf};

use reroute_checkpoint::{cached_path, is_repository};
use reroute_zoo::Folder;

/// The checkpoint in a folder, or in GGUF files; `owner/name`, where there is no such folder, is looked up in the
/// Hugging Face cache. Nothing is downloaded.
pub(crate) fn folder(path: &Path, mmproj: Option<&Path>) -> anyhow::Result<Folder> {
    let path = found(path)?;
    Ok(match mmproj {
        Some(mmproj) => Folder::open_gguf(path, Some(mmproj))?,
        None => Folder::open(path)?,
    })
}

/// The same, as a path; of a repository in the cache, that of its snapshot.
pub(crate) fn path(path: &Path) -> anyhow::Result<PathBuf> {
    let path = found(path)?;
    if !path.is_dir() {
        return Ok(path);
    }
    let folder = Folder::on_disk(&path)?;
    Ok(folder.root().unwrap_or(&path).to_owned())
}

/// Where it is: `owner/name`, or a file of such a repository, in the cache, unless there is a folder `owner` here.
fn found(path: &Path) -> anyhow::Result<PathBuf> {
    let Some(name) = path.to_str().filter(|_| !path.exists()) else {
        return Ok(path.to_owned());
    };
    let is_here = path.parent().is_some_and(Path::is_dir);
    if is_repository(name) {
        return match cached_path(cache(), name) {
            Err(_) if is_here => Ok(path.to_owned()),
            found => Ok(found?),
        };
    }
    if let Some((repository, file)) = name.rsplit_once('/')
        && is_repository(repository)
        && !is_here
    {
        let folder = Folder::on_disk(&cached_path(cache(), repository)?)?;
        return Ok(folder.root().unwrap_or(path).join(file));
    }
    Ok(path.to_owned())
}

/// The cache, where `huggingface_hub` has it.
pub(crate) fn cache() -> PathBuf {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let home = || env::home_dir().unwrap_or_default();
    let user = || set("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from);
    let hugging_face = || set("HF_HOME").map_or_else(|| user().join("huggingface"), PathBuf::from);
    set("HF_HUB_CACHE").map_or_else(|| hugging_face().join("hub"), PathBuf::from)
}
