use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::encoder::{Tap, Taps};
use reroute::Decoder;
use reroute_family::{FamilyError, FamilyModel, Look, Pictures};
use reroute_layers::linears;
use vision_encoder::vit::VitTower;

use crate::{LlavaConfig, Projector};

/// LLaVA: a vision transformer, a projector, a decoder.
#[derive(Module, Debug)]
pub struct Llava<B: Backend> {
    vision_tower: VitTower<B>,
    multi_modal_projector: Projector<B>,
    language_model: Decoder<B>,
    #[module(skip)]
    config: LlavaConfig,
}

linears!(Llava: vision_tower, multi_modal_projector, language_model);

impl<B: Backend> Llava<B> {
    /// The vision tower.
    pub fn vision_tower(&self) -> &VitTower<B> {
        &self.vision_tower
    }

    /// Vision features, as the projector takes them.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns `[feature_size, images · tokens]`, see [`LlavaConfig::feature_size`]
    pub fn vision_features(&self, pixels: Tensor<B, 4>) -> Result<Tensor<B, 2>, FamilyError> {
        let (layers, skipped) = (&self.config.vision_layers, self.config.skipped_rows);
        Ok(self.vision_tower.features(pixels, layers, skipped)?)
    }
}

impl<B: Backend> FamilyModel<B> for Llava<B> {
    type Config = LlavaConfig;

    fn new(config: &LlavaConfig, device: &B::Device) -> Result<Self, FamilyError> {
        Ok(Self {
            vision_tower: config.vision.init(device),
            multi_modal_projector: Projector::new(config, device),
            language_model: config.text.init(device)?,
            config: config.clone(),
        })
    }

    fn config(&self) -> &LlavaConfig {
        &self.config
    }

    fn decoder(&self) -> &Decoder<B> {
        &self.language_model
    }

    fn decoder_mut(&mut self) -> &mut Decoder<B> {
        &mut self.language_model
    }

    fn look(&self, pictures: Pictures<B>, taps: &[Tap]) -> Result<Look<B>, FamilyError> {
        let Pictures::Fixed(pixels) = pictures else {
            return Err(FamilyError::WrongPixels {
                given: pictures.describe(),
                wanted: "squares [images, 3, height, width]",
            });
        };
        let [rows, columns] = self.config.token_grid();
        let grids = vec![[1, rows, columns]; pixels.dims()[0]];
        let taps = match taps.is_empty() {
            true => Taps::from([(Tap::Features, self.vision_features(pixels)?)]),
            false => self.vision_taps(pixels, taps)?,
        };
        Ok(Look {
            grids,
            taps,
            deepstack: Vec::new(),
        })
    }

    fn project(&self, features: &Tensor<B, 2>) -> Option<Tensor<B, 2>> {
        Some(self.multi_modal_projector.forward(features.clone()))
    }
}
