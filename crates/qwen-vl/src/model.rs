use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::encoder::{Tap, Taps};
use reroute::Decoder;
use reroute_family::{FamilyError, FamilyModel, Look, Pictures};
use reroute_layers::linears;
use vision_encoder::VisionOutput;
use vision_encoder::qwen::QwenVisionTower;

use crate::QwenVlConfig;

/// Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
#[derive(Module, Debug)]
pub struct QwenVl<B: Backend> {
    visual: QwenVisionTower<B>,
    language_model: Decoder<B>,
    #[module(skip)]
    config: QwenVlConfig,
}

linears!(QwenVl: visual, language_model);

impl<B: Backend> QwenVl<B> {
    /// The vision tower.
    pub fn visual(&self) -> &QwenVisionTower<B> {
        &self.visual
    }
}

impl<B: Backend> FamilyModel<B> for QwenVl<B> {
    type Config = QwenVlConfig;

    fn new(config: &QwenVlConfig, device: &B::Device) -> Result<Self, FamilyError> {
        Ok(Self {
            visual: config.vision.init(device),
            language_model: config.text.init(device)?,
            config: config.clone(),
        })
    }

    fn config(&self) -> &QwenVlConfig {
        &self.config
    }

    fn decoder(&self) -> &Decoder<B> {
        &self.language_model
    }

    fn decoder_mut(&mut self) -> &mut Decoder<B> {
        &mut self.language_model
    }

    fn look(&self, pictures: Pictures<B>, taps: &[Tap]) -> Result<Look<B>, FamilyError> {
        let Pictures::Patches(patches, grids) = pictures else {
            return Err(FamilyError::WrongPixels {
                given: pictures.describe(),
                wanted: "patches [patches, features] with their grids",
            });
        };
        let (output, taps) = match taps.is_empty() {
            true => {
                let output = self.visual.forward(patches, &grids)?;
                let taps = Taps::from([(Tap::Features, output.tokens.clone())]);
                (output, taps)
            }
            false => self.vision_taps(patches, &grids, taps)?,
        };
        let merge = self.config.vision.spatial_merge_size;
        let grids = grids.iter().map(|g| [g.t, g.h / merge, g.w / merge]);
        let VisionOutput { deepstack, .. } = output;
        Ok(Look {
            grids: grids.collect(),
            taps,
            deepstack,
        })
    }

    /// The tower's merger has made visual tokens already.
    fn project(&self, _: &Tensor<B, 2>) -> Option<Tensor<B, 2>> {
        None
    }
}
