use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use reroute_eval::Shard;

use super::{ModelArgs, one_or_more};

/// What is measured, on what, and where the records go.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct EvalArgs {
    /// Join shards instead.
    #[command(subcommand)]
    pub command: Option<EvalCommand>,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What is measured: refcoco, refcoco+, refcocog, pope, gqa, textvqa, or own for lines of JSON of one's own. May be
    /// given several times.
    #[arg(long, value_name = "NAME", required = true)]
    pub task: Vec<String>,
    /// Splits: val, testA, testB, test, …, or all that have answers; by default val of RefCOCO, test of POPE, testdev
    /// of GQA, validation of TextVQA.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub split: Vec<String>,
    /// Folder with the Parquet files as the hub has them, a folder of such folders by their names, or the hub's
    /// cache; of the task own, a file of lines: {"image", "question", and "answer", "answers" or "box"}.
    #[arg(long, value_name = "DIR|FILE.jsonl", required = true)]
    pub data: Option<PathBuf>,
    /// Presets (`reroute presets` lists them) or JSON files, one flag each or several behind one.
    #[arg(long, value_name = "PRESET|FILE.json", num_args = 1..)]
    pub routing: Vec<String>,
    /// Leave out the dense run that the others are compared with, unless --routing names it.
    #[arg(long)]
    pub no_dense: bool,
    /// How boxes are asked for.
    #[arg(long, value_enum, default_value = "family")]
    pub prompt: PromptArg,
    /// How boxes are measured.
    #[arg(long, value_enum, default_value = "correct")]
    pub box_units: UnitsArg,
    /// Tokens of an answer at most; what the harness has for the task otherwise.
    #[arg(long, value_name = "N", value_parser = one_or_more)]
    pub max_new_tokens: Option<usize>,
    /// Answers side by side. At 1 every answer is computed as if it were alone, bit for bit.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = one_or_more)]
    pub batch: usize,
    /// The first so many samples of a split.
    #[arg(long, value_name = "N", value_parser = one_or_more)]
    pub limit: Option<usize>,
    /// The i-th of n parts of the samples; `reroute eval merge` joins them.
    #[arg(long, value_name = "I/N", value_parser = shard, default_value = "1/1")]
    pub shard: Shard,
    /// Folder of records (a line of JSON for every sample), results.csv, results.json and accuracy.svg; of several
    /// tasks or splits, of a folder for each.
    #[arg(long, value_name = "DIR", default_value = "reroute-eval")]
    pub out: PathBuf,
    /// Go on behind the records that are there; what has failed is tried again.
    #[arg(long)]
    pub resume: bool,
    /// What becomes of samples that cannot be answered.
    #[arg(long, value_enum, default_value = "stop")]
    pub on_error: OnErrorArg,
    /// The bootstrap.
    #[command(flatten)]
    pub bootstrap: BootstrapArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `reroute eval merge`
#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Join the records of shards, and report on all of them.
    Merge {
        /// Folders with records of shards.
        #[arg(value_name = "DIR", required = true)]
        from: Vec<PathBuf>,
        /// Folder of the whole.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// How boxes are measured.
        #[arg(long, value_enum, default_value = "correct")]
        box_units: UnitsArg,
        /// The bootstrap.
        #[command(flatten)]
        bootstrap: BootstrapArgs,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// How intervals are drawn.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct BootstrapArgs {
    /// Draws of the bootstrap that 95 % intervals come from; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub resamples: usize,
    /// What they are drawn by. Answers are greedy: nothing else is drawn.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// How boxes are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PromptArg {
    /// As the model was trained to be asked.
    Family,
    /// The harness's long sentence, which the paper asks LLaVA with.
    Full,
    /// The end of it.
    Short,
    /// That of Nüwa, which the paper asks Qwen-VL with.
    Nuwa,
}

/// How boxes are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum UnitsArg {
    /// In pixels of the picture as given, whatever it was resized, padded or cropped to.
    Correct,
    /// Also, under a name of its own, as the release of Reroute divides them: pixels of the resized picture by the size
    /// of the picture as given.
    Release,
}

/// What becomes of samples that cannot be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnErrorArg {
    /// The first one ends the run.
    Stop,
    /// It is recorded with its error and counted apart.
    Skip,
}

fn shard(text: &str) -> Result<Shard, String> {
    text.parse()
}
