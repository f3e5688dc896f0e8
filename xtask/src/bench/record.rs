//! What a run has measured so far, where it came from, and the file that keeps it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use serde_json::{Value, json};

use super::plot;

/// Grows while a run goes on; written down again and again, into one file.
pub struct Record {
    /// What a reader must know.
    pub notes: Vec<String>,
    /// Reports of the backends' programs.
    pub backends: Vec<Value>,
    /// Times of ours and of others.
    pub peers: Vec<Value>,
    date: Option<String>,
    commit: Option<String>,
    uncommitted_changes: Option<bool>,
    /// What tells this run from others of its day: a model or a type that is not the usual one.
    what: String,
    folder: PathBuf,
    path: Option<PathBuf>,
}

impl Record {
    /// Nothing yet, of the state that the workspace is in now.
    pub fn new(root: &Path, folder: &Path, what: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let changes = output(root, "git", &["status", "--porcelain", "-uno"]);
        Ok(Self {
            notes: Vec::new(),
            backends: Vec::new(),
            peers: Vec::new(),
            date: output(root, "date", &["-u", "+%F"]),
            commit: output(root, "git", &["rev-parse", "HEAD"]),
            uncommitted_changes: changes.map(|text| !text.is_empty()),
            what: what.into(),
            folder: folder.into(),
            path: None,
        })
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.backends.is_empty() && self.peers.is_empty()
    }

    /// When and of what everything is.
    pub fn origin(&self) -> Value {
        json!({
            "date": self.date,
            "commit": self.commit,
            "uncommitted_changes": self.uncommitted_changes,
            "notes": self.notes,
        })
    }

    /// Writes everything so far, and a picture of it if there is something to draw. The first time
    /// decides on the file: `DATE-DEVICE.json`, or `DATE-DEVICE-MODEL-TYPE.json` for others than the
    /// default ones; with a number if there is one of that name.
    pub fn keep(&mut self) -> anyhow::Result<PathBuf> {
        let mut measured = self.backends.iter().chain(&self.peers);
        let device = measured.find_map(|it| it["device"].as_str());
        let mut report = self.origin();
        report["device"] = json!(device);
        report["backends"] = json!(self.backends);
        report["peers"] = json!(self.peers);
        let path = match &self.path {
            Some(path) => path.clone(),
            None => free(&self.folder, &self.name(device.unwrap_or("unknown"))),
        };
        write(&path, &report)?;
        self.path = Some(path.clone());
        plot::draw(&report, &path.with_extension("svg"))?;
        Ok(path)
    }

    fn name(&self, device: &str) -> String {
        let date = self.date.as_deref().unwrap_or("undated");
        let words = [date, device, &self.what].map(slug);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
        words.join("-")
    }
}

/// Writes a file that is there as a whole or not at all.
pub fn write(path: &Path, report: &Value) -> anyhow::Result<()> {
    let part = path.with_extension("part");
    let written = fs::write(&part, format!("{report:#}\n"));
    written
        .and_then(|()| fs::rename(&part, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The first of `NAME.json`, `NAME-2.json`, … that is not there.
fn free(folder: &Path, name: &str) -> PathBuf {
    let mut path = folder.join(format!("{name}.json"));
    for number in 2.. {
        if !path.exists() {
            break;
        }
        path = folder.join(format!("{name}-{number}.json"));
    }
    path
}

/// Letters and digits, in words between hyphens.
fn slug(text: &str) -> String {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    words.join("-")
}

/// What a program prints in the workspace, if it runs and succeeds.
fn output(root: &Path, program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    let output = command.args(arguments).current_dir(root).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
    output.status.success().then_some(text)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::Record;

    #[test]
    fn a_result_is_named_after_day_device_and_other_models_and_replaces_none() {
        let folder = tempfile::tempdir().unwrap();
        for (model, name) in [
            ("", "2026-01-02-fast-r-processor-2-ghz.json"),
            ("", "2026-01-02-fast-r-processor-2-ghz-2.json"),
            ("qwen", "2026-01-02-fast-r-processor-2-ghz-qwen.json"),
            (
                "My_Model bf16",
                "2026-01-02-fast-r-processor-2-ghz-my-model-bf16.json",
            ),
        ] {
            let mut record = Record::new(folder.path(), folder.path(), model).unwrap();
            record.date = Some("2026-01-02".into());
            record.peers = vec![json!({"device": "Fast(R) Processor @ 2 GHz"})];
            let path = record.keep().unwrap();
            assert_eq!(path, folder.path().join(name));
            assert!(path.is_file());
        }
    }

    #[test]
    fn what_comes_later_goes_into_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = Record::new(folder.path(), folder.path(), "").unwrap();
        record.backends = vec![json!({"device": "card", "prefill": 1})];
        let first = record.keep().unwrap();
        record.backends = vec![json!({"device": "card", "prefill": 1, "decode": 2})];
        record.notes.push("busy".into());
        assert_eq!(record.keep().unwrap(), first);
        let kept: Value = serde_json::from_slice(&std::fs::read(&first).unwrap()).unwrap();
        assert_eq!(kept["device"], "card");
        assert_eq!(kept["backends"][0]["decode"], 2);
        assert_eq!(kept["notes"][0], "busy");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
