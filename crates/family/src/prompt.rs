use std::fmt;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use reducers::Positions;
use reroute::{KeptRows, Prompt, RerouteError, SampleLayout, interleave};
use vision_encoder::{Grid, VisionOutput};

use crate::reduction::{KeptVisuals, kept_of_slots};
use crate::{FamilyConfig, FamilyError, FamilyModel};

/// What a slot stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modality {
    /// A visual token of an image.
    Image,
    /// A visual token of a video.
    Video,
}

impl Modality {
    /// Both, in the order in which everything is kept that exists once for each.
    pub const ALL: [Self; 2] = [Self::Image, Self::Video];
}

impl fmt::Display for Modality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Image => "image",
            Self::Video => "video",
        })
    }
}

/// One prompt and the sizes of what its slots stand for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// Token ids without padding, every slot repeated once per visual token.
    pub ids: Vec<u32>,
    /// Patches of each image, in order of appearance; families whose images are all of one size need none.
    pub image_grids: Vec<Grid>,
    /// Patches of each video, in order of appearance.
    pub video_grids: Vec<Grid>,
    /// Seconds that a temporal patch of each video lasts, for families that ask for it; 1 where empty.
    pub second_per_grid_ts: Vec<f32>,
}

impl Sample {
    /// The grids of a modality.
    pub fn grids(&self, modality: Modality) -> &[Grid] {
        match modality {
            Modality::Image => &self.image_grids,
            Modality::Video => &self.video_grids,
        }
    }
}

impl From<Vec<u32>> for Sample {
    fn from(ids: Vec<u32>) -> Self {
        Self {
            ids,
            ..Self::default()
        }
    }
}

/// Where the rows of a full prompt stand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowPositions {
    /// `[axes][rows]`
    pub axes: Vec<Vec<i64>>,
    /// Position of the first generated token.
    pub next: i64,
}

impl RowPositions {
    /// Rows counted from 0, on one axis.
    pub fn counted(rows: usize) -> Self {
        let next = rows as i64;
        Self {
            axes: vec![(0..next).collect()],
            next,
        }
    }
}

/// The rows of each sample that a reduction has kept; all of them if there was none.
pub fn kept_rows(
    config: &dyn FamilyConfig,
    samples: &[Sample],
    reduction: Option<&KeptVisuals>,
) -> Vec<KeptRows> {
    let Some(reduction) = reduction else {
        let all = samples.iter().map(|sample| KeptRows::all(sample.ids.len()));
        return all.collect();
    };
    let slots = config.slots();
    let mut kept = [&reduction.images[..], &reduction.videos[..]];
    let of_sample = |sample: &Sample| {
        let rows = Modality::ALL.map(|modality| {
            let is_slot = |row: &usize| slots.modality(sample.ids[*row]) == Some(modality);
            (0..sample.ids.len()).filter(is_slot).collect()
        });
        kept_of_slots(sample.ids.len(), rows, &mut kept, reduction.positions)
    };
    samples.iter().map(of_sample).collect()
}

