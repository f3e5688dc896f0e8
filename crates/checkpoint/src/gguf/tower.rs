//! Vision towers (`mmproj` files): what `config.json` and the image processor would say of one, and its tensors
//! under the names of Hugging Face.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::keys::{self, Keys, decimal};
use super::language::{Architecture, Language, unknown};
use super::names::{LLAVA, QWEN2, QWEN2_5, QWEN3};
use super::{Gguf, Refused};
use crate::arranged::Arranged;
use crate::{NameTable, TensorInfo};

/// Pixels that the published models take at least and at most, which a file seldom says.
const QWEN2_PIXELS: [usize; 2] = [3136, 12_845_056];
const QWEN3_PIXELS: [usize; 2] = [65_536, 16_777_216];
const QWEN3_VIDEO_PIXELS: [usize; 2] = [4096, 25_165_824];
/// Side of a window of Qwen2.5-VL, in pixels.
const WINDOW: usize = 112;

/// What keys have to be that have a default, or that are seldom there.
const KINDS: [(&str, keys::Kind); 12] = [
    ("clip.has_vision_encoder", keys::Kind::Flag),
    ("clip.projector_type", keys::Kind::Text),
    ("clip.vision.projector_type", keys::Kind::Text),
    ("clip.use_gelu", keys::Kind::Flag),
    ("clip.use_silu", keys::Kind::Flag),
    ("clip.vision.feature_layer", keys::Kind::Integers),
    ("clip.vision.image_grid_pinpoints", keys::Kind::Integers),
    ("clip.vision.mm_patch_merge_type", keys::Kind::Text),
    (
        "clip.vision.attention.layer_norm_epsilon",
        keys::Kind::Number,
    ),
    ("clip.vision.image_mean", keys::Kind::Numbers),
    ("clip.vision.image_std", keys::Kind::Numbers),
    ("clip.vision.n_wa_pattern", keys::Kind::Count),
];
/// That of all Qwen towers.
const QWEN_EPSILON: f64 = 1e-6;

/// Towers that are read, with the projector or merger behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Clip,
    Siglip,
    Qwen2,
    Qwen2_5,
    Qwen3,
}

/// A vision tower.
pub(super) struct Tower<'a> {
    keys: Keys<'a>,
    pub(super) kind: Kind,
    file: &'a Gguf,
    width: usize,
}

impl<'a> Tower<'a> {
    pub(super) fn new(file: &'a Gguf) -> Result<Self, Refused> {
        let keys = Keys::new(&file.metadata);
        if keys.architecture != "clip" {
            return Err(format!(
                "it is a language model ({}) and no tower: give the mmproj file that was published with the model",
                keys.architecture
            ));
        }
        keys.check(&KINDS)?;
        if keys.flag("clip.has_vision_encoder") == Some(false) {
            return Err("it has no vision tower".into());
        }
        let said = keys.text("clip.projector_type");
        let said = said.or(keys.text("clip.vision.projector_type"));
        let has = |name: &str| file.tensors.info(name).is_some();
        let kind = match said.unwrap_or("mlp") {
            "mlp" if has("v.class_embd") => Kind::Clip,
            "mlp" => Kind::Siglip,
            "qwen2vl_merger" => Kind::Qwen2,
            "qwen2.5vl_merger" => Kind::Qwen2_5,
            "qwen3vl_merger" => Kind::Qwen3,
            other => {
                return Err(format!(
                    "its projector is {other:?}; those of LLaVA-1.5 (mlp), Qwen2-VL, Qwen2.5-VL and Qwen3-VL \
                     are supported"
                ));
            }
        };
        let tower = Self {
            keys,
            kind,
            file,
            width: keys.needed("clip.vision.embedding_length")?,
        };
        if tower.is_llava() {
            let unpads = keys.text("clip.vision.mm_patch_merge_type") == Some("spatial_unpad");
            let has_tiles = keys.integers("clip.vision.image_grid_pinpoints").is_some();
            if unpads || has_tiles || has("v.image_newline") {
                return Err(
                    "it is of LLaVA-NeXT (1.6), whose pictures are cut into tiles, which is not \
                            supported; nearest is LLaVA-1.5"
                        .into(),
                );
            }
            if has("v.post_ln.weight") {
                return Err(
                    "it has a norm behind its features (v.post_ln), which LLaVA-1.5 has not".into(),
                );
            }
        }
        let epsilon = keys.number("clip.vision.attention.layer_norm_epsilon");
        let is_other = |epsilon: &f64| (epsilon - QWEN_EPSILON).abs() > QWEN_EPSILON / 1e3;
        if let Some(epsilon) = epsilon.filter(|epsilon| !tower.is_llava() && is_other(epsilon)) {
            return Err(format!(
                "its clip.vision.attention.layer_norm_epsilon is {epsilon}, and that of Qwen towers {QWEN_EPSILON}"
            ));
        }
        let (blocks, said) = (tower.blocks()?, keys.needed("clip.vision.block_count")?);
        if blocks != said {
            return Err(format!(
                "it has {blocks} blocks, and says that there are {said}"
            ));
        }
        Ok(tower)
    }

