use burn::tensor::backend::Backend;
use serde::Deserialize;

use super::VitTower;
use crate::VisionError;

/// Which of the towers a configuration describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum VitKind {
    /// A class token, a norm before the first layer.
    Clip,
    /// No class token, a bias on the patches.
    Siglip,
    /// A class token, a bias on the patches, scaled residuals, positions for any size of image.
    Dinov2,
}

impl VitKind {
    const ALL: [Self; 3] = [Self::Clip, Self::Siglip, Self::Dinov2];

    /// What `config.json` calls it.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Clip => "clip_vision_model",
            Self::Siglip => "siglip_vision_model",
            Self::Dinov2 => "dinov2",
        }
    }
}

/// Activation of the MLPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum VitActivation {
    /// `x · σ(1.702 x)`
    QuickGelu,
    /// With the error function.
    Gelu,
    /// With `tanh` for the error function.
    GeluTanh,
    /// `silu(gate) · up` (arXiv 2002.05202), both halves of one product: DINOv2 giant.
    SwiGlu,
}

/// The `vision_config` of a Hugging Face checkpoint, of any kind.
///
/// What is missing has the default of the library's class for the kind.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct VitHfConfig {
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_channels: Option<usize>,
    image_size: Option<Side>,
    patch_size: Option<Side>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    /// DINOv2: width of the MLP, in widths of the residual stream.
    mlp_ratio: Option<usize>,
    /// DINOv2
    qkv_bias: Option<bool>,
    /// DINOv2
    use_swiglu_ffn: Option<bool>,
}

/// A side of a square, or height and width.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "a size is a number, or height and width")]
enum Side {
    One(usize),
    Two([usize; 2]),
}

// Far above any real tower; products of sizes stay away from overflow.
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 10;
const MAX_HEADS: usize = 1 << 16;
const MAX_SIDE: usize = 1 << 14;

impl VitHfConfig {
    /// CLIP ViT-L/14 at 336 px, what LLaVA-1.5 means when it names no vision config.
    pub fn clip_large_patch14_336() -> Self {
        Self {
            hidden_size: Some(1024),
            intermediate_size: Some(4096),
            num_hidden_layers: Some(24),
            num_attention_heads: Some(16),
            image_size: Some(Side::One(336)),
            patch_size: Some(Side::One(14)),
            ..Self::default()
        }
    }

    /// What `config.json` calls the tower.
    pub fn model_type(&self) -> &str {
        let missing = VitKind::Clip.model_type();
        self.model_type.as_deref().unwrap_or(missing)
    }

    /// Checks the numbers against each other.
    pub fn resolve(&self) -> Result<VitConfig, VisionError> {
        let known = |kind: &VitKind| kind.model_type() == self.model_type();
        let Some(kind) = VitKind::ALL.into_iter().find(known) else {
            return inconsistent(format!(
                "model_type \"{}\" is not supported; {} are",
                self.model_type(),
                VitKind::ALL.map(VitKind::model_type).join(", ")
            ));
        };
        let (patch_size, activation, layer_norm_eps) = match kind {
            VitKind::Clip => (32, "quick_gelu", 1e-5),
            VitKind::Siglip => (16, "gelu_pytorch_tanh", 1e-6),
            VitKind::Dinov2 => (14, "gelu", 1e-6),
        };
        let image_size = side("image_size", self.image_size, 224)?;
        let patch_size = side("patch_size", self.patch_size, patch_size)?;
        let hidden_size = self.hidden_size.unwrap_or(768);
        within("hidden_size", hidden_size, MAX_WIDTH)?;
        let swiglu = kind == VitKind::Dinov2 && self.use_swiglu_ffn.unwrap_or(false);
        let intermediate_size = match kind {
            VitKind::Dinov2 => {
                let ratio = self.mlp_ratio.unwrap_or(4);
                within("mlp_ratio", ratio, 1 << 8)?;
                let inner = hidden_size * ratio;
                // Two thirds of a plain MLP's width, rounded up to a multiple of 8.
                if swiglu {
                    (inner * 2 / 3).next_multiple_of(8)
                } else {
                    inner
                }
            }
            _ => self.intermediate_size.unwrap_or(3072),
        };
        let activation = match self.hidden_act.as_deref().unwrap_or(activation) {
            _ if swiglu => VitActivation::SwiGlu,
            "quick_gelu" => VitActivation::QuickGelu,
            "gelu" => VitActivation::Gelu,
            "gelu_pytorch_tanh" | "gelu_new" => VitActivation::GeluTanh,
            other => {
                return inconsistent(format!(
                    "hidden_act \"{other}\" is not quick_gelu, gelu or gelu_pytorch_tanh"
                ));
            }
        };
        let channels = self.num_channels.unwrap_or(3);
        if channels != 3 {
            return inconsistent(format!("num_channels is {channels}, not 3"));
        }
        let config = VitConfig {
            kind,
            hidden_size,
            intermediate_size,
            num_layers: self.num_hidden_layers.unwrap_or(12),
            num_heads: self.num_attention_heads.unwrap_or(12),
            image_size,
            patch_size,
            position_grid: image_size / patch_size.max(1),
            activation,
            qkv_bias: kind != VitKind::Dinov2 || self.qkv_bias.unwrap_or(true),
            layer_norm_eps: self.layer_norm_eps.unwrap_or(layer_norm_eps),
        };
        config.validate()?;
        Ok(config)
    }
}

