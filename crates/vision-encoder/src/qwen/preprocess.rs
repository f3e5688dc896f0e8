//! Qwen's preprocessing of images and videos, as the Pillow path of Hugging Face's
//! `Qwen2VLImageProcessor` does it.
//!
//! Videos come as pictures that the caller decoded and sampled; a rate of `fps` pictures a second
//! makes `temporal_patch_size / fps` seconds of a grid's step in time (`second_per_grid_ts`). Their
//! sizes are those of `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor`; they are resized like
//! images, where the library's torchvision path rounds some bytes differently.

mod config;

use std::slice;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

use self::config::Recipe;
use super::smart_resize::{PixelBounds, smart_resize, smart_resize_video};
use crate::normalise::Normalisation;
use crate::resize::{Canvas, Window, resize_bicubic};
use crate::{Grid, RgbImage, VisionError};

pub use self::config::QwenPreprocessorConfig;

/// Most pixels of a picture unless the caller asks for more: 1280 visual tokens of 28 × 28 pixels.
///
/// Published checkpoints allow up to 16384 visual tokens, whose cost in time and memory surprises.
pub const DEFAULT_MAX_PIXELS: usize = 1280 * 28 * 28;

/// Most pixels of all pictures of a video together: 6 GiB of numbers.
const MAX_VIDEO_PIXELS: usize = 1 << 29;

/// Resolved preprocessing: resize within bounds on the area, normalise, cut into patches.
#[derive(Debug, Clone, PartialEq)]
pub struct QwenPreprocessor {
    patch_size: usize,
    temporal_patch_size: usize,
    merge_size: usize,
    images: Recipe,
    videos: Recipe,
    /// The caller's bounds on one picture.
    min_pixels: Option<usize>,
    max_pixels: usize,
}

/// A preprocessed image or video.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchPixels {
    /// How the patches are arranged.
    pub grid: Grid,
    /// `[patches, features]`: patches in the order that [`Grid`] says; of each patch channels,
    /// pictures, rows and columns.
    pub data: Vec<f32>,
    /// Width and height of every picture as given, in pixels.
    pub original: [usize; 2],
    /// Width and height of every picture as the model sees it, in pixels.
    pub resized: [usize; 2],
    /// What `resized` would be by the checkpoint alone: another size where the caller's or the
    /// default bounds on pixels changed it.
    pub unbounded: [usize; 2],
}

impl QwenPreprocessor {
    /// At most so many pixels in a picture instead of [`DEFAULT_MAX_PIXELS`], but never more than
    /// the checkpoint's own bound; a picture has one visual token at least.
    pub fn with_max_pixels(self, max_pixels: usize) -> Self {
        let max_pixels = max_pixels.max(1);
        Self { max_pixels, ..self }
    }

    /// At least so many pixels in a picture instead of the checkpoint's own bound, as far as the
    /// most pixels allow.
    pub fn with_min_pixels(self, min_pixels: usize) -> Self {
        let min_pixels = Some(min_pixels.max(1));
        Self { min_pixels, ..self }
    }

    /// Width and height that an image of this width and height gets, in pixels.
    pub fn image_size(&self, original: [usize; 2]) -> Result<[usize; 2], VisionError> {
        self.size(&self.images, 1, original, self.bounds(&self.images, 1))
    }

    /// Width and height that `frames` pictures of this width and height get, in pixels.
    pub fn video_size(
        &self,
        frames: usize,
        original: [usize; 2],
    ) -> Result<[usize; 2], VisionError> {
        if frames == 0 {
            return Err(VisionError::NoFrames);
        }
        let bounds = self.bounds(&self.videos, frames);
        self.size(&self.videos, frames, original, bounds)
    }

    /// Resizes, normalises and cuts an image; every patch repeats it in time.
    pub fn image(&self, image: &RgbImage) -> Result<PatchPixels, VisionError> {
        let resized = self.image_size([image.width(), image.height()])?;
        self.patches(&self.images, slice::from_ref(image), resized)
    }

    /// Resizes, normalises and cuts the pictures of a video, all of one size; the last is repeated
    /// to fill its group of `temporal_patch_size`.
    pub fn video(&self, frames: &[RgbImage]) -> Result<PatchPixels, VisionError> {
        let size = |frame: &RgbImage| [frame.width(), frame.height()];
        let expected = frames.first().map(size).ok_or(VisionError::NoFrames)?;
        for (frame, found) in frames.iter().map(size).enumerate() {
            if found != expected {
                return Err(VisionError::MixedFrames {
                    frame,
                    found,
                    expected,
                });
            }
        }
        let resized = self.video_size(frames.len(), expected)?;
        self.patches(&self.videos, frames, resized)
    }

