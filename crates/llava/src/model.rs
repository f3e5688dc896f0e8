use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use reroute::{Decoder, Prompt, SampleLayout};
use vision_encoder::clip::ClipVisionTower;

use crate::{LlavaConfig, LlavaError, Projector};

/// LLaVA-1.5.
#[derive(Module, Debug)]
pub struct Llava<B: Backend> {
    vision_tower: ClipVisionTower<B>,
    multi_modal_projector: Projector<B>,
    language_model: Decoder<B>,
    #[module(skip)]
    config: LlavaConfig,
}

impl<B: Backend> Llava<B> {
    /// Builds the model; parameters are lazily random until loaded.
    pub fn new(config: &LlavaConfig, device: &B::Device) -> Result<Self, LlavaError> {
        Ok(Self {
            vision_tower: config.vision.init(device),
            multi_modal_projector: Projector::new(config, device),
            language_model: config.text.init(device)?,
            config: config.clone(),
        })
    }

    /// The resolved configuration.
    pub fn config(&self) -> &LlavaConfig {
        &self.config
    }

    /// The decoder.
    pub fn language_model(&self) -> &Decoder<B> {
        &self.language_model
    }

    /// Visual tokens of one image.
    pub fn tokens_per_image(&self) -> usize {
        self.config.vision.patches()
    }

    /// Vision features, as the projector takes them.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns `[vision hidden_size, images · tokens_per_image]`
    pub fn vision_features(&self, pixels: Tensor<B, 4>) -> Result<Tensor<B, 2>, LlavaError> {
        Ok(self
            .vision_tower
            .patch_features(pixels, self.config.vision_layers)?)
    }

    /// Visual tokens from vision features.
    ///
    /// # Shapes
    /// - `features`: `[vision hidden_size, rows]`
    /// - returns `[hidden_size, rows]`
    pub fn project(&self, features: Tensor<B, 2>) -> Tensor<B, 2> {
        self.multi_modal_projector.forward(features)
    }

    /// Packs prompts: text rows from the embedding table, image slots filled with visual tokens.
    ///
    /// `samples` are the token ids of each prompt without padding, every image slot repeated
    /// [`tokens_per_image`](Self::tokens_per_image) times; images are taken in order of appearance.
    ///
    /// # Shapes
    /// - `visual`: `[hidden_size, all visual tokens of all samples]`, `None` without images
    pub fn prompt(
        &self,
        samples: &[Vec<u32>],
        visual: Option<Tensor<B, 2>>,
        device: &B::Device,
    ) -> Result<Prompt<B>, LlavaError> {
        let image = self.config.image_token;
        let vocab_size = self.config.text.vocab_size;
        let ids: Vec<u32> = samples.iter().flatten().copied().collect();
        let text: Vec<u32> = ids.iter().copied().filter(|&id| id != image).collect();
        if let Some(&id) = ids
            .iter()
            .find(|&&id| id != image && id as usize >= vocab_size)
        {
            return Err(LlavaError::TokenId { id, vocab_size });
        }
        let (slots, given) = (
            ids.len() - text.len(),
            visual.as_ref().map_or(0, |v| v.dims()[1]),
        );
        if slots != given {
            return Err(LlavaError::ImageSlots {
                slots,
                visual: given,
                per_image: self.tokens_per_image(),
            });
        }

        // Runs of text and of slots alternate; each run is a block of columns.
        let text = (!text.is_empty()).then(|| self.language_model.embed(&text));
        let (mut text_at, mut visual_at) = (0, 0);
        let runs = ids.chunk_by(|a, b| (*a == image) == (*b == image));
        let blocks: Vec<Tensor<B, 2>> = runs
            .filter_map(|run| {
                let (source, at) = match run[0] == image {
                    true => (&visual, &mut visual_at),
                    false => (&text, &mut text_at),
                };
                let block = source.clone()?.narrow(1, *at, run.len());
                *at += run.len();
                Some(block)
            })
            .collect();
        if blocks.is_empty() {
            return Err(reroute::RerouteError::Prompt("it has no tokens".into()).into());
        }

        let layouts = samples.iter().map(|ids| SampleLayout {
            rows: ids.len(),
            visual: (0..ids.len()).filter(|&row| ids[row] == image).collect(),
            next_position: ids.len() as i64,
        });
        let positions = samples.iter().flat_map(|ids| 0..ids.len() as i64);
        let positions: Vec<i64> = positions.collect();
        Ok(Prompt {
            embeddings: Tensor::cat(blocks, 1),
            positions: Tensor::<B, 1, Int>::from_data(positions.as_slice(), device).unsqueeze(),
            deepstack: Vec::new(),
            samples: layouts.collect(),
        })
    }
}
