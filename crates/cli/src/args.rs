//! The whole command-line grammar.

mod eval;
mod serve;
mod tune;
mod types;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use reroute_zoo::{Folder, ImageOptions, OpenOptions};

use crate::backend::version;
use crate::{hub, open};
pub use eval::{BootstrapArgs, EvalArgs, EvalCommand, OnErrorArg, PromptArg, UnitsArg};
pub use serve::{LimitArgs, ServeArgs};
pub use tune::{Decay, OnBad, TuneArgs};
pub use types::{CodedMaps, Kv, WeightType};

/// Ask vision-language models about images, with FastV, PyramidDrop or Reroute deciding which
/// visual tokens each decoder layer works on.
#[derive(Debug, Parser)]
#[command(name = "reroute", version, long_version = version())]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer a question about images and videos.
    Ask(AskArgs),
    /// Keep a conversation: one question per line, earlier images stay in it.
    Chat(ChatArgs),
    /// Find what an expression describes and draw a box around it.
    Ground(GroundArgs),
    /// Draw which visual tokens each stage works on, and count what it costs.
    Explain(ExplainArgs),
    /// Fit shortcuts for visual tokens that wait, so that they drift less ("waiting": "shortcut").
    Calibrate(CalibrateArgs),
    /// Ask one question under several routings and show answers, costs and selections side by side.
    Compare(CompareArgs),
    /// Run prepared tensors and write logits, scores and selections, for comparisons.
    Trace(TraceArgs),
    /// List every routing preset with its counts and costs for a model.
    Presets(PresetsArgs),
    /// Convert a checkpoint into a form that loads fast, or back into one that transformers loads.
    Convert(ConvertArgs),
    /// Train a model on examples: an adapter, the projector, or everything.
    Tune(Box<TuneArgs>),
    /// Answer over HTTP, as OpenAI's chat completions, many requests side by side.
    Serve(Box<ServeArgs>),
    /// Measure routings on RefCOCO, POPE, GQA, TextVQA or data of one's own.
    Eval(Box<EvalArgs>),
    /// Say what keeps a checkpoint from running here, and how much memory it needs.
    Doctor(DoctorArgs),
    /// Print what completes commands and flags in a shell.
    Completions(CompletionsArgs),
    /// Print the manual page.
    Man,
}

/// Which model, and how it is loaded.
#[derive(Debug, Clone, clap::Args)]
pub struct ModelArgs {
    /// Checkpoint folder in Hugging Face layout, or OWNER/NAME of one that the Hugging Face cache has; or a
    /// language model in GGUF, or a folder that has it and its tower. Without it: a tiny built-in model that
    /// finds coloured shapes.
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub model: Option<PathBuf>,
    /// The vision tower that goes with a language model in GGUF, where it is not the only one beside it.
    #[arg(long, value_name = "FILE.gguf", requires = "model")]
    pub mmproj: Option<PathBuf>,
    /// Type of the weights in memory.
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: WeightType,
    /// Type of keys and values in memory.
    #[arg(long, value_enum, default_value = "auto")]
    pub kv: Kv,
    /// Which linear maps --dtype int8 and q4 are for.
    #[arg(long, value_enum, default_value = "decoder")]
    pub coded: CodedMaps,
    /// Pad images to a square instead of cropping them, as the original LLaVA code does, for models
    /// whose images are all of one size.
    #[arg(long)]
    pub pad_to_square: bool,
    /// Largest area of an image or video frame in pixels; larger ones are scaled down, for models
    /// that take any size. The
    /// default is the checkpoint's own limit, but at most 1003520, which is 1280 visual tokens of 28×28.
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = one_or_more)]
    pub max_pixels: Option<usize>,
    /// Folder of a low-rank adapter, as PEFT saves it (adapter_config.json, adapter_model.safetensors); may be
    /// given several times, and the changes add up.
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// Add the adapters to the weights instead of keeping them beside.
    #[arg(long, requires = "adapter")]
    pub merge_adapter: bool,
}

impl ModelArgs {
    /// The checkpoint.
    pub fn folder(&self) -> anyhow::Result<Folder> {
        open::folder(self.model.as_deref(), self.mmproj.as_deref())
    }

