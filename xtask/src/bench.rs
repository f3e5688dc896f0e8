//! `cargo xtask bench`: one benchmark binary for the chosen backend.

use std::process::Command;

use anyhow::{Context, bail};

#[derive(clap::Args)]
pub struct Args {
    /// Backend to measure: flex, ndarray, wgpu or cuda.
    #[arg(long, default_value = "flex")]
    backend: String,
    /// Passed on to the benchmark (criterion's flags and filters).
    #[arg(last = true)]
    rest: Vec<String>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let status = Command::new(env!("CARGO"))
        .args([
            "bench",
            "-p",
            "benches",
            "--no-default-features",
            "--features",
            &args.backend,
        ])
        .arg("--")
        .args(&args.rest)
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the benchmark ended with {status}");
    }
    Ok(())
}
