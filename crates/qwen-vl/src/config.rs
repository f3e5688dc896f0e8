use reroute::{DecoderConfig, MAX_HEAD_DIM, RopeConfig, RopeDefaults, RopeFields};
use serde::Deserialize;
use vision_encoder::qwen::{QwenGeneration, QwenTowerConfig, QwenVisionConfig};

use reroute_family::FamilyError;

/// `config.json` of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint: hub-era (the first two have the
/// text model's fields at the top level) or current, with the library's defaults.
#[derive(Debug, Clone, Deserialize)]
pub struct QwenVlHfConfig {
    model_type: String,
    vision_config: QwenVisionConfig,
    text_config: Option<TextConfig>,
    #[serde(flatten)]
    flat: TextConfig,
    #[serde(default = "default_image_token")]
    image_token_id: u32,
    #[serde(default = "default_video_token")]
    video_token_id: u32,
}

/// The fields of the text model, at either place.
#[derive(Debug, Clone, Deserialize)]
struct TextConfig {
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    #[serde(flatten)]
    rope: RopeFields,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    tie_word_embeddings: Option<bool>,
}

fn default_image_token() -> u32 {
    151_655
}

fn default_video_token() -> u32 {
    151_656
}

/// What the library's text configurations say where config.json is silent.
struct Defaults {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: f64,
    mrope_section: [usize; 3],
}

/// `Qwen2VLTextConfig` and `Qwen2_5_VLTextConfig`.
const QWEN2: Defaults = Defaults {
    vocab_size: 152_064,
    hidden_size: 8192,
    intermediate_size: 29_568,
    num_hidden_layers: 80,
    num_attention_heads: 64,
    num_key_value_heads: 8,
    max_position_embeddings: 32_768,
    rms_norm_eps: 1e-5,
    rope_theta: 1e6,
    mrope_section: [16, 24, 24],
};

/// `Qwen3VLTextConfig`.
const QWEN3: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 4096,
    intermediate_size: 22_016,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: 32,
    max_position_embeddings: 128_000,
    rms_norm_eps: 1e-6,
    rope_theta: 5e5,
    mrope_section: [24, 20, 20],
};

/// `Qwen3VLTextConfig` has its own; the older ones divide `hidden_size` by the heads.
const QWEN3_HEAD_DIM: usize = 128;

/// A resolved configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct QwenVlConfig {
    /// The vision tower, which says the model's generation.
    pub vision: QwenTowerConfig,
    /// The decoder.
    pub text: DecoderConfig,
    /// Token id of an image slot.
    pub image_token: u32,
    /// Token id of a video slot.
    pub video_token: u32,
}

fn unsupported<T>(what: String) -> Result<T, FamilyError> {
    Err(FamilyError::Config(what))
}

impl QwenVlHfConfig {
    /// Checks every number and maps the names.
    pub fn resolve(&self) -> Result<QwenVlConfig, FamilyError> {
        let generation = match self.model_type.as_str() {
            "qwen2_vl" => QwenGeneration::Qwen2,
            "qwen2_5_vl" => QwenGeneration::Qwen2_5,
            "qwen3_vl" => QwenGeneration::Qwen3,
            other => {
                return unsupported(format!(
                    "model_type \"{other}\" is not supported, only qwen2_vl, qwen2_5_vl and qwen3_vl \
                     are (no mixtures of experts)"
                ));
            }
        };
        let vision = self.vision_config.resolve(generation)?;
        let layout = self.text_config.as_ref().unwrap_or(&self.flat);
        let tied = [layout, &self.flat].map(|text| text.tie_word_embeddings);
        let text = layout.resolve(generation, tied.contains(&Some(true)))?;
        if vision.output_size != text.hidden_size {
            return unsupported(format!(
                "the vision tower gives {} features, but hidden_size of the text model is {}",
                vision.output_size, text.hidden_size
            ));
        }
        if vision.deepstack_layers.len() > text.num_layers {
            return unsupported(format!(
                "deepstack_visual_indexes has {} entries, one for each of the first decoder layers, \
                 but there are {} layers",
                vision.deepstack_layers.len(),
                text.num_layers
            ));
        }
        if self.image_token_id == self.video_token_id {
            return unsupported(format!(
                "image_token_id and video_token_id are both {}",
                self.image_token_id
            ));
        }
        Ok(QwenVlConfig {
            vision,
            text,
            image_token: self.image_token_id,
            video_token: self.video_token_id,
        })
    }
}

