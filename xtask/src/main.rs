//! Developer tasks, one file per command. Light: what needs a backend is a program of its own that
//! a task spawns.

mod bench;
mod convert;
mod make_random;
mod parity;
mod small_vlm;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer tasks")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check the house rules that no other tool checks.
    Tidy,
    /// Compare `reroute trace` with a folder of reference outputs.
    Parity(parity::Args),
    /// Convert a checkpoint into a form that loads fast, or back.
    Convert(convert::Args),
    /// Make a checkpoint of random weights.
    MakeRandom(make_random::Args),
    /// Measure backends, and other implementations beside them.
    Bench(Box<bench::Args>),
    /// Train small models from scratch, and measure routing on them.
    SmallVlm(small_vlm::Args),
}

fn main() -> ExitCode {
    match run(&Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Tidy => tidy::run(&root()),
        Command::Parity(args) => parity::run(args),
        Command::Convert(args) => convert::run(args),
        Command::MakeRandom(args) => make_random::run(args, &root()),
        Command::Bench(args) => bench::run(args, &root()),
        Command::SmallVlm(args) => small_vlm::run(args, &root()),
    }
}

/// The workspace that cargo runs the task in.
fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| ".".into());
    let manifest = Path::new(&manifest);
    manifest.parent().unwrap_or(manifest).to_path_buf()
}