    /// How the checkpoint is opened.
    pub fn options(&self, folder: &Folder) -> anyhow::Result<OpenOptions> {
        let (dtype, weights) = self.dtype.types(self.coded, folder);
        let adapters = self.adapter.iter().map(|path| hub::folder(path, None));
        Ok(OpenOptions {
            dtype,
            weights,
            kv: self.kv.chosen(),
            images: ImageOptions {
                pad_to_square: self.pad_to_square.then_some(true),
                max_pixels: self.max_pixels,
            },
            adapters: adapters.collect::<Result<_, _>>()?,
            merge_adapters: self.merge_adapter,
        })
    }
}

/// What to look at.
#[derive(Debug, clap::Args)]
pub struct VisualArgs {
    /// Images (PNG, JPEG, WebP), in the order in which the question speaks of them: files, `data:` and
    /// `file:` URLs, or - for the standard input.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub image: Vec<PathBuf>,
    /// Videos, after the images: each a folder of frames (PNG, JPEG, WebP), in the order of their
    /// names; frame 2 comes before frame 10.
    #[arg(long, value_name = "DIR", num_args = 1..)]
    pub video: Vec<PathBuf>,
    /// Frames per second of the frames given.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2.0,
        allow_negative_numbers = true
    )]
    pub fps: f64,
}

/// Types that weights can have in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// 16-bit floats: half the memory, faster decoding.
    F16,
    /// The same, with the range of f32 and a third of the digits of f16.
    Bf16,
}

/// Which visual tokens the layers work on.
#[derive(Debug, clap::Args)]
pub struct RoutingArgs {
    /// A preset (`reroute presets` lists them) or a JSON file:
    /// {"action": "remove"|"reroute", "monotonic": false, "stages": [{"layer": 2, "keep_ratio": 0.45}]}
    #[arg(long, value_name = "PRESET|FILE.json", default_value = "dense")]
    pub routing: String,
}

/// How the answer is generated.
#[derive(Debug, clap::Args)]
pub struct GenerationArgs {
    /// Tokens to generate at most; the checkpoint's own limit otherwise.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_new_tokens: Option<usize>,
    /// Temperature; 0 is greedy.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Sample from the smallest set of tokens that holds this probability.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Sample from this many most likely tokens; 0 is all.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub top_k: usize,
    /// Make tokens that were seen before less likely; 1 is off.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Seed of the random numbers.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub seed: u64,
}

/// `reroute ask`
#[derive(Debug, clap::Args)]
pub struct AskArgs {
    /// Model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What to look at.
    #[command(flatten)]
    pub visual: VisualArgs,
    /// The question.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Routing.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `reroute chat`
#[derive(Debug, clap::Args)]
pub struct ChatArgs {
    /// Model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What the first question is about.
    #[command(flatten)]
    pub visual: VisualArgs,
    /// Routing.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Print one JSON object per answer, each on a line.
    #[arg(long)]
    pub json: bool,
}

/// `reroute ground`
#[derive(Debug, clap::Args)]
pub struct GroundArgs {
    /// Model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The image (PNG, JPEG, WebP).
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// What to find.
    #[arg(long, value_name = "TEXT")]
    pub expression: Option<String>,
    /// Where to draw what is found (PNG, JPEG or WebP, as the name ends).
    #[arg(long, value_name = "FILE")]
    pub overlay: Option<PathBuf>,
    /// Routing.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `reroute explain`
#[derive(Debug, clap::Args)]
pub struct ExplainArgs {
    /// Model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What to look at.
    #[command(flatten)]
    pub visual: VisualArgs,
    /// The question.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Folder for the pictures.
    #[arg(long, value_name = "DIR", default_value = "reroute-explain")]
    pub out: PathBuf,
    /// A preset (`reroute presets` lists them) or a JSON file with a schedule.
    #[arg(
        long,
        value_name = "PRESET|FILE.json",
        default_value = "reroute-pdrop@192"
    )]
    pub routing: String,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `reroute calibrate`
#[derive(Debug, clap::Args)]
pub struct CalibrateArgs {
    /// Model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// A few dozen pictures like those that will be asked about; every fifth is held out to measure by.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub image: Vec<PathBuf>,
    /// A preset (`reroute presets` lists them) or a JSON file with a schedule: its decisions say which layers tokens wait for.
    #[arg(
        long,
        value_name = "PRESET|FILE.json",
        default_value = "reroute-pdrop@192"
    )]
    pub routing: String,
    /// Numbers that the state of a token is mapped down to.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub rank: usize,
    /// How strongly maps are held small, as a share of the mean square of states.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    pub ridge: f64,
    /// Where to write, if not to the shortcuts.json of the checkpoint folder; maps for other layers that it has stay.
    #[arg(long, value_name = "FILE")]
    pub to: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `reroute compare`
