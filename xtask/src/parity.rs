//! `cargo xtask parity`: run `reroute trace` on the inputs of a reference folder and compare.
//!
//! The folder has `ckpt/`, `golden.safetensors` and any number of `reroute_*.safetensors` with a
//! `.json` beside each that holds the schedule.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

#[derive(clap::Args)]
pub struct Args {
    /// Folder of reference outputs.
    #[arg(long)]
    golden: PathBuf,
    /// Backend to compare: flex, ndarray, wgpu or cuda.
    #[arg(long, default_value = "flex")]
    backend: String,
    /// Tolerance of logits, absolute.
    #[arg(long, default_value_t = 5e-4)]
    logits: f64,
    /// Tolerance of scores, absolute.
    #[arg(long, default_value_t = 1e-5)]
    scores: f64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let inputs = args.golden.join("golden.safetensors");
    let mut failures = 0;
    for reference in references(&args.golden)? {
        let name = reference
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let routing = routing(&reference, scratch.path())?;
        let out = scratch.path().join(format!("{name}.out.safetensors"));
        let expected = fs::read(&reference)?;
        let expected = SafeTensors::deserialize(&expected)?;
        let steps = expected
            .tensor("decode.ids")
            .map_or(0, |ids| ids.shape()[1]);
        trace(args, &inputs, &out, &routing, steps)?;
        let found = fs::read(&out)?;
        let found = SafeTensors::deserialize(&found)?;
        failures += compare(args, &name, &expected, &found)?;
    }
    if failures > 0 {
        bail!("{failures} comparisons failed");
    }
    Ok(())
}

fn references(golden: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(golden).with_context(|| golden.display().to_string())?;
    let mut files: Vec<PathBuf> = entries
        .map(|e| Ok(e?.path()))
        .collect::<anyhow::Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    Ok(files)
}

/// The schedule that belongs to a reference file, as `--routing` takes it.
fn routing(reference: &Path, scratch: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(reference.with_extension("json"))?;
    let described: Value = serde_json::from_str(&text)?;
    let config = &described["config"];
    if config.is_null() {
        return Ok("dense".into());
    }
    let stage = |layer: &Value, ratio: &Value| json!({"layer": layer, "keep_ratio": ratio});
    let stages: Vec<Value> = match config["drop_layers"].as_array() {
        Some(layers) => {
            let ratio = |at: usize| &config["keep_ratios"][at];
            layers
                .iter()
                .enumerate()
                .map(|(at, layer)| stage(layer, ratio(at)))
                .collect()
        }
        None => vec![stage(&config["scoring_layer"], &config["keep_ratio"])],
    };
    let action = match described["action"].as_str() {
        Some("physical_delete") => "remove",
        _ => "reroute",
    };
    let monotonic = config["monotonic"].as_bool().unwrap_or(false);
    let schedule = json!({"action": action, "monotonic": monotonic, "stages": stages});
    let name = reference.with_extension("json");
    let path = scratch.join(name.file_name().unwrap_or_default());
    fs::write(&path, schedule.to_string())?;
    Ok(path.display().to_string())
}

fn trace(
    args: &Args,
    inputs: &Path,
    out: &Path,
    routing: &str,
    steps: usize,
) -> anyhow::Result<()> {
    let status = Command::new(env!("CARGO"))
        .args([
            "run",
            "--quiet",
            "--release",
            "-p",
            "reroute-cli",
            "--bin",
            "reroute",
        ])
        .args([
            "--no-default-features",
            "--features",
            &args.backend,
            "--",
            "trace",
            "--model",
        ])
        .arg(args.golden.join("ckpt"))
        .arg("--inputs")
        .arg(inputs)
        .arg("--out")
        .arg(out)
        .args(["--routing", routing, "--new-tokens", &steps.to_string()])
        .stdout(std::process::Stdio::null())
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("reroute trace ended with {status}");
    }
    Ok(())
}

fn compare(
    args: &Args,
    name: &str,
    expected: &SafeTensors,
    found: &SafeTensors,
) -> anyhow::Result<usize> {
    let mut failures = 0;
    let mut report = |what: &str, error: f64, tolerance: f64| {
        let verdict = if error <= tolerance { "ok  " } else { "FAIL" };
        failures += usize::from(error > tolerance);
        println!("{verdict} {name:<34} {what:<22} {error:>9.2e}  (≤ {tolerance:.0e})");
    };
    let logits = floats(&expected.tensor("logits")?)?;
    let last = floats(&found.tensor("logits")?)?;
    report(
        "logits",
        distance(&logits[logits.len() - last.len()..], &last),
        args.logits,
    );
    for key in found
        .names()
        .into_iter()
        .filter(|key| key.starts_with("routing."))
    {
        let Ok(reference) = expected.tensor(key) else {
            continue;
        };
        let tolerance = if key.ends_with("scores") {
            args.scores
        } else {
            0.0
        };
        report(
            key,
            distance(&floats(&reference)?, &floats(&found.tensor(key)?)?),
            tolerance,
        );
    }
    for (key, tolerance) in [
        ("rope.position_ids", 0.0),
        ("rope_deltas", 0.0),
        ("decode.ids", 0.0),
        ("decode.logits", args.logits),
    ] {
        if let (Ok(reference), Ok(ours)) = (expected.tensor(key), found.tensor(key)) {
            report(
                key,
                distance(&floats(&reference)?, &floats(&ours)?),
                tolerance,
            );
        }
    }
    Ok(failures)
}

/// Largest absolute difference; infinite when the lengths differ.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |worst, d| {
        if d.is_nan() {
            f64::INFINITY
        } else {
            worst.max(d)
        }
    })
}

fn floats(view: &TensorView) -> anyhow::Result<Vec<f64>> {
    let bytes = view.data();
    Ok(match view.dtype() {
        Dtype::F32 => {
            let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into();
            bytes.chunks_exact(4).map(value).collect()
        }
        Dtype::I64 => {
            let value = |b: &[u8]| i64::from_le_bytes(std::array::from_fn(|i| b[i])) as f64;
            bytes.chunks_exact(8).map(value).collect()
        }
        other => bail!("type {other:?} is not compared"),
    })
}
