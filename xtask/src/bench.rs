//! `cargo xtask bench`: measures backends, and other implementations beside them, and keeps what comes
//! out as JSON and as a picture under `benches/results/`.

mod peers;
mod plot;
mod results;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

#[derive(clap::Args)]
pub struct Args {
    /// Backends to measure, one program for each.
    #[arg(long, value_delimiter = ',', default_value = "flex",
          value_parser = ["flex", "ndarray", "wgpu", "cuda"])]
    backend: Vec<String>,
    /// Layer shapes: `llava` (LLaVA-1.5-7B), `qwen` (Qwen2.5-VL-7B), or a folder with a config.json.
    #[arg(long, default_value = "llava", value_name = "NAME|DIR")]
    model: String,
    /// Budgets of the routed prefills: visual tokens of 576 that a layer works on, on average.
    #[arg(long, value_delimiter = ',', default_value = "192,128,64", value_parser = ["192", "128", "64"])]
    budgets: Vec<String>,
    /// Decoder layers.
    #[arg(long, default_value_t = 8)]
    layers: usize,
    /// Rounds that medians are taken of.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Other implementations to time in turn with ours: a folder of them (`benches/peers`), or a
    /// command that speaks their protocol (`benches/peers/README.md`).
    #[arg(long, value_name = "DIR|COMMAND")]
    compare: Vec<String>,
    /// Python with PyTorch and transformers, for `--compare`; else what REROUTE_PYTHON says, or
    /// python3.
    #[arg(long, value_name = "PROGRAM")]
    python: Option<String>,
    /// What a reader must know about this run, such as who else used the machine.
    #[arg(long)]
    note: Option<String>,
    /// Toy shapes, one round; nothing is kept.
    #[arg(long = "test")]
    smoke: bool,
    /// What to measure: prefill, decode, vision, sizes (together the default), scenes, ops; `peer` for
    /// `--compare` alone.
    sections: Vec<String>,
}

pub fn run(args: &Args, root: &Path) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let mut notes: Vec<String> = args.note.iter().cloned().collect();
    let mut backends = Vec::new();
    let only_peers =
        args.sections.iter().all(|section| section == "peer") && !args.sections.is_empty();
    for backend in args.backend.iter().filter(|_| !only_peers) {
        let out = scratch.path().join(format!("{backend}.json"));
        match measure(args, backend, &out) {
            Ok(report) => backends.push(report),
            Err(error) => notes.push(format!("{backend} was not measured: {error:#}")),
        }
    }
    let mut peers = Vec::new();
    if !args.compare.is_empty() {
        match peers::compare(args, &mut notes) {
            Ok(compared) => {
                peers::print(&compared);
                peers = compared;
            }
            Err(error) => notes.push(format!("nobody was compared: {error:#}")),
        }
    }
    for note in &notes {
        println!("note: {note}");
    }
    ensure!(
        !backends.is_empty() || !peers.is_empty(),
        "nothing was measured"
    );
    let report = results::describe(json!({
        "notes": notes,
        "backends": backends,
        "peers": peers,
    }));
    let folder = match args.smoke {
        true => scratch.path().to_path_buf(),
        false => root.join("benches/results"),
    };
    let what = match &args.sections[..] {
        [only] if only == "scenes" => "scenes",
        _ => &args.model,
    };
    let path = results::save(&report, what, &folder)?;
    let picture = path.with_extension("svg");
    let drawn = plot::draw(&report, &picture)?;
    if args.smoke {
        println!("everything runs; toy numbers are not kept");
    } else {
        println!("kept in {}", path.display());
        if drawn {
            println!("drawn in {}", picture.display());
        }
    }
    Ok(())
}

/// Builds and runs one backend's program.
fn measure(args: &Args, backend: &str, out: &Path) -> anyhow::Result<Value> {
    let mut command = program(args, backend);
    command.args(&args.sections).arg("--out").arg(out);
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the benchmark ended with {status}");
    }
    let text = fs::read(out).with_context(|| out.display().to_string())?;
    let mut report: Value = serde_json::from_slice(&text)?;
    report["model"] = json!(args.model);
    Ok(report)
}

/// The bench binary of a backend, with the flags that all its sections share.
fn program(args: &Args, backend: &str) -> Command {
    // Cargo runs the program in the folder of its package.
    let model = match args.model.as_str() {
        name @ ("llava" | "qwen") => name.into(),
        folder => Path::new(folder).canonicalize().unwrap_or(folder.into()),
    };
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["bench", "--quiet", "-p", "benches", "--no-default-features"])
        .args(["--features", backend, "--", "--model"])
        .arg(model)
        .args(["--budgets", &args.budgets.join(",")])
        .args(["--layers", &args.layers.to_string()])
        .args(["--rounds", &args.rounds.to_string()])
        .args(args.smoke.then_some("--test"));
    command
}