#[derive(Debug, clap::Args)]
pub struct CompareArgs {
    /// Model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What to look at.
    #[command(flatten)]
    pub visual: VisualArgs,
    /// The question.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Presets (`reroute presets` lists them) or JSON files, one flag each or several behind one.
    #[arg(
        long,
        value_name = "PRESET|FILE.json",
        num_args = 1..,
        default_values = ["dense", "fastv@192", "reroute-fastv@192", "nuwa@192", "reroute-nuwa@192"]
    )]
    pub routing: Vec<String>,
    /// Times each routing is asked; times are medians.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub rounds: usize,
    /// Where the picture goes (PNG, JPEG or WebP, as the name ends): a row per routing, a column per stage.
    #[arg(long, value_name = "FILE", default_value = "reroute-compare.png")]
    pub out: PathBuf,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `reroute trace`
#[derive(Debug, clap::Args)]
pub struct TraceArgs {
    /// Model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Safetensors with in.input_ids [B, L], in.attention_mask [B, L] and
    /// models of one size: in.pixel_values [N, 3, H, W];
    /// others: in.pixel_values [patches, features], in.image_grid_thw [N, 3], for videos
    /// in.pixel_values_videos, in.video_grid_thw, in.second_per_grid_ts (one number per video);
    /// in.mm_token_type_ids [B, L] is checked against the ids.
    #[arg(long, value_name = "IN.safetensors")]
    pub inputs: PathBuf,
    /// Safetensors to write.
    #[arg(long, value_name = "OUT.safetensors")]
    pub out: PathBuf,
    /// Tokens to generate greedily after the prefill.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    pub new_tokens: usize,
    /// Also write vision features, embeddings and the output of every layer.
    #[arg(long)]
    pub hidden_states: bool,
    /// Routing.
    #[command(flatten)]
    pub routing: RoutingArgs,
    /// Print one JSON object about what was written.
    #[arg(long)]
    pub json: bool,
}

/// `reroute presets`
#[derive(Debug, clap::Args)]
pub struct PresetsArgs {
    /// Checkpoint folder (only config.json is read), or a language model in GGUF; the built-in model otherwise.
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub model: Option<PathBuf>,
    /// The vision tower that goes with a language model in GGUF, where it is not the only one beside it.
    #[arg(long, value_name = "FILE.gguf", requires = "model")]
    pub mmproj: Option<PathBuf>,
    /// Folder of a low-rank adapter; may be given several times. What routing costs is counted without, as
    /// published; one that does not fit the model is refused.
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// Visual tokens of the prompt; those of one image otherwise.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub visual_tokens: Option<u32>,
    /// Text tokens of the prompt.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 64,
        allow_negative_numbers = true
    )]
    pub text_tokens: u32,
    /// Type of keys and values; auto is that of the checkpoint.
    #[arg(long, alias = "dtype", value_enum, default_value = "f16")]
    pub kv: Kv,
    /// Print which method works with which family, and how close to its source, as a Markdown table.
    #[arg(long)]
    pub support: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `reroute convert`
