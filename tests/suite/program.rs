//! The program as users run it, without a process of its own: flags in; what it prints, or what it
//! refuses with, out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use clap::Parser;
use reducers::{Schedule, presets};
use reroute_cli::args::Args;
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::embedded;
use reroute_zoo::{Folder, OpenOptions, Vlm};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use tempfile::TempDir;
use vision_encoder::{DecodeLimits, RgbImage};

/// The built-in model, opened once.
pub static BUILT_IN: LazyLock<Vlm<Backend>> = LazyLock::new(|| open(&embedded::checkpoint()));

fn open(folder: &Folder) -> Vlm<Backend> {
    Vlm::open(folder, &OpenOptions::default(), &Device::default()).expect("it is built in")
}

/// A preset for the built-in model.
pub fn schedule(preset: &str) -> Schedule {
    let preset = presets::find(preset).expect("a preset");
    preset.schedule(layers()).expect("it has enough layers")
}

/// Decoder layers of the built-in model.
pub fn layers() -> usize {
    BUILT_IN.config().decoder().num_layers
}

/// Runs the program and returns all that it prints.
pub fn reroute<S: AsRef<str>>(flags: &[S]) -> Result<String, String> {
    let flags = flags.iter().map(AsRef::as_ref);
    let args = Args::try_parse_from(std::iter::once("reroute").chain(flags));
    let args = args.map_err(|error| error.to_string())?;
    let mut out = Vec::new();
    let result = reroute_cli::run(&args.command, &mut out);
    let out = String::from_utf8(out).expect("UTF-8");
    match result {
        Ok(()) => Ok(out),
        Err(error) => {
            assert_eq!(out, "", "printed before it failed with: {error:#}");
            Err(format!("{error:#}"))
        }
    }
}

/// Runs the program with `--json` and parses what it prints, but for the times.
pub fn report<S: AsRef<str>>(flags: &[S]) -> Value {
    let mut flags: Vec<&str> = flags.iter().map(AsRef::as_ref).collect();
    flags.push("--json");
    let printed = reroute(&flags).unwrap_or_else(|error| panic!("{flags:?}: {error}"));
    let mut report: Value = serde_json::from_str(&printed).expect("one JSON object");
    report.as_object_mut().expect("an object").remove("seconds");
    report
}

/// Asserts that the program refuses, and that its message has all these words.
#[track_caller]
pub fn refuses<S: AsRef<str>>(flags: &[S], expected: &[&str]) {
    let flags: Vec<&str> = flags.iter().map(AsRef::as_ref).collect();
    match reroute(&flags) {
        Ok(printed) => panic!("{flags:?} is not refused but prints: {printed}"),
        Err(message) => {
            for words in expected {
                assert!(
                    message.contains(words),
                    "{flags:?}: {message:?} lacks {words:?}"
                );
            }
        }
    }
}

/// One of the scenes of `assets/scenes`.
pub fn scene(name: &str) -> String {
    let scenes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/zoo/assets/scenes");
    text(&scenes.join(name).with_extension("png"))
}

/// Writes an image as PNG.
pub fn write_image(scratch: &Scratch, name: &str, image: &RgbImage) -> String {
    let mut bytes = Vec::new();
    let (width, height) = (image.width() as u32, image.height() as u32);
    let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    let colour = image::ExtendedColorType::Rgb8;
    image::ImageEncoder::write_image(encoder, image.data(), width, height, colour)
        .expect("a good image");
    scratch.write(name, bytes)
}

pub fn read_image(path: &str) -> RgbImage {
    let bytes = std::fs::read(path).expect("the image exists");
    vision_encoder::decode(&bytes, &DecodeLimits::default()).expect("a good image")
}

/// The checkpoint folder of `tests/fixtures`.
pub fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llava/ckpt")
}

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_string()
}

