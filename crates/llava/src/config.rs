use reroute::DecoderConfig;
use reroute_family::FamilyError;
use serde::Deserialize;
use vision_encoder::vit::{VitConfig, VitHfConfig, VitKind};

use crate::text::TextConfig;

/// `config.json` of a LLaVA checkpoint, hub-era or current, with the library's defaults.
#[derive(Debug, Clone, Deserialize)]
pub struct LlavaHfConfig {
    #[serde(default)]
    text_config: TextConfig,
    #[serde(default = "VitHfConfig::clip_large_patch14_336")]
    vision_config: VitHfConfig,
    #[serde(default)]
    image_token_index: Option<u32>,
    #[serde(default)]
    image_token_id: Option<u32>,
    #[serde(default = "default_feature_layer")]
    vision_feature_layer: FeatureLayer,
    #[serde(default = "default_select_strategy")]
    vision_feature_select_strategy: String,
    #[serde(default = "default_projector_act")]
    projector_hidden_act: String,
    #[serde(default = "yes")]
    multimodal_projector_bias: bool,
    #[serde(default)]
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    image_seq_length: Option<usize>,
}

/// One layer of the tower, or several whose features stand one below the other.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum FeatureLayer {
    One(i64),
    Several(Vec<i64>),
}

/// The image token where config.json names none.
const IMAGE_TOKEN: u32 = 32000;

/// `image_seq_length` where config.json is silent; the library writes it whatever the tower makes.
const DEFAULT_LENGTH: usize = 576;

fn default_feature_layer() -> FeatureLayer {
    FeatureLayer::One(-2)
}

fn default_select_strategy() -> String {
    "default".into()
}

fn default_projector_act() -> String {
    "gelu".into()
}

fn yes() -> bool {
    true
}

/// A resolved LLaVA configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaConfig {
    /// The vision tower.
    pub vision: VitConfig,
    /// Layers of the tower to run before its features are taken; those of several stand one below the
    /// other.
    pub vision_layers: Vec<usize>,
    /// Rows of an image that the projector does not get, from the first: 1 under
    /// `vision_feature_select_strategy` `"default"` whatever the tower (the class token, or SigLIP's
    /// first patch), 0 under `"full"`.
    pub skipped_rows: usize,
    /// Whether the projector's layers have biases.
    pub projector_bias: bool,
    /// The decoder.
    pub text: DecoderConfig,
    /// Token id of an image slot.
    pub image_token: u32,
    /// Visual tokens of an image, if config.json says it.
    pub image_seq_length: Option<usize>,
}

impl LlavaConfig {
    /// Visual tokens of one image.
    pub fn visual_tokens(&self) -> usize {
        self.vision.tokens().saturating_sub(self.skipped_rows)
    }

    /// Features of a row that the projector takes: the tower's, once for each layer.
    pub fn feature_size(&self) -> usize {
        self.vision_layers.len() * self.vision.hidden_size
    }

    /// Whether the visual tokens are the patches of the image, all of them and no more.
    pub fn tokens_are_patches(&self) -> bool {
        self.skipped_rows == self.vision.prefix_tokens()
    }

    /// Rows and columns of the visual tokens of an image: those of its patches, or one row of all of
    /// them where they are not its patches.
    pub fn token_grid(&self) -> [usize; 2] {
        match self.tokens_are_patches() {
            true => [self.vision.grid(); 2],
            false => [1, self.visual_tokens()],
        }
    }

    /// Refuses methods before the decoder where visual tokens have no grid for them.
    pub(crate) fn check_grid(&self) -> Result<(), FamilyError> {
        if self.tokens_are_patches() {
            return Ok(());
        }
        let why = match self.skipped_rows {
            0 => "\"full\" keeps the class token among",
            _ => "\"default\" takes the first patch from",
        };
        Err(FamilyError::Config(format!(
            "vision_feature_select_strategy {why} the {} patches of this tower, so that its {} visual \
             tokens are no grid: methods before the decoder do not work on it, schedules in the \
             decoder do",
            self.vision.patches(),
            self.visual_tokens()
        )))
    }

