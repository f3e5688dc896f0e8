//! Results as a table, CSV, JSON and a plot.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::record::Records;
use crate::summary::{Metric, Summary};
use crate::{EvalError, plot};

/// Writes `results.csv`, `results.json` and `accuracy.svg` into a folder; those of a shard end in its
/// [`suffix`](crate::Shard::suffix).
pub fn write(folder: &Path, records: &[Records], summaries: &[Summary]) -> Result<(), EvalError> {
    let Some(first) = records.first() else {
        return Ok(());
    };
    let header = &first.header;
    let path =
        |name: &str, kind: &str| folder.join(format!("{name}{}.{kind}", header.shard.suffix()));
    put(&path("results", "csv"), csv(records, summaries).as_bytes())?;
    let report = json(records, summaries);
    put(&path("results", "json"), format!("{report:#}\n").as_bytes())?;
    let title = format!("{} {}", header.task.name(), header.split);
    let path = path("accuracy", "svg");
    let drawn = plot::accuracy(&title, summaries).map_err(|reason| EvalError::Plot {
        path: path.clone(),
        reason,
    })?;
    put(&path, drawn.as_bytes())
}

/// What was measured, and what it came to.
pub fn json(records: &[Records], summaries: &[Summary]) -> Value {
    let Some(Records { header, .. }) = records.first() else {
        return Value::Null;
    };
    json!({
        "task": header.task,
        "split": header.split,
        "samples": header.samples,
        "shard": header.shard,
        "data": header.data,
        "model": header.model,
        "prompt": header.prompt,
        "max_new_tokens": header.max_new_tokens,
        "results": summaries,
    })
}

/// A line for each routing and metric.
pub fn csv(records: &[Records], summaries: &[Summary]) -> String {
    let mut text = String::from(
        "task,split,routing,action,samples,pictures,errors,cut_off,average_tokens,metric,value,low,high,difference,\
         difference_low,difference_high\n",
    );
    for (records, summary) in records.iter().zip(summaries) {
        for metric in &summary.metrics {
            let interval = metric
                .interval
                .map(|[low, high]| [low.to_string(), high.to_string()]);
            let [low, high] = interval.unwrap_or_default();
            let difference = metric.difference.as_ref();
            let between = difference.and_then(|difference| difference.interval);
            let between = between.map(|[low, high]| [low.to_string(), high.to_string()]);
            let [from, to] = between.unwrap_or_default();
            let difference = difference.map(|difference| difference.value.to_string());
            let cells = [
                records.header.task.name().to_string(),
                records.header.split.clone(),
                summary.routing.clone(),
                summary.action.clone().unwrap_or_default(),
                summary.samples.to_string(),
                summary.pictures.to_string(),
                summary.errors.to_string(),
                summary.cut_off.to_string(),
                summary.average_tokens.to_string(),
                metric.name.clone(),
                metric.value.to_string(),
                low,
                high,
                difference.unwrap_or_default(),
                from,
                to,
            ];
            text.push_str(&cells.map(quoted).join(","));
            text.push('\n');
        }
    }
    text
}

/// As RFC 4180 has it.
fn quoted(cell: String) -> String {
    match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell,
    }
}

/// A table for people: percent, bounds of 95 %, and differences to dense.
pub fn table(records: &[Records], summaries: &[Summary]) -> String {
    let (Some(first), Some(summary)) = (records.first(), summaries.first()) else {
        return String::new();
    };
    let header = &first.header;
    let part = match header.shard.of {
        1 => String::new(),
        of => format!(", shard {}/{of}", header.shard.index),
    };
    let mut text = format!(
        "{} {}{part}: {} samples on {} pictures, in percent, 95 % intervals over pictures\n",
        header.task.name(),
        header.split,
        summary.samples,
        summary.pictures
    );
    let has_errors = summaries.iter().any(|summary| summary.errors > 0);
    let has_cut_off = summaries.iter().any(|summary| summary.cut_off > 0);
    let mut titles = vec!["routing".to_string(), "average tokens".into()];
    for metric in shown(summary) {
        titles.push(metric.name.clone());
        titles.extend(is_compared(metric).then(|| "against dense".into()));
    }
    titles.extend(has_errors.then(|| "errors".into()));
    titles.extend(has_cut_off.then(|| "cut off".into()));
    let mut rows = vec![titles];
    for summary in summaries {
        let mut cells = vec![
            summary.routing.clone(),
            format!("{:.2}", summary.average_tokens),
        ];
        for metric in shown(summary) {
            let interval = metric.interval.filter(|_| is_compared(metric));
            cells.push(with_bounds(metric.value, interval, false));
            let difference = metric
                .difference
                .as_ref()
                .map(|difference| with_bounds(difference.value, difference.interval, true));
            cells.extend(is_compared(metric).then(|| difference.unwrap_or("-".into())));
        }
        cells.extend(has_errors.then(|| summary.errors.to_string()));
        cells.extend(has_cut_off.then(|| summary.cut_off.to_string()));
        rows.push(cells);
    }
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// What a table has room for: means over samples, and F1.
fn shown(summary: &Summary) -> impl Iterator<Item = &Metric> {
    let metrics = summary.metrics.iter();
    metrics.filter(|metric| metric.is_mean || metric.name == "F1")
}

/// Those that are shown with bounds, and beside dense.
fn is_compared(metric: &Metric) -> bool {
    metric.is_mean && metric.name.starts_with("accuracy")
}

fn with_bounds(value: f64, interval: Option<[f64; 2]>, signed: bool) -> String {
    let percent = |value: f64| match signed {
        true => format!("{:+.2}", 100.0 * value),
        false => format!("{:.2}", 100.0 * value),
    };
    match interval {
        Some([low, high]) => format!("{} [{}, {}]", percent(value), percent(low), percent(high)),
        None => percent(value),
    }
}

/// Writes a file whole or not at all.
pub(crate) fn put(path: &Path, bytes: &[u8]) -> Result<(), EvalError> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    // Temporary files are private by default; this one becomes a file like any other.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(EvalError::io(path))?;
    file.write_all(bytes).map_err(EvalError::io(path))?;
    let kept = file.persist(path);
    kept.map(drop)
        .map_err(|error| EvalError::io(path)(error.error))
}
