use std::path::PathBuf;

use clap::ValueEnum;

use super::{ModelArgs, one_or_more};

/// What is trained, on what, how, and where to.
#[derive(Debug, clap::Args)]
pub struct TuneArgs {
    /// The model to begin with.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Examples, in lines of JSON or a list: LLaVA's and Qwen-VL's conversations, messages with images (TRL,
    /// ms-swift, mlx-vlm), boxes in pixels of the picture as given. May be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    pub data: Vec<PathBuf>,
    /// Folder that paths of images begin in; that of the data otherwise.
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Examples to measure on.
    #[arg(long, value_name = "FILE", conflicts_with = "hold_out")]
    pub validation: Option<PathBuf>,
    /// Examples to set aside for measuring, drawn by the seed.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub hold_out: usize,
    /// What becomes of examples that cannot be used.
    #[arg(long, value_enum, default_value = "stop")]
    pub on_bad: OnBad,
    /// Folder of the run: its log, a plot of the losses, checkpoints, and in the end `adapter` or `model`.
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// Go on with the run in that folder.
    #[arg(long)]
    pub resume: bool,
    /// What is trained in f32: adapter, projector, tower, decoder, all, or names of parameters as the checkpoint
    /// has them (`lm_head`, `multi_modal_projector.linear_2`).
    #[arg(
        long,
        value_name = "WHAT,…",
        value_delimiter = ',',
        default_value = "adapter"
    )]
    pub train: Vec<String>,
    /// Linear maps that the adapter changes: ends of names, patterns in which a `*`
    /// stands for whole parts between dots (`model.language_model.*.q_proj`), or `all-linear`.
    /// The attention of the decoder by default.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub target: Vec<String>,
    /// Rank of the adapter; 16 by default.
    #[arg(long, value_name = "N", value_parser = one_or_more)]
    pub rank: Option<usize>,
    /// The adapter counts alpha / rank times; twice by default.
    #[arg(long, value_name = "X")]
    pub alpha: Option<f64>,
    /// Or alpha / √rank times (rsLoRA).
    #[arg(long)]
    pub rslora: bool,
    /// Share of the adapter's inputs that are left out in training.
    #[arg(long, value_name = "SHARE")]
    pub dropout: Option<f64>,
    /// Presets of the forward pass, `dense` for none; of several one is drawn for every step.
    #[arg(
        long,
        value_name = "PRESET,…",
        value_delimiter = ',',
        default_value = "dense"
    )]
    pub routing: Vec<String>,
    /// Steps of the optimizer; one epoch by default.
    #[arg(long, value_name = "N", value_parser = one_or_more)]
    pub steps: Option<usize>,
    /// Or how often every example is learnt.
    #[arg(long, value_name = "N", conflicts_with = "steps", value_parser = one_or_more)]
    pub epochs: Option<usize>,
    /// Examples side by side in a forward pass.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = one_or_more)]
    pub batch: usize,
    /// Forward passes of a step.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = one_or_more)]
    pub accumulate: usize,
    /// Let the decoder's layers keep nothing but what enters them, and compute everything once more on the way back: less memory,
    /// more time. For --routing dense.
    #[arg(long)]
    pub recompute: bool,
    /// Largest learning rate.
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    pub learning_rate: f64,
    /// Share of the steps in which it is reached.
    #[arg(long, value_name = "SHARE", default_value_t = 0.03)]
    pub warmup: f64,
    /// What the learning rate does then.
    #[arg(long, value_enum, default_value = "cosine")]
    pub decay: Decay,
    /// Share of a weight, times the learning rate, that a step takes off.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub weight_decay: f32,
    /// Longest gradient of all parameters together; 0 for any.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub clip: f64,
    /// Seed of everything that is drawn.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Steps from one validation to the next; 0 for the end alone.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub validate_every: usize,
    /// Validations without a better loss after which training ends; 0 for never.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub patience: usize,
    /// Steps from one checkpoint to the next; 0 for the end alone.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub save_every: usize,
    /// Add the adapter to the weights in the end, and write the whole model.
    #[arg(long)]
    pub merge: bool,
    /// Peers that share the forward passes of a step (`--accumulate`): threads of this process, or
    /// processes that are told which one each is.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = one_or_more)]
    pub peers: usize,
    /// Which of several processes on this machine this is, from 0; all are given the same flags and folder.
    #[arg(long, value_name = "I", requires = "peer_port")]
    pub peer: Option<usize>,
    /// The first of 2 + 2 * N ports that those processes use; nothing else guards them.
    #[arg(long, value_name = "PORT", requires = "peer")]
    pub peer_port: Option<u16>,
    /// Seconds that peers wait for one that lives.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub peer_timeout: u64,
}

/// What becomes of what cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnBad {
    /// The first one ends the run.
    Stop,
    /// It is named and left out.
    Skip,
}

/// What the learning rate does behind the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Decay {
    /// Half a cosine down to 0.
    Cosine,
    /// A line down to 0.
    Linear,
    /// Nothing.
    Constant,
}
