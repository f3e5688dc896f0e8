//! The table: printed, and kept as JSON when asked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use reroute_cli::backend;
use serde_json::{Value, json};

/// Everything the table says.
pub struct Report {
    /// Decoder layers of the model whose layer shapes were measured.
    pub full_depth: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Visual tokens of the prompt.
    pub visual_tokens: usize,
    /// Text tokens of the prompt.
    pub text_tokens: usize,
    /// Rows of the vocabulary head.
    pub head_rows: usize,
    /// Rounds that medians are taken of.
    pub rounds: usize,
    /// Making the weights and the first run.
    pub warm_up_seconds: f64,
    /// Median of the dense prefills.
    pub dense_ms: f64,
    /// Operations of the ceiling's convention per second of that.
    pub dense_gflops_per_second: f64,
    /// The vision tower.
    pub vision: Vision,
    /// One more token.
    pub decode: Decode,
    /// One row per method and budget.
    pub rows: Vec<Row>,
}

/// Times of the vision tower on one image.
pub struct Vision {
    /// Layers that were timed.
    pub layers: usize,
    /// Patch embedding and its norm.
    pub embedding_ms: f64,
    /// One layer: the mean of those timed.
    pub layer_ms: f64,
}

/// Times of one decoded token.
pub struct Decode {
    /// After a dense prefill.
    pub dense_ms: f64,
    /// After a routed prefill.
    pub routed_ms: f64,
    /// The preset of that.
    pub routed_by: String,
}

/// What was measured of one method at one budget.
pub struct Row {
    /// Method and budget.
    pub preset: String,
    /// Decision layers.
    pub decision_layers: Vec<usize>,
    /// Visual tokens kept by each decision.
    pub keep_counts: Vec<usize>,
    /// Visual tokens that a layer works on, on average.
    pub average_tokens: f64,
    /// Median dense prefill.
    pub dense_ms: f64,
    /// Median routed prefill.
    pub routed_ms: f64,
    /// Median of the rounds' ratios.
    pub speedup: f64,
    /// Ratio of operations, layers and decisions.
    pub ceiling: f64,
    /// Scores, selection and gathering, of the routed prefill.
    pub selection_share: f64,
    /// The same and the keys of the rows that are not kept.
    pub selection_and_keys_share: f64,
    /// What the ceiling counts for that.
    pub selection_and_keys_flop_share: f64,
}

impl Report {
    /// Prints the table.
    pub fn print(&self) {
        println!(
            "\nMeasured on {} ({} threads, {}): {} layers, {} visual + {} text tokens, medians of {} rounds.",
            backend::NAME,
            threads(),
            processor(),
            self.layers,
            self.visual_tokens,
            self.text_tokens,
            self.rounds
        );
        println!(
            "Dense prefill {:.0} ms, {:.0} GFLOP/s. Ceiling: ratio of FLOPs of the layers (head of {} rows not \
             counted, but timed). Selection: of the routed prefill; `+ keys` with the keys of rows not kept.",
            self.dense_ms, self.dense_gflops_per_second, self.head_rows
        );
        println!(
            "\n{:<18} {:<11} {:>8} {:>9} {:>9} {:>9} {:>8} {:>10} {:>10} {:>7}",
            "preset",
            "decides at",
            "average",
            "dense ms",
            "routed ms",
            "measured",
            "ceiling",
            "of ceiling",
            "selection",
            "+ keys"
        );
        for row in &self.rows {
            let layers: Vec<String> = row.decision_layers.iter().map(usize::to_string).collect();
            println!(
                "{:<18} {:<11} {:>8.1} {:>9.0} {:>9.0} {:>8.2}x {:>7.2}x {:>10.2} {:>8.1} % {:>5.1} %",
                row.preset,
                layers.join(" "),
                row.average_tokens,
                row.dense_ms,
                row.routed_ms,
                row.speedup,
                row.ceiling,
                row.speedup / row.ceiling,
                100.0 * row.selection_share,
                100.0 * row.selection_and_keys_share,
            );
        }
        if self.layers < self.full_depth {
            println!(
                "\nThe full model takes as many decisions in {} layers: there they weigh {:.1} times \
                 less than here, in the measurements and in the ceiling.",
                self.full_depth,
                self.full_depth as f64 / self.layers as f64
            );
        }
        println!(
            "\nDecoding one token: dense {:.1} ms, {} {:.1} ms. CLIP tower: embedding {:.1} ms, a layer {:.1} ms \
             (mean of {}). Weights and first run: {:.1} s.",
            self.decode.dense_ms,
            self.decode.routed_by,
            self.decode.routed_ms,
            self.vision.embedding_ms,
            self.vision.layer_ms,
            self.vision.layers,
            self.warm_up_seconds,
        );
    }

