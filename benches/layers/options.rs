//! What to run, from the command line.

use std::path::PathBuf;

use anyhow::bail;
use burn::tensor::DType;
use clap::builder::RangedU64ValueParser;
use clap::{Parser, ValueEnum};
use reroute_cli::backend;
use reroute_layers::CodeFormat;

/// Those that every method has a preset for.
const BUDGETS: [usize; 3] = [192, 128, 64];

/// Four decisions at the published relative depths need as many layers to stay apart.
const MIN_LAYERS: u64 = 7;

/// Measures prefill, selection, decoding and vision of one backend at the layer shapes of a model, with
/// random weights.
#[derive(Debug, Parser)]
#[command(name = "cargo bench -p benches --")]
pub struct Options {
    /// What to measure; all but `scenes`, `precision`, `sessions`, `kv`, `ops`, `training` and `peer` if nothing is
    /// said.
    #[arg(value_enum)]
    sections: Vec<Section>,
    /// Layer shapes: `llava` (LLaVA-1.5-7B), `qwen` (Qwen2.5-VL-7B), or a folder with a config.json.
    #[arg(long, default_value = "llava", value_name = "NAME|DIR")]
    pub model: String,
    /// Weights that `sessions` runs on, instead of the built-in model's.
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,
    /// Budgets of the routed prefills: visual tokens of 576 that a layer works on, on average.
    #[arg(long, value_delimiter = ',', default_value = "192,128,64")]
    pub budgets: Vec<usize>,
    /// Decoder layers.
    #[arg(long, default_value_t = 8,
          value_parser = RangedU64ValueParser::<usize>::new().range(MIN_LAYERS..))]
    pub layers: usize,
    /// Type of weights and activations, where a section does not measure all of them.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Type,
    /// Rounds that medians are taken of.
    #[arg(long, default_value_t = 5, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub rounds: usize,
    /// Where to write everything as JSON.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Toy shapes, one round: whether everything runs, in seconds.
    #[arg(long = "test")]
    pub smoke: bool,
    /// What `cargo bench` says.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A type of the decoder's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Type {
    /// Floats, and activations of the same type.
    F32,
    /// The same.
    F16,
    /// The same.
    Bf16,
    /// Bytes with a scale for each row; activations in bf16.
    Int8,
    /// 4 bits with a scale for each group; activations in bf16.
    Q4,
}

impl Type {
    /// The type of activations, and of what is not in codes.
    pub fn floats(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Int8 | Self::Q4 => backend::or_f32(DType::BF16),
        }
    }

    /// The format of weights in codes.
    pub fn codes(self) -> Option<CodeFormat> {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => None,
            Self::Int8 => Some(CodeFormat::Int8),
            Self::Q4 => Some(CodeFormat::Int4),
        }
    }

    /// What it is called in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Q4 => "q4",
        }
    }
}

/// Something to measure, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// Accuracy, drift and times of every method on the scenes of the built-in model.
    Scenes,
    /// What types of fewer bits cost in accuracy there.
    Precision,
    /// Requests at once, on the built-in model or a checkpoint.
    Sessions,
    /// The vision tower.
    Vision,
    /// Dense prefill, every preset, what their decisions take, and the reference design.
    Prefill,
    /// One more token.
    Decode,
    /// Prefill against the number of visual tokens.
    Sizes,
    /// Keys and values in every type.
    Kv,
    /// Every operation of a layer at several row counts.
    Ops,
    /// A step of training, of everything and of adapters.
    Training,
    /// One line of measurements for every line of input, beside other implementations.
    Peer,
}

impl Options {
    /// Reads the command line. `cargo test` passes no `--bench`: then everything runs at toy shapes,
    /// whatever filter is meant for other tests.
    ///
    /// `None` if only a list of tests is wanted.
    pub fn from_command_line() -> anyhow::Result<Option<Self>> {
        let arguments: Vec<String> = std::env::args().collect();
        let given = |flag: &str| arguments.iter().any(|argument| argument == flag);
        let options = match given("--bench") {
            true => Self::parse_from(&arguments),
            false if given("--list") => return Ok(None),
            false => Self::parse_from([arguments[0].as_str(), "--test"]),
        };
        options.check()?;
        Ok(Some(options))
    }

    fn check(&self) -> anyhow::Result<()> {
        if let Some(budget) = self.budgets.iter().find(|at| !BUDGETS.contains(at)) {
            bail!("--budgets has {budget}; there are presets for {BUDGETS:?}");
        }
        if self.names(Section::Peer) && self.sections.len() > 1 {
            bail!("`peer` waits for somebody who asks it: name it alone, or leave it out");
        }
        Ok(())
    }

    /// Whether `cargo test` runs this: then in every type that the backend has.
    pub fn is_test(&self) -> bool {
        !self.bench
    }

    /// Whether to measure this.
    pub fn wants(&self, section: Section) -> bool {
        match self.sections.is_empty() {
            true => {
                self.smoke
                    || !matches!(
                        section,
                        Section::Scenes
                            | Section::Precision
                            | Section::Sessions
                            | Section::Kv
                            | Section::Ops
                            | Section::Training
                            | Section::Peer
                    )
            }
            false => self.names(section),
        }
    }

    /// Whether this is what the command line asks for by name.
    pub fn names(&self, section: Section) -> bool {
        self.sections.contains(&section)
    }

    /// Rounds that medians are taken of.
    pub fn rounds(&self) -> usize {
        if self.smoke { 1 } else { self.rounds }
    }
}
