//! Times decoder layers of LLaVA-1.5-7B's shape in candle, by the protocol of `../README.md`.

use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::llama::{Cache, Config, Llama};
use serde_json::json;

const TOKENS: usize = 4;

fn config(toy: bool) -> Config {
    let (hidden_size, intermediate_size, heads) = match toy {
        true => (64, 128, 4),
        false => (4096, 11008, 32),
    };
    Config {
        vocab_size: 1024,
        hidden_size,
        intermediate_size,
        num_hidden_layers: 2,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        ..Config::config_7b_v1(false)
    }
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

fn main() -> anyhow::Result<()> {
    let toy = std::env::args().any(|argument| argument == "--test");
    let device = Device::Cpu;
    let config = config(toy);
    let model = model(&config, &device)?;
    let rows = if toy { 128 } else { 640 };
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
        "threads": std::thread::available_parallelism()?.get(),
        "rows": rows,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
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
