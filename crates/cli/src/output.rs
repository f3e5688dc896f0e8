//! Files that appear whole or not at all, and the lines that commands share.

use std::fs::OpenOptions;
use std::io::{Write, stderr};
use std::path::Path;

use anyhow::Context;
use reducers::Plan;
use reroute::{Drift, FinishReason, KvError};
use reroute_zoo::{Answer, View, Vlm};
use serde_json::{Value, json};

use crate::backend::{self, Backend};

/// Writes a file under a temporary name beside it, then renames it. Of a link, the file that it leads to;
/// into devices and pipes what they take.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    let found = path.canonicalize();
    let path = found.as_deref().unwrap_or(path);
    if path.exists() && !path.is_file() {
        let mut stream = OpenOptions::new()
            .write(true)
            .open(path)
            .with_context(cannot)?;
        return stream.write_all(bytes).with_context(cannot);
    }
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

/// A path as JSON. Bytes that are no UTF-8 are written as `\xff`.
pub(crate) fn path(path: &Path) -> Value {
    let chunks = path.as_os_str().as_encoded_bytes().utf8_chunks();
    let text = chunks.map(|chunk| {
        let bytes = chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}"));
        [chunk.valid().to_string(), bytes.collect()].concat()
    });
    Value::String(text.collect())
}

pub(crate) fn print_json(out: &mut dyn Write, value: &Value) -> anyhow::Result<()> {
    Ok(writeln!(out, "{}", serde_json::to_string_pretty(value)?)?)
}

/// One line about what routing and generation did.
pub(crate) fn summary(vlm: &Vlm<Backend>, plan: &Plan, answer: &Answer) -> String {
    let (cost, dense) = vlm.costs(&plan.schedule, answer);
    let milliseconds = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    format!(
        "{} text + {} visual tokens, {:.1} visual on average per layer; decoder prefill {:.0} % of \
         the dense FLOPs, KV {:.1} of {:.1} KiB in {}; vision {:.0} ms, prefill {:.0} ms, decode {:.0} ms \
         ({} tokens), {}",
        answer.prompt_rows - answer.visual_tokens,
        answer.visual_tokens,
        cost.average_tokens(),
        100.0 * cost.total_flops() / dense.total_flops(),
        answer.kv_bytes.iter().sum::<u64>() as f64 / 1024.0,
        dense.total_kv_bytes() as f64 / 1024.0,
        vlm.kv_type(),
        milliseconds(answer.timings.vision),
        milliseconds(answer.timings.prefill),
        milliseconds(answer.timings.decode),
        answer.tokens.len(),
        backend::NAME,
    )
}

/// What the lines of [`drift_line`] are about.
pub(crate) const DRIFT: &str = "drift of tokens that waited until a decision, as a share of what \
                                they would have become (in brackets: of those that did not wait)";

/// One line about a drift.
pub(crate) fn drift_line(drift: &Drift) -> String {
    format!(
        "layer {:>2}: {:>4} waited, mean {:.2}, largest {:.2} ({:.2})",
        drift.layer,
        drift.tokens.len(),
        drift.mean(),
        drift.largest(),
        drift.active_mean
    )
}

/// One line about what the type of keys and values changes.
pub(crate) fn kv_error_line(error: &KvError) -> String {
    format!(
        "keys and values in {}, beside {}: logits differ by {:.2} % of the largest at most, {} of {} \
         likeliest tokens and {} of {} selected visual tokens are the same",
        error.kv,
        error.against,
        100.0 * error.largest,
        error.same,
        error.tokens,
        error.selected_in_both,
        error.selected,
    )
}

/// The same as JSON.
pub(crate) fn kv_error_json(error: &KvError) -> Value {
    json!({
        "kv": error.kv.to_string(),
        "against": error.against.to_string(),
        "largest": error.largest,
        "tokens": error.tokens,
        "same": error.same,
        "selected": error.selected,
        "selected_in_both": error.selected_in_both,
    })
}

/// A drift as JSON.
pub(crate) fn drift_json(drift: &Drift) -> Value {
    json!({
        "layer": drift.layer,
        "waited": drift.tokens,
        "distances": drift.distances,
        "mean": drift.mean(),
        "largest": drift.largest(),
        "active_mean": drift.active_mean,
    })
}

