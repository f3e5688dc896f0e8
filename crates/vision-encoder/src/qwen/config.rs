use burn::tensor::backend::Backend;
use serde::Deserialize;

use super::QwenVisionTower;
use crate::VisionError;

/// Which of the three towers a configuration describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QwenGeneration {
    /// Layer norms, plain MLP, full attention.
    Qwen2,
    /// RMS norms, gated MLP, attention within windows except in a few layers.
    Qwen2_5,
    /// Learned positions, layer norms, plain MLP, full attention, DeepStack.
    Qwen3,
}

/// The `vision_config` of a Hugging Face checkpoint, of any generation, hub-era or current.
///
/// What is missing has the default of the library's class for the generation.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct QwenVisionConfig {
    depth: Option<usize>,
    /// Qwen2-VL: width of the residual stream.
    embed_dim: Option<usize>,
    /// Qwen2-VL: width of the output; else of the residual stream.
    hidden_size: Option<usize>,
    /// Qwen2-VL: width of the MLP, in widths of the residual stream.
    mlp_ratio: Option<usize>,
    /// Width of the MLP, from Qwen2.5-VL on.
    intermediate_size: Option<usize>,
    /// Width of the output, from Qwen2.5-VL on.
    out_hidden_size: Option<usize>,
    num_heads: Option<usize>,
    in_channels: Option<usize>,
    patch_size: Option<usize>,
    temporal_patch_size: Option<usize>,
    spatial_merge_size: Option<usize>,
    hidden_act: Option<String>,
    rope_parameters: Option<RopeParameters>,
    /// Qwen2.5-VL: side of a window in pixels.
    window_size: Option<usize>,
    /// Qwen2.5-VL: layers without windows.
    fullatt_block_indexes: Option<Vec<usize>>,
    /// Qwen2.5-VL
    tokens_per_second: Option<usize>,
    /// Qwen3-VL: entries of the learned table, a square.
    num_position_embeddings: Option<usize>,
    /// Qwen3-VL: layers whose output goes to the decoder.
    deepstack_visual_indexes: Option<Vec<usize>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct RopeParameters {
    rope_type: Option<String>,
    rope_theta: Option<f64>,
}

/// Activation of the MLPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    QuickGelu,
    Silu,
    GeluTanh,
}

/// A resolved tower configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct QwenTowerConfig {
    /// The tower's kind.
    pub generation: QwenGeneration,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Width of the visual tokens: that of the decoder.
    pub output_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Number of attention heads.
    pub num_heads: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Pictures of a video that make one frame of patches; an image is repeated as often.
    pub temporal_patch_size: usize,
    /// Side of the square of patches that becomes one visual token.
    pub spatial_merge_size: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Attention within windows (Qwen2.5-VL).
    pub windows: Option<WindowConfig>,
    /// Steps of the temporal position in a second of video (Qwen2.5-VL).
    pub tokens_per_second: Option<usize>,
    /// Entries of the square table of learned positions (Qwen3-VL).
    pub position_embeddings: Option<usize>,
    /// Blocks whose output is merged for the decoder's first layers, ascending (Qwen3-VL).
    pub deepstack_layers: Vec<usize>,
    pub(super) activation: Activation,
}

/// Attention within windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowConfig {
    /// Side of a window, in visual tokens.
    pub side: usize,
    /// Blocks that attend to the whole frame nevertheless.
    pub full_attention_layers: Vec<usize>,
}

/// Colour channels of a picture.
const CHANNELS: usize = 3;

// Far above any real tower; products of sizes stay away from overflow.
const MAX_WIDTH: usize = 1 << 20;
const MAX_COUNT: usize = 1 << 10;
const MAX_MERGE: usize = 1 << 4;

impl QwenVisionConfig {
    /// Checks every number and maps the names.
    pub fn resolve(&self, generation: QwenGeneration) -> Result<QwenTowerConfig, VisionError> {
        let default = QwenTowerConfig::library_default(generation);
        let hidden_size = match generation {
            QwenGeneration::Qwen2 => self.embed_dim,
            _ => self.hidden_size,
        };
        let hidden_size = hidden_size.unwrap_or(default.hidden_size);
        let (intermediate_size, output_size) = match generation {
            QwenGeneration::Qwen2 => {
                let ratio = self.mlp_ratio.unwrap_or(4);
                (Some(hidden_size.saturating_mul(ratio)), self.hidden_size)
            }
            _ => (self.intermediate_size, self.out_hidden_size),
        };
        let patch_size = self.patch_size.unwrap_or(default.patch_size);
        let spatial_merge_size = self
            .spatial_merge_size
            .unwrap_or(default.spatial_merge_size);
        let windows = default.windows.map(|default| WindowConfig {
            side: match self.window_size {
                // A token without pixels is refused below.
                Some(pixels) => pixels / spatial_merge_size.max(1) / patch_size.max(1),
                None => default.side,
            },
            full_attention_layers: match &self.fullatt_block_indexes {
                Some(layers) => layers.clone(),
                None => default.full_attention_layers,
            },
        });
        let config = QwenTowerConfig {
            generation,
            hidden_size,
            intermediate_size: intermediate_size.unwrap_or(default.intermediate_size),
            output_size: output_size.unwrap_or(default.output_size),
            num_layers: self.depth.unwrap_or(default.num_layers),
            num_heads: self.num_heads.unwrap_or(default.num_heads),
            patch_size,
            temporal_patch_size: self
                .temporal_patch_size
                .unwrap_or(default.temporal_patch_size),
            spatial_merge_size,
            rope_theta: self.rope_theta()?.unwrap_or(default.rope_theta),
            windows,
            tokens_per_second: (default.tokens_per_second)
                .map(|default| self.tokens_per_second.unwrap_or(default)),
            position_embeddings: (default.position_embeddings)
                .map(|default| self.num_position_embeddings.unwrap_or(default)),
            deepstack_layers: match (generation, &self.deepstack_visual_indexes) {
                (QwenGeneration::Qwen3, Some(layers)) => layers.clone(),
                _ => default.deepstack_layers,
            },
            activation: self.activation()?.unwrap_or(default.activation),
        };
        if let Some(channels) = self.in_channels.filter(|&channels| channels != CHANNELS) {
            return inconsistent(format!("in_channels is {channels}, not {CHANNELS}"));
        }
        config.check()?;
        Ok(config)
    }