    pub(super) fn is_llava(&self) -> bool {
        matches!(self.kind, Kind::Clip | Kind::Siglip)
    }

    /// What names of the language model begin with in the whole model, and what its head is called.
    pub(super) fn language_names(&self) -> (&'static str, &'static str) {
        match self.kind {
            Kind::Clip | Kind::Siglip => ("language_model.model", "language_model.lm_head"),
            Kind::Qwen2 | Kind::Qwen2_5 => ("model", "lm_head"),
            Kind::Qwen3 => ("model.language_model", "lm_head"),
        }
    }

    /// Whether a language model goes with it.
    pub(super) fn check(&self, language: &Language<'_>) -> Result<(), Refused> {
        let fits = match language.architecture {
            Architecture::Llama | Architecture::Qwen2 => self.is_llava(),
            Architecture::Qwen2Vl => matches!(self.kind, Kind::Qwen2 | Kind::Qwen2_5),
            Architecture::Qwen3Vl => self.kind == Kind::Qwen3,
        };
        if !fits {
            return Err(format!(
                "its projector is of another model than the language model, which is of {}: give the mmproj \
                 file that was published with it",
                language.keys.architecture
            ));
        }
        let made = self.shape("mm.2.weight")?.first().copied();
        let wanted = language.keys.needed(".embedding_length")?;
        if let Some(made) = made.filter(|made| *made != wanted) {
            return Err(format!(
                "it makes visual tokens of {made} features, and the language model has {wanted}: give the mmproj file \
                 that was published with it"
            ));
        }
        let deepstack = language.keys.count(".n_deepstack_layers")?;
        match deepstack.is_some_and(|layers| layers != self.indices("v.deepstack.").len()) {
            true => Err("it has not as many deepstack layers as the language model takes".into()),
            false => Ok(()),
        }
    }

