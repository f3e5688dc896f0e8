use std::iter::repeat_n;

use vision_encoder::Grid;
use vision_encoder::qwen::QwenGeneration;

use reroute_family::{FamilyConfig, FamilyError, Modality, RowPositions, Sample};

use crate::QwenVlConfig;

/// Visual tokens that follow one another without text: an image, a video, or a frame of Qwen3-VL.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// Time steps, and merged patches along height and width.
    size: [usize; 3],
    /// Positions between time steps.
    interval: f32,
}

impl QwenVlConfig {
    /// M-RoPE positions of a prompt, time, height and width (arXiv 2409.12191, §2.1), as the library's `get_rope_index` (transformers 5.23) has it.
    ///
    /// Text advances all axes by one. A block of visual tokens counts time, height and width from where it
    /// begins, and what follows stands behind the longer of its two spatial sides, however long it lasts.
    pub fn mrope(&self, sample: &Sample) -> Result<RowPositions, FamilyError> {
        let mut images = self.images(sample)?.into_iter();
        let mut frames = self
            .videos(sample)?
            .into_iter()
            .flat_map(|video| self.split(video));
        let (slots, mut positions) = (self.slots(), Mrope::default());
        let (mut row, mut next) = (0, 0);
        while let Some(&id) = sample.ids.get(row) {
            let Some(modality) = slots.modality(id) else {
                positions.push([next; 3]);
                row += 1;
                next += 1;
                continue;
            };
            let block = match modality {
                Modality::Image => images.next(),
                Modality::Video => frames.next(),
            };
            let block = block.ok_or(FamilyError::TooManySlots { modality, row })?;
            let tokens = block.tokens();
            let run = sample.ids[row..].iter().take(tokens);
            let found = run.take_while(|&&other| other == id).count();
            if found < tokens {
                return Err(FamilyError::Slots {
                    modality,
                    row,
                    slots: found,
                    tokens,
                });
            }
            block
                .positions(next)
                .for_each(|place| positions.push(place));
            row += tokens;
            next += block.size[1].max(block.size[2]) as i64;
        }
        for (modality, left, given) in [
            (Modality::Image, images.next(), sample.image_grids.len()),
            (Modality::Video, frames.next(), sample.video_grids.len()),
        ] {
            if left.is_some() {
                return Err(FamilyError::TooFewSlots { modality, given });
            }
        }
        Ok(RowPositions {
            axes: positions.axes.into(),
            next: positions.next,
        })
    }

    fn images(&self, sample: &Sample) -> Result<Vec<Block>, FamilyError> {
        let grids = sample.image_grids.iter();
        grids.map(|&grid| self.block(grid, 1.0)).collect()
    }

    fn videos(&self, sample: &Sample) -> Result<Vec<Block>, FamilyError> {
        let (videos, given) = (sample.video_grids.len(), &sample.second_per_grid_ts);
        let is_duration = |seconds: &f32| seconds.is_finite() && *seconds >= 0.0;
        if !(given.is_empty() || given.len() == videos) || !given.iter().all(is_duration) {
            return Err(FamilyError::SecondsPerGrid {
                given: given.clone(),
                videos,
            });
        }
        let block = |(index, &grid): (usize, &Grid)| {
            let seconds = given.get(index).copied().unwrap_or(1.0);
            let rate = self.vision.tokens_per_second;
            let interval = rate.map_or(1.0, |rate| rate as f32 * seconds);
            self.block(grid, interval)
        };
        sample.video_grids.iter().enumerate().map(block).collect()
    }

    fn block(&self, grid: Grid, interval: f32) -> Result<Block, FamilyError> {
        let merge = self.vision.spatial_merge_size;
        let size = [grid.t, grid.h / merge, grid.w / merge];
        let tokens = size[0]
            .checked_mul(size[1])
            .and_then(|n| n.checked_mul(size[2]));
        let whole = grid.h.is_multiple_of(merge) && grid.w.is_multiple_of(merge);
        match tokens {
            Some(1..) if whole => Ok(Block { size, interval }),
            _ => Err(FamilyError::Grid { grid, merge }),
        }
    }

    /// The blocks of a video: Qwen3-VL writes the time of each frame as text between the frames.
    fn split(&self, video: Block) -> impl Iterator<Item = Block> + use<> {
        let [frames, height, width] = video.size;
        let (count, size) = match self.vision.generation {
            QwenGeneration::Qwen3 => (frames, [1, height, width]),
            _ => (1, video.size),
        };
        repeat_n(Block { size, ..video }, count)
    }
}

impl Block {
    fn tokens(&self) -> usize {
        self.size.iter().product()
    }

    /// The places of its tokens, raster by raster.
    fn positions(self, start: i64) -> impl Iterator<Item = [i64; 3]> {
        let [frames, height, width] = self.size;
        (0..frames).flat_map(move |frame| {
            // In f32 and rounded down, as in the reference.
            let time = start.saturating_add((frame as f32 * self.interval) as i64);
            (0..height).flat_map(move |y| {
                (0..width).map(move |x| [time, start + y as i64, start + x as i64])
            })
        })
    }
}

/// Positions as they are counted.
#[derive(Default)]
struct Mrope {
    axes: [Vec<i64>; 3],
    next: i64,
}

impl Mrope {
    fn push(&mut self, place: [i64; 3]) {
        for (axis, position) in self.axes.iter_mut().zip(place) {
            axis.push(position);
            self.next = self.next.max(position.saturating_add(1));
        }
    }
}
