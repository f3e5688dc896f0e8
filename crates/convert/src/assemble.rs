//! A model of parts: a vision tower, a language model, and between them a projector that is to be trained.
//!
//! `--assemble llava`: the tower is that of an ONNX file or of a folder of the hub, the decoder any folder that
//! holds a LLaMA, Mistral or Qwen2. Projectors are random, of a seed.

mod names;
mod nodes;
mod text;
mod tower;

use std::collections::BTreeMap;
use std::path::Path;

use reroute_checkpoint::{
    CONFIG, CONFIG_MAX_BYTES, Dtype, Folder, NameTable, NewTensor, Rule, dtype_of, json_bytes,
};
use serde_json::{Value, json};

use crate::source::{Made, SourceTensor, Weights};
use crate::{ConvertError, Job};
use tower::Tower;

/// What is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Assembly {
    /// Side of the images, in pixels; 16 patches for DINOv2 if `None`, and the tower's own otherwise.
    pub image_size: Option<usize>,
    /// The special token of the decoder that becomes `<image>`; `<image>` itself, or one that is known to be
    /// unused, if `None`.
    pub image_token: Option<String>,
    /// What the projector is drawn by.
    pub seed: u64,
}

/// What a model is assembled of.
pub(crate) struct Assembled {
    pub(crate) weights: Vec<Weights>,
    pub(crate) tensors: Vec<SourceTensor>,
    pub(crate) config: Value,
    /// Type of all weights where nobody asks for another; as they are if `None`.
    pub(crate) dtype: Option<Dtype>,
    /// Small files, which come before those of the decoder.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
}

impl Assembled {
    /// Files of the decoder that are left out: they know no images.
    pub(crate) fn is_old(name: &str) -> bool {
        text::OLD.contains(&name)
    }
}

const PREPROCESSOR: &str = "preprocessor_config.json";
/// Visual tokens along a side, if nobody says how many.
const SIDE: usize = 16;
const MAX_SIDE: usize = 1 << 14;

/// The output table of a language model, which has none where it is the input's.
const HEAD: &str = "lm_head.weight";

/// The names of a language model in a LLaVA.
static DECODER: NameTable = NameTable {
    rules: &[
        Rule {
            module: "language_model.lm_head.*",
            file: &["lm_head.*"],
        },
        Rule {
            module: "language_model.model.*",
            file: &["model.*"],
        },
    ],
    ignore: &["*.rotary_emb.inv_freq"],
};

/// Opens both parts and says what becomes of them.
pub(crate) fn open(
    job: &Job,
    assembly: &Assembly,
    folder: &Folder,
) -> Result<Assembled, ConvertError> {
    let Some(tower_path) = &job.vision_tower else {
        let problem = "it needs --vision-tower FILE.onnx or DIR beside it".into();
        return Err(refuse(&job.from, problem));
    };
    let tower = Tower::open(tower_path, job.allow_pickle)?;
    let text: Value = folder.read_json(CONFIG, CONFIG_MAX_BYTES)?;
    let kind = text["model_type"].as_str().unwrap_or_default();
    if !["llama", "mistral", "qwen2"].contains(&kind) {
        let problem = format!("its model_type is {kind:?}; a decoder is llama, mistral or qwen2");
        return Err(refuse(&job.from, problem));
    }
    let Some(hidden) = text["hidden_size"]
        .as_u64()
        .filter(|n| (1..1 << 20).contains(n))
    else {
        return Err(refuse(
            &job.from,
            "its config.json says no hidden_size".into(),
        ));
    };
    let decoder = Weights::open(folder, &job.from, job.allow_pickle)?;
    let (weights, config) = (&tower.sizes, &tower.config);
    let projector = projector(weights.hidden, hidden as usize, assembly.seed);
    let side = side(&tower, tower_path, assembly.image_size)?;
    let spelled = match (&job.tokenizer, folder.has("tokenizer.json")) {
        (Some(other), false) => (Folder::open(other)?, other),
        _ => (folder.clone(), &job.from),
    };
    let image_token = assembly.image_token.as_deref();
    let (image_token, mut files) = text::files(&spelled.0, spelled.1, image_token)?;
    files.insert(PREPROCESSOR.into(), json_bytes(&preprocessor(&tower, side)));
    files.insert(
        "processor_config.json".into(),
        json_bytes(&processor(&tower)),
    );
    let has_head = decoder.tensors().iter().any(|tensor| tensor.name == HEAD);
    let tied = text["tie_word_embeddings"].as_bool().unwrap_or(!has_head);
    let dtype = dtype_of(&text).or(Some(Dtype::F32));
    let config = json!({
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": (side / tower.sizes.patch).pow(2),
        "image_token_index": image_token,
        "multimodal_projector_bias": true,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "text_config": text,
        "vision_config": config,
        "vision_feature_layer": tower.naming.feature_layer,
        "vision_feature_select_strategy": strategy(&tower),
    });
    let mut tensors = decoder_tensors(&decoder, &job.from, tied)?;
    tensors.extend(projector);
    tensors.extend(tower.tensors);
    Ok(Assembled {
        weights: vec![tower.weights, decoder],
        tensors,
        config,
        dtype,
        files,
    })
}

