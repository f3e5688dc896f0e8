//! LLaVA-1.5 as its authors published it: a language model with a projector, and the name of a CLIP
//! tower that lies elsewhere.
//!
//! Names, the two tokens that are added to the vocabulary and its size, a multiple of 64, are those
//! of transformers' `convert_llava_weights_to_hf.py`. Rows of new tokens are the mean of the others;
//! the script draws them around that mean with a hundred-thousandth of the covariance.

use std::path::Path;

use reroute_checkpoint::{Dtype, NameTable, NewTensor, Rule};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::ConvertError;

/// Tokens that the family adds: the image slot, then padding.
const NEW_TOKENS: usize = 2;
const VOCAB_MULTIPLE: usize = 64;

/// What the hub calls the tensors of the tower.
pub(crate) const TOWER_PREFIX: &str = "vision_tower.";

/// What the authors call a tensor, and what the hub does.
static LANGUAGE: NameTable = NameTable {
    rules: &[
        Rule {
            module: "multi_modal_projector.linear_1.*",
            file: &["model.mm_projector.0.*"],
        },
        Rule {
            module: "multi_modal_projector.linear_2.*",
            file: &["model.mm_projector.2.*"],
        },
        Rule {
            module: "vision_tower.vision_model.*",
            file: &["model.vision_tower.vision_tower.vision_model.*"],
        },
        Rule {
            module: "language_model.lm_head.*",
            file: &["lm_head.*"],
        },
        Rule {
            module: "language_model.model.*",
            file: &["model.*"],
        },
    ],
    ignore: &["*.rotary_emb.inv_freq", "*.embeddings.position_ids"],
};

/// The same for a CLIP model, of which only the tower is used.
static TOWER: NameTable = NameTable {
    rules: &[Rule {
        module: "vision_tower.vision_model.*",
        file: &["vision_model.*"],
    }],
    ignore: &[
        "text_model.*",
        "text_projection.weight",
        "visual_projection.weight",
        "logit_scale",
        "*.embeddings.position_ids",
    ],
};

/// Tables with one row per token.
const VOCABULARY: [&str; 2] = [
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
];

/// The authors' `config.json`.
#[derive(Debug, Deserialize)]
pub(crate) struct OriginalConfig {
    vocab_size: usize,
    mm_projector_type: String,
    mm_vision_select_layer: i64,
    #[serde(default = "patch")]
    mm_vision_select_feature: String,
    #[serde(default)]
    mm_use_im_start_end: bool,
    /// What describes the language model.
    #[serde(flatten)]
    rest: Map<String, Value>,
}

fn patch() -> String {
    "patch".to_owned()
}

/// Whether a `config.json` is the authors'.
pub(crate) fn is_original(config: &Value) -> bool {
    config.get("mm_vision_tower").is_some()
}

impl OriginalConfig {
    /// `path` is that of the file, for messages.
    pub(crate) fn parse(config: &Value, path: &Path) -> Result<Self, ConvertError> {
        let parsed = Self::deserialize(config);
        let config = parsed.map_err(|error| refuse(path, error.to_string()))?;
        let is_1_5 = config.mm_projector_type == "mlp2x_gelu"
            && config.mm_vision_select_feature == "patch"
            && !config.mm_use_im_start_end;
        if !is_1_5 {
            return Err(refuse(
                path,
                "it is not of LLaVA-1.5 but of another version".into(),
            ));
        }
        if config.vocab_size > 1 << 24 {
            return Err(refuse(path, format!("vocab_size is {}", config.vocab_size)));
        }
        Ok(config)
    }

    /// Rows of the vocabulary tables after the conversion.
    fn padded_vocab_size(&self) -> usize {
        (self.vocab_size + NEW_TOKENS).next_multiple_of(VOCAB_MULTIPLE)
    }

    /// `config.json` as transformers has it. `tower` is that of the CLIP model.
    pub(crate) fn to_hub(&self, tower: &Value, path: &Path) -> Result<Value, ConvertError> {
        let vision = tower.get("vision_config").unwrap_or(tower);
        let number = |key: &str| vision.get(key).and_then(Value::as_u64);
        let sizes = (number("image_size"), number("patch_size"));
        let (Some(image @ 1..=65536), Some(patch @ 1..=65536)) = sizes else {
            return Err(refuse(
                path,
                "it lacks the image_size and patch_size of CLIP".into(),
            ));
        };
        let mut vision = vision.clone();
        vision["model_type"] = "clip_vision_model".into();
        let mut text = self.rest.clone();
        text.retain(|key, _| !key.starts_with("mm_") && !TRAINING.contains(&key.as_str()));
        text.insert("model_type".into(), "llama".into());
        text.insert("architectures".into(), json!(["LlamaForCausalLM"]));
        text.insert("vocab_size".into(), self.padded_vocab_size().into());
        Ok(json!({
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "ignore_index": -100,
            "image_token_index": self.vocab_size,
            "pad_token_id": self.vocab_size + 1,
            "image_seq_length": (image / patch) * (image / patch),
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": false,
            "torch_dtype": self.rest.get("torch_dtype"),
            "text_config": text,
            "vision_config": vision,
            "vision_feature_layer": self.mm_vision_select_layer,
            "vision_feature_select_strategy": "default",
        }))
    }

    /// The hub's name of a tensor and the rows to add to it; `None` if no model needs it.
    pub(crate) fn rename(
        &self,
        tensor: &mut NewTensor,
        is_tower: bool,
        path: &Path,
    ) -> Result<Option<usize>, ConvertError> {
        let table = if is_tower { &TOWER } else { &LANGUAGE };
        if table.ignores(&tensor.name) {
            return Ok(None);
        }
        let unknown = || refuse(path, format!("no model needs its tensor {:?}", tensor.name));
        tensor.name = table.module_path(&tensor.name).ok_or_else(unknown)?;
        if !VOCABULARY.contains(&tensor.name.as_str()) {
            return Ok(Some(0));
        }
        // The mean of rows is computed of these.
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let found = format!(
                "{} is of type {}; save it as F32",
                tensor.name, tensor.dtype
            );
            return Err(refuse(path, found));
        }
        match tensor.shape.as_mut_slice() {
            [rows, _] if *rows == self.vocab_size => {
                *rows = self.padded_vocab_size();
                Ok(Some(*rows - self.vocab_size))
            }
            shape => {
                let found = format!(
                    "{} is {shape:?}, vocab_size {}",
                    tensor.name, self.vocab_size
                );
                Err(refuse(path, found))
            }
        }
    }
}

/// Keys of the authors' `config.json` that say how the model was trained or called.
const TRAINING: [&str; 10] = [
    "_name_or_path",
    "freeze_mm_mlp_adapter",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "pretrain_mm_mlp_adapter",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "transformers_version",
    "tune_mm_mlp_adapter",
    "unfreeze_mm_vision_tower",
];

fn refuse(path: &Path, problem: String) -> ConvertError {
    ConvertError::Original {
        path: path.to_path_buf(),
        problem,
    }
}
