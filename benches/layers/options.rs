//! What to run, from the command line and the environment.

use std::env;

use anyhow::{Context, bail};

/// What to run.
///
/// | variable | meaning | default |
/// |---|---|---|
/// | `REROUTE_BENCH_MODEL` | layer shapes: `llava` (LLaVA-1.5-7B) or `qwen` (Qwen2.5-VL-7B) | `llava` |
/// | `REROUTE_BENCH_LAYERS` | decoder layers, at least 7 | 8 |
/// | `REROUTE_BENCH_ROUNDS` | rounds of the table | 5 |
/// | `REROUTE_BENCH_SAVE` | keeps the table as `benches/results/NAME-MODEL-DEVICE.json`; `1` means today's date | not kept |
#[derive(Debug)]
pub struct Options {
    /// Toy shapes, one round: `--test`, or `cargo test`, which does not pass `--bench`.
    pub smoke: bool,
    /// Whether to run the criterion benchmarks.
    pub criterion: bool,
    /// Whether to print the table of speed-ups: if nothing is filtered, or the filter is `table`.
    pub table: bool,
    /// Whether to print the time of every operation: if the filter is `ops`.
    pub ops: bool,
    /// Whether to measure the vision tower of Qwen2.5-VL-7B: if the filter is `tower`, and at toy
    /// shapes.
    pub tower: bool,
    /// Whose layer shapes the decoder has.
    pub shapes: Shapes,
    /// Decoder layers.
    pub depth: usize,
    /// Rounds of the table.
    pub rounds: usize,
    /// Name to keep the table under.
    pub save: Option<String>,
}

/// A model whose layer shapes are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shapes {
    /// LLaVA-1.5-7B.
    Llava,
    /// Qwen2.5-VL-7B.
    Qwen,
}

impl Shapes {
    /// As `REROUTE_BENCH_MODEL` says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llava => "llava",
            Self::Qwen => "qwen",
        }
    }

    /// Decoder layers of the whole model.
    pub fn depth(self) -> usize {
        match self {
            Self::Llava => 32,
            Self::Qwen => 28,
        }
    }
}

/// Four decisions at the published relative depths need as many layers to stay apart.
const MIN_DEPTH: usize = 7;

impl Options {
    /// Reads arguments and environment.
    pub fn from_environment() -> anyhow::Result<Self> {
        let arguments: Vec<String> = env::args().skip(1).collect();
        let given = |name: &str| arguments.iter().any(|argument| argument == name);
        let smoke = given("--test") || !given("--bench");
        let everything = arguments.iter().all(|a| a == "--bench" || a == "--test");
        let own = given("table") || given("ops") || given("tower");
        let shapes = match env::var("REROUTE_BENCH_MODEL").as_deref() {
            Err(_) | Ok("" | "llava") => Shapes::Llava,
            Ok("qwen") => Shapes::Qwen,
            Ok(other) => bail!("REROUTE_BENCH_MODEL is {other:?}, neither llava nor qwen"),
        };
        let depth = number("REROUTE_BENCH_LAYERS", 8)?;
        if depth < MIN_DEPTH {
            bail!(
                "REROUTE_BENCH_LAYERS is {depth}; four decisions need {MIN_DEPTH} layers or more"
            );
        }
        Ok(Self {
            smoke,
            criterion: !own,
            table: (everything && !given("--list")) || given("table"),
            ops: given("ops"),
            tower: given("tower") || smoke,
            shapes,
            depth,
            rounds: if smoke {
                1
            } else {
                number("REROUTE_BENCH_ROUNDS", 5)?
            },
            save: env::var("REROUTE_BENCH_SAVE")
                .ok()
                .filter(|name| !name.is_empty()),
        })
    }
}

/// A positive whole number from the environment.
fn number(name: &str, default: usize) -> anyhow::Result<usize> {
    let Ok(text) = env::var(name) else {
        return Ok(default);
    };
    let number: usize = text
        .parse()
        .with_context(|| format!("{name} is {text:?}, not a whole number"))?;
    if number == 0 {
        bail!("{name} is 0; it must be at least 1");
    }
    Ok(number)
}