/// The decoder's tensors, under the hub's names.
fn decoder_tensors(
    decoder: &Weights,
    path: &Path,
    tied: bool,
) -> Result<Vec<SourceTensor>, ConvertError> {
    let mut tensors = Vec::new();
    for mut tensor in decoder.tensors() {
        let stored_name = tensor.name.clone();
        let is_copy = tied && stored_name == HEAD;
        if is_copy || DECODER.ignores(&stored_name) {
            continue;
        }
        let Some(name) = DECODER.module_path(&stored_name) else {
            let problem = format!("{stored_name:?} is no tensor of a language model alone");
            return Err(refuse(path, problem));
        };
        tensor.name = name;
        tensors.push(SourceTensor {
            tensor,
            weights: 1,
            is_widened: decoder.is_widened(&stored_name),
            stored_name,
            made: Made::Stored(0),
            codes: None,
        });
    }
    Ok(tensors)
}

/// Two linear maps, random, and their biases, zero.
fn projector(features: usize, hidden: usize, seed: u64) -> impl Iterator<Item = SourceTensor> {
    let tensor = move |name: &str, shape: Vec<usize>, made: Made| SourceTensor {
        tensor: NewTensor {
            name: format!("multi_modal_projector.{name}"),
            dtype: Dtype::F32,
            shape,
        },
        weights: 0,
        is_widened: false,
        stored_name: String::new(),
        made,
        codes: None,
    };
    [("linear_1", features), ("linear_2", hidden)]
        .into_iter()
        .flat_map(move |(name, columns)| {
            let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
            [
                tensor(&weight, vec![hidden, columns], Made::Random(seed)),
                tensor(&bias, vec![hidden], Made::Filled(0.0)),
            ]
        })
}

/// Side of the images, in pixels.
fn side(tower: &Tower, path: &Path, wanted: Option<usize>) -> Result<usize, ConvertError> {
    let (patch, grid) = (tower.sizes.patch, tower.grid);
    let own = grid * patch;
    let is_any = tower.naming.model_type == "dinov2";
    let default = if is_any { grid.min(SIDE) * patch } else { own };
    match wanted.unwrap_or(default) {
        side if side == own => Ok(side),
        side if is_any && side > 0 && side <= MAX_SIDE && side.is_multiple_of(patch) => Ok(side),
        side if is_any => Err(refuse(
            path,
            format!("--image-size {side} is no multiple of its patches of {patch} pixels"),
        )),
        side => Err(refuse(
            path,
            format!("--image-size {side} is not possible, its positions are those of {own} pixels"),
        )),
    }
}

/// What LLaVA does not take of a tower's rows: the class token.
fn strategy(tower: &Tower) -> &'static str {
    match tower.naming.class_token {
        true => "default",
        false => "full",
    }
}

/// `preprocessor_config.json`: images are resized to the side and cropped, or, for SigLIP, resized to the square.
fn preprocessor(tower: &Tower, side: usize) -> Value {
    let said = |key: &str, default: Value| match tower.preprocessor.get(key) {
        Some(value) if !value.is_null() => value.clone(),
        _ => default,
    };
    let square = json!({"height": side, "width": side});
    let is_cropped = tower.naming.class_token;
    let mut settings = json!({
        "image_processor_type": tower.naming.processor,
        "do_convert_rgb": true,
        "do_resize": true,
        "size": if is_cropped { json!({"shortest_edge": side}) } else { square.clone() },
        "resample": said("resample", 3.into()),
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": said("image_mean", json!(tower.naming.mean)),
        "image_std": said("image_std", json!(tower.naming.std)),
    });
    if is_cropped {
        settings["do_center_crop"] = true.into();
        settings["crop_size"] = square;
    }
    settings
}

/// `processor_config.json`: by what transformers reckons how many slots an image has.
fn processor(tower: &Tower) -> Value {
    json!({
        "processor_class": "LlavaProcessor",
        "image_token": text::IMAGE,
        "patch_size": tower.sizes.patch,
        "num_additional_image_tokens": u8::from(tower.naming.class_token),
        "vision_feature_select_strategy": strategy(tower),
    })
}

fn refuse(path: &Path, problem: String) -> ConvertError {
    ConvertError::Assembly {
        path: path.to_path_buf(),
        problem,
    }
}
