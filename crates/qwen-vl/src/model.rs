use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use reducers::Positions;
use reroute::{Decoder, Prompt, RerouteError, SampleLayout, Survivors, interleave};
use vision_encoder::qwen::{Grid, QwenVisionOutput, QwenVisionTower};

use crate::{Modality, QwenVlConfig, QwenVlError};

/// Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
#[derive(Module, Debug)]
pub struct QwenVl<B: Backend> {
    visual: QwenVisionTower<B>,
    language_model: Decoder<B>,
    #[module(skip)]
    config: QwenVlConfig,
}

/// One prompt and the sizes of what its slots stand for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct QwenSample {
    /// Token ids without padding, every slot repeated once per visual token.
    pub ids: Vec<u32>,
    /// Patches of each image, in order of appearance.
    pub image_grids: Vec<Grid>,
    /// Patches of each video, in order of appearance.
    pub video_grids: Vec<Grid>,
    /// Seconds that a temporal patch of each video lasts, which only Qwen2.5-VL asks for; 1 where empty.
    pub second_per_grid_ts: Vec<f32>,
}

impl<B: Backend> QwenVl<B> {
    /// Builds the model; parameters are lazily random until loaded.
    pub fn new(config: &QwenVlConfig, device: &B::Device) -> Result<Self, QwenVlError> {
        Ok(Self {
            visual: config.vision.init(device),
            language_model: config.text.init(device)?,
            config: config.clone(),
        })
    }

    /// The resolved configuration.
    pub fn config(&self) -> &QwenVlConfig {
        &self.config
    }

    /// The vision tower.
    pub fn visual(&self) -> &QwenVisionTower<B> {
        &self.visual
    }

    /// The decoder.
    pub fn language_model(&self) -> &Decoder<B> {
        &self.language_model
    }

    /// Packs prompts: text rows from the embedding table, slots filled with visual tokens.
    ///
    /// `images` and `videos` are what [`visual`](Self::visual) makes of all images and of all videos of the
    /// samples, in order of appearance. The images and videos of one sample form one pool.
    pub fn prompt(
        &self,
        samples: &[QwenSample],
        images: Option<&QwenVisionOutput<B>>,
        videos: Option<&QwenVisionOutput<B>>,
    ) -> Result<Prompt<B>, QwenVlError> {
        let all = samples
            .iter()
            .map(|sample| Survivors::all(sample.ids.len()));
        self.prompt_reduced(samples, &all.collect::<Vec<_>>(), images, videos)
    }

    /// The same for prompts some of whose slots a reduction has taken: `images` and `videos` fill
    /// those that are left, at the positions that they have in the full prompt.
    pub fn prompt_reduced(
        &self,
        samples: &[QwenSample],
        survivors: &[Survivors],
        images: Option<&QwenVisionOutput<B>>,
        videos: Option<&QwenVisionOutput<B>>,
    ) -> Result<Prompt<B>, QwenVlError> {
        let axes = self.config.text.rope.axes();
        let (mut ids, mut layouts) = (Vec::new(), Vec::new());
        let mut positions = vec![Vec::new(); axes];
        for (sample, survivors) in samples.iter().zip(survivors) {
            if survivors.positions == Positions::Renumber {
                return Err(RerouteError::Renumber.into());
            }
            let places = self.config.positions(sample)?;
            // Before they become a tensor: backends count in 32 bits.
            let needed = usize::try_from(places.next).unwrap_or(usize::MAX);
            let available = self.config.text.max_position_embeddings;
            if needed > available {
                return Err(RerouteError::ContextLength { needed, available }.into());
            }
            let left = survivors.of(&sample.ids)?;
            for (all, of_sample) in positions.iter_mut().zip(&places.axes) {
                all.extend(survivors.of(of_sample)?);
            }
            let is_visual = |row: &usize| self.config.modality(left[*row]).is_some();
            layouts.push(SampleLayout {
                rows: left.len(),
                visual: (0..left.len()).filter(is_visual).collect(),
                next_position: places.next,
                salience: survivors.salience.clone(),
                cells: self.cells(sample, &survivors.rows),
            });
            ids.extend(left);
        }
        let slots: Vec<Modality> = ids
            .iter()
            .filter_map(|&id| self.config.modality(id))
            .collect();
        for (modality, given) in [(Modality::Image, images), (Modality::Video, videos)] {
            let slots = slots.iter().filter(|&&slot| slot == modality).count();
            let tokens = given.map_or(0, |output| output.tokens.dims()[1]);
            if slots != tokens {
                return Err(QwenVlError::VisualTokens {
                    modality,
                    slots,
                    tokens,
                });
            }
        }

        let features = [images, videos];
        let tokens = features.map(|output| Some(output?.tokens.clone()));
        let source = |id| Some(self.config.modality(id)? as usize);
        let embeddings = self.language_model.embed_prompt(&ids, &tokens, source)?;
        let order: Vec<usize> = slots.iter().map(|&modality| modality as usize).collect();
        let taps = match order.is_empty() {
            true => 0,
            false => self.config.vision.deepstack_layers.len(),
        };
        let tap = |layer| {
            interleave(
                &order,
                &features.map(|output| output?.deepstack.get(layer).cloned()),
            )
        };
        let deepstack = (0..taps)
            .map(tap)
            .collect::<Result<Vec<_>, RerouteError>>()?;

        let places = TensorData::new(positions.concat(), [axes, ids.len()]);
        Ok(Prompt {
            positions: Tensor::<B, 2, Int>::from_data(places, &embeddings.device()),
            embeddings,
            deepstack,
            samples: layouts,
        })
    }

    /// Row and column in their picture of those of the `rows` of a prompt that are slots.
    fn cells(&self, sample: &QwenSample, rows: &[usize]) -> Vec<[usize; 2]> {
        let merge = self.config.vision.spatial_merge_size;
        let of_grids = |grids: &[Grid]| {
            let of_grid = |grid: &Grid| {
                let [height, width] = [grid.h / merge, grid.w / merge];
                let frame = move |_| {
                    let cell = move |cell| [cell / width, cell % width];
                    (0..height * width).map(cell)
                };
                (0..grid.t).flat_map(frame).collect::<Vec<_>>()
            };
            grids
                .iter()
                .flat_map(of_grid)
                .collect::<Vec<_>>()
                .into_iter()
        };
        let mut of_kind = [of_grids(&sample.image_grids), of_grids(&sample.video_grids)];
        let cells = sample.ids.iter().map(|&id| {
            let modality = self.config.modality(id)?;
            of_kind[modality as usize].next()
        });
        let cells: Vec<Option<[usize; 2]>> = cells.collect();
        rows.iter().filter_map(|&row| cells[row]).collect()
    }
}
