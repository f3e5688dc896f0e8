//! The same layers as the programs of `benches/peers` run, by nearly the same protocol: a line of JSON
//! that says what this is and of which shape, then one line of measurements for every line of input.
//! Whoever asks several of them in turn gets measurements of the same minutes. What is measured is the
//! difference of a decoder and one of half its layers.

use std::io::{BufRead, Write};

use reducers::Schedule;
use reroute::KvCache;
use reroute_cli::backend::{self, Backend};
use serde_json::{Value, json};

use reroute::DecoderLayer;
use reroute_kernels::{Multiplied, Reading, limit};
use reroute_layers::{Linears, Weight};

use crate::decode::next_token;
use crate::options::Type;
use crate::setup::Setup;
use crate::timing::{median, seconds};

/// Layers of the deeper decoder, each with weights of its own.
pub const LAYERS: usize = 4;

/// Tokens of a measurement.
const TOKENS: usize = 8;

/// How often to measure until a difference is positive. The last one is told as it is.
const TRIES: usize = 5;

/// Answers every line, by a decoder of an even number of layers and its first half.
pub fn serve(
    deep: &Setup,
    device: &str,
    input: impl BufRead,
    mut out: impl Write,
) -> anyhow::Result<()> {
    let layers = deep.decoder.layers().len() / 2;
    let shallow = deep.shallower(layers)?;
    let name = format!("reroute, {}", backend::NAME);
    let config = deep.decoder.config();
    let hello = json!({
        "peer": name,
        "device": device,
        "shape": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rows": deep.rows(),
            "dtype": deep.kind.name(),
            "runs_on": if backend::ON_HOST { "cpu" } else { backend::NAME },
        },
        "first_seconds": deep.first_prefill_seconds,
        "weight_bytes": weight_bytes(&deep.decoder.layers()[..layers]),
    });
    let memory = backend::ON_HOST.then(|| Reading::new(Reading::BYTES));
    writeln!(out, "{hello}")?;
    out.flush()?;
    for line in input.lines() {
        line?;
        let mut times = measure(deep, &shallow)?;
        if let Some(memory) = &memory {
            times["limits"] = limits(deep.kind, memory);
        }
        writeln!(out, "{times}")?;
        out.flush()?;
    }
    Ok(())
}

/// Bytes of the linear maps of layers: what a token reads.
fn weight_bytes(layers: &[DecoderLayer<Backend>]) -> usize {
    let mut layers = layers.to_vec();
    let mut found = Vec::new();
    layers.linears("", &mut found);
    let bytes = |weight: &Weight<Backend>| match weight {
        Weight::Float(weight) => weight.lazy_shape().num_elements() * weight.val().dtype().size(),
        Weight::Coded(coded) => coded.words.lazy_shape().num_elements() * size_of::<u32>(),
    };
    found.iter().map(|(_, linear)| bytes(&linear.weight)).sum()
}

/// What the processor does at most with numbers of a type, and how fast it reads memory, measured now.
fn limits(kind: Type, memory: &Reading) -> Value {
    let multiplied = match kind {
        Type::F32 | Type::F16 => Multiplied::F32,
        Type::Bf16 => Multiplied::BF16,
        Type::Int8 | Type::Q4 => Multiplied::Bytes,
    };
    let mut limits = json!({"bytes_per_second": memory.bytes_per_second()});
    if let Some(limit) = limit(multiplied) {
        let of_cycle = limit.operations_per_second / limit.threads as f64 / limit.clock;
        limits["flops_per_second"] = json!(limit.operations_per_second);
        limits["instruction"] = json!(limit.instruction);
        limits["threads"] = json!(limit.threads);
        limits["clock"] = json!(limit.clock);
        limits["flops_per_cycle"] = json!(of_cycle);
    }
    limits
}

/// The first times whose differences are positive.
fn measure(deep: &Setup, shallow: &Setup) -> anyhow::Result<Value> {
    let mut tries = 1;
    loop {
        let (prefills, tokens) = measure_once(deep, shallow)?;
        let differences = [prefills, tokens].map(|[deep, shallow]| deep - shallow);
        if tries < TRIES && differences.iter().any(|difference| *difference <= 0.0) {
            tries += 1;
            continue;
        }
        let mut times = json!({
            "prefill_ms": differences[0] * 1e3,
            "decode_ms": differences[1] * 1e3,
            "tries": tries,
        });
        for (what, seconds) in [("prefill", prefills), ("decode", tokens)] {
            for (setup, seconds) in [deep, shallow].into_iter().zip(seconds) {
                let layers = setup.decoder.layers().len();
                times[format!("{what}_{layers}_ms")] = json!(seconds * 1e3);
            }
        }
        return Ok(times);
    }
}

/// Seconds of the prefill and of the median token, of the deeper and of the shallower decoder, in turn.
fn measure_once(deep: &Setup, shallow: &Setup) -> anyhow::Result<([f64; 2], [f64; 2])> {
    let (deep_prefill, mut deep_cache) = prefill(deep)?;
    let (shallow_prefill, mut shallow_cache) = prefill(shallow)?;
    let mut deep_tokens = Vec::with_capacity(TOKENS);
    let mut shallow_tokens = Vec::with_capacity(TOKENS);
    for _ in 0..TOKENS {
        deep_tokens.push(next_token(&deep.decoder, &mut deep_cache)?);
        shallow_tokens.push(next_token(&shallow.decoder, &mut shallow_cache)?);
    }
    Ok((
        [deep_prefill, shallow_prefill],
        [median(deep_tokens), median(shallow_tokens)],
    ))
}

/// Seconds of a prefill after one that does not count, and its cache.
fn prefill(setup: &Setup) -> anyhow::Result<(f64, KvCache<Backend>)> {
    // Unmeasured: see `benches/peers/README.md`.
    let mut cache = setup.prefill(&Schedule::dense())?.cache;
    let seconds = seconds(|| {
        cache = setup.prefill(&Schedule::dense())?.cache;
        Ok(())
    })?;
    Ok((seconds, cache))
}