    /// What is kept of it.
    pub fn to_json(&self) -> Value {
        json!({
            "layers": self.layers,
            "visual_tokens": self.visual_tokens,
            "text_tokens": self.text_tokens,
            "head_rows": self.head_rows,
            "rounds": self.rounds,
            "warm_up_seconds": self.warm_up_seconds,
            "dense_ms": self.dense_ms,
            "dense_gflops_per_second": self.dense_gflops_per_second,
            "vision": {
                "layers": self.vision.layers,
                "embedding_ms": self.vision.embedding_ms,
                "layer_ms": self.vision.layer_ms,
            },
            "decode": {
                "dense_ms": self.decode.dense_ms,
                "routed_ms": self.decode.routed_ms,
                "routed_by": self.decode.routed_by,
            },
            "presets": self.rows.iter().map(Row::to_json).collect::<Vec<_>>(),
        })
    }
}

impl Row {
    fn to_json(&self) -> Value {
        json!({
            "preset": self.preset,
            "decision_layers": self.decision_layers,
            "keep_counts": self.keep_counts,
            "average_tokens": self.average_tokens,
            "dense_ms": self.dense_ms,
            "routed_ms": self.routed_ms,
            "speedup": self.speedup,
            "ceiling": self.ceiling,
            "of_ceiling": self.speedup / self.ceiling,
            "selection_share": self.selection_share,
            "selection_and_keys_share": self.selection_and_keys_share,
            "selection_and_keys_flop_share": self.selection_and_keys_flop_share,
        })
    }
}

/// Writes `benches/results/NAME-WHAT-DEVICE.json` and returns its path; `1` stands for today's date.
pub fn save(mut values: Value, what: &str, name: &str) -> anyhow::Result<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    ensure!(
        name.chars().all(plain) && !name.starts_with('.'),
        "REROUTE_BENCH_SAVE is {name:?}; use letters, digits, '.', '_' and '-' only"
    );
    let name = match name {
        "1" => output("date", &["-u", "+%F"]).context("no date; give a name instead of 1")?,
        name => name.to_string(),
    };
    let device = format!("{}-{}", backend::NAME, processor()).to_lowercase();
    let words: Vec<&str> = device.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let device = words
        .into_iter()
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join("-");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    let path = folder.join(format!("{name}-{what}-{device}.json"));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    values["backend"] = json!(backend::NAME);
    values["commit"] = json!(output("git", &["rev-parse", "HEAD"]));
    let changes = output("git", &["status", "--porcelain"]);
    values["uncommitted_changes"] = json!(changes.map(|text| !text.is_empty()));
    values["processor"] = json!(processor());
    values["threads"] = json!(threads());
    fs::write(&path, format!("{values:#}\n"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// What a program prints, if it runs and succeeds.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
    output.status.success().then_some(text)
}

/// Threads that CPU backends use.
fn threads() -> usize {
    let asked = std::env::var("RAYON_NUM_THREADS")
        .ok()
        .and_then(|text| text.parse().ok());
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    asked
        .filter(|&threads| threads > 0)
        .unwrap_or_else(available)
}

/// The processor's name. Several models share one that says little, so that its numbers follow.
fn processor() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.split_once(": "));
        line.map_or("unknown", |(_, value)| value.trim())
    };
    format!(
        "{} family {} model {}",
        field("model name"),
        field("cpu family"),
        field("model\t")
    )
}
