//! `cargo xtask convert`: a checkpoint in another form, by `reroute convert`.

use std::process::{Command, exit};

use anyhow::Context;

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// What `reroute convert` takes; `--help` lists it.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let status = Command::new(env!("CARGO"))
        .args([
            "run",
            "--quiet",
            "--release",
            "-p",
            "reroute-cli",
            "--",
            "convert",
        ])
        .args(&args.rest)
        .status()
        .context("cannot start cargo")?;
    match status.success() {
        true => Ok(()),
        false => exit(status.code().unwrap_or(1)), // It has said why.
    }
}
