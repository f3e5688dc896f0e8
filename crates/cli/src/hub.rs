//! Where a checkpoint is that is called by its folder, or by its name on the Hugging Face hub.

use std::env;
use std::path::{Path, PathBuf};

use reroute_checkpoint::is_repository;
use reroute_zoo::Folder;

/// The checkpoint in a folder, or in GGUF files; `owner/name`, where there is no such folder, is looked up in the
/// Hugging Face cache. Nothing is downloaded.
pub(crate) fn folder(path: &Path, mmproj: Option<&Path>) -> anyhow::Result<Folder> {
    match (path.to_str(), mmproj) {
        (Some(name), _) if !path.exists() && is_repository(name) => {
            Ok(Folder::cached(cache(), name)?)
        }
        (_, Some(mmproj)) => Ok(Folder::open_gguf(path, Some(mmproj))?),
        _ => Ok(Folder::open(path)?),
    }
}

/// The same, as a path; what is no folder is left to whoever opens it.
pub(crate) fn path(path: &Path) -> anyhow::Result<PathBuf> {
    if path.is_file() || !path.exists() && !path.to_str().is_some_and(is_repository) {
        return Ok(path.to_owned());
    }
    let folder = folder(path, None)?;
    Ok(folder.root().unwrap_or(path).to_owned())
}

/// The cache, where `huggingface_hub` has it.
fn cache() -> PathBuf {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let home = || env::home_dir().unwrap_or_default();
    let user = || set("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from);
    let hugging_face = || set("HF_HOME").map_or_else(|| user().join("huggingface"), PathBuf::from);
    set("HF_HUB_CACHE").map_or_else(|| hugging_face().join("hub"), PathBuf::from)
}