#[derive(Debug, clap::Args)]
pub struct ConvertArgs {
    /// Folder of the checkpoint: Hugging Face safetensors, Burnpack, GGUF, or PyTorch `.bin` files; or a language
    /// model in GGUF.
    #[arg(
        long,
        value_name = "DIR|FILE.gguf",
        required_unless_present = "assemble"
    )]
    pub from: Option<PathBuf>,
    /// The vision tower that goes with a language model in GGUF, where it is not the only one beside it.
    #[arg(long, value_name = "FILE.gguf", requires = "from")]
    pub mmproj: Option<PathBuf>,
    /// Make a model of parts instead: --vision-tower, --decoder, and a random projector between them that is to be
    /// trained.
    #[arg(long, value_enum, value_name = "FAMILY", conflicts_with = "from", requires_all = ["vision_tower", "decoder"])]
    pub assemble: Option<Assemble>,
    /// Language model to assemble, LLaMA, Mistral or Qwen2: its folder, or its file in GGUF.
    #[arg(long, value_name = "DIR|FILE.gguf", requires = "assemble")]
    pub decoder: Option<PathBuf>,
    /// Side of the images of an assembled model, in pixels, if its tower takes any: 16 patches.
    #[arg(long, value_name = "N", requires = "assemble", value_parser = one_or_more)]
    pub image_size: Option<usize>,
    /// Special token of the decoder without a use of its own, which becomes `<image>`.
    #[arg(long, value_name = "TOKEN", requires = "assemble")]
    pub image_token: Option<String>,
    /// What the projector is drawn by.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "assemble")]
    pub seed: u64,
    /// Folder to make, or a file of weights that ends in .bpk or .safetensors. What --format leaves
    /// open the name says: `hf` becomes a folder that transformers loads again.
    #[arg(long, value_name = "DIR|FILE")]
    pub to: PathBuf,
    /// Type of the weights. Without it they stay as they are; those of fewer bits that others have quantised are
    /// widened and become what config.json says.
    #[arg(long, value_enum)]
    pub dtype: Option<FileType>,
    /// Which linear maps --dtype int8 and q4 are for.
    #[arg(long, value_enum, default_value = "decoder")]
    pub coded: CodedMaps,
    /// Make the largest value of the type of values beyond its range, instead of refusing them.
    #[arg(long)]
    pub clamp: bool,
    /// What to write; Burnpack, unless --to names a .safetensors file, and hf of an assembled model.
    #[arg(long, value_enum)]
    pub format: Option<ConvertForm>,
    /// Folder of the CLIP model, for LLaVA as its authors published it. To assemble: folder or ONNX file of a tower
    /// (DINOv2, CLIP, SigLIP).
    #[arg(long, value_name = "DIR|FILE")]
    pub vision_tower: Option<PathBuf>,
    /// Folder whose tokenizer and chat template are used where --from has none.
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Read PyTorch's `.bin` files. Their code is never run, but their makers must be trusted.
    #[arg(long)]
    pub allow_pickle: bool,
    /// Largest shard of --format hf, in bytes.
    #[arg(long, value_name = "N", default_value_t = 5_000_000_000)]
    pub max_shard_bytes: u64,
    /// List what would be written, and write nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Types that weights can have in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FileType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// The same, with the range of f32 and a third of the digits of f16.
    Bf16,
    /// Bytes with a scale for each row; what is no linear map stays what it is.
    Int8,
    /// 4 bits with a scale for each group of 64; what is no linear map stays what it is.
    Q4,
}

/// Families that are assembled of parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Assemble {
    /// LLaVA
    Llava,
}

/// What `reroute convert` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConvertForm {
    /// model.bpk, which is mapped into memory
    Burnpack,
    /// model.safetensors
    Safetensors,
    /// Shards and an index, as transformers saves and loads them
    Hf,
}

/// `reroute doctor`
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Picture to reckon with, in pixels.
    #[arg(long, value_name = "WxH", default_value = "1024x768", value_parser = image_size)]
    pub image_size: [usize; 2],
    /// Text tokens to reckon with: those of the prompt and of the answer.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 320,
        allow_negative_numbers = true
    )]
    pub text_tokens: u32,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// A number that is not zero.
fn one_or_more(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("give 1 or more".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

/// `reroute completions`
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: Shell,
}

/// `1024x768`
fn image_size(text: &str) -> Result<[usize; 2], String> {
    let side = |text: &str| text.parse::<u16>().ok().filter(|&side| side > 0);
    let sides = text.split_once(['x', '×']);
    match sides.and_then(|(width, height)| Some([side(width)?, side(height)?])) {
        Some(sides) => Ok(sides.map(usize::from)),
        None => Err("give width and height in pixels, 1 to 65535 each, such as 1024x768".into()),
    }
}
