//! Measures one backend at the layer shapes of LLaVA-1.5-7B, Qwen2.5-VL-7B or any `config.json`, with
//! random weights. `cargo xtask bench` runs it for several backends, keeps and draws the results.
//!
//! - `cargo bench -p benches`: prefill, decode, vision, sizes; about half an hour on two cores.
//! - `cargo bench -p benches -- scenes`: accuracy, drift and times of every method on the built-in model.
//! - `cargo bench -p benches -- precision`: what types of fewer bits cost in accuracy there.
//! - `cargo bench -p benches -- kv`: keys and values in every type: error, accuracy on the built-in model, time.
//! - `cargo bench -p benches -- sessions`: requests at once, on the built-in model or any checkpoint.
//! - `cargo bench -p benches -- decode --rounds 3`: some of it; `--help` lists the rest.
//! - `cargo test -p benches`: everything once in every type of the backend, at toy shapes, in seconds.

mod decode;
mod kv;
mod model;
mod ops;
mod options;
mod peak;
mod peer;
mod precision;
mod prefill;
mod reference;
mod report;
mod scenes;
mod sessions;
mod setup;
mod sizes;
mod timing;
mod training;
mod vision;

use std::io;
use std::process::ExitCode;

use anyhow::ensure;
use clap::ValueEnum;
use mimalloc::MiMalloc;
use model::Model;
use options::{Options, Section, Type};
use peak::Peak;
use peakmem_alloc::PeakMemAlloc;
use report::Report;
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
    let Some(mut options) = Options::from_command_line()? else {
        return Ok(());
    };
    // First of all: a backend may tell the card's name only before it computes.
    let adapter = backend::adapter().name;
    let device = backend::device()?;
    let model = match options.smoke {
        true => Model::toy()?,
        false => Model::open(&options.model)?,
    };
    let dtype = options.dtype.floats();
    let supported = backend::dtypes(&device);
    ensure!(
        supported.contains(&dtype),
        "{} has no {} on {adapter}: choose another --dtype",
        backend::NAME,
        options.dtype.name()
    );
    if options.names(Section::Peer) {
        let model = model.with_distinct_layers(peer::LAYERS);
        let setup = Setup::new(&model, peer::LAYERS, options.dtype, &device)?;
        return peer::serve(&setup, &adapter, io::stdin().lock(), io::stdout());
    }
    if !options.is_test() {
        return measure(&model, &adapter, &device, &options);
    }
    for dtype in Type::value_variants() {
        if supported.contains(&dtype.floats()) {
            options.dtype = *dtype;
            measure(&model, &adapter, &device, &options)?;
        }
    }
    Ok(())
}

/// Measures what the options ask for, section by section: what fails takes no other down.
fn measure(model: &Model, adapter: &str, device: &Device, options: &Options) -> anyhow::Result<()> {
    if options.smoke {
        println!("smoke test at toy shapes: the numbers below mean nothing");
    }
    println!("Backend {} on {adapter}", backend::NAME);
    let peak = Peak::measure(device, options)?;
    let head = json!({
        "backend": backend::NAME,
        "device": adapter,
        "threads": std::thread::available_parallelism().map_or(1, usize::from),
        "model": options.model,
        "dtype": options.dtype.name(),
        "peak": peak,
        "peak_memory": timing::PEAK_MEMORY,
    });
    let mut report = Report::new(head, options.out.as_deref());
    report.keep()?;
    let mut setup = None;
    for section in Section::value_variants() {
        if options.wants(*section) {
            let measured = measure_section(*section, &mut setup, model, &peak, device, options);
            report.add(*section, measured)?;
        }
    }
    report.finish()
}

/// Measures one section. All that need a decoder share one.
fn measure_section(
    section: Section,
    setup: &mut Option<Setup>,
    model: &Model,
    peak: &Peak,
    device: &Device,
    options: &Options,
) -> anyhow::Result<Value> {
    match section {
        Section::Scenes => return Ok(json!(scenes::run(device, options)?)),
        Section::Precision => return Ok(json!(precision::run(device, options)?)),
        Section::Sessions => return Ok(json!(sessions::run(device, options)?)),
        Section::Vision => return vision::run(model, peak, device, options),
        Section::Training => return Ok(json!(training::run(model, device, options)?)),
        _ => (),
    }
    let setup = match setup {
        Some(setup) => setup,
        None => setup.insert(Setup::new(model, options.layers, options.dtype, device)?),
    };
    Ok(match section {
        Section::Prefill => json!(prefill::run(setup, model, peak, options)?),
        Section::Decode => json!(decode::run(setup, model, options)?),
        Section::Sizes => json!(sizes::run(setup, model, peak, options)?),
        Section::Kv => json!(kv::run(setup, model, device, options)?),
        Section::Ops => json!(ops::run(setup)?),
        // A smoke test of the protocol.
        _ => json!(peer::serve(setup, "", &b"\n"[..], io::stdout())?),
    })
}
