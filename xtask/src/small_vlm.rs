//! `cargo xtask small-vlm`: trains and measures small models, in a program of its own (`examples/small-vlm`).

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What the program is given: `train` or `evaluate`, `--model narrow`, …; `--help` tells all.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENTS"
    )]
    arguments: Vec<OsString>,
}

/// Builds the example with optimisation and runs it. It has the lock file of the workspace.
pub(crate) fn run(args: &Args, root: &Path) -> anyhow::Result<()> {
    let example = root.join("examples/small-vlm");
    let lock = example.join("Cargo.lock");
    if !lock.exists() {
        std::fs::copy(root.join("Cargo.lock"), &lock)
            .with_context(|| format!("writing {}", lock.display()))?;
    }
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["run", "--quiet", "--release", "--manifest-path"])
        .arg(example.join("Cargo.toml"))
        .arg("--")
        .args(&args.arguments)
        // A step frees and takes the same memory in every layer: it is not given back in between.
        .env("MIMALLOC_PURGE_DELAY", "10000")
        .status()
        .context("cargo does not start")?;
    ensure!(status.success(), "examples/small-vlm has failed");
    Ok(())
}
