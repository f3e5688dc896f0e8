//! How a run was begun, in its folder, and whose the folder is.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};

use burn::tensor::backend::AutodiffBackend;
use reroute_zoo::Vlm;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::data::{Example, ImageSource};
use crate::peers::PREFIX;
use crate::{Run, Settings, TuneError, state};

/// File that says how a run was begun.
const RUN: &str = "run.json";
/// File that is locked while somebody trains.
const LOCK: &str = ".lock";

/// What a run begins with, to tell it from another model, or from the same that sees pictures otherwise.
pub(crate) fn base<B: AutodiffBackend>(vlm: &Vlm<B>) -> Result<Value, TuneError> {
    Ok(json!({
        "config": format!("{:?}", vlm.config()),
        "preprocessor": format!("{:?}", vlm.preprocessor()),
        "type": vlm.dtype().name(),
        "codes": vlm.model().coded().len(),
        "weights": state::fingerprint(vlm.model())?,
    }))
}

/// Makes the folder, or compares how the run in it was begun. A run without a checkpoint has lost nothing. The
/// folder is this process's as long as the file that is returned is open.
pub(crate) fn begin(run: &Run, described: &Value) -> Result<File, TuneError> {
    let folder = run.folder;
    fs::create_dir_all(folder).map_err(TuneError::io(folder))?;
    let path = folder.join(RUN);
    if !path.exists() {
        let entries = fs::read_dir(folder).map_err(TuneError::io(folder))?;
        let names = entries.flatten().map(|entry| entry.file_name());
        let is_strange = |name: &OsString| {
            let name = name.to_string_lossy();
            !name.starts_with(RUN) && !name.starts_with(PREFIX) && name != LOCK
        };
        if { names }.any(|name| is_strange(&name)) {
            let path = folder.to_owned();
            return Err(TuneError::NotEmpty { path });
        }
    }
    let lock = folder.join(LOCK);
    let file = File::create(&lock).map_err(TuneError::io(&lock))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            let path = folder.to_owned();
            return Err(TuneError::Busy { path });
        }
        // Where files cannot be locked nobody is kept out.
        Ok(()) | Err(TryLockError::Error(_)) => {}
    }
    if !path.exists() || !state::has_any(folder)? {
        let text = format!("{described:#}\n");
        let partial = path.with_extension("json.partial");
        fs::write(&partial, text).map_err(TuneError::io(&partial))?;
        fs::rename(&partial, &path).map_err(TuneError::io(&path))?;
        return Ok(file);
    }
    if !run.resume {
        let path = folder.to_owned();
        return Err(TuneError::Taken { path });
    }
    let found = fs::read(&path).map_err(TuneError::io(&path))?;
    let other = |what: String| TuneError::OtherRun {
        path: folder.to_owned(),
        what,
    };
    let found: Value = serde_json::from_slice(&found)
        .map_err(|error| other(format!("{RUN}, or it is damaged ({error})")))?;
    match difference(&found, described) {
        Some(what) => Err(other(what)),
        None => Ok(file),
    }
}

/// What of a value is not as it was found, by name: `course.batch`.
fn difference(found: &Value, value: &Value) -> Option<String> {
    let differs = |(name, value): (&String, &Value)| {
        let found = found.get(name).unwrap_or(&Value::Null);
        match (found.is_object() && value.is_object(), found == value) {
            (_, true) => None,
            (true, false) => Some(format!("{name}.{}", difference(found, value)?)),
            (false, false) => Some(name.clone()),
        }
    };
    value.as_object()?.iter().find_map(differs)
}

/// All that decides what a run does.
pub(crate) fn described(run: &Run) -> Value {
    let Settings {
        adapter,
        trained,
        routings,
        course,
        optimizer,
    } = run.settings;
    let of = |examples: &[Example]| {
        let mut digest = Sha256::new();
        for example in examples {
            // Wherever it is written, and its pictures lie.
            let Example {
                images,
                system,
                exchanges,
                ..
            } = example;
            for image in images {
                match image {
                    ImageSource::File(path) => {
                        let bytes = fs::metadata(path).map_or(0, |file| file.len());
                        digest.update(format!("{:?} {bytes}", path.file_name()));
                    }
                    ImageSource::Bytes(bytes) => digest.update(Sha256::digest(bytes)),
                }
            }
            digest.update(format!("{system:?}{exchanges:?}"));
        }
        json!({"count": examples.len(), "sha256": state::hex(&digest.finalize())})
    };
    json!({
        "adapter": adapter.as_ref().map(|adapter| format!("{adapter:?}")),
        "trained": format!("{trained:?}"),
        "routing": routings,
        "course": course,
        "optimizer": optimizer,
        "examples": of(run.examples),
        "validation": of(run.validation),
    })
}