/// A folder to write to, which goes away with this.
pub struct Scratch(TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    /// A folder with the files of the fixture's checkpoint.
    pub fn checkpoint() -> Self {
        Self::copy(&fixture())
    }

    /// A folder with the files of the built-in model.
    pub fn built_in() -> Self {
        Self::copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/zoo/assets/narrow-llava"))
    }

    /// A folder with the files of another.
    pub fn copy(folder: &Path) -> Self {
        let scratch = Self::new();
        for entry in folder.read_dir().expect("the folder is complete") {
            let entry = entry.expect("the folder is readable");
            let target = scratch.0.path().join(entry.file_name());
            std::fs::copy(entry.path(), target).expect("a temporary file");
        }
        scratch
    }

    /// The folder.
    pub fn path(&self) -> String {
        text(self.0.path())
    }

    /// The folder, as checkpoints are opened.
    pub fn folder(&self) -> Folder {
        Folder::open(self.path()).expect("it exists")
    }

    /// Path of a file in it, whether it exists or not.
    pub fn at(&self, name: &str) -> String {
        text(&self.0.path().join(name))
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.at(name);
        std::fs::write(&path, content).expect("a temporary file");
        path
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.at(name)).unwrap_or_else(|_| panic!("{name} exists"))
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.at(name)).expect("it exists");
    }

    /// Sets a value in a JSON file; the pointer's parents exist.
    pub fn set(&self, name: &str, pointer: &str, value: Value) {
        let mut json: Value = serde_json::from_slice(&self.read(name)).expect("valid JSON");
        let (parent, key) = pointer.rsplit_once('/').expect("a JSON pointer");
        let parent = json.pointer_mut(parent).expect("the parent exists");
        match parent.as_array_mut() {
            Some(list) => list[key.parse::<usize>().expect("an index")] = value,
            None => parent[key] = value,
        }
        self.write(name, json.to_string());
    }

    /// Names of all entries, sorted.
    pub fn entries(&self) -> Vec<String> {
        let entries = self.0.path().read_dir().expect("the folder exists");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            let name = entry.expect("readable").file_name();
            name.into_string().expect("UTF-8")
        };
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }
}

/// A named tensor: type, shape, little-endian bytes.
pub type Named<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

/// A safetensors file.
pub fn safetensors(tensors: &[Named]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).expect("a consistent tensor");
        (*name, view)
    });
    safetensors::serialize(views, None).expect("serialisable")
}

pub fn i64s(name: &str, shape: impl Into<Vec<usize>>, values: impl AsRef<[i64]>) -> Named<'_> {
    let bytes = values.as_ref().iter().flat_map(|v| v.to_le_bytes());
    (name, Dtype::I64, shape.into(), bytes.collect())
}

pub fn f32s(name: &str, shape: impl Into<Vec<usize>>, values: impl AsRef<[f32]>) -> Named<'_> {
    let bytes = values.as_ref().iter().flat_map(|v| v.to_le_bytes());
    (name, Dtype::F32, shape.into(), bytes.collect())
}

/// A tensor as read: shape, and its values as the type it has.
#[derive(Debug, PartialEq)]
pub enum Values {
    Integers(Vec<usize>, Vec<i64>),
    Floats(Vec<usize>, Vec<f32>),
}

impl Values {
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Integers(shape, _) | Self::Floats(shape, _) => shape,
        }
    }

    pub fn integers(&self) -> &[i64] {
        match self {
            Self::Integers(_, values) => values,
            Self::Floats(..) => panic!("these are floats"),
        }
    }

    pub fn floats(&self) -> &[f32] {
        match self {
            Self::Floats(_, values) => values,
            Self::Integers(..) => panic!("these are integers"),
        }
    }
}

/// All tensors of a safetensors file.
pub fn read_tensors(path: &str) -> BTreeMap<String, Values> {
    let bytes = std::fs::read(path).expect("the file exists");
    let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let values = |(name, view): (String, TensorView)| {
        let (shape, data) = (view.shape().to_vec(), view.data());
        let values = match view.dtype() {
            Dtype::I64 => {
                let value = |b: &[u8]| i64::from_le_bytes(std::array::from_fn(|i| b[i]));
                Values::Integers(shape, data.chunks_exact(8).map(value).collect())
            }
            Dtype::F32 => {
                let value = |b: &[u8]| f32::from_le_bytes(std::array::from_fn(|i| b[i]));
                Values::Floats(shape, data.chunks_exact(4).map(value).collect())
            }
            other => panic!("{name} is {other:?}"),
        };
        (name, values)
    };
    tensors.tensors().into_iter().map(values).collect()
}
