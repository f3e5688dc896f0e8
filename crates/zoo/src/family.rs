use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use llava::{Llava, LlavaConfig, LlavaHfConfig};
use qwen_vl::{QwenSample, QwenVl, QwenVlConfig, QwenVlHfConfig};
use reducers::encoder::EncoderShape;
use reroute::{Decoder, DecoderConfig, Prompt, Survivors};
use reroute_checkpoint::{
    CONFIG_MAX_BYTES, Folder, LoadOptions, LoadProgress, NameTable, Shards, check_fit, load_into,
};
use serde::Deserialize;
use vision_encoder::qwen::{Grid, QwenGeneration, QwenVisionOutput};

use crate::grounding::GroundingFormat;
use crate::reduction::{self, Kept, Left, Shown};
use crate::visual::{Leftover, PixelTensors, VisualTokens};
use crate::{Dialect, EncoderStep, ZooError};

/// Families that can be opened.
const KNOWN: &str = "llava (LLaVA-1.5), qwen2_vl, qwen2_5_vl, qwen3_vl";

/// The resolved configuration of a model of one of the families.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelConfig {
    /// LLaVA-1.5.
    Llava(LlavaConfig),
    /// Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
    Qwen(QwenVlConfig),
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
            "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl" => {
                let config: QwenVlHfConfig = folder.read_json("config.json", CONFIG_MAX_BYTES)?;
                Ok(Self::Qwen(config.resolve()?))
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
            Self::Qwen(config) => &config.text,
        }
    }

    /// The vision encoder as methods that reduce before the decoder know it.
    pub fn encoder(&self) -> EncoderShape {
        match self {
            Self::Llava(config) => config.encoder(),
            Self::Qwen(config) => config.encoder(),
        }
    }

    /// Token id of an image slot.
    pub fn image_token(&self) -> u32 {
        match self {
            Self::Llava(config) => config.image_token,
            Self::Qwen(config) => config.image_token,
        }
    }

    /// Token id of a video slot, if the model takes videos.
    pub fn video_token(&self) -> Option<u32> {
        match self {
            Self::Llava(_) => None,
            Self::Qwen(config) => Some(config.video_token),
        }
    }

    /// Tokens that are slots or stand around them, whatever the tokenizer says of them.
    pub(crate) fn slot_tokens(&self) -> Vec<u32> {
        match self {
            Self::Llava(config) => vec![config.image_token],
            Self::Qwen(config) => vec![config.image_token, config.video_token],
        }
    }

    /// Visual tokens of one image: as many as every image has, or as 28 · 28 pixel cells (Qwen3-VL:
    /// 32 · 32) a picture of 672 × 672 pixels has.
    pub fn typical_visual_tokens(&self) -> usize {
        match self {
            Self::Llava(config) => config.vision.patches(),
            Self::Qwen(config) => {
                let cell = config.vision.patch_size * config.vision.spatial_merge_size;
                (672 / cell).pow(2)
            }
        }
    }

    /// Patches along each side of the square that becomes one visual token.
    pub(crate) fn spatial_merge_size(&self) -> usize {
        match self {
            Self::Llava(_) => 1,
            Self::Qwen(config) => config.vision.spatial_merge_size,
        }
    }

    /// How weights are called in a checkpoint, and how they are loaded.
    fn weights(&self, dtype: DType) -> (&'static NameTable, LoadOptions) {
        let (names, tied_head) = match self {
            Self::Llava(_) => (&llava::NAMES, llava::TIED_HEAD),
            Self::Qwen(_) => (&qwen_vl::NAMES, qwen_vl::TIED_HEAD),
        };
        let mut options = LoadOptions::new(dtype);
        if self.decoder().tie_word_embeddings {
            options.unused.push(tied_head.into());
        }
        (names, options)
    }

    /// How prompts of the family are written.
    pub(crate) fn dialect(&self) -> Dialect {
        match self {
            Self::Llava(_) => Dialect::LLAVA,
            Self::Qwen(config) => match config.vision.generation {
                QwenGeneration::Qwen2 | QwenGeneration::Qwen2_5 => Dialect::QWEN2_VL,
                QwenGeneration::Qwen3 => Dialect::QWEN3_VL,
            },
        }
    }

    /// How the family is asked for boxes.
    pub(crate) fn grounding(&self) -> GroundingFormat {
        match self {
            Self::Llava(_) => GroundingFormat::llava(),
            Self::Qwen(config) => match config.vision.generation {
                QwenGeneration::Qwen2 => GroundingFormat::qwen2_vl(),
                QwenGeneration::Qwen2_5 => GroundingFormat::qwen2_5_vl(),
                QwenGeneration::Qwen3 => GroundingFormat::qwen3_vl(),
            },
        }
    }
}

