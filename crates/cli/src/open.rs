//! From flags to models, images and schedules.

use std::fs::File;
use std::io::{IsTerminal, Read, Write, stderr};
use std::path::Path;

use anyhow::{Context, bail};
use burn::tensor::DType;
use reducers::{Plan, presets};
use reroute::{GenerationOptions, SamplingOptions};
use reroute_zoo::{Folder, ImageOptions, ModelConfig, OpenOptions, Video, Visual, Vlm};
use vision_encoder::{DecodeLimits, RgbImage, decode};

use crate::args::{Dtype, GenerationArgs, ModelArgs, VisualArgs};
use crate::backend::{self, Backend};
use reroute_zoo::embedded;

/// Largest image and schedule files that are read.
const MAX_IMAGE_BYTES: u64 = 256 << 20;
const MAX_SCHEDULE_BYTES: u64 = 1 << 20;
const MAX_TENSOR_BYTES: u64 = 4 << 30;

/// Most frames of a video, and most memory that they may take.
const MAX_FRAMES: usize = 768;
const MAX_VIDEO_BYTES: usize = 2 << 30;

/// Loading shows its progress from this size on.
const SHOW_PROGRESS_BYTES: u64 = 256 << 20;

impl Dtype {
    /// Burn's name of it.
    pub fn burn(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

pub(crate) fn folder(path: Option<&Path>) -> anyhow::Result<Folder> {
    match path {
        Some(path) => Ok(Folder::open(path)?),
        None => Ok(embedded::checkpoint()),
    }
}

/// What the flags ask of preprocessing.
pub(crate) fn image_options(args: &ModelArgs) -> ImageOptions {
    ImageOptions {
        pad_to_square: args.pad_to_square.then_some(true),
        max_pixels: args.max_pixels,
    }
}

pub(crate) fn model(args: &ModelArgs) -> anyhow::Result<Vlm<Backend>> {
    let device = backend::device()?;
    let folder = folder(args.model.as_deref())?;
    let options = OpenOptions {
        dtype: args.dtype.burn(),
        images: image_options(args),
    };
    let show = stderr().is_terminal();
    let vlm = Vlm::open_with_progress(&folder, &options, &device, &mut |progress| {
        if show && progress.total_bytes > SHOW_PROGRESS_BYTES {
            let (loaded, total) = (progress.loaded_bytes >> 20, progress.total_bytes >> 20);
            let end = if loaded == total { "\n" } else { "" };
            let _ = write!(stderr(), "\rloading {loaded} of {total} MiB{end}");
        }
    });
    Ok(vlm?)
}

/// Images, then videos.
pub(crate) fn visuals(args: &VisualArgs) -> anyhow::Result<Vec<Visual>> {
    let images = args
        .image
        .iter()
        .map(|path| Ok(Visual::Image(image(path)?)));
    let videos = args
        .video
        .iter()
        .map(|path| Ok(Visual::Video(video(path, args.fps)?)));
    images.chain(videos).collect()
}

/// A folder of frames, in the order of their names.
pub(crate) fn video(folder: &Path, fps: f64) -> anyhow::Result<Video> {
    let shown = folder.display();
    let cannot = || format!("cannot read the folder of frames {shown}");
    let entries = folder.read_dir().with_context(cannot)?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.with_context(cannot)?.path();
        if path.is_file() {
            paths.push(path);
        }
        if paths.len() > MAX_FRAMES {
            bail!("{shown} has more than {MAX_FRAMES} files; keep fewer frames per second");
        }
    }
    paths.sort();
    if paths.is_empty() {
        bail!("{shown} has no frames in it");
    }
    let mut frames = Vec::new();
    let mut bytes = 0;
    for path in paths {
        let frame = image(&path)?;
        bytes += frame.data().len();
        if bytes > MAX_VIDEO_BYTES {
            bail!(
                "the frames of {shown} take more than {} MiB; scale them down or keep fewer",
                MAX_VIDEO_BYTES >> 20
            );
        }
        frames.push(frame);
    }
    Ok(Video { frames, fps })
}

pub(crate) fn image(path: &Path) -> anyhow::Result<RgbImage> {
    let bytes = read(path, MAX_IMAGE_BYTES)?;
    decode(&bytes, &DecodeLimits::default()).with_context(|| format!("image {}", path.display()))
}

/// The contents of a safetensors file.
pub(crate) fn tensors(path: &Path) -> anyhow::Result<Vec<u8>> {
    read(path, MAX_TENSOR_BYTES)
}

/// The built-in scene.
pub(crate) fn scene() -> anyhow::Result<RgbImage> {
    Ok(decode(embedded::SCENE.image, &DecodeLimits::default())?)
}

/// A preset by name, or a plan from a JSON file.
pub(crate) fn plan(routing: &str, config: &ModelConfig) -> anyhow::Result<Plan> {
    let num_layers = config.decoder().num_layers;
    if routing.ends_with(".json") {
        let text = String::from_utf8(read(Path::new(routing), MAX_SCHEDULE_BYTES)?)
            .with_context(|| format!("schedule {routing} is not UTF-8 text"))?;
        let named = || format!("schedule {routing}");
        let plan = Plan::from_json(&text).with_context(named)?;
        plan.schedule.check_depth(num_layers).with_context(named)?;
        return Ok(plan);
    }
    let preset = presets::find(routing)
        .with_context(|| format!("--routing {routing} is no preset and does not end in .json"))?;
    Ok(preset.plan(num_layers, &config.encoder())?)
}

pub(crate) fn generation(
    args: &GenerationArgs,
    defaults: GenerationOptions,
) -> anyhow::Result<GenerationOptions> {
    let sampling = SamplingOptions {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    };
    sampling.validate()?;
    Ok(GenerationOptions {
        max_new_tokens: args.max_new_tokens.unwrap_or(defaults.max_new_tokens),
        sampling,
        ..defaults
    })
}

fn read(path: &Path, limit: u64) -> anyhow::Result<Vec<u8>> {
    let shown = path.display();
    let file = File::open(path).with_context(|| format!("cannot open {shown}"))?;
    let mut bytes = Vec::new();
    let read = file.take(limit + 1).read_to_end(&mut bytes);
    read.with_context(|| format!("cannot read {shown}"))?;
    if bytes.len() as u64 > limit {
        bail!(
            "{shown} is larger than {} MiB; give a smaller file",
            limit >> 20
        );
    }
    Ok(bytes)
}