    /// Whether `image_seq_length` is what the tower gives.
    pub(crate) fn check_length(&self) -> Result<(), FamilyError> {
        let given = self.visual_tokens();
        let said = |&length: &usize| length != given && length != DEFAULT_LENGTH;
        let Some(length) = self.image_seq_length.filter(said) else {
            return Ok(());
        };
        let strategy = match self.skipped_rows {
            0 => "full",
            _ => "default",
        };
        Err(FamilyError::Config(format!(
            "image_seq_length is {length}, but image_size and patch_size give {given} visual tokens \
             under vision_feature_select_strategy \"{strategy}\""
        )))
    }
}

impl LlavaHfConfig {
    /// Checks every number and maps the names.
    pub fn resolve(&self) -> Result<LlavaConfig, FamilyError> {
        let unsupported = |what: String| Err(FamilyError::Config(what));
        if self.vision_config.model_type() == "pixtral" {
            return unsupported(
                "this is Pixtral, which shares the model_type \"llava\" (vision_config.model_type \
                 \"pixtral\": 2-D rotary positions, images of any size, row breaks); it is not \
                 supported. Nearest: a LLaVA whose tower is clip_vision_model, siglip_vision_model or \
                 dinov2, or Qwen2.5-VL for images of any size"
                    .into(),
            );
        }
        let vision = self.vision_config.resolve()?;
        let text = self.text_config.resolve(self.tie_word_embeddings)?;
        let skipped_rows = match self.vision_feature_select_strategy.as_str() {
            "default" => 1,
            "full" => 0,
            other => {
                return unsupported(format!(
                    "vision_feature_select_strategy \"{other}\" is neither \"default\" nor \"full\""
                ));
            }
        };
        if skipped_rows >= vision.tokens() {
            return unsupported(format!(
                "vision_feature_select_strategy \"default\" takes the only patch of an image of {} pixels",
                vision.image_size
            ));
        }
        if self.projector_hidden_act != "gelu" {
            return unsupported(format!(
                "projector_hidden_act \"{}\" is not supported, only \"gelu\"",
                self.projector_hidden_act
            ));
        }
        let image_token = match (self.image_token_index, self.image_token_id) {
            (Some(index), Some(id)) if index != id => {
                return unsupported(format!(
                    "image_token_index is {index}, but image_token_id beside it is {id}: remove the \
                     wrong one"
                ));
            }
            (index, id) => index.or(id).unwrap_or(IMAGE_TOKEN),
        };
        let layers = match &self.vision_feature_layer {
            FeatureLayer::One(layer) => std::slice::from_ref(layer),
            FeatureLayer::Several(layers) => layers,
        };
        let config = LlavaConfig {
            vision_layers: resolve_layers(layers, vision.num_layers)?,
            vision,
            skipped_rows,
            projector_bias: self.multimodal_projector_bias,
            text,
            image_token,
            image_seq_length: self.image_seq_length,
        };
        // DINOv2 may see another size than config.json says.
        if config.vision.kind != VitKind::Dinov2 {
            config.check_length()?;
        }
        Ok(config)
    }
}

/// Depths after which features are taken. Entry 0 of the reference's list of hidden states is the
/// input of the first layer.
fn resolve_layers(layers: &[i64], num_layers: usize) -> Result<Vec<usize>, FamilyError> {
    let unsupported = |what: String| Err(FamilyError::Config(what));
    let entries = num_layers as i64 + 1;
    // More than all of them is nobody's configuration, and takes memory for each.
    if layers.is_empty() || layers.len() > entries as usize {
        return unsupported(format!(
            "vision_feature_layer lists {} layers, 1 to {entries} are possible",
            layers.len()
        ));
    }
    let mut resolved = Vec::with_capacity(layers.len());
    for &layer in layers {
        let at = match layer < 0 {
            true => entries.saturating_add(layer),
            false => layer,
        };
        if !(0..entries).contains(&at) {
            return unsupported(format!(
                "vision_feature_layer {layer} does not exist in a tower of {num_layers} layers"
            ));
        }
        resolved.push(at as usize);
    }
    Ok(resolved)
}
