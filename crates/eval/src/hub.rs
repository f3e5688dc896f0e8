//! Where the files of a split are: a folder as the hub has it, or the hub's cache.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{EvalError, Task};

/// The owner of the data before it was renamed.
const FORMER_OWNER: &str = "lmms-lab";

/// The Parquet files of a split, in order.
///
/// `folder` may be a copy of the repository, a folder of such copies by their names, a snapshot of the hub's cache,
/// the cache's folder of the repository, or the cache.
pub(crate) fn files(
    task: Task,
    folder: &Path,
    config: Option<&str>,
    split: &str,
) -> Result<Vec<PathBuf>, EvalError> {
    let repository = task.repository();
    if !folder.is_dir() {
        let path = folder.to_owned();
        return Err(EvalError::NoFolder { path, repository });
    }
    let (owner, name) = repository.split_once('/').unwrap_or(("", repository));
    // One table of expressions looks like another.
    let is_of = |task: &&Task| {
        let name = task.repository().rsplit('/').next().unwrap_or_default();
        let last = folder.file_name().and_then(|last| last.to_str());
        last.is_some_and(|last| last == name || last.ends_with(&format!("--{name}")))
    };
    let other = { Task::ALL.iter().find(is_of) }.filter(|_| !is_of(&&task));
    let mut roots = vec![folder.to_owned(), folder.join(name)];
    for owner in [owner, FORMER_OWNER] {
        roots.push(folder.join(format!("datasets--{owner}--{name}")));
    }
    let folders = match config {
        Some(config) => vec![config.to_string()],
        None => vec!["data".into(), "default".into(), String::new()],
    };
    for root in roots.into_iter().map(snapshot) {
        for below in &folders {
            // The hub's own conversions have a folder for each split.
            for (folder, prefix) in [
                (root.join(below), Some(split)),
                (root.join(below).join(split), None),
            ] {
                let found = parts(&folder, prefix)?;
                match other {
                    _ if found.is_empty() => {}
                    None => return Ok(found),
                    Some(other) => {
                        return Err(EvalError::OtherData {
                            path: root.clone(),
                            given: other.repository(),
                            wanted: repository,
                        });
                    }
                }
            }
        }
    }
    let below = config.unwrap_or("data");
    Err(EvalError::NoFiles {
        path: folder.to_owned(),
        looked_for: format!("{below}/{split}-00000-of-0000N.parquet"),
        repository,
    })
}

/// The snapshot that a folder of the cache stands for.
fn snapshot(folder: PathBuf) -> PathBuf {
    let snapshots = folder.join("snapshots");
    let main = fs::read_to_string(folder.join("refs/main"));
    let named = main.map(|commit| snapshots.join(commit.trim()));
    let named = named.ok().filter(|folder| folder.is_dir());
    let any = || {
        let entries = fs::read_dir(&snapshots).ok()?;
        let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        found.sort();
        found.pop()
    };
    named.or_else(any).unwrap_or(folder)
}

/// The Parquet files of a folder whose names begin with that of the split, or all of them.
fn parts(folder: &Path, split: Option<&str>) -> Result<Vec<PathBuf>, EvalError> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(Vec::new());
    };
    let is_part = |path: &PathBuf| {
        let stem = path.file_name().and_then(|name| name.to_str());
        let Some(stem) = stem.and_then(|name| name.strip_suffix(".parquet")) else {
            return false;
        };
        let Some(split) = split else { return true };
        let rest = stem.strip_prefix(split);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    let mut found: Vec<PathBuf> = { entries.flatten() }
        .map(|entry| entry.path())
        .filter(is_part)
        .collect();
    found.sort();
    // `split-00002-of-00005`, and perhaps a checksum behind it.
    let numbers = |path: &Path| {
        let (before, after) = path.file_stem()?.to_str()?.split_once("-of-")?;
        let number = before.rsplit('-').next()?.parse::<usize>().ok()?;
        let count = after.split('-').next()?.parse::<usize>().ok()?;
        Some((number, count))
    };
    if let Some((_, parts)) = found.iter().find_map(|path| numbers(path)) {
        let have: Vec<usize> = { found.iter() }
            .filter_map(|path| Some(numbers(path)?.0))
            .collect();
        // What an earlier release has left beside them would be counted, too.
        let belongs = |at: usize| match numbers(&found[at]) {
            Some((number, of)) => of == parts && number < parts && !have[..at].contains(&number),
            None => false,
        };
        if let Some(at) = (0..found.len()).find(|&at| !belongs(at)) {
            return Err(EvalError::ExtraPart {
                path: found[at].clone(),
                parts,
            });
        }
        if let Some(missing) = (0..parts).find(|number| !have.contains(number)) {
            let split = split.unwrap_or("part");
            let name = format!("{split}-{missing:05}-of-{parts:05}.parquet");
            return Err(EvalError::MissingPart {
                path: folder.join(name),
                parts,
            });
        }
    }
    Ok(found)
}
