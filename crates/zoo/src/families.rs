//! The families that this zoo opens. A further one is one more line in the list below.
#![allow(clippy::large_enum_variant, reason = "a Box is no Module")]

use std::ops::{ControlFlow, Deref};
use std::path::Path;

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reroute::{Decoder, KeptRows, Prompt};
use reroute_checkpoint::{
    AdapterError, CONFIG_MAX_BYTES, CheckpointError, Folder, Layout, LoadOptions, LoadProgress,
    Loading, NameTable, Save, Saved, Shards, StoredAdapter, check_fit,
};
use reroute_family::{
    EncoderStep, FamilyConfig, FamilyModel, ModelType, PixelTensors, Sample, VisualTokens,
    kept_rows,
};
use reroute_layers::{Linear, Linears, Weight};
use serde::Deserialize;

use crate::{Weights, ZooError};

/// Writes everything that has a case for each family, from a list of families: what the zoo calls one,
/// its crate, and there its configuration and its model.
macro_rules! families {
    ($($(#[$doc:meta])* $family:ident => $krate:ident::{$config:ident, $model:ident},)+) => {
        /// The resolved configuration of a model of one of the families.
        #[derive(Debug, Clone, PartialEq)]
        #[non_exhaustive]
        pub enum ModelConfig {
            $($(#[$doc])* $family($krate::$config),)+
        }

        /// A model of one of the families.
        #[derive(Module, Debug)]
        pub enum Model<B: Backend> {
            $($(#[$doc])* $family($krate::$model<B>),)+
        }

        /// The crates of the families.
        pub mod crates {
            $(pub use $krate;)+
        }

        /// Everything that can be opened.
        pub fn model_types() -> Vec<ModelType> {
            let all = [$($krate::$config::model_types(),)+];
            all.concat()
        }

        /// A configuration is what its family says of the model.
        impl Deref for ModelConfig {
            type Target = dyn FamilyConfig;

            fn deref(&self) -> &Self::Target {
                match self {
                    $(Self::$family(config) => config,)+
                }
            }
        }

        impl ModelConfig {
            fn open_as(model_type: &str, folder: &Folder) -> Result<Option<Self>, ZooError> {
                let is = |types: &[ModelType]| types.iter().any(|known| known.name == model_type);
                $(if is($krate::$config::model_types()) {
                    return Ok(Some(Self::$family($krate::$config::open(folder)?)));
                })+
                Ok(None)
            }
        }

        impl<B: Backend> Linears<B> for Model<B> {
            fn linears<'a>(
                &'a mut self,
                path: &str,
                found: &mut Vec<(String, &'a mut Linear<B>)>,
            ) {
                match self {
                    $(Self::$family(model) => model.linears(path, found),)+
                }
            }

            fn weights<'a>(
                &'a mut self,
                path: &str,
                found: &mut Vec<(String, &'a mut [Weight<B>])>,
            ) {
                match self {
                    $(Self::$family(model) => model.weights(path, found),)+
                }
            }
        }

        impl<B: Backend> Model<B> {
            /// Builds the model that the configuration describes; parameters are not made before they
            /// are loaded or used.
            pub fn new(config: &ModelConfig, device: &B::Device) -> Result<Self, ZooError> {
                Ok(match config {
                    $(ModelConfig::$family(config) => Self::$family(FamilyModel::new(config, device)?),)+
                })
            }

            /// The same with the weights of a checkpoint.
            fn load(
                mut self,
                shards: &Shards,
                names: &NameTable,
                (options, weights): (&LoadOptions, Weights),
                progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
            ) -> Result<Self, CheckpointError> {
                let mut loading = match &self {
                    $(Self::$family(model) => {
                        Loading::begin(model, shards, names, options, progress)?
                    })+
                };
                weights.put(&mut self, &mut loading, options.dtype)?;
                Ok(match self {
                    $(Self::$family(model) => Self::$family(loading.fill(model)?),)+
                })
            }

            /// Whether every parameter has its tensor.
            fn fits(
                &self,
                shards: &Shards,
                names: &NameTable,
                options: &LoadOptions,
            ) -> Result<(), CheckpointError> {
                match self {
                    $(Self::$family(model) => check_fit(model, shards, names, options),)+
                }
            }

            /// Writes the parameters, and all else like a folder that describes the model `described`.
            pub(crate) fn write_like(
                &self,
                described: &Self,
                like: &Folder,
                to: &Path,
                dtype: DType,
                max_shard_bytes: u64,
            ) -> Result<Saved, ZooError> {
                let (table, config) = (self.config().names(), self.config());
                let codes = self.codes();
                match (self, described) {
                    $((Self::$family(module), Self::$family(described)) => Ok(Save {
                        module,
                        described,
                        table,
                        file_name: &|path| config.file_name(path),
                        linear: Layout::AsStored,
                        like,
                        codes,
                        dtype,
                        max_shard_bytes,
                    }
                    .write::<B>(to)?),)+
                    _ => Err(ZooError::OtherFamily { like: like.describe() }),
                }
            }

            /// Whether the model has the modules that an adapter has as a whole.
            pub(crate) fn check_whole(&self, adapter: &StoredAdapter) -> Result<(), AdapterError> {
                match self {
                    $(Self::$family(model) => adapter.check_whole(model),)+
                }
            }

            /// The model with the modules that an adapter has as a whole.
            pub(crate) fn put_whole(self, adapter: &StoredAdapter) -> Result<Self, AdapterError> {
                let dtype = self.decoder().dtype();
                Ok(match self {
                    $(Self::$family(model) => Self::$family(adapter.put_whole(model, dtype)?),)+
                })
            }

            /// What the family says of the model.
            pub fn config(&self) -> &dyn FamilyConfig {
                match self {
                    $(Self::$family(model) => FamilyModel::config(model),)+
                }
            }

            /// The decoder.
            pub fn decoder(&self) -> &Decoder<B> {
                match self {
                    $(Self::$family(model) => FamilyModel::decoder(model),)+
                }
            }

            /// The decoder, to change how it is run.
            pub fn decoder_mut(&mut self) -> &mut Decoder<B> {
                match self {
                    $(Self::$family(model) => FamilyModel::decoder_mut(model),)+
                }
            }

            /// Visual tokens of preprocessed images and videos; with a `step`, every picture reduced by
            /// itself. `questions` are embeddings of the text asked about each image, and about each
            /// video, for methods that want to see it.
            pub fn see_reduced(
                &self,
                pixels: PixelTensors<B>,
                step: Option<&EncoderStep<'_, B>>,
                questions: [Vec<Tensor<B, 2>>; 2],
            ) -> Result<VisualTokens<B>, ZooError> {
                let reduced = step.is_some();
                let _span = tracing::info_span!("vision", reduced).entered();
                Ok(match self {
                    $(Self::$family(model) => reroute_family::see(model, pixels, step, questions)?,)+
                })
            }

            /// Packs the rows of samples that a reduction has kept ([`kept_rows`]).
            pub(crate) fn prompt_of(
                &self,
                samples: &[Sample],
                kept: &[KeptRows],
                tokens: &VisualTokens<B>,
            ) -> Result<Prompt<B>, ZooError> {
                let (images, videos) = (tokens.images.as_ref(), tokens.videos.as_ref());
                Ok(match self {
                    $(Self::$family(model) => {
                        reroute_family::prompt(model, samples, kept, images, videos)?
                    })+
                })
            }
        }
    };
}

families! {
    /// LLaVA-1.5.
    Llava => llava::{LlavaConfig, Llava},
    /// Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
    QwenVl => qwen_vl::{QwenVlConfig, QwenVl},
}

/// Types of decoders that stand alone in checkpoints of their own.
const LANGUAGE_MODELS: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

#[derive(Deserialize)]
struct HasModelType {
    #[serde(default)]
    model_type: String,
}

impl ModelConfig {
    /// Reads and checks `config.json`.
    pub fn open(folder: &Folder) -> Result<Self, ZooError> {
        let HasModelType { model_type } = folder.read_json("config.json", CONFIG_MAX_BYTES)?;
        match Self::open_as(&model_type, folder)? {
            Some(config) => Ok(config),
            None if LANGUAGE_MODELS.contains(&model_type.as_str()) => {
                Err(ZooError::LanguageModel { found: model_type })
            }
            None => {
                let name = |known: &ModelType| format!("{} ({})", known.name, known.title);
                let known: Vec<String> = model_types().iter().map(name).collect();
                Err(ZooError::UnknownFamily {
                    found: model_type,
                    known: known.join(", "),
                })
            }
        }
    }

    /// How weights are loaded.
    fn load_options(&self, dtype: DType) -> LoadOptions {
        let mut options = LoadOptions::new(dtype);
        if self.decoder().tie_word_embeddings {
            options.unused.push(self.tied_head().into());
        }
        options
    }
}

impl<B: Backend> Model<B> {
    /// Builds the model that the configuration describes and streams its weights in, as floats.
    pub fn open(
        config: &ModelConfig,
        folder: &Folder,
        dtype: DType,
        device: &B::Device,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self, ZooError> {
        Self::open_with(config, folder, (dtype, Weights::Floats), device, progress)
    }

    /// The same with weights of linear maps in fewer bits; everything else is of the type given.
    pub fn open_with(
        config: &ModelConfig,
        folder: &Folder,
        (dtype, weights): (DType, Weights),
        device: &B::Device,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self, ZooError> {
        let shards = Shards::open(folder)?;
        let _span = tracing::info_span!("loading", dtype = ?dtype, weights = ?weights).entered();
        let (names, options) = (config.names(), config.load_options(dtype));
        let model = Self::new(config, device)?;
        Ok(model.load(&shards, names, (&options, weights), progress)?)
    }

    /// Whether every parameter has its tensor.
    pub(crate) fn check_fit(&self, config: &ModelConfig, shards: &Shards) -> Result<(), ZooError> {
        let (names, options) = (config.names(), config.load_options(DType::F32));
        Ok(self.fits(shards, names, &options)?)
    }

    /// Packs token ids (slots repeated) and visual tokens into a prompt.
    pub fn prompt(
        &self,
        samples: &[Sample],
        tokens: &VisualTokens<B>,
    ) -> Result<Prompt<B>, ZooError> {
        let kept = kept_rows(self.config(), samples, tokens.kept.as_ref());
        self.prompt_of(samples, &kept, tokens)
    }

    /// Visual tokens of preprocessed images and videos.
    pub fn see(&self, pixels: PixelTensors<B>) -> Result<VisualTokens<B>, ZooError> {
        self.see_reduced(pixels, None, Default::default())
    }
}
