//! What a command checks before the weights are read, which may take minutes.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use reducers::Plan;
use reroute::GenerationOptions;
use reroute_zoo::{Outline, Visual};

use crate::args::{GenerationArgs, ModelArgs, VisualArgs};
use crate::{draw, open};

/// A model of which the settings are known and the weights not yet read.
pub(crate) struct Known(Outline);

impl Known {
    /// Reads the settings of the model that the flags name.
    pub(crate) fn of(args: &ModelArgs) -> anyhow::Result<Self> {
        let folder = args.folder()?;
        Ok(Self(Outline::open(&folder, &args.options(&folder)?)?))
    }

    /// What can be known of the model.
    pub(crate) fn outline(&self) -> &Outline {
        &self.0
    }

    /// A preset by name, or a plan from a JSON file.
    pub(crate) fn plan(&self, routing: &str) -> anyhow::Result<Plan> {
        open::plan(routing, &self.0.config)
    }

    /// Images, then videos, as far as the model can look at them.
    pub(crate) fn visuals(&self, args: &VisualArgs) -> anyhow::Result<Vec<Visual>> {
        let visuals = open::visuals(args)?;
        for visual in &visuals {
            self.0.check(visual)?;
        }
        Ok(visuals)
    }
}

/// Whether the settings of sampling are in range.
pub(crate) fn check_generation(args: &GenerationArgs) -> anyhow::Result<()> {
    open::generation(args, GenerationOptions::default()).map(drop)
}

/// Whether a file can be written there, and is none of those that are read, nor in a folder that is.
pub(crate) fn check_file<'a>(
    path: &Path,
    read: impl IntoIterator<Item = &'a PathBuf>,
) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    if path.is_dir() {
        bail!("{}: it is a folder, give the name of a file", cannot());
    }
    let found = path.canonicalize().ok();
    let read: Vec<PathBuf> = { read.into_iter() }
        .filter_map(|path| path.canonicalize().ok())
        .collect();
    // A link in a folder that is read belongs to it, wherever it leads.
    let folder = Path::new(".").join(path).parent().map(Path::canonicalize);
    let folder = folder.and_then(Result::ok);
    let is_read =
        |found: &PathBuf| read.contains(found) || folder.iter().any(|folder| read.contains(folder));
    if found.as_ref().is_some_and(is_read) {
        bail!("{}: it is read here, give another name", cannot());
    }
    if found.as_ref().is_some_and(|path| !path.is_file()) {
        // A device or a pipe.
        return Ok(());
    }
    let path = found.as_deref().unwrap_or(path);
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    try_writing(folder).with_context(cannot)
}

/// Whether a picture can be written there.
pub(crate) fn check_picture<'a>(
    path: &Path,
    read: impl IntoIterator<Item = &'a PathBuf>,
) -> anyhow::Result<()> {
    draw::Format::of(path)?;
    check_file(path, read)
}

/// Whether a folder is there, or can be made, and files can be written into it.
pub(crate) fn check_folder(path: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot make the folder {}", path.display());
    let given: PathBuf = Path::new(".").join(path);
    let there = given.ancestors().find(|folder| folder.exists());
    let there = there.unwrap_or(Path::new("."));
    if !there.is_dir() {
        bail!("{}: {} is a file", cannot(), there.display());
    }
    try_writing(there).with_context(cannot)
}

/// Makes a file that is gone at once.
fn try_writing(folder: &Path) -> std::io::Result<()> {
    tempfile::tempfile_in(folder).map(drop)
}
