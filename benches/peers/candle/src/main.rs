//! Times decoder layers in candle, by the protocol of `../README.md`.

use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::llama::{Cache, Config, Llama};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

const TOKENS: usize = 8;

/// How often to measure until a difference is positive. The last one is told as it is.
const TRIES: usize = 5;

/// What every peer runs: see `../README.md`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    rows: usize,
    dtype: String,
    runs_on: String,
}

fn config(shape: &Shape) -> anyhow::Result<Config> {
    ensure!(
        (shape.dtype.as_str(), shape.runs_on.as_str()) == ("f32", "cpu"),
        "candle runs f32 on the CPU here, not {} on {}",
        shape.dtype,
        shape.runs_on
    );
    ensure!(
        shape.head_dim * shape.num_attention_heads == shape.hidden_size,
        "candle's Llama has no heads of {}: they are its width of {} over {}",
        shape.head_dim,
        shape.hidden_size,
        shape.num_attention_heads
    );
    Ok(Config {
        vocab_size: shape.vocab_size,
        hidden_size: shape.hidden_size,
        intermediate_size: shape.intermediate_size,
        num_hidden_layers: 2 * shape.num_hidden_layers,
        num_attention_heads: shape.num_attention_heads,
        num_key_value_heads: shape.num_key_value_heads,
        max_position_embeddings: shape.rows + 2 * TOKENS,
        ..Config::config_7b_v1(false)
    })
}

/// A decoder of so many layers.
struct Runner {
    layers: usize,
    config: Config,
    model: Llama,
}

/// The whole decoder and its first half, with random weights that both share and that record no
/// gradients.
fn runners(config: &Config, device: &Device) -> anyhow::Result<[Runner; 2]> {
    let variables = VarMap::new();
    Llama::load(
        VarBuilder::from_varmap(&variables, DType::F32, device),
        config,
    )?;
    let variables = variables.data().lock().expect("no thread has failed");
    let tensors = variables.iter();
    let tensors: HashMap<String, Tensor> = tensors
        .map(|(name, variable)| (name.clone(), variable.as_detached_tensor()))
        .collect();
    let runner = |layers: usize| {
        let weights = VarBuilder::from_tensors(tensors.clone(), DType::F32, device);
        let config = Config {
            num_hidden_layers: layers,
            ..config.clone()
        };
        let model = Llama::load(weights, &config)?;
        anyhow::Ok(Runner {
            layers,
            config,
            model,
        })
    };
    let layers = config.num_hidden_layers;
    Ok([runner(layers)?, runner(layers / 2)?])
}

/// What everybody runs.
struct Inputs {
    embeddings: Tensor,
    token: Tensor,
    device: Device,
}

impl Inputs {
    /// Milliseconds of a prefill after one that does not count, and its cache.
    fn prefill(&self, runner: &Runner) -> anyhow::Result<(f64, Cache)> {
        let prefill = || -> anyhow::Result<Cache> {
            let mut cache = Cache::new(true, DType::F32, &runner.config, &self.device)?;
            let model = &runner.model;
            model.forward_input_embed(&self.embeddings, 0, &mut cache)?;
            Ok(cache)
        };
        prefill()?; // Unmeasured: see README.md.
        let started = Instant::now();
        let cache = prefill()?;
        Ok((milliseconds(started), cache))
    }

    /// Times of the deeper and of the shallower decoder, in turn, and their differences.
    fn measure_once(&self, [deep, shallow]: &[Runner; 2]) -> anyhow::Result<[[f64; 2]; 2]> {
        let (deep_prefill, mut deep_cache) = self.prefill(deep)?;
        let (shallow_prefill, mut shallow_cache) = self.prefill(shallow)?;
        let rows = self.embeddings.dim(1)?;
        let mut tokens = [Vec::new(), Vec::new()];
        for position in rows..rows + TOKENS {
            let runs = [(deep, &mut deep_cache), (shallow, &mut shallow_cache)];
            for ((runner, cache), times) in runs.into_iter().zip(&mut tokens) {
                let started = Instant::now();
                runner.model.forward(&self.token, position, cache)?;
                times.push(milliseconds(started));
            }
        }
        Ok([[deep_prefill, shallow_prefill], tokens.map(median)])
    }

    /// The first times whose differences are positive.
    fn measure(&self, runners: &[Runner; 2]) -> anyhow::Result<Value> {
        let mut tries = 1;
        loop {
            let measured = self.measure_once(runners)?;
            if tries < TRIES && measured.iter().any(|[deep, shallow]| deep <= shallow) {
                tries += 1;
                continue;
            }
            let mut times = json!({ "tries": tries });
            for (what, measured) in ["prefill", "decode"].into_iter().zip(measured) {
                times[format!("{what}_ms")] = json!(measured[0] - measured[1]);
                for (runner, time) in runners.iter().zip(measured) {
                    times[format!("{what}_{}_ms", runner.layers)] = json!(time);
                }
            }
            return Ok(times);
        }
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[TOKENS / 2 - 1].midpoint(times[TOKENS / 2])
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    let shape: Shape = serde_json::from_str(&line).context("the first line is no shape")?;
    let device = Device::Cpu;
    let config = config(&shape)?;
    let runners = runners(&config, &device)?;
    let size = (1, shape.rows, config.hidden_size);
    let inputs = Inputs {
        embeddings: Tensor::randn(0f32, 0.1, size, &device)?,
        token: Tensor::new(&[[1u32]], &device)?,
        device,
    };
    let started = Instant::now();
    inputs.measure_once(&runners)?;
    let hello = json!({
        "peer": "candle 0.11, candle-transformers",
        "shape": shape,
        "threads": std::thread::available_parallelism()?.get(),
        "first_seconds": started.elapsed().as_secs_f64(),
    });
    let mut out = io::stdout().lock();
    writeln!(out, "{hello}")?;
    for line in io::stdin().lock().lines() {
        line?;
        let times = inputs.measure(&runners)?;
        writeln!(out, "{times}")?;
        out.flush()?;
    }
    Ok(())
}
