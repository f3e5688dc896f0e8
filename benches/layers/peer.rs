//! The same two layers as the programs of `benches/peers` run, by nearly the same protocol: a line of
//! JSON that says what this is and of which shape, then one line of measurements for every line of
//! input. Whoever asks several of them in turn gets measurements of the same minutes.

use std::io::{BufRead, Write};

use reducers::Schedule;
use reroute_cli::backend;
use serde_json::json;

use crate::decode::next_token;
use crate::setup::{Setup, dtype_name};
use crate::timing::{median, seconds};

/// Tokens of a measurement.
const TOKENS: usize = 4;

/// Answers every line.
pub fn serve(
    setup: &Setup,
    device: &str,
    input: impl BufRead,
    mut out: impl Write,
) -> anyhow::Result<()> {
    let name = format!("reroute, {}", backend::NAME);
    let config = setup.decoder.config();
    let hello = json!({
        "peer": name,
        "device": device,
        "shape": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": setup.decoder.layers().len(),
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rows": setup.rows(),
            "dtype": dtype_name(setup.dtype()),
            "runs_on": if backend::ON_HOST { "cpu" } else { backend::NAME },
        },
        "first_seconds": setup.first_prefill_seconds,
    });
    writeln!(out, "{hello}")?;
    out.flush()?;
    for line in input.lines() {
        line?;
        // Unmeasured: see `benches/peers/README.md`.
        let mut cache = setup.prefill(&Schedule::dense())?.cache;
        let prefill = seconds(|| {
            cache = setup.prefill(&Schedule::dense())?.cache;
            Ok(())
        })?;
        let tokens: anyhow::Result<Vec<f64>> =
            (0..TOKENS).map(|_| next_token(setup, &mut cache)).collect();
        let times = json!({"prefill_ms": prefill * 1e3, "decode_ms": median(tokens?) * 1e3});
        writeln!(out, "{times}")?;
        out.flush()?;
    }
    Ok(())
}
