use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use checkpoint::{CONFIG_MAX_BYTES, Folder, LoadOptions, LoadProgress, Shards, load_into};
use llava::{Llava, LlavaConfig, LlavaHfConfig, NAMES, TIED_HEAD};
use reroute::{Decoder, DecoderConfig, Prompt};
use serde::Deserialize;

use crate::ZooError;

/// Families that can be opened.
const KNOWN: &str = "llava (LLaVA-1.5)";

/// The resolved configuration of a model of one of the families.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelConfig {
    /// LLaVA-1.5.
    Llava(LlavaConfig),
}

#[derive(Deserialize)]
struct HasModelType {
    #[serde(default)]
    model_type: String,
}

impl ModelConfig {
    /// Reads and checks `config.json`.
    pub fn open(folder: &Folder) -> Result<Self, ZooError> {
        let config: HasModelType = folder.read_json("config.json", CONFIG_MAX_BYTES)?;
        match config.model_type.as_str() {
            "llava" => {
                let config: LlavaHfConfig = folder.read_json("config.json", CONFIG_MAX_BYTES)?;
                Ok(Self::Llava(config.resolve()?))
            }
            _ => Err(ZooError::UnknownFamily {
                found: config.model_type,
                known: KNOWN,
            }),
        }
    }

    /// The decoder.
    pub fn decoder(&self) -> &DecoderConfig {
        match self {
            Self::Llava(config) => &config.text,
        }
    }

    /// Token id of an image slot.
    pub fn image_token(&self) -> u32 {
        match self {
            Self::Llava(config) => config.image_token,
        }
    }

    /// Rows and columns of the grid of visual tokens of one image.
    pub fn visual_grid(&self) -> [usize; 2] {
        match self {
            Self::Llava(config) => [config.vision.grid(); 2],
        }
    }

    /// Side of the square images that the vision tower takes, in pixels.
    pub(crate) fn image_size(&self) -> usize {
        match self {
            Self::Llava(config) => config.vision.image_size,
        }
    }
}

/// A loaded model of one of the families.
#[derive(Debug)]
pub enum Model<B: Backend> {
    /// LLaVA-1.5.
    Llava(Box<Llava<B>>),
}

impl<B: Backend> Model<B> {
    /// Builds the model that the configuration describes and streams its weights in.
    pub(crate) fn open(
        config: &ModelConfig,
        folder: &Folder,
        dtype: DType,
        device: &B::Device,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ZooError> {
        let shards = Shards::open(folder)?;
        match config {
            ModelConfig::Llava(config) => {
                let model = Llava::new(config, device)?;
                let mut options = LoadOptions::new(dtype);
                if config.text.tie_word_embeddings {
                    options.unused.push(TIED_HEAD.into());
                }
                let model = load_into(model, &shards, &NAMES, &options, progress)?;
                Ok(Self::Llava(Box::new(model)))
            }
        }
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder<B> {
        match self {
            Self::Llava(model) => model.language_model(),
        }
    }

    /// Vision features of images.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, height, width]`
    /// - returns `[vision hidden_size, images · tokens]`
    pub fn vision_features(&self, pixels: Tensor<B, 4>) -> Result<Tensor<B, 2>, ZooError> {
        match self {
            Self::Llava(model) => Ok(model.vision_features(pixels)?),
        }
    }

    /// Visual tokens from vision features.
    ///
    /// # Shapes
    /// - `features`: `[vision hidden_size, rows]`
    /// - returns `[hidden_size, rows]`
    pub fn project(&self, features: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Llava(model) => model.project(features),
        }
    }

    /// Packs token ids (image slots repeated) and visual tokens into a prompt.
    ///
    /// # Shapes
    /// - `visual`: `[hidden_size, visual tokens of all samples]`
    pub fn prompt(
        &self,
        samples: &[Vec<u32>],
        visual: Option<Tensor<B, 2>>,
        device: &B::Device,
    ) -> Result<Prompt<B>, ZooError> {
        match self {
            Self::Llava(model) => Ok(model.prompt(samples, visual, device)?),
        }
    }
}
