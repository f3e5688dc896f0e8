//! `cargo xtask make-random`: a checkpoint with the structure of a family and random weights, for
//! tests and benchmarks.
//!
//! Everything but the weights and the sizes is that of the family's fixture.

mod shapes;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use shapes::{Fill, Tensor};

/// Many times those of any model.
const MAX_LAYERS: usize = 1024;

/// Values that are written at once.
const CHUNK: usize = 1 << 18;

#[derive(clap::Args)]
pub struct Args {
    /// Family of the model.
    #[arg(long)]
    family: Family,
    /// Sizes of its layers: the fixture's, or those of the published 7B model (Qwen3-VL: 8B) or of Qwen2-VL-2B.
    #[arg(long, default_value = "tiny")]
    size: Size,
    /// Layers of the decoder; the fixture's 8 without it, or 4 of those of a published model.
    #[arg(long)]
    layers: Option<usize>,
    /// Type of the weights.
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// Equal seeds make equal files.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder to make; it must not be there, or be empty.
    #[arg(long)]
    to: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Family {
    Llava,
    Qwen2Vl,
    #[value(name = "qwen2.5-vl")]
    Qwen25Vl,
    Qwen3Vl,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Size {
    Tiny,
    #[value(name = "7b-layers")]
    Layers7b,
    #[value(name = "2b-layers")]
    Layers2b,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

pub fn run(args: &Args, root: &Path) -> anyhow::Result<()> {
    let fixture = root
        .join("tests/fixtures")
        .join(args.family.fixture())
        .join("ckpt");
    let mut config = read_json(&fixture.join("config.json"))?;
    let mut preprocessor = read_json(&fixture.join("preprocessor_config.json"))?;
    if args.size != Size::Tiny {
        let (model, pixels) = args.family.published();
        merge(&mut config, model);
        merge(&mut preprocessor, pixels);
    }
    if args.size == Size::Layers2b {
        ensure!(
            args.family == Family::Qwen2Vl,
            "--size 2b-layers is of --family qwen2-vl"
        );
        // Qwen/Qwen2-VL-2B-Instruct beside its 7B.
        let changes = json!({
            "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": true,
            "vision_config": {"hidden_size": 1536},
        });
        merge(&mut config, changes);
    }
    let text = match config.get_mut("text_config") {
        Some(text) => text,
        None => &mut config,
    };
    if let Some(layers) = args.layers {
        text["num_hidden_layers"] = layers.into();
    }
    let taps = &config["vision_config"]["deepstack_visual_indexes"];
    let least = taps.as_array().map_or(1, Vec::len).max(1);
    let allowed = least..=MAX_LAYERS;
    if args.layers.is_some_and(|layers| !allowed.contains(&layers)) {
        bail!("this family takes --layers {least} to {MAX_LAYERS}");
    }
    set_dtype(&mut config, args.dtype.name());

    let tensors = match args.family {
        Family::Llava => shapes::llava(&config)?,
        Family::Qwen2Vl => shapes::qwen2_vl(&config)?,
        Family::Qwen25Vl => shapes::qwen2_5_vl(&config)?,
        Family::Qwen3Vl => shapes::qwen3_vl(&config)?,
    };
    let is_taken = match args.to.read_dir() {
        Ok(mut entries) => entries.next().is_some() || args.to.is_symlink(),
        Err(_) => args.to.symlink_metadata().is_ok(),
    };
    if is_taken {
        bail!(
            "{} is already there; remove it, or choose another --to",
            args.to.display()
        );
    }
    let name = args.to.file_name();
    let name = name.context("--to must end in the name of the folder to make")?;
    let parent = match args.to.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent)?;
    let elements = tensors.iter().map(|tensor| tensor.elements() as u64);
    check_space(parent, elements.sum::<u64>() * args.dtype.bytes())?;
    // The folder gets its name when it is whole.
    let unfinished = tempfile::Builder::new()
        .prefix(".make-random-")
        .tempdir_in(parent)?;
    let folder = unfinished.path().join(name);
    fs::create_dir(&folder)?;
    let weights = folder.join("model.safetensors");
    write(&weights, &tensors, args.dtype, args.seed)?;
    for entry in fixture.read_dir()? {
        let name = entry?.file_name();
        if !name.to_string_lossy().starts_with("model.") && name != "config.v5.json" {
            fs::copy(fixture.join(&name), folder.join(&name))?;
        }
    }
    fs::write(
        folder.join("preprocessor_config.json"),
        format!("{preprocessor:#}\n"),
    )?;
    fs::write(folder.join("config.json"), format!("{config:#}\n"))?;
    let mib = weights.metadata()?.len() >> 20;
    if args.to.is_dir() {
        fs::remove_dir(&args.to)?; // Only if it is empty.
    }
    fs::rename(&folder, &args.to)?;
    println!(
        "{}: {} tensors, {mib} MiB",
        args.to.display(),
        tensors.len()
    );
    Ok(())
}

impl Family {
    fn fixture(self) -> &'static str {
        match self {
            Self::Llava => "llava",
            Self::Qwen2Vl => "qwen2vl",
            Self::Qwen25Vl => "qwen25vl",
            Self::Qwen3Vl => "qwen3vl",
        }
    }

    /// How `config.json` and `preprocessor_config.json` of the published model differ from the
    /// fixture's, but for the vocabulary's special tokens and the number of decoder layers: the files
    /// of llava-hf/llava-1.5-7b-hf, Qwen/Qwen2-VL-7B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct and
    /// Qwen/Qwen3-VL-8B-Instruct.
    fn published(self) -> (Value, Value) {
        let qwen2 = json!({
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 4,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            "tie_word_embeddings": false, "rope_scaling": {"mrope_section": [16, 24, 24]},
        });
        let pixels = json!({"max_pixels": 12_845_056});
        let with_vision = |vision: Value| {
            let mut config = qwen2.clone();
            config["vision_config"] = vision;
            config
        };
        match self {
            Self::Llava => (
                json!({
                    "image_seq_length": 576, "vocab_size": 32064,
                    "text_config": {
                        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4,
                        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
                    },
                    "vision_config": {
                        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                        "num_attention_heads": 16, "num_hidden_layers": 24, "projection_dim": 768,
                    },
                }),
                json!({"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}),
            ),
            Self::Qwen2Vl => (
                with_vision(json!({
                    "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16,
                })),
                pixels,
            ),
            Self::Qwen25Vl => (
                with_vision(json!({
                    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                    "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31],
                })),
                pixels,
            ),
            Self::Qwen3Vl => (
                json!({
                    "tie_word_embeddings": false,
                    "text_config": {
                        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 4,
                        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                        "vocab_size": 151936, "tie_word_embeddings": false,
                        "rope_scaling": {"mrope_section": [24, 20, 20]},
                    },
                    "vision_config": {
                        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                        "out_hidden_size": 4096, "num_position_embeddings": 2304,
                        "deepstack_visual_indexes": [8, 16, 24],
                    },
                }),
                json!({}),
            ),
        }
    }
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// Of one value.
    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Says the type of the weights, also where the config of a part names it.
fn set_dtype(config: &mut Value, name: &str) {
    config["torch_dtype"] = name.into();
    for part in config.as_object_mut().into_iter().flat_map(Map::values_mut) {
        for key in ["torch_dtype", "dtype"] {
            if let Some(dtype) = part.get_mut(key) {
                *dtype = name.into();
            }
        }
    }
}

/// Puts the values of `changes` into `config`, object by object.
fn merge(config: &mut Value, changes: Value) {
    match (config, changes) {
        (Value::Object(config), Value::Object(changes)) => {
            for (key, value) in changes {
                merge(config.entry(key).or_insert(Value::Null), value);
            }
        }
        (config, value) => *config = value,
    }
}

fn read_json(path: &Path) -> anyhow::Result<Value> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// Refuses what a disk has no room for.
fn check_space(folder: &Path, needed: u64) -> anyhow::Result<()> {
    let available = fs4::available_space(folder)?;
    if needed > available {
        bail!(
            "{} has {available} bytes free, {needed} are needed; free some, or choose another --to",
            folder.display()
        );
    }
    Ok(())
}

/// Writes a safetensors file piece by piece.
fn write(path: &Path, tensors: &[Tensor], dtype: Dtype, seed: u64) -> anyhow::Result<()> {
    let name = match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
    };
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0_u64;
    for tensor in tensors {
        let start = end;
        end += tensor.elements() as u64 * dtype.bytes();
        let info = json!({"dtype": name, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), info);
    }
    let mut header = Value::Object(header).to_string();
    let padding = header.len().next_multiple_of(8) - header.len();
    header.extend(std::iter::repeat_n(' ', padding));
    let mut file = File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut random = Random(seed);
    let mut bytes = Vec::new();
    for tensor in tensors {
        let mut value = || match tensor.fill {
            Fill::Ones => 1.0,
            Fill::Uniform(bound) => bound * random.next(),
        };
        let mut left = tensor.elements();
        while left > 0 {
            let count = left.min(CHUNK);
            bytes.resize(count * dtype.bytes() as usize, 0);
            match dtype {
                Dtype::F32 => fill(&mut bytes, || value().to_le_bytes()),
                Dtype::F16 => fill(&mut bytes, || f16::from_f32(value()).to_le_bytes()),
                Dtype::Bf16 => fill(&mut bytes, || bf16::from_f32(value()).to_le_bytes()),
            }
            file.write_all(&bytes)?;
            left -= count;
        }
    }
    Ok(())
}

/// Values side by side.
fn fill<const BYTES: usize>(bytes: &mut [u8], mut value: impl FnMut() -> [u8; BYTES]) {
    for place in bytes.as_chunks_mut().0 {
        *place = value();
    }
}

/// Random numbers that are the same on every machine (SplitMix64).
struct Random(u64);

impl Random {
    /// Uniform in [-1, 1).
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn weights_are_of_the_type_asked_for_and_every_config_says_so() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let scratch = tempfile::tempdir().unwrap();
        for (dtype, stored, other) in [
            (Dtype::F32, safetensors::Dtype::F32, "float16"),
            (Dtype::F16, safetensors::Dtype::F16, "float32"),
            (Dtype::Bf16, safetensors::Dtype::BF16, "float32"),
        ] {
            for family in Family::value_variants() {
                let to = scratch
                    .path()
                    .join(format!("{}-{}", family.fixture(), dtype.name()));
                let args = Args {
                    family: *family,
                    size: Size::Tiny,
                    layers: None,
                    dtype,
                    seed: 0,
                    to: to.clone(),
                };
                run(&args, &root).unwrap();
                let config = fs::read_to_string(to.join("config.json")).unwrap();
                assert!(config.contains(dtype.name()) && !config.contains(other));
                let weights = fs::read(to.join("model.safetensors")).unwrap();
                let weights = SafeTensors::deserialize(&weights).unwrap();
                assert!(weights.iter().all(|(_, tensor)| tensor.dtype() == stored));
            }
        }
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_left_beside() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let scratch = tempfile::tempdir().unwrap();
        let to = scratch.path().join("model");
        let mut args = Args {
            family: Family::Llava,
            size: Size::Tiny,
            layers: None,
            dtype: Dtype::F32,
            seed: 0,
            to: to.clone(),
        };
        let refused = |args: &Args| run(args, &root).unwrap_err().to_string();
        let names = |folder: &Path| {
            let entries = folder.read_dir().unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name());
            names.collect::<Vec<_>>()
        };
        fs::create_dir(&to).unwrap();
        for file in [
            "config.json",
            "model.bpk",
            "model-00001-of-00002.safetensors",
        ] {
            fs::write(to.join(file), "precious").unwrap();
            assert!(refused(&args).contains("is already there"));
            assert_eq!(names(&to), [file]);
            fs::remove_file(to.join(file)).unwrap();
        }
        args.layers = Some(usize::MAX);
        assert!(refused(&args).contains("--layers 1 to 1024"));
        args.layers = None;
        run(&args, &root).unwrap();
        assert!(refused(&args).contains("is already there"));
        assert_eq!(names(scratch.path()), ["model"]);
        let full = check_space(scratch.path(), u64::MAX).unwrap_err();
        assert!(full.to_string().contains("bytes free"), "{full}");
    }
}
