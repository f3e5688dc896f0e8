//! Files that appear whole or not at all, and the lines that commands share.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use reducers::{Cost, Schedule};
use serde_json::{Value, json};
use zoo::{Answer, Vlm};

use crate::backend::{self, Backend};

/// Writes a file under a temporary name beside it, then renames it.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    // Temporary files are private by default; this one becomes a file like any other.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).with_context(cannot)?;
    file.write_all(bytes).with_context(cannot)?;
    file.persist(path)
        .map_err(|error| error.error)
        .with_context(cannot)?;
    Ok(())
}

pub(crate) fn print_json(out: &mut dyn Write, value: &Value) -> anyhow::Result<()> {
    Ok(writeln!(out, "{}", serde_json::to_string_pretty(value)?)?)
}

/// Predicted cost of a schedule for an answered prompt, and of the dense model.
pub(crate) fn costs(vlm: &Vlm<Backend>, schedule: &Schedule, answer: &Answer) -> (Cost, Cost) {
    let shape = vlm.decoder_config().shape();
    let visual = answer.visual_tokens;
    let text = answer.prompt_rows - visual;
    let bytes = vlm.dtype().size();
    let cost = |schedule| Cost::of(&shape, schedule, visual, text, bytes);
    (cost(schedule), cost(&Schedule::dense()))
}

/// One line about what routing and generation did.
pub(crate) fn summary(vlm: &Vlm<Backend>, schedule: &Schedule, answer: &Answer) -> String {
    let (cost, dense) = costs(vlm, schedule, answer);
    let milliseconds = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    format!(
        "{} text + {} visual tokens, {:.1} visual on average per layer; decoder prefill {:.0} % of \
         the dense FLOPs, KV {:.1} of {:.1} KiB; vision {:.0} ms, prefill {:.0} ms, decode {:.0} ms \
         ({} tokens), {}",
        answer.prompt_rows - answer.visual_tokens,
        answer.visual_tokens,
        cost.average_tokens(),
        100.0 * cost.total_flops() / dense.total_flops(),
        answer.kv_bytes.iter().sum::<u64>() as f64 / 1024.0,
        dense.total_kv_bytes() as f64 / 1024.0,
        milliseconds(answer.timings.vision),
        milliseconds(answer.timings.prefill),
        milliseconds(answer.timings.decode),
        answer.tokens.len(),
        backend::NAME,
    )
}

/// What every answering command reports as JSON.
pub(crate) fn answer_json(vlm: &Vlm<Backend>, schedule: &Schedule, answer: &Answer) -> Value {
    let (cost, dense) = costs(vlm, schedule, answer);
    let rows: Vec<usize> = answer.trace.rows.iter().map(|rows| rows[0]).collect();
    let decisions = answer.trace.decisions.iter().map(|decision| {
        json!({
            "layer": decision.layer,
            "candidates": decision.candidates.len(),
            "selected": decision.selected,
            "returned": decision.returned,
        })
    });
    json!({
        "answer": answer.text,
        "tokens": answer.tokens,
        "finish": format!("{:?}", answer.finish).to_lowercase(),
        "backend": backend::NAME,
        "schedule": schedule,
        "prompt_rows": answer.prompt_rows,
        "visual_tokens": answer.visual_tokens,
        "average_visual_tokens": cost.average_tokens(),
        "rows_per_layer": rows,
        "decisions": decisions.collect::<Vec<_>>(),
        "flops": cost.total_flops(),
        "dense_flops": dense.total_flops(),
        "kv_bytes": answer.kv_bytes.iter().sum::<u64>(),
        "dense_kv_bytes": dense.total_kv_bytes(),
        "seconds": {
            "vision": answer.timings.vision.as_secs_f64(),
            "prefill": answer.timings.prefill.as_secs_f64(),
            "decode": answer.timings.decode.as_secs_f64(),
        },
    })
}
