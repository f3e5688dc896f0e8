//! CLIP's image preprocessing, as the Pillow path of Hugging Face's `CLIPImageProcessor` does it.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use serde::Deserialize;

use crate::resize::{Canvas, Window, resize_bicubic};
use crate::{RgbImage, VisionError};

/// Pillow's number for bicubic.
const BICUBIC: u32 = 3;

/// Largest side that a configuration may ask for, in pixels.
const MAX_SIDE: usize = 1 << 14;

/// `preprocessor_config.json` of a CLIP-based model.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ClipPreprocessorConfig {
    do_resize: bool,
    size: Size,
    resample: u32,
    do_center_crop: bool,
    crop_size: Size,
    do_rescale: bool,
    rescale_factor: f64,
    do_normalize: bool,
    image_mean: Vec<f64>,
    image_std: Vec<f64>,
    /// The original LLaVA code's switch; `"pad"` is the one it was trained with.
    image_aspect_ratio: Option<String>,
}

/// A size, as the various versions of the library write it.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "a size is a number, {\"shortest_edge\": n} or {\"height\": n, \"width\": n}"
)]
enum Size {
    Side(usize),
    ShortestEdge { shortest_edge: usize },
    Exact { height: usize, width: usize },
}

impl Default for ClipPreprocessorConfig {
    fn default() -> Self {
        Self {
            do_resize: true,
            size: Size::ShortestEdge { shortest_edge: 224 },
            resample: BICUBIC,
            do_center_crop: true,
            crop_size: Size::Side(224),
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: vec![0.48145466, 0.4578275, 0.40821073],
            image_std: vec![0.26862954, 0.26130258, 0.27577711],
            image_aspect_ratio: None,
        }
    }
}

impl ClipPreprocessorConfig {
    /// Checks the numbers.
    pub fn resolve(&self) -> Result<ClipPreprocessor, VisionError> {
        let wrong = |reason: String| Err(VisionError::Preprocessor(reason));
        for (name, on) in [
            ("do_resize", self.do_resize),
            ("do_center_crop", self.do_center_crop),
            ("do_rescale", self.do_rescale),
            ("do_normalize", self.do_normalize),
        ] {
            if !on {
                return wrong(format!("{name} is off, the vision tower needs it on"));
            }
        }
        if self.resample != BICUBIC {
            return wrong(format!("resample {} is not 3 (bicubic)", self.resample));
        }
        let (Ok(mean), Ok(std)) = (
            <[f64; 3]>::try_from(self.image_mean.as_slice()),
            <[f64; 3]>::try_from(self.image_std.as_slice()),
        ) else {
            return wrong("image_mean and image_std must have three numbers each".into());
        };
        let crop = match self.crop_size {
            Size::Side(side) => [side, side],
            Size::Exact { height, width } => [height, width],
            Size::ShortestEdge { .. } => return wrong("crop_size needs height and width".into()),
        };
        let (Size::Side(resize)
        | Size::ShortestEdge {
            shortest_edge: resize,
        }) = self.size
        else {
            return wrong("size must be {\"shortest_edge\": n}".into());
        };
        for (name, side) in [
            ("size", resize),
            ("crop_size.height", crop[0]),
            ("crop_size.width", crop[1]),
        ] {
            if side == 0 || side > MAX_SIDE {
                return wrong(format!("{name} is {side}, not 1 to {MAX_SIDE} pixels"));
            }
        }
        let preprocessor = ClipPreprocessor {
            shortest_edge: resize,
            crop,
            rescale: self.rescale_factor,
            mean: mean.map(|value| value as f32),
            std: std.map(|value| value as f32),
            fill: mean.map(|value| (value * 255.0) as u8),
            pad_to_square: self.image_aspect_ratio.as_deref() == Some("pad"),
        };
        // Numbers that are fine in JSON may be infinite or zero as f32.
        let mut ends =
            (0..3).flat_map(|channel| [0, 255].map(|v| preprocessor.normalise(v, channel)));
        if !ends.all(f32::is_finite) {
            return wrong(
                "image_mean, image_std and rescale_factor must make finite pixels, \
                 with an image_std that is not 0"
                    .into(),
            );
        }
        Ok(preprocessor)
    }
}

/// Resolved preprocessing: resize the short side, crop the middle, normalise.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipPreprocessor {
    shortest_edge: usize,
    /// Height, width.
    crop: [usize; 2],
    rescale: f64,
    mean: [f32; 3],
    std: [f32; 3],
    /// Colour of padding: the mean colour.
    fill: [u8; 3],
    pad_to_square: bool,
}

/// A preprocessed image.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// `[3, height, width]`
    pub data: Vec<f32>,
}