impl TextConfig {
    fn resolve(
        &self,
        generation: QwenGeneration,
        tied: bool,
    ) -> Result<DecoderConfig, FamilyError> {
        let is_qwen3 = generation == QwenGeneration::Qwen3;
        let default = if is_qwen3 { QWEN3 } else { QWEN2 };
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return unsupported(format!(
                "hidden_act \"{act}\" is not supported, only \"silu\""
            ));
        }
        if self.attention_bias == Some(true) {
            return unsupported("attention_bias is true; Qwen-VL has no such biases".into());
        }
        let num_layers = self.num_hidden_layers.unwrap_or(default.num_hidden_layers);
        if self.has_windows(num_layers) {
            return unsupported(
                "sliding-window attention is not supported: set use_sliding_window to false, as the \
                 published checkpoints do"
                    .into(),
            );
        }
        let hidden_size = self.hidden_size.unwrap_or(default.hidden_size);
        let heads = self
            .num_attention_heads
            .unwrap_or(default.num_attention_heads);
        let head_dim = match hidden_size.checked_rem(heads) {
            _ if is_qwen3 => self.head_dim.unwrap_or(QWEN3_HEAD_DIM),
            Some(0) => hidden_size / heads,
            _ => {
                return unsupported(format!(
                    "hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
                ));
            }
        };
        let config = DecoderConfig {
            vocab_size: self.vocab_size.unwrap_or(default.vocab_size),
            hidden_size,
            intermediate_size: self.intermediate_size.unwrap_or(default.intermediate_size),
            num_layers,
            num_attention_heads: heads,
            num_key_value_heads: self
                .num_key_value_heads
                .unwrap_or(default.num_key_value_heads),
            head_dim,
            rms_norm_eps: self.rms_norm_eps.unwrap_or(default.rms_norm_eps),
            qkv_bias: !is_qwen3,
            qk_norm: is_qwen3,
            tie_word_embeddings: tied,
            max_position_embeddings: self
                .max_position_embeddings
                .unwrap_or(default.max_position_embeddings),
            sliding_window: None,
            rope: self.rope(head_dim, is_qwen3, &default)?,
        };
        config.validate()?;
        Ok(config)
    }

    fn has_windows(&self, num_layers: usize) -> bool {
        match &self.layer_types {
            Some(types) => types.iter().any(|kind| kind != "full_attention"),
            // Layers from `max_window_layers` on have windows.
            None => {
                self.use_sliding_window == Some(true)
                    && self.max_window_layers.is_none_or(|full| full < num_layers)
            }
        }
    }

    fn rope(
        &self,
        head_dim: usize,
        interleaved: bool,
        default: &Defaults,
    ) -> Result<RopeConfig, FamilyError> {
        let rope = self.rope.read(RopeDefaults {
            theta: default.rope_theta,
            max_position_embeddings: self
                .max_position_embeddings
                .unwrap_or(default.max_position_embeddings),
            mrope: true,
        });
        let rope = rope.map_err(|error| FamilyError::Config(error.to_string()))?;
        if (rope.mrope_interleaved).is_some_and(|given| given != interleaved) {
            return unsupported(format!(
                "mrope_interleaved must be {interleaved} in this model"
            ));
        }
        let section = rope.mrope_section.unwrap_or(default.mrope_section);
        if section.iter().map(|&n| n as u128).sum::<u128>() != head_dim as u128 / 2 {
            return unsupported(format!(
                "mrope_section {section:?} does not add up to half of a head's {head_dim} channels"
            ));
        }
        let axis = if interleaved {
            interleaved_axis
        } else {
            sectioned_axis
        };
        Ok(RopeConfig {
            scaling: rope.scaling,
            theta: rope.theta,
            // Of a wider head, which is refused later, no memory is asked for.
            axis_of_frequency: (0..head_dim.min(MAX_HEAD_DIM) / 2)
                .map(|frequency| axis(frequency, section))
                .collect(),
        })
    }
}

/// Time, height and width one after the other.
fn sectioned_axis(frequency: usize, [time, height, _]: [usize; 3]) -> usize {
    usize::from(frequency >= time) + usize::from(frequency >= time + height)
}

/// Time, height and width in turn while their sections last, then time alone.
fn interleaved_axis(frequency: usize, section: [usize; 3]) -> usize {
    let (turn, axis) = (frequency / 3, frequency % 3);
    if turn < section[axis] { axis } else { 0 }
}
