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
use serde_json::json;

const TOKENS: usize = 4;

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
        num_hidden_layers: shape.num_hidden_layers,
        num_attention_heads: shape.num_attention_heads,
        num_key_value_heads: shape.num_key_value_heads,
        max_position_embeddings: shape.rows + TOKENS,
        ..Config::config_7b_v1(false)
    })
}

/// A model with random weights that record no gradients.
fn model(config: &Config, device: &Device) -> anyhow::Result<Llama> {
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
    let weights = VarBuilder::from_tensors(tensors, DType::F32, device);
    Ok(Llama::load(weights, config)?)
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
    let model = model(&config, &device)?;
    let rows = shape.rows;
    let embeddings = Tensor::randn(0f32, 0.1, (1, rows, config.hidden_size), &device)?;
    let token = Tensor::new(&[[1u32]], &device)?;

    let measure = || -> anyhow::Result<[f64; 2]> {
        let prefill = || -> anyhow::Result<Cache> {
            let mut cache = Cache::new(true, DType::F32, &config, &device)?;
            model.forward_input_embed(&embeddings, 0, &mut cache)?;
            Ok(cache)
        };
        prefill()?; // Unmeasured: see README.md.
        let started = Instant::now();
        let mut cache = prefill()?;
        let prefill = started.elapsed().as_secs_f64();
        let mut tokens = Vec::new();
        for position in rows..rows + TOKENS {
            let started = Instant::now();
            model.forward(&token, position, &mut cache)?;
            tokens.push(started.elapsed().as_secs_f64());
        }
        tokens.sort_by(f64::total_cmp);
        Ok([prefill, tokens[TOKENS / 2 - 1].midpoint(tokens[TOKENS / 2])])
    };

    let first: f64 = measure()?.iter().sum();
    let hello = json!({
        "peer": "candle 0.11, candle-transformers",
        "shape": shape,
        "threads": std::thread::available_parallelism()?.get(),
        "first_seconds": first,
    });
    let mut out = io::stdout().lock();
    writeln!(out, "{hello}")?;
    for line in io::stdin().lock().lines() {
        line?;
        let [prefill, token] = measure()?;
        writeln!(
            out,
            "{}",
            json!({"prefill_ms": prefill * 1e3, "decode_ms": token * 1e3})
        )?;
        out.flush()?;
    }
    Ok(())
}
