//! Measures one backend at the layer shapes of LLaVA-1.5-7B, Qwen2.5-VL-7B or any `config.json`, with
//! random weights. `cargo xtask bench` runs it for several backends, keeps and draws the results.
//!
//! - `cargo bench -p benches`: prefill, decode, vision, sizes; about half an hour on two cores.
//! - `cargo bench -p benches -- scenes`: accuracy, drift and times of every method on the built-in model.
//! - `cargo bench -p benches -- decode --rounds 3`: some of it; `--help` lists the rest.
//! - `cargo test -p benches`: everything once, at toy shapes, in seconds.

mod decode;
mod model;
mod ops;
mod options;
mod peak;
mod peer;
mod prefill;
mod reference;
mod scenes;
mod setup;
mod sizes;
mod timing;
mod vision;

use std::process::ExitCode;
use std::{fs, io};

use anyhow::Context;
use mimalloc::MiMalloc;
use model::{DISTINCT_LAYERS, Model};
use options::{Options, Section};
use peak::Peak;
use peakmem_alloc::PeakMemAlloc;
use reroute_cli::backend::{self, Device};
use reroute_cli::heap;
use serde_json::{Value, json};
use setup::Setup;

#[global_allocator]
static HEAP: PeakMemAlloc<MiMalloc> = PeakMemAlloc::new(MiMalloc);

fn main() -> ExitCode {
    heap::keep_freed_memory();
    // From one of the pool's own threads an operation starts several times faster than from outside.
    match rayon::scope(|_| run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> anyhow::Result<()> {
    let Some(options) = Options::from_command_line()? else {
        return Ok(());
    };
    let device = backend::device()?;
    let model = match options.smoke {
        true => Model::toy()?,
        false => Model::open(&options.model)?,
    };
    if options.names(Section::Peer) {
        let setup = Setup::new(&model, DISTINCT_LAYERS, &device)?;
        return peer::serve(&setup, io::stdin().lock(), io::stdout());
    }
    let report = measure(&model, &device, &options)?;
    if let Some(path) = &options.out {
        let cannot = || format!("cannot write {}", path.display());
        fs::write(path, format!("{report:#}\n")).with_context(cannot)?;
    }
    Ok(())
}

/// Measures what the options ask for.
fn measure(model: &Model, device: &Device, options: &Options) -> anyhow::Result<Value> {
    if options.smoke {
        println!("smoke test at toy shapes: the numbers below mean nothing");
    }
    let adapter = backend::adapter();
    println!("Backend {} on {}", backend::NAME, adapter.name);
    let peak = Peak::measure(device, options)?;
    let mut report = json!({
        "backend": backend::NAME,
        "device": adapter.name,
        "threads": std::thread::available_parallelism().map_or(1, usize::from),
        "model": options.model,
        "peak": peak,
    });
    if options.wants(Section::Scenes) {
        report["scenes"] = json!(scenes::run(device, options)?);
    }
    if options.wants(Section::Vision) {
        report["vision"] = vision::run(model, &peak, device, options)?;
    }
    let decodes = [
        Section::Prefill,
        Section::Decode,
        Section::Sizes,
        Section::Ops,
    ];
    if decodes.iter().any(|section| options.wants(*section)) {
        let setup = Setup::new(model, options.layers, device)?;
        if options.wants(Section::Prefill) {
            report["prefill"] = json!(prefill::run(&setup, model, &peak, options)?);
        }
        if options.wants(Section::Decode) {
            report["decode"] = json!(decode::run(&setup, model, options)?);
        }
        if options.wants(Section::Sizes) {
            report["sizes"] = json!(sizes::run(&setup, model, options)?);
        }
        if options.wants(Section::Ops) {
            ops::run(&setup)?;
        }
        if options.wants(Section::Peer) {
            peer::serve(&setup, &b"\n"[..], io::stdout())?;
        }
    }
    Ok(report)
}