    /// Shape of a tensor.
    fn shape(&self, name: &str) -> Result<&'a [usize], Refused> {
        let info = self.file.tensors.info(name);
        Ok(&info.ok_or_else(|| format!("it has no {name}"))?.shape)
    }

    /// Blocks that are there: numbers behind a prefix, all of them from 0.
    fn blocks(&self) -> Result<usize, Refused> {
        let blocks = self.indices("v.blk.");
        match blocks.last() {
            Some(&last) if last + 1 == blocks.len() => Ok(blocks.len()),
            _ => Err("its blocks (v.blk.N) are not all there: is the download complete?".into()),
        }
    }

    /// Numbers that names have behind a prefix, ascending.
    fn indices(&self, prefix: &str) -> Vec<usize> {
        let names = self.file.tensors.names();
        let indices: BTreeSet<usize> = names
            .filter_map(|name| name.strip_prefix(prefix)?.split('.').next()?.parse().ok())
            .collect();
        indices.into_iter().collect()
    }

    /// Whether old scripts have called the first map of an MLP `down` and the second `up`, which llama.cpp
    /// finds out as is done here.
    fn is_swapped(&self) -> bool {
        let down = self.file.tensors.info("v.blk.0.ffn_down.weight");
        let inputs = down.and_then(|down| down.shape.last());
        self.kind != Kind::Qwen3 && inputs == Some(&self.width)
    }

    /// Width of an MLP.
    fn mlp(&self) -> Result<usize, Refused> {
        let up = match self.is_swapped() {
            true => "v.blk.0.ffn_down.weight",
            false => "v.blk.0.ffn_up.weight",
        };
        self.shape(up)?
            .first()
            .copied()
            .ok_or_else(|| format!("its {up} has no rows"))
    }

    fn activation(&self) -> &'static str {
        let is = |key| self.keys.flag(key) == Some(true);
        match self.kind {
            _ if is("clip.use_silu") => "silu",
            Kind::Siglip | Kind::Qwen3 if is("clip.use_gelu") => "gelu_pytorch_tanh",
            _ if is("clip.use_gelu") => "gelu",
            _ => "quick_gelu",
        }
    }

    /// `config.json`. `language` is what it says of the language model, `special` finds a token.
    pub(super) fn config(
        &self,
        language: serde_json::Map<String, Value>,
        special: &dyn Fn(&str) -> Option<usize>,
        image_token: Option<usize>,
    ) -> Result<Value, Refused> {
        let keys = self.keys;
        let (blocks, heads) = (
            self.blocks()?,
            keys.needed("clip.vision.attention.head_count")?,
        );
        let patch = keys.needed("clip.vision.patch_size")?;
        let output = language.get("hidden_size").cloned();
        let dtype = language.get("torch_dtype").cloned();
        let tied = language.get("tie_word_embeddings").cloned();
        if self.is_llava() {
            let layers = keys.integers("clip.vision.feature_layer");
            let layers = layers.map_or_else(|| json!(blocks), |layers| json!(layers));
            let (model_type, strategy) = match self.kind {
                Kind::Clip => ("clip_vision_model", "default"),
                _ => ("siglip_vision_model", "full"),
            };
            let image = keys.needed("clip.vision.image_size")?;
            let side = image.checked_div(patch).unwrap_or(0);
            return Ok(json!({
                "architectures": ["LlavaForConditionalGeneration"],
                "model_type": "llava",
                "image_token_index": image_token,
                "image_seq_length": side.saturating_mul(side),
                "projector_hidden_act": "gelu",
                "multimodal_projector_bias": self.shape("mm.0.bias").is_ok(),
                "tie_word_embeddings": tied,
                "torch_dtype": dtype,
                "vision_feature_layer": layers,
                "vision_feature_select_strategy": strategy,
                "text_config": language,
                "vision_config": {
                    "model_type": model_type,
                    "hidden_size": self.width,
                    "intermediate_size": self.mlp()?,
                    "num_hidden_layers": blocks,
                    "num_attention_heads": heads,
                    "image_size": image,
                    "patch_size": patch,
                    "hidden_act": self.activation(),
                    "layer_norm_eps": keys.number("clip.vision.attention.layer_norm_epsilon").unwrap_or(1e-5),
                },
            }));
        }
        let mut vision = json!({
            "depth": blocks,
            "num_heads": heads,
            "in_channels": 3,
            "patch_size": patch,
            "spatial_merge_size": keys.count("clip.vision.spatial_merge_size")?.unwrap_or(2),
            "temporal_patch_size": 2,
            "hidden_act": self.activation(),
        });
        match self.kind {
            Kind::Qwen2 => {
                let ratio = self.mlp()?.checked_div(self.width);
                vision["embed_dim"] = self.width.into();
                vision["hidden_size"] = output.unwrap_or_default();
                vision["mlp_ratio"] = ratio.unwrap_or(0).into();
            }
            _ => {
                vision["hidden_size"] = self.width.into();
                vision["intermediate_size"] = self.mlp()?.into();
                vision["out_hidden_size"] = output.unwrap_or_default();
            }
        }
        if self.kind == Kind::Qwen2_5 {
            let pattern = keys.needed("clip.vision.n_wa_pattern")?;
            let whole: Vec<usize> = (1..=blocks)
                // As llama.cpp has it, no pattern is no window.
                .filter(|block| pattern == 0 || block.is_multiple_of(pattern))
                .map(|block| block - 1)
                .collect();
            vision["fullatt_block_indexes"] = json!(whole);
            vision["window_size"] = keys
                .count("clip.vision.window_size")?
                .unwrap_or(WINDOW)
                .into();
            vision["tokens_per_second"] = 2.into();
        }
        if self.kind == Kind::Qwen3 {
            let positions = self.shape("v.position_embd.weight")?.first().copied();
            vision["num_position_embeddings"] = json!(positions);
            vision["deepstack_visual_indexes"] = json!(self.indices("v.deepstack."));
        }
        let (model_type, class) = match self.kind {
            Kind::Qwen2 => ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
            Kind::Qwen2_5 => ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
            _ => ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
        };
        let mut config = match self.kind {
            Kind::Qwen3 => json!({ "text_config": language }),
            // As the hub has them, the language model is described at the top.
            _ => Value::Object(language),
        };
        config["architectures"] = json!([class]);
        config["model_type"] = model_type.into();
        config["vision_config"] = vision;
        config["tie_word_embeddings"] = tied.unwrap_or_default();
        config["torch_dtype"] = dtype.unwrap_or_default();
        for (key, token) in [
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        ] {
            let id = special(token);
            config[key] = id
                .ok_or_else(|| format!("its vocabulary lacks {token}"))?
                .into();
        }
        Ok(config)
    }

    /// Settings of the image processor, and of the video processor where they are others.
    pub(super) fn processors(&self) -> Result<Vec<(String, Value)>, Refused> {
        let keys = self.keys;
        let statistics = |key: &str| match keys.floats(key) {
            Some(numbers) if numbers.len() == 3 => {
                let numbers = numbers.iter().copied();
                Ok(json!(numbers.map(decimal).collect::<Vec<f64>>()))
            }
            _ => Err(format!("it does not say {key} as three numbers")),
        };
        let (mean, std) = (
            statistics("clip.vision.image_mean")?,
            statistics("clip.vision.image_std")?,
        );
        let patch = keys.needed("clip.vision.patch_size")?;
        let merge = keys.count("clip.vision.spatial_merge_size")?.unwrap_or(2);
        let said = [
            keys.count("clip.vision.image_min_pixels")?,
            keys.count("clip.vision.image_max_pixels")?,
        ];
        let mut settings = json!({
            "do_resize": true,
            "do_rescale": true,
            "rescale_factor": 1.0 / 255.0,
            "do_normalize": true,
            "do_convert_rgb": true,
            "resample": 3,
            "image_mean": mean,
            "image_std": std,
        });
        let mut videos = None;
        if self.is_llava() {
            let side = keys.needed("clip.vision.image_size")?;
            let square = json!({ "height": side, "width": side });
            match self.kind {
                Kind::Clip => {
                    // As the authors' code and llama.cpp have it: padded to a square, not cropped.
                    settings["image_processor_type"] = "LlavaImageProcessor".into();
                    settings["do_pad"] = true.into();
                    settings["size"] = json!({ "shortest_edge": side });
                    settings["do_center_crop"] = true.into();
                    settings["crop_size"] = square;
                }
                _ => {
                    settings["image_processor_type"] = "SiglipImageProcessor".into();
                    settings["size"] = square;
                }
            }
        } else {
            settings["image_processor_type"] = "Qwen2VLImageProcessor".into();
            settings["patch_size"] = patch.into();
            settings["temporal_patch_size"] = 2.into();
            settings["merge_size"] = merge.into();
            let limits = |published: [usize; 2]| {
                let [least, most] = [0, 1].map(|end| said[end].unwrap_or(published[end]));
                json!({ "shortest_edge": least, "longest_edge": most })
            };
            if self.kind == Kind::Qwen3 {
                let mut other = settings.clone();
                if let Value::Object(other) = &mut other {
                    other.remove("image_processor_type");
                }
                other["video_processor_type"] = "Qwen3VLVideoProcessor".into();
                other["size"] = limits(QWEN3_VIDEO_PIXELS);
                settings["size"] = limits(QWEN3_PIXELS);
                videos = Some(other);
            } else {
                let size = limits(QWEN2_PIXELS);
                settings["min_pixels"] = size["shortest_edge"].clone();
                settings["max_pixels"] = size["longest_edge"].clone();
            }
        }
        let mut files = vec![("preprocessor_config.json".to_owned(), settings)];
        files.extend(videos.map(|videos| ("video_preprocessor_config.json".to_owned(), videos)));
        Ok(files)
    }

    /// The tensors under the names of Hugging Face.
    pub(super) fn rename(
        &self,
        mut tensors: BTreeMap<String, TensorInfo>,
    ) -> Result<BTreeMap<String, TensorInfo>, Refused> {
        let tables: &[&NameTable] = match self.kind {
            Kind::Clip | Kind::Siglip => &[&LLAVA],
            Kind::Qwen2 => &[&QWEN2],
            Kind::Qwen2_5 => &[&QWEN2_5, &QWEN2],
            Kind::Qwen3 => &[&QWEN3],
        };
        self.arrange(&mut tensors)?;
        let deepstack = self.indices("v.deepstack.");
        let swapped = self.is_swapped();
        let mut renamed = BTreeMap::new();
        for (name, info) in tensors {
            let mut called = name.clone();
            if swapped && name.contains(".ffn_up.") {
                called = name.replacen(".ffn_up.", ".ffn_down.", 1);
            } else if swapped {
                called = name.replacen(".ffn_down.", ".ffn_up.", 1);
            }
            if let Some(rest) = name.strip_prefix("v.deepstack.")
                && let Some((layer, rest)) = rest.split_once('.')
                && let Some(at) = deepstack
                    .iter()
                    .position(|index| index.to_string() == layer)
            {
                called = format!("v.deepstack.{at}.{rest}");
            }
            let path = tables.iter().find_map(|table| table.module_path(&called));
            renamed.insert(path.unwrap_or_else(|| unknown(&name)), info);
        }
        Ok(renamed)
    }

    /// Puts together what the file has in parts: `q`, `k` and `v`, and the patches of two frames.
    fn arrange(&self, tensors: &mut BTreeMap<String, TensorInfo>) -> Result<(), Refused> {
        if self.is_llava() {
            return Ok(());
        }
        let named = |name: &str, made: Result<TensorInfo, String>| {
            made.map_err(|reason| format!("its tensor {name:?} {reason}"))
        };
        for block in 0..self.blocks()? {
            for end in ["weight", "bias"] {
                let names = ["q", "k", "v"].map(|part| format!("v.blk.{block}.attn_{part}.{end}"));
                if names.iter().all(|name| tensors.contains_key(name)) {
                    let parts = names
                        .iter()
                        .filter_map(|name| tensors.remove(name))
                        .collect();
                    let name = format!("v.blk.{block}.attn_qkv.{end}");
                    let made = named(&name, Arranged::stacked(parts))?;
                    tensors.insert(name, made);
                }
            }
        }
        let names = ["v.patch_embd.weight", "v.patch_embd.weight.1"];
        if names.iter().all(|name| tensors.contains_key(*name)) {
            let parts = names
                .iter()
                .filter_map(|name| tensors.remove(*name))
                .collect();
            let made = named(names[0], Arranged::alternating(parts, 2))?;
            tensors.insert(names[0].to_owned(), made);
        }
        Ok(())
    }
}