/// A model of one of the families.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "a Box is no Module")]
pub enum Model<B: Backend> {
    /// LLaVA-1.5.
    Llava(Llava<B>),
    /// Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
    Qwen(QwenVl<B>),
}

impl<B: Backend> Model<B> {
    /// Builds the model that the configuration describes; parameters are not made before they are
    /// loaded or used.
    pub fn new(config: &ModelConfig, device: &B::Device) -> Result<Self, ZooError> {
        Ok(match config {
            ModelConfig::Llava(config) => Self::Llava(Llava::new(config, device)?),
            ModelConfig::Qwen(config) => Self::Qwen(QwenVl::new(config, device)?),
        })
    }

    /// Builds the model that the configuration describes and streams its weights in.
    pub fn open(
        config: &ModelConfig,
        folder: &Folder,
        dtype: DType,
        device: &B::Device,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ZooError> {
        let shards = Shards::open(folder)?;
        let (names, options) = config.weights(dtype);
        Ok(match Self::new(config, device)? {
            Self::Llava(model) => {
                Self::Llava(load_into(model, &shards, names, &options, progress)?)
            }
            Self::Qwen(model) => Self::Qwen(load_into(model, &shards, names, &options, progress)?),
        })
    }

    /// Whether every parameter has its tensor.
    pub(crate) fn check_fit(&self, config: &ModelConfig, shards: &Shards) -> Result<(), ZooError> {
        let (names, options) = config.weights(DType::F32);
        let fit = match self {
            Self::Llava(model) => check_fit(model, shards, names, &options),
            Self::Qwen(model) => check_fit(model, shards, names, &options),
        };
        Ok(fit?)
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder<B> {
        match self {
            Self::Llava(model) => model.language_model(),
            Self::Qwen(model) => model.language_model(),
        }
    }

    /// Visual tokens of preprocessed images and videos.
    pub fn see(&self, pixels: PixelTensors<B>) -> Result<VisualTokens<B>, ZooError> {
        match (self, pixels) {
            (_, PixelTensors::Nothing) => Ok(VisualTokens::default()),
            (Self::Llava(model), PixelTensors::Squares(pixels)) => {
                let features = model.vision_features(pixels)?;
                let tokens = model.project(features.clone());
                Ok(VisualTokens {
                    features: Some(features),
                    images: Some(QwenVisionOutput {
                        tokens,
                        deepstack: Vec::new(),
                    }),
                    videos: None,
                    left: None,
                })
            }
            (Self::Qwen(model), PixelTensors::Patches { images, videos }) => {
                let see = |patches: Option<(Tensor<B, 2>, Vec<Grid>)>| {
                    let seen =
                        patches.map(|(patches, grids)| model.visual().forward(patches, &grids));
                    seen.transpose()
                };
                Ok(VisualTokens {
                    features: None,
                    images: see(images)?,
                    videos: see(videos)?,
                    left: None,
                })
            }
            (_, pixels) => Err(ZooError::WrongPixels {
                given: pixels.describe(),
                wanted: match self {
                    Self::Llava(_) => "squares [images, 3, height, width]",
                    Self::Qwen(_) => "patches [patches, features] with their grids",
                },
            }),
        }
    }

    /// The vision tower as methods that reduce before the decoder know it.
    pub fn encoder(&self) -> EncoderShape {
        match self {
            Self::Llava(model) => model.config().encoder(),
            Self::Qwen(model) => model.config().encoder(),
        }
    }

    /// Visual tokens of preprocessed images and videos, every picture reduced by itself. `questions`
    /// are embeddings of the text asked about each image, and about each video, for methods that
    /// want to see it.
    pub fn see_reduced(
        &self,
        pixels: PixelTensors<B>,
        step: &EncoderStep<'_, B>,
        questions: [Vec<Tensor<B, 2>>; 2],
    ) -> Result<VisualTokens<B>, ZooError> {
        let encoder = self.encoder();
        let needs = step.reducer.needs(&encoder)?;
        let [of_images, of_videos] = questions;
        let left = |images: Vec<Kept>, videos: Vec<Kept>| {
            Some(Leftover {
                images,
                videos,
                positions: step.positions,
            })
        };
        match (self, pixels) {
            (Self::Llava(model), PixelTensors::Squares(pixels)) => {
                let side = model.config().vision.grid();
                let shown = Shown {
                    grids: vec![[1, side, side]; pixels.dims()[0]],
                    taps: model.vision_taps(pixels, &needs)?,
                    deepstack: Vec::new(),
                    questions: of_images,
                };
                let Left { features, kept, .. } = reduction::reduce(&shown, step, encoder)?;
                let tokens = model.project(features.clone());
                Ok(VisualTokens {
                    features: Some(features),
                    images: Some(QwenVisionOutput {
                        tokens,
                        deepstack: Vec::new(),
                    }),
                    videos: None,
                    left: left(kept, Vec::new()),
                })
            }
            (Self::Qwen(model), PixelTensors::Patches { images, videos }) => {
                let merge = model.config().vision.spatial_merge_size;
                let see = |patches: Option<(Tensor<B, 2>, Vec<Grid>)>, questions| {
                    let Some((patches, grids)) = patches else {
                        return Ok((None, Vec::new()));
                    };
                    let (output, taps) = model.vision_taps(patches, &grids, &needs)?;
                    let grids = grids.iter();
                    let shown = Shown {
                        taps,
                        deepstack: output.deepstack,
                        grids: grids.map(|g| [g.t, g.h / merge, g.w / merge]).collect(),
                        questions,
                    };
                    let left = reduction::reduce(&shown, step, encoder)?;
                    let output = QwenVisionOutput {
                        tokens: left.features,
                        deepstack: left.deepstack,
                    };
                    Ok::<_, ZooError>((Some(output), left.kept))
                };
                let (images, of_images) = see(images, of_images)?;
                let (videos, of_videos) = see(videos, of_videos)?;
                Ok(VisualTokens {
                    features: None,
                    images,
                    videos,
                    left: left(of_images, of_videos),
                })
            }
            // Nothing to reduce, or pixels of the wrong kind.
            (_, pixels) => self.see(pixels),
        }
    }

    /// Packs token ids (slots repeated) and visual tokens into a prompt. LLaVA needs no grids.
    pub fn prompt(
        &self,
        samples: &[QwenSample],
        tokens: &VisualTokens<B>,
        device: &B::Device,
    ) -> Result<Prompt<B>, ZooError> {
        let survivors = self.survivors(samples, tokens);
        let (images, videos) = (tokens.images.as_ref(), tokens.videos.as_ref());
        match self {
            Self::Llava(model) => {
                let ids: Vec<Vec<u32>> = samples.iter().map(|sample| sample.ids.clone()).collect();
                let images = images.map(|images| images.tokens.clone());
                Ok(model.prompt_reduced(&ids, &survivors, images, device)?)
            }
            Self::Qwen(model) => Ok(model.prompt_reduced(samples, &survivors, images, videos)?),
        }
    }

    /// The rows of each sample that a reduction has left.
    pub(crate) fn survivors(
        &self,
        samples: &[QwenSample],
        tokens: &VisualTokens<B>,
    ) -> Vec<Survivors> {
        let (image, video) = match self {
            Self::Llava(model) => (model.config().image_token, None),
            Self::Qwen(model) => {
                let config = model.config();
                (config.image_token, Some(config.video_token))
            }
        };
        let Some(left) = &tokens.left else {
            let all = samples
                .iter()
                .map(|sample| Survivors::all(sample.ids.len()));
            return all.collect();
        };
        let mut kept = [&left.images[..], &left.videos[..]];
        let of_sample = |sample: &QwenSample| {
            let slots = [Some(image), video].map(|slot| {
                let is_slot = |row: &usize| Some(sample.ids[*row]) == slot;
                (0..sample.ids.len()).filter(is_slot).collect()
            });
            reduction::survivors(sample.ids.len(), slots, &mut kept, left.positions)
        };
        samples.iter().map(of_sample).collect()
    }
}