    fn rope_theta(&self) -> Result<Option<f64>, VisionError> {
        let Some(rope) = &self.rope_parameters else {
            return Ok(None);
        };
        match rope.rope_type.as_deref() {
            None | Some("axial" | "default") => Ok(rope.rope_theta),
            Some(other) => inconsistent(format!("rope_type \"{other}\" is not axial")),
        }
    }

    fn activation(&self) -> Result<Option<Activation>, VisionError> {
        Ok(match self.hidden_act.as_deref() {
            None => None,
            Some("quick_gelu") => Some(Activation::QuickGelu),
            Some("silu") => Some(Activation::Silu),
            Some("gelu_pytorch_tanh") => Some(Activation::GeluTanh),
            Some(other) => {
                return inconsistent(format!(
                    "hidden_act \"{other}\" is not quick_gelu, silu or gelu_pytorch_tanh"
                ));
            }
        })
    }
}

impl QwenTowerConfig {
    /// What the library's configuration class says where a checkpoint says nothing.
    fn library_default(generation: QwenGeneration) -> Self {
        let qwen2 = Self {
            generation,
            hidden_size: 1280,
            intermediate_size: 5120,
            output_size: 3584,
            num_layers: 32,
            num_heads: 16,
            patch_size: 14,
            temporal_patch_size: 2,
            spatial_merge_size: 2,
            rope_theta: 10_000.0,
            windows: None,
            tokens_per_second: None,
            position_embeddings: None,
            deepstack_layers: Vec::new(),
            activation: Activation::QuickGelu,
        };
        match generation {
            QwenGeneration::Qwen2 => qwen2,
            QwenGeneration::Qwen2_5 => Self {
                hidden_size: 3584,
                intermediate_size: 3420,
                windows: Some(WindowConfig {
                    side: 4,
                    full_attention_layers: vec![7, 15, 23, 31],
                }),
                tokens_per_second: Some(4),
                activation: Activation::Silu,
                ..qwen2
            },
            QwenGeneration::Qwen3 => Self {
                hidden_size: 1152,
                intermediate_size: 4304,
                num_layers: 27,
                patch_size: 16,
                position_embeddings: Some(2304),
                deepstack_layers: vec![8, 16, 24],
                activation: Activation::GeluTanh,
                ..qwen2
            },
        }
    }

    fn check(&self) -> Result<(), VisionError> {
        let window_side = self.windows.as_ref().map_or(1, |windows| windows.side);
        for (name, value, limit) in [
            ("width of the residual stream", self.hidden_size, MAX_WIDTH),
            ("width of the MLP", self.intermediate_size, MAX_WIDTH),
            ("width of the output", self.output_size, MAX_WIDTH),
            ("depth", self.num_layers, MAX_COUNT),
            ("num_heads", self.num_heads, MAX_WIDTH),
            ("patch_size", self.patch_size, MAX_COUNT),
            ("temporal_patch_size", self.temporal_patch_size, MAX_COUNT),
            ("spatial_merge_size", self.spatial_merge_size, MAX_MERGE),
            ("window_size, in visual tokens,", window_side, MAX_COUNT),
            (
                "tokens_per_second",
                self.tokens_per_second.unwrap_or(1),
                MAX_WIDTH,
            ),
            (
                "num_position_embeddings",
                self.position_embeddings.unwrap_or(1),
                MAX_WIDTH,
            ),
        ] {
            if value == 0 || value > limit {
                return inconsistent(format!("{name} is {value}, 1 to {limit} are possible"));
            }
        }
        // Rotation pairs channels; half of the pairs turn with the row, half with the column.
        if !self.hidden_size.is_multiple_of(4 * self.num_heads) {
            return inconsistent(format!(
                "the width of the residual stream, {}, is not a multiple of 4 times num_heads {}",
                self.hidden_size, self.num_heads
            ));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return inconsistent(format!("rope_theta is {}", self.rope_theta));
        }
        let taps = &self.deepstack_layers;
        let reached = taps.last().is_none_or(|&last| last < self.num_layers);
        if !(reached && taps.is_sorted_by(|a, b| a < b)) {
            return inconsistent(format!(
                "deepstack_visual_indexes {taps:?} must ascend and be below the depth {}",
                self.num_layers
            ));
        }
        Ok(())
    }

    /// Numbers in one patch: channels, pictures, rows and columns.
    pub fn patch_features(&self) -> usize {
        CHANNELS * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Shape of the patch embedding's kernel without its outputs.
    pub(super) fn patch_shape(&self) -> [usize; 4] {
        let side = self.patch_size;
        [CHANNELS, self.temporal_patch_size, side, side]
    }

    /// Builds the tower; parameters are lazily random until loaded.
    pub fn init<B: Backend>(&self, device: &B::Device) -> QwenVisionTower<B> {
        QwenVisionTower::new(self, device)
    }
}

fn inconsistent<T>(reason: String) -> Result<T, VisionError> {
    Err(VisionError::Config(format!("vision_config: {reason}")))
}
