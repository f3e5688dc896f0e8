//! The text models under LLaVA: what each one's part of `config.json` means.

use reroute::{DecoderConfig, RopeConfig, RopeDefaults, RopeFields};
use reroute_family::FamilyError;
use serde::Deserialize;

/// `text_config` of any of them; what is missing has the default of the library's class.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TextConfig {
    model_type: Option<String>,
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
    attention_bias: bool,
    mlp_bias: bool,
    tie_word_embeddings: Option<bool>,
    /// `null` switches Mistral's default off.
    sliding_window: Window,
    /// Qwen2
    use_sliding_window: Option<bool>,
    /// Qwen2: layers before this one have no window.
    max_window_layers: Option<usize>,
    /// Qwen2
    layer_types: Option<Vec<String>>,
}

/// A window that is not mentioned is not the same as none.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(from = "Option<usize>")]
enum Window {
    #[default]
    Unsaid,
    Off,
    Rows(usize),
}

impl From<Option<usize>> for Window {
    fn from(rows: Option<usize>) -> Self {
        rows.map_or(Self::Off, Self::Rows)
    }
}

/// The defaults of a text model's class.
struct Defaults {
    vocab_size: usize,
    intermediate_size: usize,
    /// `None`: as many as query heads.
    num_key_value_heads: Option<usize>,
    max_position_embeddings: usize,
    sliding_window: Option<usize>,
    qkv_bias: bool,
}

const HIDDEN_SIZE: usize = 4096;
const LAYERS: usize = 32;
const HEADS: usize = 32;

const LLAMA: Defaults = Defaults {
    vocab_size: 32_000,
    intermediate_size: 11_008,
    num_key_value_heads: None,
    max_position_embeddings: 2048,
    sliding_window: None,
    qkv_bias: false,
};

const MISTRAL: Defaults = Defaults {
    intermediate_size: 14_336,
    num_key_value_heads: Some(8),
    max_position_embeddings: 131_072,
    sliding_window: Some(4096),
    ..LLAMA
};

const QWEN2: Defaults = Defaults {
    vocab_size: 151_936,
    intermediate_size: 22_016,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    sliding_window: Some(4096),
    qkv_bias: true,
};

impl TextConfig {
    /// Checks every number; `tied` is what stands beside it for the whole model.
    pub(crate) fn resolve(&self, tied: Option<bool>) -> Result<DecoderConfig, FamilyError> {
        let unsupported = |what: String| Err(FamilyError::Config(what));
        let model_type = self.model_type.as_deref().unwrap_or("llama");
        let default = match model_type {
            "llama" | "vicuna" => LLAMA,
            "mistral" => MISTRAL,
            "qwen2" => QWEN2,
            other => {
                return unsupported(format!(
                    "text_config.model_type \"{other}\" is not supported; llama, mistral and qwen2 are"
                ));
            }
        };
        let silu = self.hidden_act.as_deref().is_none_or(|act| act == "silu");
        if !silu || self.attention_bias || self.mlp_bias {
            return unsupported(
                "text_config asks for an activation other than silu, or for biases that LLaVA's text \
                 models do not have"
                    .into(),
            );
        }
        let hidden_size = self.hidden_size.unwrap_or(HIDDEN_SIZE);
        let layers = self.num_hidden_layers.unwrap_or(LAYERS);
        let heads = self.num_attention_heads.unwrap_or(HEADS);
        let head_dim = match self.head_dim {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return unsupported(format!(
                    "text_config.hidden_size {hidden_size} is not a multiple of num_attention_heads \
                     {heads}"
                ));
            }
        };
        let positions = self.max_position_embeddings;
        let positions = positions.unwrap_or(default.max_position_embeddings);
        let rope = self.rope.read(RopeDefaults {
            theta: 10_000.0,
            max_position_embeddings: positions,
            mrope: false,
        });
        let rope = rope.map_err(|error| FamilyError::Config(format!("text_config: {error}")))?;
        let config = DecoderConfig {
            vocab_size: self.vocab_size.unwrap_or(default.vocab_size),
            hidden_size,
            intermediate_size: self.intermediate_size.unwrap_or(default.intermediate_size),
            num_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: self
                .num_key_value_heads
                .or(default.num_key_value_heads)
                .unwrap_or(heads),
            head_dim,
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            qkv_bias: default.qkv_bias,
            qk_norm: false,
            tie_word_embeddings: tied.unwrap_or(false) || self.tie_word_embeddings.unwrap_or(false),
            max_position_embeddings: positions,
            sliding_window: self.window(model_type, layers, &default),
            rope: RopeConfig::one_axis(rope.theta, head_dim).with_scaling(rope.scaling),
        };
        config.validate()?;
        Ok(config)
    }

    /// The window of any layer.
    fn window(&self, model_type: &str, layers: usize, default: &Defaults) -> Option<usize> {
        let used = match model_type {
            "mistral" => true,
            // Some layers of it, by index or by name.
            "qwen2" => {
                let by_index = || self.max_window_layers.unwrap_or(28) < layers;
                let by_name = |kinds: &Vec<String>| kinds.iter().any(|k| k == "sliding_attention");
                self.use_sliding_window.unwrap_or(false)
                    && self.layer_types.as_ref().map_or_else(by_index, by_name)
            }
            _ => false,
        };
        match self.sliding_window {
            _ if !used => None,
            Window::Unsaid => default.sliding_window,
            Window::Off => None,
            Window::Rows(rows) => Some(rows),
        }
    }
}
