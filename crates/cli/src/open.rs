//! From flags to models, images and schedules.

use std::fs::File;
use std::io::{IsTerminal, Read, Write, stderr};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use burn::tensor::backend::Backend as AnyBackend;
use reducers::{Plan, presets};
use reroute::{GenerationOptions, SamplingOptions};
use reroute_zoo::embedded;
use reroute_zoo::{Folder, ModelConfig, Video, Visual, Vlm, natural};
use vision_encoder::{DecodeLimits, RgbImage, decode};

use crate::args::{GenerationArgs, ModelArgs, VisualArgs};
use crate::backend::{self, Backend, Device};
use crate::hub;
use crate::source::{is_stdin, read, shown};

/// Largest image and schedule files that are read.
const MAX_IMAGE_BYTES: u64 = 256 << 20;
const MAX_SCHEDULE_BYTES: u64 = 1 << 20;
const MAX_TENSOR_BYTES: u64 = 4 << 30;

/// Most frames of a video, and most memory that they may take.
const MAX_FRAMES: usize = 768;
const MAX_VIDEO_BYTES: usize = 2 << 30;

/// Most files of a folder of frames, pictures or not.
const MAX_FILES: usize = 8192;
/// Bytes at the start of a file that tell what it is.
const MAGIC_BYTES: u64 = 32;
/// Endings of names that only pictures have.
const PICTURES: [&str; 4] = ["jpeg", "jpg", "png", "webp"];

/// Loading shows its progress from this size on.
const SHOW_PROGRESS_BYTES: u64 = 256 << 20;

pub(crate) fn folder(path: Option<&Path>, mmproj: Option<&Path>) -> anyhow::Result<Folder> {
    match path {
        Some(path) => hub::folder(path, mmproj),
        None => Ok(embedded::checkpoint()),
    }
}

pub(crate) fn model(args: &ModelArgs) -> anyhow::Result<Vlm<Backend>> {
    model_on(args)
}

/// The same on what is built on the backend.
pub(crate) fn model_on<B: AnyBackend<Device = Device>>(args: &ModelArgs) -> anyhow::Result<Vlm<B>> {
    let device = backend::device()?;
    let folder = args.folder()?;
    let options = args.options(&folder)?;
    let show = stderr().is_terminal();
    let vlm = Vlm::open_with_progress(&folder, &options, &device, &mut |progress| {
        if show && progress.total_bytes > SHOW_PROGRESS_BYTES {
            let (loaded, total) = (progress.loaded_bytes >> 20, progress.total_bytes >> 20);
            let end = if loaded == total { "\n" } else { "" };
            let _ = write!(stderr(), "\rloading {loaded} of {total} MiB{end}");
        }
        ControlFlow::Continue(())
    });
    Ok(vlm?)
}

/// Images, then videos.
pub(crate) fn visuals(args: &VisualArgs) -> anyhow::Result<Vec<Visual>> {
    if args.image.iter().filter(|path| is_stdin(path)).count() > 1 {
        bail!("the standard input holds one image; give `-` once");
    }
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

/// A folder of frames, in the order of their names: a number in a name counts as a number.
pub(crate) fn video(folder: &Path, fps: f64) -> anyhow::Result<Video> {
    let shown = folder.display();
    let paths = frames(folder)?;
    if paths.len() > MAX_FRAMES {
        bail!("{shown} has more than {MAX_FRAMES} frames; keep fewer frames per second");
    }
    let mut frames: Vec<RgbImage> = Vec::with_capacity(paths.len());
    let mut bytes = 0;
    for path in &paths {
        let frame = image(path)?;
        let size = |image: &RgbImage| (image.width(), image.height());
        if let Some(first) = frames.first()
            && size(first) != size(&frame)
        {
            let ((width, height), (first_width, first_height)) = (size(&frame), size(first));
            bail!(
                "{} is {width}×{height} pixels, {} is {first_width}×{first_height}; the frames of a \
                 video must have one size",
                path.display(),
                paths[0].display()
            );
        }
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

/// The pictures of a folder, at least one. Other files are left out with a note, but not those that
/// are called pictures.
fn frames(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let shown = folder.display();
    let cannot = || format!("cannot read the folder of frames {shown}");
    if folder.is_file() {
        bail!(
            "{shown} is a file; videos are read as folders of frames, such as \
             `ffmpeg -i {shown} -vf fps=2 frames/%04d.png` makes"
        );
    }
    let (mut pictures, mut others) = (Vec::new(), Vec::new());
    for entry in folder.read_dir().with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        if !path.is_file() {
            if is_called_picture(&path) && !path.is_dir() {
                bail!(
                    "{} is called a picture and is no file, or a link to nothing",
                    path.display()
                );
            }
            continue;
        }
        match is_picture(&path)? {
            true => pictures.push(path),
            false => others.push(path),
        }
        if pictures.len() + others.len() > MAX_FILES {
            bail!("{shown} has more than {MAX_FILES} files; give a folder of frames alone");
        }
    }
    pictures.sort_by_cached_key(|path| natural::key(path));
    others.sort();
    let names = others.iter().filter_map(|path| path.file_name());
    let mut names: Vec<_> = names.map(|name| name.display().to_string()).collect();
    if names.len() > 5 {
        names.splice(5.., ["…".to_owned()]);
    }
    let names = names.join(", ");
    if pictures.is_empty() {
        match others.is_empty() {
            true => bail!("{shown} has no frames in it"),
            false => bail!("{shown} has no frames in it: {names} is no PNG, JPEG or WebP image"),
        }
    }
    if !others.is_empty() {
        let _ = writeln!(
            stderr(),
            "note: left out of {shown}, for they are no pictures: {names}"
        );
    }
    Ok(pictures)
}

/// Whether the name is that of a picture, and not hidden.
fn is_called_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(|end| end.to_str());
    let is_called = |end: &str| PICTURES.iter().any(|known| known.eq_ignore_ascii_case(end));
    let hidden = path
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    extension.is_some_and(is_called) && !hidden
}

/// Whether a file is a picture by its first bytes, or by its name: then it may be a damaged one.
fn is_picture(path: &Path) -> anyhow::Result<bool> {
    if is_called_picture(path) {
        return Ok(true);
    }
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut magic = Vec::new();
    let read = file.take(MAGIC_BYTES).read_to_end(&mut magic);
    read.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(image::guess_format(&magic).is_ok())
}

pub(crate) fn image(path: &Path) -> anyhow::Result<RgbImage> {
    let bytes = read(path, MAX_IMAGE_BYTES)?;
    decode(&bytes, &DecodeLimits::default()).with_context(|| format!("image {}", shown(path)))
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
        let shape = config.decoder().shape();
        plan.schedule.check(&shape).with_context(named)?;
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
        ..SamplingOptions::default()
    };
    sampling.validate()?;
    Ok(GenerationOptions {
        max_new_tokens: args.max_new_tokens.unwrap_or(defaults.max_new_tokens),
        sampling,
        ..defaults
    })
}
