//! CLIP's image preprocessing, as the Pillow path of Hugging Face's `CLIPImageProcessor` does it.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use serde::Deserialize;

use crate::normalise::{CLIP_STATISTICS, Normalisation, NormalisationConfig, require};
use crate::resize::{Canvas, Window, resize_bicubic};
use crate::{Geometry, RgbImage, VisionError};

/// Largest side that a configuration may ask for, in pixels.
const MAX_SIDE: usize = 1 << 14;

/// `preprocessor_config.json` of a CLIP-based model.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ClipPreprocessorConfig {
    #[serde(flatten)]
    pixels: NormalisationConfig,
    size: Size,
    do_center_crop: Option<bool>,
    crop_size: Size,
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
            pixels: NormalisationConfig::default(),
            size: Size::ShortestEdge { shortest_edge: 224 },
            do_center_crop: None,
            crop_size: Size::Side(224),
            image_aspect_ratio: None,
        }
    }
}

impl ClipPreprocessorConfig {
    /// Checks the numbers.
    pub fn resolve(&self) -> Result<ClipPreprocessor, VisionError> {
        let wrong = |reason: String| Err(VisionError::Preprocessor(reason));
        let normalisation = self.pixels.resolve(CLIP_STATISTICS)?;
        require("do_center_crop", self.do_center_crop)?;
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
        Ok(ClipPreprocessor {
            shortest_edge: resize,
            crop,
            normalisation,
            pad_to_square: self.image_aspect_ratio.as_deref() == Some("pad"),
        })
    }
}

/// Resolved preprocessing: resize the short side, crop the middle, normalise.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipPreprocessor {
    shortest_edge: usize,
    /// Height, width.
    crop: [usize; 2],
    normalisation: Normalisation,
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

    /// The image on what the model is told to be the whole picture.
    fn canvas<'a>(&self, image: &'a RgbImage) -> Canvas<'a> {
        match self.pad_to_square {
            true => Canvas::square(image, self.normalisation.fill),
            false => Canvas::of(image),
        }
    }

    /// The image as the model sees it: resized and cropped, before normalisation.
    ///
    /// Only the part that survives the crop is computed, so the shape of the image does not matter
    /// for memory.
    pub fn view(&self, image: &RgbImage) -> Result<RgbImage, VisionError> {
        let canvas = self.canvas(image);
        let [crop_height, crop_width] = self.crop;
        let [width, height] = self.resized([canvas.width, canvas.height]);
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

    /// Resizes, crops and normalises.
    pub fn preprocess(&self, image: &RgbImage) -> Result<Pixels, VisionError> {
        let view = self.view(image)?;
        let (height, width) = (view.height(), view.width());
        let mut data = Vec::with_capacity(3 * height * width);
        for channel in 0..3 {
            let values = view.data().iter().skip(channel).step_by(3);
            data.extend(values.map(|&value| self.normalisation.apply(value, channel)));
        }
        Ok(Pixels {
            height,
            width,
            data,
        })
    }

    /// What the model sees of a picture of this width and height in pixels: the middle that the crop
    /// leaves, or all of it on its padded square.
    pub fn geometry(&self, original: [usize; 2]) -> Geometry {
        let canvas = match self.pad_to_square {
            true => [original[0].max(original[1]); 2],
            false => original,
        };
        let resized = self.resized(canvas);
        let crop = [self.crop[1], self.crop[0]];
        let mut geometry = Geometry::whole(original);
        for axis in 0..2 {
            let (window, border) = centre(resized[axis], crop[axis]);
            let padding = (canvas[axis] - original[axis]) / 2;
            let pixels = |seen: f64| seen * canvas[axis] as f64 / resized[axis] as f64;
            let start = window.start as f64 - border as f64;
            geometry.offset[axis] = pixels(start) - padding as f64;
            geometry.extent[axis] = pixels(crop[axis] as f64);
        }
        geometry
    }

    /// Width and height of the canvas after resizing, before the crop.
    fn resized(&self, canvas: [usize; 2]) -> [usize; 2] {
        let short = canvas[0].min(canvas[1]);
        // `int(size · long / short)`: Python divides the integers as doubles.
        let scaled = |side: usize| (self.shortest_edge * side) as f64 / short as f64;
        canvas.map(|side| match side == short {
            true => self.shortest_edge,
            false => scaled(side) as usize,
        })
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