    /// The checkpoint's bounds within the caller's.
    fn bounds(&self, recipe: &Recipe, frames: usize) -> PixelBounds {
        let pictures = if recipe.together { frames } else { 1 };
        let own = self.own_bounds(recipe, frames);
        let max = own.max.min(self.max_pixels.saturating_mul(pictures));
        let min = match self.min_pixels {
            Some(min) => min.saturating_mul(pictures),
            None => own.min,
        };
        let min = min.min(max);
        PixelBounds { min, max }
    }

    /// The checkpoint's bounds.
    fn own_bounds(&self, recipe: &Recipe, frames: usize) -> PixelBounds {
        let factor = self.patch_size * self.merge_size;
        recipe.bounds(frames, self.temporal_patch_size, factor)
    }

    /// Width and height within the bounds.
    fn size(
        &self,
        recipe: &Recipe,
        frames: usize,
        [width, height]: [usize; 2],
        bounds: PixelBounds,
    ) -> Result<[usize; 2], VisionError> {
        let (factor, temporal) = (self.patch_size * self.merge_size, self.temporal_patch_size);
        let [height, width] = match recipe.together {
            true => smart_resize_video(frames, height, width, temporal, factor, bounds)?,
            false => smart_resize(height, width, factor, bounds)?,
        };
        Ok([width, height])
    }

    /// `frames` are one picture or more, of one size.
    fn patches(
        &self,
        recipe: &Recipe,
        frames: &[RgbImage],
        resized: [usize; 2],
    ) -> Result<PatchPixels, VisionError> {
        let [width, height] = resized;
        let grid = Grid {
            t: frames.len().div_ceil(self.temporal_patch_size),
            h: height / self.patch_size,
            w: width / self.patch_size,
        };
        let pixels = (grid.t * self.temporal_patch_size).saturating_mul(width * height);
        if pixels > MAX_VIDEO_PIXELS {
            return Err(VisionError::TooManyFrames {
                frames: frames.len(),
                resized,
                max_pixels: MAX_VIDEO_PIXELS,
            });
        }
        let window = Window {
            x: 0..width,
            y: 0..height,
        };
        let mut data = Vec::with_capacity(pixels * 3);
        for group in frames.chunks(self.temporal_patch_size) {
            let resize = |image| resize_bicubic(&Canvas::of(image), width, height, &window);
            let group: Vec<RgbImage> = group.iter().map(resize).collect::<Result<_, _>>()?;
            for place in (Grid { t: 1, ..grid }).places(self.merge_size) {
                self.cut(&group, place, &recipe.normalisation, &mut data);
            }
        }
        let original = [frames[0].width(), frames[0].height()];
        let own = self.own_bounds(recipe, frames.len());
        let unbounded = self.size(recipe, frames.len(), original, own)?;
        Ok(PatchPixels {
            grid,
            data,
            original,
            resized,
            unbounded,
        })
    }

    /// One patch of up to `temporal_patch_size` pictures.
    fn cut(
        &self,
        group: &[RgbImage],
        [row, column]: [usize; 2],
        normalisation: &Normalisation,
        data: &mut Vec<f32>,
    ) {
        let side = self.patch_size;
        for channel in 0..3 {
            for picture in 0..self.temporal_patch_size {
                let picture = &group[picture.min(group.len() - 1)];
                for y in row * side..(row + 1) * side {
                    let line = &picture.row(y)[column * side * 3..(column + 1) * side * 3];
                    let values = line.iter().skip(channel).step_by(3);
                    data.extend(values.map(|&value| normalisation.apply(value, channel)));
                }
            }
        }
    }
}

/// The patches of several images or videos side by side, with their grids.
///
/// One image is not copied on the host; of several, each is freed once it is appended.
///
/// # Shapes
/// - returns `[features, patches]`, f32
pub fn pack<B: Backend>(
    pixels: Vec<PatchPixels>,
    device: &B::Device,
) -> Result<(Tensor<B, 2>, Vec<Grid>), VisionError> {
    let grids: Vec<Grid> = pixels.iter().map(|pixels| pixels.grid).collect();
    let patches = grids.iter().map(Grid::patches);
    let patches = patches.fold(0, usize::saturating_add);
    let total: usize = pixels.iter().map(|pixels| pixels.data.len()).sum();
    let features = total.checked_div(patches).unwrap_or(0);
    let fits = |pixels: &PatchPixels| pixels.data.len() == features * pixels.grid.patches();
    if features == 0 || !pixels.iter().all(fits) {
        return Err(VisionError::Patches(
            "patches of one call must not be none, and of the same preprocessor".into(),
        ));
    }
    let mut pixels = pixels.into_iter().map(|pixels| pixels.data);
    let mut values = pixels.next().unwrap_or_default();
    values.reserve_exact(total - values.len());
    for more in pixels {
        values.extend_from_slice(&more);
    }
    let data = TensorData::new(values, [patches, features]);
    let patches = Tensor::from_data(data, (device, DType::F32));
    Ok((patches.transpose(), grids))
}