impl ClipPreprocessor {
    /// Pads images to a square with the mean colour before resizing (original LLaVA), so that
    /// nothing is cropped away.
    pub fn with_pad_to_square(self, pad_to_square: bool) -> Self {
        Self {
            pad_to_square,
            ..self
        }
    }

    /// Height and width of the result.
    pub fn output_size(&self) -> [usize; 2] {
        self.crop
    }

    /// The image as the model sees it: resized and cropped, before normalisation.
    ///
    /// Only the part that survives the crop is computed, so the shape of the image does not matter
    /// for memory.
    pub fn view(&self, image: &RgbImage) -> Result<RgbImage, VisionError> {
        let canvas = match self.pad_to_square {
            true => Canvas::square(image, self.fill),
            false => Canvas::of(image),
        };
        let (width, height) = (canvas.width, canvas.height);
        let short = width.min(height);
        // `int(size · long / short)`: Python divides the integers as doubles.
        let scaled = |side: usize| (self.shortest_edge * side) as f64 / short as f64;
        let resized = |side: usize| match side == short {
            true => self.shortest_edge,
            false => scaled(side) as usize,
        };
        let (width, height) = (resized(width), resized(height));
        let [crop_height, crop_width] = self.crop;
        let (x, left) = centre(width, crop_width);
        let (y, top) = centre(height, crop_height);
        let part = resize_bicubic(&canvas, width, height, &Window { x, y })?;
        if [part.height(), part.width()] == self.crop {
            return Ok(part);
        }
        // Smaller than the crop: black all around.
        let mut data = vec![0; crop_height * crop_width * 3];
        for y in 0..part.height() {
            let row = part.row(y);
            data[((top + y) * crop_width + left) * 3..][..row.len()].copy_from_slice(row);
        }
        RgbImage::new(crop_width, crop_height, data)
    }

    /// One value of a channel, in the number types that NumPy goes through.
    fn normalise(&self, value: u8, channel: usize) -> f32 {
        ((f64::from(value) * self.rescale) as f32 - self.mean[channel]) / self.std[channel]
    }

    /// Resizes, crops and normalises.
    pub fn preprocess(&self, image: &RgbImage) -> Result<Pixels, VisionError> {
        let view = self.view(image)?;
        let (height, width) = (view.height(), view.width());
        let mut data = Vec::with_capacity(3 * height * width);
        for channel in 0..3 {
            let values = view.data().iter().skip(channel).step_by(3);
            data.extend(values.map(|&value| self.normalise(value, channel)));
        }
        Ok(Pixels {
            height,
            width,
            data,
        })
    }

    /// A box in shares of the image (`x1, y1, x2, y2`, 0 to 1) in pixels of the original.
    ///
    /// With padding, models speak of the padded square; without, of the whole image, as the
    /// published grounding data do even though the crop hides its ends.
    pub fn box_to_pixels(&self, image: &RgbImage, normalized: [f64; 4]) -> [f64; 4] {
        let canvas = match self.pad_to_square {
            true => Canvas::square(image, self.fill),
            false => Canvas::of(image),
        };
        let x = |v: f64| {
            let x = v * canvas.width as f64 - canvas.left as f64;
            x.clamp(0.0, image.width() as f64)
        };
        let y = |v: f64| {
            let y = v * canvas.height as f64 - canvas.top as f64;
            y.clamp(0.0, image.height() as f64)
        };
        let [x1, y1, x2, y2] = normalized;
        [x(x1), y(y1), x(x2), y(y2)]
    }
}

/// The middle `crop` of `size` pixels, and how far from the edge of the crop it starts.
fn centre(size: usize, crop: usize) -> (std::ops::Range<usize>, usize) {
    match size.checked_sub(crop) {
        Some(rest) => (rest / 2..rest / 2 + crop, 0),
        None => (0..size, (crop - size).div_ceil(2)),
    }
}

/// Stacks preprocessed images.
///
/// # Shapes
/// - returns `[images, 3, height, width]`, f32
pub fn to_tensor<B: Backend>(
    images: &[Pixels],
    device: &B::Device,
) -> Result<Tensor<B, 4>, VisionError> {
    let size = |pixels: &Pixels| [pixels.height, pixels.width];
    let [height, width] = images.first().map(size).ok_or(VisionError::MixedSizes)?;
    if images.iter().any(|pixels| size(pixels) != [height, width]) {
        return Err(VisionError::MixedSizes);
    }
    let values: Vec<f32> = images
        .iter()
        .flat_map(|pixels| pixels.data.iter().copied())
        .collect();
    let data = TensorData::new(values, [images.len(), 3, height, width]);
    Ok(Tensor::from_data(data, (device, DType::F32)))
}