/// One line about what a turn of a conversation did, and what it would have cost to read everything
/// again.
pub(crate) fn turn_summary(vlm: &Vlm<Backend>, plan: &Plan, answer: &Answer) -> String {
    let computed: Vec<usize> = answer.trace.rows.iter().map(|rows| rows[0]).collect();
    let (least, most) = (computed.iter().min(), computed.iter().max());
    let (fresh, _) = vlm.costs(&plan.schedule, answer);
    format!(
        "layers computed {} to {} of {} rows, {:.0} % of the FLOPs of reading all again; {}",
        least.unwrap_or(&0),
        most.unwrap_or(&0),
        answer.prompt_rows,
        100.0 * turn_flops(vlm, answer) / fresh.total_layer_flops(),
        summary(vlm, plan, answer),
    )
}

/// Floating-point operations of the rows that the layers computed in this turn.
fn turn_flops(vlm: &Vlm<Backend>, answer: &Answer) -> f64 {
    let shape = vlm.config().decoder().shape();
    let trace = &answer.trace;
    let layers = trace.rows.iter().zip(&trace.queries).zip(&answer.kv_rows);
    layers
        .map(|((rows, queries), &keys)| shape.partial_layer_flops(rows[0], queries[0], keys))
        .sum()
}

/// Says which images lost resolution, and whether the answer is whole.
pub(crate) fn print_notices(answer: &Answer) {
    let cut_off = match answer.finish {
        FinishReason::Length => match answer.tokens.len() {
            1 => "after 1 token (--max-new-tokens)".into(),
            tokens => format!("after {tokens} tokens (--max-new-tokens)"),
        },
        FinishReason::Context => "where the model has no further position".into(),
        _ => String::new(),
    };
    if !cut_off.is_empty() {
        let _ = writeln!(stderr(), "note: the answer is cut off {cut_off}");
    }
    for (index, view) in answer.views.iter().enumerate() {
        if let Some(notice) = view.notice() {
            let kind = if view.time.is_some() {
                "video"
            } else {
                "image"
            };
            let _ = writeln!(stderr(), "note: {kind} {}: {notice}", index + 1);
        }
    }
}

/// What every answering command reports as JSON.
pub(crate) fn answer_json(vlm: &Vlm<Backend>, plan: &Plan, answer: &Answer) -> Value {
    let (cost, dense) = vlm.costs(&plan.schedule, answer);
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
        "schedule": plan.to_json(),
        "prompt_rows": answer.prompt_rows,
        "visual_tokens": answer.visual_tokens,
        "visuals": answer.views.iter().map(visual_json).collect::<Vec<_>>(),
        "average_visual_tokens": cost.average_tokens(),
        "rows_per_layer": rows,
        "kv_rows_per_layer": answer.kv_rows,
        "decisions": decisions.collect::<Vec<_>>(),
        "flops": cost.total_flops(),
        "dense_flops": dense.total_flops(),
        "published_flops": cost.published_flops(),
        "dense_published_flops": dense.published_flops(),
        "kv": vlm.kv_type().to_string(),
        "kv_bytes": answer.kv_bytes.iter().sum::<u64>(),
        "dense_kv_bytes": dense.total_kv_bytes(),
        "seconds": {
            "vision": answer.timings.vision.as_secs_f64(),
            "prefill": answer.timings.prefill.as_secs_f64(),
            "decode": answer.timings.decode.as_secs_f64(),
        },
    })
}

/// How an image or a video was seen.
fn visual_json(view: &View) -> Value {
    json!({
        "kind": if view.time.is_some() { "video" } else { "image" },
        "size": view.original,
        "seen_size": view.resized,
        "grid": [view.grid.t, view.grid.h, view.grid.w],
        "visual_tokens": view.token_count(),
    })
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn names_that_are_no_text_are_escaped() {
        let named = |bytes: &[u8]| path(Path::new(std::ffi::OsStr::from_bytes(bytes)));
        assert_eq!(named("a/é.png".as_bytes()), "a/é.png");
        assert_eq!(named(b"a\xff\xc3/b.png"), "a\\xff\\xc3/b.png");
    }
}
