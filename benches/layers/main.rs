//! LLaVA-1.5-7B or Qwen2.5-VL-7B layer shapes with random weights: vision, prefill, selection and
//! decoding, then a table of measured speed-ups beside their FLOP ceilings.
//!
//! - `cargo bench -p benches`: everything; about 10 minutes on two cores.
//! - `cargo bench -p benches -- decode`: the criterion benchmarks whose names match.
//! - `cargo bench -p benches -- table`: the table alone.
//! - `cargo bench -p benches -- tower`: Qwen2.5-VL-7B's vision tower against the number of patches.
//! - `cargo bench -p benches -- ops`: the time of every operation at several row counts.
//! - `cargo bench -p benches -- --test`, `cargo test -p benches --benches`: everything once, at
//!   toy shapes, in a second or so.
//!
//! Environment: see [`options::Options`].

mod ops;
mod options;
mod report;
mod setup;
mod single;
mod table;
mod timing;
mod tower;

use std::process::ExitCode;

use options::Options;
use peak_alloc::PeakAlloc;
use setup::Setup;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> anyhow::Result<()> {
    let options = Options::from_environment()?;
    if options.tower {
        let report = tower::run(&options)?;
        if let Some(name) = options.save.as_ref().filter(|_| !options.smoke) {
            let path = report::save(report, "qwen-tower", name)?;
            println!("kept in {}", path.display());
        }
        if !options.smoke {
            return Ok(());
        }
    }
    let mut criterion = single::criterion();
    let setup = Setup::new(&options)?;
    println!("{}", setup.describe());
    if options.smoke {
        println!("smoke test at toy shapes: the numbers below mean nothing");
    }
    if options.criterion {
        single::run(&mut criterion, &setup)?;
        criterion.final_summary();
    }
    if options.ops {
        ops::run(&setup)?;
    }
    if options.table {
        let report = table::run(&setup, &options)?;
        match &options.save {
            Some(_) if options.smoke => println!("not kept: toy shapes"),
            Some(name) => {
                let path = report::save(report.to_json(), options.shapes.name(), name)?;
                println!("kept in {}", path.display());
            }
            None => {}
        }
    }
    Ok(())
}
