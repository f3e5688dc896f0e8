//! Preprocessing to one size, as the Pillow path of Hugging Face's `CLIPImageProcessor`,
//! `LlavaImageProcessor`, `SiglipImageProcessor` and `BitImageProcessor` (DINOv2's) does it.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use serde::Deserialize;

use crate::normalise::{
    CLIP_STATISTICS, Normalisation, NormalisationConfig, OtherKeys, STANDARD_STATISTICS,
};
use crate::resize::{Canvas, Resample, Window, resize};
use crate::{Geometry, RgbImage, VisionError};

/// Largest side that a configuration may ask for, in pixels.
const MAX_SIDE: usize = 1 << 14;

/// `preprocessor_config.json` of a model whose images are all of one size.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct VitPreprocessorConfig {
    image_processor_type: Option<String>,
    #[serde(flatten)]
    pixels: NormalisationConfig,
    size: Option<Size>,
    do_center_crop: Option<bool>,
    crop_size: Option<Size>,
    do_pad: Option<bool>,
    /// The original LLaVA code's switch; `"pad"` is the one it was trained with.
    image_aspect_ratio: Option<String>,
    #[serde(flatten)]
    other: OtherKeys,
}

/// A size, as the various versions of the library write it.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(
    untagged,
    expecting = "a size is a number, {\"shortest_edge\": n} or {\"height\": n, \"width\": n}"
)]
enum Size {
    Side(usize),
    ShortestEdge {
        shortest_edge: usize,
        longest_edge: Option<usize>,
    },
    Exact {
        height: usize,
        width: usize,
    },
}

/// The library's classes that differ in what they do with a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Processor {
    /// Also DINOv2's.
    Clip,
    /// CLIP's, with padding.
    Llava,
    /// Nothing is cropped.
    Siglip,
}

impl VitPreprocessorConfig {
    /// Checks the numbers.
    pub fn resolve(&self) -> Result<VitPreprocessor, VisionError> {
        let processor = self.processor()?;
        self.other.check(&[])?;
        let (statistics, siglip) = match processor {
            Processor::Siglip => (STANDARD_STATISTICS, true),
            Processor::Clip | Processor::Llava => (CLIP_STATISTICS, false),
        };
        let normalisation = self.pixels.resolve(statistics)?;
        let resample = self
            .pixels
            .resample(&[Resample::Bilinear, Resample::Bicubic])?;
        let pad = self.do_pad.unwrap_or(false);
        if pad && processor == Processor::Clip {
            return wrong("do_pad is for LlavaImageProcessor".into());
        }
        let size = match self.size {
            None if siglip => Fit::Exact([224, 224]),
            None => Fit::ShortestEdge(224),
            Some(Size::Exact { height, width }) => Fit::Exact([height, width]),
            Some(Size::ShortestEdge {
                longest_edge: Some(_),
                ..
            }) => return wrong("size.longest_edge is not supported, only shortest_edge".into()),
            Some(
                Size::Side(edge)
                | Size::ShortestEdge {
                    shortest_edge: edge,
                    ..
                },
            ) => Fit::ShortestEdge(edge),
        };
        let crop = match (self.do_center_crop.unwrap_or(!siglip), size) {
            (false, Fit::Exact(size)) => size,
            (false, Fit::ShortestEdge(_)) => {
                return wrong(
                    "do_center_crop is off and size says no height and width: the vision tower needs \
                     images of one size"
                        .into(),
                );
            }
            (true, _) => match self.crop_size.unwrap_or(Size::Side(224)) {
                Size::Side(side) => [side, side],
                Size::Exact { height, width } => [height, width],
                Size::ShortestEdge { .. } => {
                    return wrong("crop_size needs height and width".into());
                }
            },
        };
        let [fit_height, fit_width] = match size {
            Fit::ShortestEdge(edge) => [edge, edge],
            Fit::Exact(size) => size,
        };
        for (name, side) in [
            ("size", fit_height),
            ("size", fit_width),
            ("crop_size.height", crop[0]),
            ("crop_size.width", crop[1]),
        ] {
            if side == 0 || side > MAX_SIDE {
                return wrong(format!("{name} is {side}, not 1 to {MAX_SIDE} pixels"));
            }
        }
        Ok(VitPreprocessor {
            size,
            crop,
            resample,
            normalisation,
            pad_to_square: pad || self.image_aspect_ratio.as_deref() == Some("pad"),
        })
    }

    fn processor(&self) -> Result<Processor, VisionError> {
        let Some(class) = self.image_processor_type.as_deref() else {
            return Ok(Processor::Llava);
        };
        let name = class.strip_suffix("Fast").or(class.strip_suffix("Pil"));
        match name.unwrap_or(class) {
            "CLIPImageProcessor" | "CLIPFeatureExtractor" | "BitImageProcessor" => {
                Ok(Processor::Clip)
            }
            "LlavaImageProcessor" => Ok(Processor::Llava),
            "SiglipImageProcessor" => Ok(Processor::Siglip),
            _ => wrong(format!(
                "image_processor_type \"{class}\" is not supported; CLIPImageProcessor, \
                 LlavaImageProcessor, SiglipImageProcessor and BitImageProcessor are"
            )),
        }
    }
}

fn wrong<T>(reason: String) -> Result<T, VisionError> {
    Err(VisionError::preprocessor(reason))
}

/// Resolved preprocessing: resize, crop the middle, normalise.
#[derive(Debug, Clone, PartialEq)]
pub struct VitPreprocessor {
    size: Fit,
    /// Height, width.
    crop: [usize; 2],
    resample: Resample,
    normalisation: Normalisation,
    pad_to_square: bool,
}

/// How an image is resized before the crop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fit {
    /// Its short side to this length, in pixels.
    ShortestEdge(usize),
    /// To this height and width, whatever becomes of its shape.
    Exact([usize; 2]),
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

impl VitPreprocessor {
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
        let part = resize(&canvas, width, height, &Window { x, y }, self.resample)?;
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

    /// Width and height of the canvas after resizing, before the crop.
    fn resized(&self, canvas: [usize; 2]) -> [usize; 2] {
        let edge = match self.size {
            Fit::ShortestEdge(edge) => edge,
            Fit::Exact([height, width]) => return [width, height],
        };
        let short = canvas[0].min(canvas[1]);
        // `int(size · long / short)`: Python divides the integers as doubles.
        let scaled = |side: usize| (edge * side) as f64 / short as f64;
        canvas.map(|side| match side == short {
            true => edge,
            false => scaled(side) as usize,
        })
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
    let values = height
        .checked_mul(width)
        .and_then(|area| area.checked_mul(3));
    let fits =
        |pixels: &Pixels| Some(pixels.data.len()) == values && size(pixels) == [height, width];
    if !images.iter().all(fits) {
        return Err(VisionError::MixedSizes);
    }
    let values: Vec<f32> = images
        .iter()
        .flat_map(|pixels| pixels.data.iter().copied())
        .collect();
    let data = TensorData::new(values, [images.len(), 3, height, width]);
    Ok(Tensor::from_data(data, (device, DType::F32)))
}
