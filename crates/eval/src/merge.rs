//! Shards joined to the whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::record::{self, Header, Records, file_name};
use crate::{EvalError, Shard};

/// Joins the records of shards in these folders and writes them whole into `to`. Routings stay in the order of their
/// names, dense first.
///
/// # Errors
/// [`EvalError::Merge`] if a sample is there twice or not at all, or if the shards are of different runs;
/// [`EvalError::OtherRun`] if `to` has records of another run, [`EvalError::Busy`] if one is under way there.
pub fn merge(folders: &[PathBuf], to: &Path) -> Result<Vec<Records>, EvalError> {
    let mut found: BTreeMap<(bool, String), Vec<(PathBuf, Records)>> = BTreeMap::new();
    for folder in folders {
        for path in files(folder)? {
            let records = record::read(&path)?;
            let routing = records.header.routing.clone();
            let key = (routing != crate::summary::DENSE, routing);
            found.entry(key).or_default().push((path, records));
        }
    }
    if found.is_empty() {
        let folders: Vec<String> = folders
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        return Err(refuse(format!(
            "{} has no records of shards (records-…-shard-i-of-n.jsonl)",
            folders.join(", ")
        )));
    }
    let mut merged = Vec::new();
    for ((_, routing), shards) in found {
        merged.push(joined(&routing, shards)?);
    }
    fs::create_dir_all(to).map_err(EvalError::io(to))?;
    let path_of = |records: &Records| to.join(file_name(&records.header.routing, Shard::default()));
    let _lock = crate::run::lock(to, Shard::default())?;
    // The same run may be merged again; what another has left there stays.
    for records in &merged {
        let path = path_of(records);
        if path.exists() {
            let old = record::read(&path)?;
            old.header.check(&path, &records.header)?;
        }
    }
    for records in &merged {
        record::write(&path_of(records), records)?;
    }
    Ok(merged)
}

/// The records of shards in a folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>, EvalError> {
    let entries = fs::read_dir(folder).map_err(EvalError::io(folder))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(EvalError::io(folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let is_shard = |name: &str| {
            name.starts_with("records-") && name.contains("-shard-") && name.ends_with(".jsonl")
        };
        if name.is_some_and(is_shard) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn joined(routing: &str, shards: Vec<(PathBuf, Records)>) -> Result<Records, EvalError> {
    let mut records = BTreeMap::new();
    let mut from: BTreeMap<usize, &Path> = BTreeMap::new();
    let whole = |header: &Header| Header {
        shard: Shard::default(),
        ..header.clone()
    };
    let Some((first_path, first)) = shards.first() else {
        return Err(refuse(format!("{routing} has no shards")));
    };
    let header = whole(&first.header);
    for (path, shard) in &shards {
        if let Some((field, was, now)) = header.differs(&whole(&shard.header)) {
            return Err(refuse(format!(
                "{} and {} are of different runs: {field} is {was} and {now}; merge shards of one run",
                first_path.display(),
                path.display()
            )));
        }
        for (&sample, record) in &shard.records {
            if let Some(other) = from.insert(sample, path) {
                return Err(refuse(format!(
                    "sample {sample} of {routing} is in {} and in {}: name every shard once",
                    other.display(),
                    path.display()
                )));
            }
            records.insert(sample, record.clone());
        }
    }
    let missing: Vec<usize> = (0..header.samples)
        .filter(|sample| !records.contains_key(sample))
        .collect();
    if !missing.is_empty() {
        let parts = shards.iter().map(|(_, shard)| shard.header.shard.of).max();
        let parts = parts.unwrap_or(1);
        let of = |index| Shard { index, of: parts };
        let mut lacking = (1..=parts).filter(|&index| {
            let range = of(index).samples(header.samples);
            missing.iter().any(|sample| range.contains(sample))
        });
        let lacking: Vec<String> = { &mut lacking }
            .map(|index| format!("{index}/{parts}"))
            .collect();
        return Err(refuse(format!(
            "{} of {} samples of {routing} are missing ({}), of shard {}: run it again with --resume",
            missing.len(),
            header.samples,
            ranges(&missing),
            lacking.join(", ")
        )));
    }
    Ok(Records { header, records })
}

/// `3-7, 12`, and how many more.
fn ranges(numbers: &[usize]) -> String {
    const SHOWN: usize = 5;
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match ranges.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => ranges.push((number, number)),
        }
    }
    let shown = ranges
        .iter()
        .take(SHOWN)
        .map(|(start, end)| match start == end {
            true => start.to_string(),
            false => format!("{start}-{end}"),
        });
    let mut shown: Vec<String> = shown.collect();
    if ranges.len() > SHOWN {
        shown.push("…".into());
    }
    shown.join(", ")
}

fn refuse(reason: String) -> EvalError {
    EvalError::Merge { reason }
}
