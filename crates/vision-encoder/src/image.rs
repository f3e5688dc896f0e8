//! Decoding image files within limits.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};

use crate::{VisionError, jpeg, orientation};

/// An RGB image, 8 bits per channel, rows from top to bottom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    width: usize,
    height: usize,
    /// `[height, width, 3]`
    data: Vec<u8>,
}

impl RgbImage {
    /// An image from its bytes, `[height, width, 3]`; no side may be zero.
    pub fn new(width: usize, height: usize, data: Vec<u8>) -> Result<Self, VisionError> {
        let expected = width.checked_mul(height).and_then(|n| n.checked_mul(3));
        if width == 0 || height == 0 || expected != Some(data.len()) {
            return Err(VisionError::ImageData {
                width,
                height,
                bytes: data.len(),
            });
        }
        Ok(Self {
            width,
            height,
            data,
        })
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// `[height, width, 3]`
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// `[height, width, 3]`
    pub fn data_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }

    /// The bytes of one row; `y` must be below the height.
    pub(crate) fn row(&self, y: usize) -> &[u8] {
        &self.data[y * self.width * 3..(y + 1) * self.width * 3]
    }
}

/// What an image file may ask for.
#[derive(Debug, Clone, Copy)]
pub struct DecodeLimits {
    /// Most pixels.
    pub max_pixels: u64,
    /// Longest side in pixels; decoders and resizing take time per row.
    pub max_side: u32,
    /// Most bytes that decoding may allocate.
    pub max_bytes: u64,
}

impl Default for DecodeLimits {
    /// 64 megapixels, enough for any camera; sides as long as JPEG can have; 512 MiB.
    fn default() -> Self {
        Self {
            max_pixels: 64_000_000,
            max_side: u16::MAX.into(),
            max_bytes: 512 << 20,
        }
    }
}

impl DecodeLimits {
    /// Whether an image of this width and height in pixels is read.
    pub fn check(&self, width: u32, height: u32) -> Result<(), VisionError> {
        let &Self {
            max_pixels,
            max_side,
            ..
        } = self;
        if u64::from(width) * u64::from(height) > max_pixels {
            return Err(VisionError::TooLarge {
                width,
                height,
                max_pixels,
            });
        }
        if width.max(height) > max_side {
            return Err(VisionError::TooLong {
                width,
                height,
                max_side,
            });
        }
        Ok(())
    }
}

/// Decodes a PNG, JPEG or WebP file.
///
/// The size is checked from the header before anything is decoded. As Pillow's `convert("RGB")`
/// does, grey becomes three equal channels, transparency is dropped, and 16-bit channels keep their
/// high byte; JPEG is decoded to the pixels of libjpeg-turbo, which Pillow uses; the orientation that
/// EXIF or XMP asks for is applied, as Hugging Face's image loading does by Pillow's
/// `ImageOps.exif_transpose`. Of an animation, the first picture is read.
///
/// Two deviations: 16-bit grey keeps its high byte like 16-bit colour, where Pillow clips it to 255
/// and leaves a white picture; JPEG files of four channels of which black is stored at a lower
/// resolution, which few programs write, may differ by some levels.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, VisionError> {
    let format = match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) => format,
        _ => return Err(VisionError::Format),
    };
    let decoded = match format {
        ImageFormat::Jpeg => jpeg::decode(bytes, limits)?,
        _ => None,
    };
    let mut image = match decoded {
        Some(image) => image,
        None => decode_as(format, bytes, limits)?,
    };
    image.apply_orientation(orientation::find(bytes, format));
    let (width, height) = (image.width() as usize, image.height() as usize);
    RgbImage::new(width, height, rgb8(image))
}

/// Most bytes that the colour profile and the texts of a PNG file may take when they are unpacked.
const PNG_METADATA_BYTES: u64 = 64 << 20;

/// Decodes a file by the `image` crate.
fn decode_as(
    format: ImageFormat,
    bytes: &[u8],
    limits: &DecodeLimits,
) -> Result<DynamicImage, VisionError> {
    let max_bytes = limits.max_bytes;
    let broken = |source| match source {
        ImageError::Limits(_) => VisionError::TooManyBytes { max_bytes },
        source => VisionError::Decode { source },
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut decoder_limits = Limits::default();
    // Of a PNG file this holds for what is not the picture (profiles, texts), which is unpacked though nobody reads it.
    decoder_limits.max_alloc = Some(match format {
        ImageFormat::Png => max_bytes.min(PNG_METADATA_BYTES),
        _ => max_bytes,
    });
    reader.limits(decoder_limits);
    let decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    // `DynamicImage::from_decoder` does not look at the limits.
    if decoder.total_bytes() > max_bytes {
        return Err(VisionError::TooManyBytes { max_bytes });
    }
    DynamicImage::from_decoder(decoder).map_err(broken)
}

fn rgb8(image: DynamicImage) -> Vec<u8> {
    let wide = matches!(
        image,
        DynamicImage::ImageLuma16(_)
            | DynamicImage::ImageLumaA16(_)
            | DynamicImage::ImageRgb16(_)
            | DynamicImage::ImageRgba16(_)
    );
    match wide {
        true => image
            .into_rgb16()
            .into_raw()
            .iter()
            .map(|v| (v >> 8) as u8)
            .collect(),
        false => image.into_rgb8().into_raw(),
    }
}