/// Packs prompts: text rows from the embedding table, slots filled with visual tokens.
///
/// `images` and `videos` are the visual tokens of all images and of all videos of the samples, in order
/// of appearance; `kept` the rows of each sample that a reduction has kept ([`kept_rows`]), at the
/// positions that they have in the full prompt. The images and videos of one sample form one pool.
pub fn prompt<B: Backend, M: FamilyModel<B>>(
    model: &M,
    samples: &[Sample],
    kept: &[KeptRows],
    images: Option<&VisionOutput<B>>,
    videos: Option<&VisionOutput<B>>,
) -> Result<Prompt<B>, FamilyError> {
    if samples.len() != kept.len() {
        return Err(FamilyError::Samples {
            samples: samples.len(),
            kept: kept.len(),
        });
    }
    let (config, decoder) = (model.config(), model.decoder());
    let (slots, axes) = (config.slots(), config.decoder().rope.axes());
    let mut packed = Packed {
        ids: Vec::new(),
        positions: vec![Vec::new(); axes],
        samples: Vec::new(),
    };
    for (sample, kept) in samples.iter().zip(kept) {
        packed.push(config, sample, kept)?;
    }
    let Packed {
        ids,
        positions,
        samples,
    } = packed;
    let order: Vec<Modality> = ids.iter().filter_map(|&id| slots.modality(id)).collect();
    let outputs = [images, videos];
    for (modality, given) in Modality::ALL.into_iter().zip(outputs) {
        let slots = order.iter().filter(|&&slot| slot == modality).count();
        let tokens = given.map_or(0, |output| output.tokens.dims()[1]);
        if slots != tokens {
            return Err(FamilyError::VisualTokens {
                modality,
                slots,
                tokens,
            });
        }
    }
    let tokens = outputs.map(|output| Some(output?.tokens.clone()));
    let source = |id| Some(slots.modality(id)? as usize);
    let embeddings = decoder.embed_prompt(&ids, &tokens, source)?;
    let order: Vec<usize> = order
        .into_iter()
        .map(|modality| modality as usize)
        .collect();
    let layers = match order.is_empty() {
        true => 0,
        false => config.deepstack_layers(),
    };
    let layer = |layer| {
        let features = outputs.map(|output| output?.deepstack.get(layer).cloned());
        interleave(&order, &features)
    };
    let deepstack = (0..layers).map(layer);
    let deepstack = deepstack.collect::<Result<Vec<_>, RerouteError>>()?;
    let positions = TensorData::new(positions.concat(), [axes, ids.len()]);
    Ok(Prompt {
        positions: Tensor::<B, 2, Int>::from_data(positions, &embeddings.device()),
        embeddings,
        deepstack,
        samples,
    })
}

/// The rows of samples side by side.
struct Packed {
    ids: Vec<u32>,
    positions: Vec<Vec<i64>>,
    samples: Vec<SampleLayout>,
}

impl Packed {
    fn push(
        &mut self,
        config: &dyn FamilyConfig,
        sample: &Sample,
        kept: &KeptRows,
    ) -> Result<(), FamilyError> {
        let full = config.positions(sample)?;
        if full.axes.len() != self.positions.len() {
            return Err(FamilyError::Axes {
                found: full.axes.len(),
                expected: self.positions.len(),
            });
        }
        // Before they become a tensor: backends count in 32 bits.
        let needed = usize::try_from(full.next).unwrap_or(usize::MAX);
        let (available, limit) = config.decoder().context();
        if needed > available {
            return Err(RerouteError::ContextLength {
                needed,
                available,
                limit,
            }
            .into());
        }
        let ids = kept.of(&sample.ids)?;
        let next_position = match (kept.positions, &mut self.positions[..]) {
            (Positions::Gap, axes) => {
                for (axis, full) in axes.iter_mut().zip(&full.axes) {
                    axis.extend(kept.of(full)?);
                }
                full.next
            }
            (Positions::Renumber, [axis]) => {
                axis.extend(0..ids.len() as i64);
                ids.len() as i64
            }
            (Positions::Renumber, _) => return Err(RerouteError::Renumber.into()),
        };
        let slots = config.slots();
        let is_visual = |row: &usize| slots.modality(ids[*row]).is_some();
        self.samples.push(SampleLayout {
            rows: ids.len(),
            visual: (0..ids.len()).filter(is_visual).collect(),
            next_position,
            salience: kept.salience.clone(),
            cells: cells(config, sample, &kept.rows),
        });
        self.ids.extend(ids);
        Ok(())
    }
}

/// Row and column in their picture of those of the `rows` of a prompt that are slots; none at all if some
/// have no cell.
fn cells(config: &dyn FamilyConfig, sample: &Sample, rows: &[usize]) -> Vec<[usize; 2]> {
    let slots = config.slots();
    let cells = Modality::ALL.map(|modality| config.cells(sample, modality));
    let mut cells = cells.map(Vec::into_iter);
    let of_row = |&id: &u32| {
        let modality = slots.modality(id)?;
        Some(cells[modality as usize].next())
    };
    let of_rows: Vec<Option<Option<[usize; 2]>>> = sample.ids.iter().map(of_row).collect();
    let of_slots: Option<Vec<[usize; 2]>> = rows.iter().filter_map(|&row| of_rows[row]).collect();
    of_slots.unwrap_or_default()
}
