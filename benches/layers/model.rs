//! Models whose layer shapes are measured.

use std::path::Path;

use reroute::DecoderConfig;
use reroute_zoo::embedded;
use reroute_zoo::{Folder, ModelConfig};
use vision_encoder::qwen::QwenTowerConfig;
use vision_encoder::vit::VitConfig;

static LLAVA: &[(&str, &[u8])] = &[("config.json", include_bytes!("../models/llava-1.5-7b.json"))];
static QWEN: &[(&str, &[u8])] = &[(
    "config.json",
    include_bytes!("../models/qwen2.5-vl-7b.json"),
)];

/// Layers with weights of their own; deeper decoders repeat them. Two, so that a layer never finds
/// its own weights in a processor cache.
pub const DISTINCT_LAYERS: usize = 2;

/// Rows of the head. It runs once however many layers there are, so that a full one would weigh
/// several times too much in a decoder of few layers; FLOP ceilings count layers only.
const SMALL_HEAD: usize = 1024;

/// Text tokens of every prompt.
pub const TEXT: usize = 64;

/// A model without its weights.
pub struct Model {
    /// Layers that the whole decoder has.
    pub full_depth: usize,
    /// The decoder with few layers and a small head.
    pub decoder: DecoderConfig,
    /// The vision tower.
    pub tower: Tower,
    /// Visual tokens of a typical image.
    pub visual: usize,
}

/// The vision tower of a family.
pub enum Tower {
    /// LLaVA.
    Vit(VitConfig),
    /// Qwen-VL.
    Qwen(Box<QwenTowerConfig>),
}

impl Model {
    /// By name, or of a folder with a `config.json`.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        match name {
            "llava" => Self::of(&Folder::embedded(LLAVA)),
            "qwen" => Self::of(&Folder::embedded(QWEN)),
            folder => Self::of(&Folder::open(Path::new(folder))?),
        }
    }

    /// The built-in model, for smoke tests.
    pub fn toy() -> anyhow::Result<Self> {
        Self::of(&embedded::checkpoint())
    }

    /// With so many layers that have weights of their own.
    pub fn with_distinct_layers(mut self, layers: usize) -> Self {
        self.decoder.num_layers = layers;
        self
    }

    fn of(folder: &Folder) -> anyhow::Result<Self> {
        let config = ModelConfig::open(folder)?;
        let full = config.decoder().clone();
        Ok(Self {
            full_depth: full.num_layers,
            decoder: DecoderConfig {
                num_layers: DISTINCT_LAYERS,
                vocab_size: SMALL_HEAD.min(full.vocab_size),
                tie_word_embeddings: false,
                // Prompts are as long as is measured.
                max_position_embeddings: 1 << 20,
                sliding_window: None,
                ..full
            },
            visual: config.typical_visual_tokens(),
            tower: match config {
                ModelConfig::Llava(config) => Tower::Vit(config.vision),
                ModelConfig::QwenVl(config) => Tower::Qwen(Box::new(config.vision)),
                _ => anyhow::bail!("no tower of this family is measured"),
            },
        })
    }
}

/// Qwen2.5-VL's tower at toy shapes, for smoke tests: the built-in model has another family's.
pub fn toy_qwen_tower() -> anyhow::Result<QwenTowerConfig> {
    let config = ModelConfig::open(&Folder::embedded(QWEN))?;
    let ModelConfig::QwenVl(config) = config else {
        anyhow::bail!("the configuration of Qwen2.5-VL-7B is not Qwen's");
    };
    let mut tower = config.vision;
    tower.hidden_size = 32;
    tower.intermediate_size = 64;
    tower.num_heads = 2;
    tower.output_size = 64;
    Ok(tower)
}
