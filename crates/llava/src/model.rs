use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use reducers::Positions;
use reroute::{Decoder, Prompt, SampleLayout, Survivors};
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

    /// The vision tower.
    pub fn vision_tower(&self) -> &ClipVisionTower<B> {
        &self.vision_tower
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
        let all = samples.iter().map(|ids| Survivors::all(ids.len()));
        self.prompt_reduced(samples, &all.collect::<Vec<_>>(), visual, device)
    }

    /// The same for prompts some of whose slots a reduction has taken: `visual` fills those that are
    /// left.
    pub fn prompt_reduced(
        &self,
        samples: &[Vec<u32>],
        survivors: &[Survivors],
        visual: Option<Tensor<B, 2>>,
        device: &B::Device,
    ) -> Result<Prompt<B>, LlavaError> {
        let image = self.config.image_token;
        let (mut ids, mut positions, mut layouts) = (Vec::new(), Vec::new(), Vec::new());
        for (full, survivors) in samples.iter().zip(survivors) {
            let left = survivors.of(full)?;
            let next_position = match survivors.positions {
                Positions::Gap => full.len(),
                Positions::Renumber => left.len(),
            };
            match survivors.positions {
                Positions::Gap => positions.extend(survivors.rows.iter().map(|&row| row as i64)),
                Positions::Renumber => positions.extend(0..left.len() as i64),
            }
            layouts.push(SampleLayout {
                rows: left.len(),
                visual: (0..left.len()).filter(|&row| left[row] == image).collect(),
                next_position: next_position as i64,
                salience: survivors.salience.clone(),
                cells: self.cells(full, &survivors.rows),
            });
            ids.extend(left);
        }
        let slots = ids.iter().filter(|&&id| id == image).count();
        let given = visual.as_ref().map_or(0, |v| v.dims()[1]);
        if slots != given {
            return Err(LlavaError::ImageSlots {
                slots,
                visual: given,
                per_image: self.tokens_per_image(),
            });
        }
        let source = |id| (id == image).then_some(0);
        let embeddings = self.language_model.embed_prompt(&ids, &[visual], source)?;
        Ok(Prompt {
            embeddings,
            positions: Tensor::<B, 1, Int>::from_data(positions.as_slice(), device).unsqueeze(),
            deepstack: Vec::new(),
            samples: layouts,
        })
    }

    /// Row and column in their image of those of the `rows` of a prompt that are image slots.
    fn cells(&self, ids: &[u32], rows: &[usize]) -> Vec<[usize; 2]> {
        let (image, side) = (self.config.image_token, self.config.vision.grid());
        let slots: Vec<usize> = (0..ids.len()).filter(|&row| ids[row] == image).collect();
        let slot = rows.iter().filter_map(|row| slots.binary_search(row).ok());
        slot.map(|slot| slot % (side * side))
            .map(|cell| [cell / side, cell % side])
            .collect()
    }
}