fn inconsistent<T>(reason: String) -> Result<T, VisionError> {
    Err(VisionError::Config(format!("vision_config.{reason}")))
}

fn within(name: &str, value: usize, limit: usize) -> Result<(), VisionError> {
    match (1..=limit).contains(&value) {
        true => Ok(()),
        false => inconsistent(format!("{name} is {value}, 1 to {limit} are possible")),
    }
}

fn side(name: &str, side: Option<Side>, default: usize) -> Result<usize, VisionError> {
    match side {
        None => Ok(default),
        Some(Side::One(side)) => Ok(side),
        Some(Side::Two([height, width])) if height == width => Ok(height),
        Some(Side::Two(sides)) => inconsistent(format!("{name} {sides:?} is no square")),
    }
}

/// A resolved tower configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct VitConfig {
    /// The tower's kind.
    pub kind: VitKind,
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
    /// Side of the square of learned positions, in patches; another grid than the images' own is
    /// interpolated, by DINOv2 alone.
    pub position_grid: usize,
    /// Activation of the MLPs.
    pub activation: VitActivation,
    /// Whether the q, k and v projections have biases.
    pub qkv_bias: bool,
    /// ε of every layer norm.
    pub layer_norm_eps: f64,
}

impl VitConfig {
    /// Whether the first row of every image stands for the whole of it.
    pub fn class_token(&self) -> bool {
        self.kind != VitKind::Siglip
    }

    /// Rows of an image before its patches.
    pub fn prefix_tokens(&self) -> usize {
        usize::from(self.class_token())
    }

    /// Patches along one side of the image.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Patches of one image, without the class token.
    pub fn patches(&self) -> usize {
        self.grid() * self.grid()
    }

    /// Rows of one image: the class token, if there is one, and the patches.
    pub fn tokens(&self) -> usize {
        self.prefix_tokens() + self.patches()
    }

    /// The same tower for images of another size, in pixels.
    ///
    /// # Errors
    /// The positions of towers other than DINOv2 are those of one size; any needs a whole patch.
    pub fn with_image_size(self, image_size: usize) -> Result<Self, VisionError> {
        if image_size != self.image_size && self.kind != VitKind::Dinov2 {
            return inconsistent(format!(
                "image_size is {}, the positions of a {} are for no other ({image_size})",
                self.image_size,
                self.kind.model_type()
            ));
        }
        let config = Self { image_size, ..self };
        config.validate()?;
        Ok(config)
    }

    /// Checks that the numbers agree with each other.
    pub fn validate(&self) -> Result<(), VisionError> {
        for (name, value, limit) in [
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("intermediate_size", self.intermediate_size, MAX_WIDTH),
            ("num_hidden_layers", self.num_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_heads, MAX_HEADS),
            ("image_size", self.image_size, MAX_SIDE),
            ("patch_size", self.patch_size, MAX_SIDE),
        ] {
            within(name, value, limit)?;
        }
        if !self.hidden_size.is_multiple_of(self.num_heads) {
            return inconsistent(format!(
                "hidden_size {} is not a multiple of num_attention_heads {}",
                self.hidden_size, self.num_heads
            ));
        }
        if self.patch_size > self.image_size || self.position_grid == 0 {
            return inconsistent(format!(
                "patch_size {} exceeds image_size {}",
                self.patch_size, self.image_size
            ));
        }
        if self.position_grid != self.grid() && self.kind != VitKind::Dinov2 {
            return inconsistent(format!(
                "image_size {} has {} patches a side, the positions have {}",
                self.image_size,
                self.grid(),
                self.position_grid
            ));
        }
        if !((self.layer_norm_eps as f32).is_finite() && self.layer_norm_eps >= 0.0) {
            return inconsistent(format!("layer_norm_eps is {}", self.layer_norm_eps));
        }
        Ok(())
    }

    /// Builds the tower; parameters are lazily random until loaded.
    pub fn init<B: Backend>(&self, device: &B::Device) -> VitTower<B> {
        VitTower::new(self, device)
    }
}
