//! What has been measured so far, and the file that keeps it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};

use crate::options::Section;

/// Grows section by section; written down after each.
pub struct Report {
    value: Value,
    path: Option<PathBuf>,
    failed: Vec<String>,
}

impl Report {
    /// What is known before the first section; kept nowhere if there is no path.
    pub fn new(head: Value, path: Option<&Path>) -> Self {
        Self {
            value: head,
            path: path.map(Path::to_path_buf),
            failed: Vec::new(),
        }
    }

    /// Adds what a section gave, or why it gave nothing.
    pub fn add(&mut self, section: Section, measured: anyhow::Result<Value>) -> anyhow::Result<()> {
        let name = section.to_possible_value();
        let name = name.map_or(String::new(), |name| name.get_name().to_string());
        match measured {
            Ok(value) => self.value[name] = value,
            Err(error) => {
                println!("\n{name} failed: {error:#}");
                self.value["failed"][&name] = json!(format!("{error:#}"));
                self.failed.push(name);
            }
        }
        self.keep()
    }

    /// Writes everything so far, in one step: a reader never sees half of it.
    pub fn keep(&self) -> anyhow::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let part = path.with_extension("part");
        let written = fs::write(&part, format!("{:#}\n", self.value));
        written
            .and_then(|()| fs::rename(&part, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// An error if a section failed.
    pub fn finish(self) -> anyhow::Result<()> {
        let failed = self.failed.join(", ");
        ensure!(failed.is_empty(), "not measured: {failed}");
        Ok(())
    }
}
