use reroute::{DecoderConfig, RopeConfig};
use serde::Deserialize;
use vision_encoder::clip::{ClipConfig, ClipVisionConfig};

use reroute_family::FamilyError;

/// `config.json` of a LLaVA-1.5 checkpoint, hub-era or current, with the library's defaults.
#[derive(Debug, Clone, Deserialize)]
pub struct LlavaHfConfig {
    #[serde(default)]
    text_config: TextConfig,
    #[serde(default = "ClipVisionConfig::large_patch14_336")]
    vision_config: ClipVisionConfig,
    #[serde(alias = "image_token_id", default = "default_image_token")]
    image_token_index: u32,
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

/// One layer, or (in variants of the model that are not LLaVA-1.5) several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum FeatureLayer {
    One(i64),
    Several(Vec<i64>),
}

/// `text_config`, with the defaults of the LLaMA configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct TextConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeScaling>,
    rope_parameters: Option<RopeScaling>,
    hidden_act: String,
    attention_bias: bool,
    mlp_bias: bool,
    tie_word_embeddings: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct RopeScaling {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            model_type: "llama".into(),
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope_theta: None,
            rope_scaling: None,
            rope_parameters: None,
            hidden_act: "silu".into(),
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: false,
        }
    }
}

fn default_image_token() -> u32 {
    32000
}

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

/// A resolved LLaVA-1.5 configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaConfig {
    /// The vision tower.
    pub vision: ClipConfig,
    /// Layers of the tower to run before its features are taken.
    pub vision_layers: usize,
    /// Whether the projector's layers have biases.
    pub projector_bias: bool,
    /// The decoder.
    pub text: DecoderConfig,
    /// Token id of an image slot.
    pub image_token: u32,
}

impl LlavaHfConfig {
    /// Checks every number and maps the names.
    pub fn resolve(&self) -> Result<LlavaConfig, FamilyError> {
        let vision = self.vision_config.resolve()?;
        let text = self.text_config.resolve(self.tie_word_embeddings)?;
        let unsupported = |what: String| Err(FamilyError::Config(what));
        if self.vision_feature_select_strategy != "default" {
            return unsupported(format!(
                "vision_feature_select_strategy \"{}\" is not supported, only \"default\" (patches \
                 without the class token) is LLaVA-1.5",
                self.vision_feature_select_strategy
            ));
        }
        if let Some(length) = self.image_seq_length.filter(|&n| n != vision.patches()) {
            return unsupported(format!(
                "image_seq_length is {length}, but image_size and patch_size give {} visual tokens",
                vision.patches()
            ));
        }
        if self.projector_hidden_act != "gelu" {
            return unsupported(format!(
                "projector_hidden_act \"{}\" is not supported, only \"gelu\"",
                self.projector_hidden_act
            ));
        }
        let layer = match &self.vision_feature_layer {
            FeatureLayer::One(layer) => *layer,
            FeatureLayer::Several(layers) => {
                return unsupported(format!(
                    "vision_feature_layer {layers:?} lists several layers; LLaVA-1.5 has one"
                ));
            }
        };
        // Entry 0 of the reference's list of hidden states is the input of the first layer.
        let entries = vision.num_layers as i64 + 1;
        let vision_layers = if layer < 0 { entries + layer } else { layer };
        if !(0..entries).contains(&vision_layers) {
            return unsupported(format!(
                "vision_feature_layer {layer} does not exist in a tower of {} layers",
                vision.num_layers
            ));
        }
        Ok(LlavaConfig {
            vision,
            vision_layers: vision_layers as usize,
            projector_bias: self.multimodal_projector_bias,
            text,
            image_token: self.image_token_index,
        })
    }
}

impl TextConfig {
    fn resolve(&self, tied: Option<bool>) -> Result<DecoderConfig, FamilyError> {
        let unsupported = |what: String| Err(FamilyError::Config(what));
        if !["llama", "vicuna"].contains(&self.model_type.as_str()) {
            return unsupported(format!(
                "text_config.model_type \"{}\" is not LLaMA",
                self.model_type
            ));
        }
        if self.hidden_act != "silu" || self.attention_bias || self.mlp_bias {
            return unsupported(
                "text_config asks for an activation other than silu, or for biases; \
                 LLaVA-1.5 has neither"
                    .into(),
            );
        }
        let ropes = [&self.rope_parameters, &self.rope_scaling];
        for rope in ropes.into_iter().flatten() {
            if let Some(kind) = rope.rope_type.as_deref().filter(|kind| *kind != "default") {
                return unsupported(format!("rope type \"{kind}\" is not supported"));
            }
        }
        let parameters = self.rope_parameters.as_ref();
        let theta = parameters
            .and_then(|rope| rope.rope_theta)
            .or(self.rope_theta);
        let heads = self.num_attention_heads;
        let head_dim = match self.head_dim {
            Some(head_dim) => head_dim,
            None if heads > 0 && self.hidden_size.is_multiple_of(heads) => self.hidden_size / heads,
            None => {
                return unsupported(format!(
                    "text_config.hidden_size {} is not a multiple of num_attention_heads {heads}",
                    self.hidden_size
                ));
            }
        };
        let config = DecoderConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim,
            rms_norm_eps: self.rms_norm_eps,
            qkv_bias: false,
            qk_norm: false,
            tie_word_embeddings: tied.unwrap_or(false) || self.tie_word_embeddings,
            max_position_embeddings: self.max_position_embeddings,
            rope: RopeConfig::one_axis(theta.unwrap_or(10_000.0), head_dim),
        };
        config.validate()?;
        Ok(config)
    }
}
