use burn::tensor::backend::Backend;
use serde::Deserialize;

use super::ClipVisionTower;
use crate::VisionError;

/// The `vision_config` of a Hugging Face checkpoint, with the library's defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
    /// Kind of tower; only `clip_vision_model` is CLIP.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads.
    pub num_attention_heads: usize,
    /// Colour channels.
    pub num_channels: usize,
    /// Side of the square input, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Activation of the MLP: `quick_gelu` or `gelu`.
    pub hidden_act: String,
    /// ε of every layer norm.
    pub layer_norm_eps: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            model_type: "clip_vision_model".into(),
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
        }
    }
}

impl ClipVisionConfig {
    /// CLIP ViT-L/14 at 336 px, what LLaVA-1.5 means when it names no vision config.
    pub fn large_patch14_336() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            image_size: 336,
            patch_size: 14,
            ..Self::default()
        }
    }

    /// Checks the numbers against each other.
    pub fn resolve(&self) -> Result<ClipConfig, VisionError> {
        let inconsistent = |reason: String| Err(VisionError::Config(reason));
        if self.model_type != "clip_vision_model" {
            return inconsistent(format!(
                "vision_config.model_type \"{}\" is not clip_vision_model",
                self.model_type
            ));
        }
        for (name, value, limit) in [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 10),
            ("num_attention_heads", self.num_attention_heads, 1 << 16),
            ("image_size", self.image_size, 1 << 14),
            ("patch_size", self.patch_size, 1 << 14),
        ] {
            // Far above any real model; keeps products of sizes away from overflow.
            if value == 0 || value > limit {
                return inconsistent(format!(
                    "vision_config.{name} is {value}, 1 to {limit} are possible"
                ));
            }
        }
        if self.num_channels != 3 {
            return inconsistent(format!(
                "vision_config.num_channels is {}, not 3",
                self.num_channels
            ));
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return inconsistent(format!(
                "vision_config.hidden_size {} is not a multiple of num_attention_heads {}",
                self.hidden_size, self.num_attention_heads
            ));
        }
        if self.patch_size > self.image_size {
            return inconsistent(format!(
                "vision_config.patch_size {} exceeds image_size {}",
                self.patch_size, self.image_size
            ));
        }
        if !(self.layer_norm_eps.is_finite() && self.layer_norm_eps >= 0.0) {
            return inconsistent(format!(
                "vision_config.layer_norm_eps is {}",
                self.layer_norm_eps
            ));
        }
        let quick_gelu = match self.hidden_act.as_str() {
            "quick_gelu" => true,
            "gelu" => false,
            other => {
                return inconsistent(format!(
                    "vision_config.hidden_act \"{other}\" is not quick_gelu or gelu"
                ));
            }
        };
        Ok(ClipConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            image_size: self.image_size,
            patch_size: self.patch_size,
            quick_gelu,
            layer_norm_eps: self.layer_norm_eps,
        })
    }
}

/// A resolved tower configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_layers: usize,
    /// Number of attention heads.
    pub num_heads: usize,
    /// Side of the square input, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Quick GELU instead of GELU.
    pub quick_gelu: bool,
    /// ε of every layer norm.
    pub layer_norm_eps: f64,
}

impl ClipConfig {
    /// Patches along one side of the image.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Patches of one image, without the class token.
    pub fn patches(&self) -> usize {
        self.grid() * self.grid()
    }

    /// Builds the tower; parameters are lazily random until loaded.
    pub fn init<B: Backend>(&self, device: &B::Device) -> ClipVisionTower<B> {
        ClipVisionTower::new(self, device)
    }
}
