//! JPEG files to the pixels of Pillow, which decodes by libjpeg-turbo: the standard leaves decoders the
//! rounding of the inverse cosine transform and how halved colour is scaled up.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::error::{DecodingError, ImageFormatHint};
use image::{DynamicImage, ImageError, ImageFormat};
use libjpeg_turbo_rs::{ComponentInfo, Decoder, FrameHeader, JpegError, PixelFormat};

use crate::{DecodeLimits, VisionError};

/// Most pixels of a picture that is decoded here: the decoder holds all colours of it once more, and of a
/// progressive file six bytes a pixel. Of larger ones a third of the pixels may differ from Pillow's by up
/// to 4 levels, before they are scaled down to what a model sees.
const MOST_PIXELS: u64 = 1 << 24;

/// Decodes a whole file; `None` if only another decoder can, or shall.
pub(crate) fn decode(
    bytes: &[u8],
    limits: &DecodeLimits,
) -> Result<Option<DynamicImage>, VisionError> {
    let max_bytes = limits.max_bytes;
    let failed = |error| match error {
        JpegError::LimitExceeded { .. } | JpegError::AllocationFailed { .. } => {
            VisionError::TooManyBytes { max_bytes }
        }
        error => broken(error),
    };
    // The size is ours to check; only memory and the number of scans are left to the decoder.
    let theirs = libjpeg_turbo_rs::DecodeLimits {
        max_width: usize::MAX,
        max_height: usize::MAX,
        max_pixels: u64::MAX,
        max_memory: Some(max_bytes),
        ..Default::default()
    };
    let mut decoder = Decoder::new_with_limits(bytes, theirs).map_err(failed)?;
    let frame = decoder.header();
    let (width, height) = (u32::from(frame.width), u32::from(frame.height));
    limits.check(width, height)?;
    if !is_whole(bytes) || width == 0 || height == 0 {
        return Err(broken(io::Error::from(io::ErrorKind::UnexpectedEof)));
    }
    let is_cmyk = match channels(frame) {
        _ if u64::from(width) * u64::from(height) > MOST_PIXELS => return Ok(None),
        Some(channels) => channels == 4,
        None => return Ok(None),
    };
    decoder.set_output_format(match is_cmyk {
        true => PixelFormat::Cmyk,
        false => PixelFormat::Rgb,
    });
    // As libjpeg does where a progressive file ends after its first scans.
    decoder.set_block_smoothing(true);
    // On some broken files of four channels it panics instead of refusing them.
    let decoded = catch_unwind(AssertUnwindSafe(|| decoder.decode_image()));
    let decoded = decoded.map_err(|_| broken(io::Error::from(io::ErrorKind::InvalidData)))?;
    let data = decoded.map_err(failed)?.data;
    let data = match is_cmyk {
        true => data.as_chunks().0.iter().flat_map(rgb).collect(),
        false => data,
    };
    let image = image::RgbImage::from_raw(width, height, data);
    let image = image.ok_or_else(|| broken(io::Error::from(io::ErrorKind::InvalidData)))?;
    Ok(Some(DynamicImage::ImageRgb8(image)))
}

/// Channels of a frame, if they are 8 bits wide and scaled up here: of four, the last must be stored in
/// full, as the first is.
fn channels(frame: &FrameHeader) -> Option<usize> {
    let sampling = |c: &ComponentInfo| (c.horizontal_sampling, c.vertical_sampling);
    match frame.components.as_slice() {
        _ if frame.precision != 8 => None,
        [_] => Some(1),
        [_, _, _] => Some(3),
        [first, colours @ .., last] if colours.len() == 2 && sampling(first) == sampling(last) => {
            // Scaled up by whole numbers.
            let whole = |c: &ComponentInfo| {
                let divides = |of: u8, part: u8| part > 0 && of.is_multiple_of(part);
                divides(first.horizontal_sampling, c.horizontal_sampling)
                    && divides(first.vertical_sampling, c.vertical_sampling)
            };
            colours.iter().all(whole).then_some(4)
        }
        _ => None,
    }
}

/// Pillow's conversion of CMYK, which files hold inverted.
fn rgb(&[cyan, magenta, yellow, black]: &[u8; 4]) -> [u8; 3] {
    let black = u32::from(black);
    [cyan, magenta, yellow].map(|ink| {
        // Divides by 255, rounding to the nearest.
        let product = u32::from(255 - ink) * black + 128;
        (black - ((product + (product >> 8)) >> 8)) as u8
    })
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> VisionError {
    let format = ImageFormatHint::Exact(ImageFormat::Jpeg);
    VisionError::Decode {
        source: ImageError::Decoding(DecodingError::new(format, error)),
    }
}

/// The segments of a file: marker and content. What lies between them is skipped.
pub(crate) fn segments(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        loop {
            let (&[first, marker], after) = rest.split_first_chunk()?;
            match (first, marker) {
                (0xff, 0xd9) => {
                    rest = &[];
                    return Some((marker, rest));
                }
                // Not a marker, or one that stands alone: stuffing, restarts, the start of the file.
                (0xff, 0x00 | 0x01 | 0xd0..=0xd8) => rest = after,
                (0xff, 0x02..=0xfe) => {
                    // The length counts itself.
                    let length = usize::from(u16::from_be_bytes(*after.first_chunk()?));
                    let (segment, after) = after.split_at_checked(length)?;
                    rest = after;
                    return Some((marker, segment.get(2..)?));
                }
                _ => rest = rest.get(1..)?,
            }
        }
    })
}

/// Whether a file has its end marker, and the tables that its scans are coded by. Decoders paint over
/// what a cut-off file lacks, and take tables that are usual for those that are missing.
fn is_whole(bytes: &[u8]) -> bool {
    // Tables seen so far, by class and number; frames that are coded arithmetically have none.
    let mut tables = [[false; 16]; 2];
    let mut has_tables = true;
    for (marker, body) in segments(bytes) {
        match marker {
            0xd9 => return has_tables,
            0xc4 => {
                let mut rest = body;
                while let Some((&[kind], after)) = rest.split_first_chunk()
                    && let Some((counts, values)) = after.split_first_chunk::<16>()
                {
                    let values = values.get(counts.iter().map(|&n| usize::from(n)).sum()..);
                    tables[usize::from(kind >> 4 & 1)][usize::from(kind & 15)] = true;
                    rest = values.unwrap_or_default();
                }
            }
            0xc9..=0xcb => tables = [[true; 16]; 2],
            0xda => {
                let Some((&count, rest)) = body.split_first() else {
                    return false;
                };
                let components = rest.as_chunks::<2>().0.iter().take(count.into());
                let &[first, last, approximation] = &rest[rest.len().min(2 * usize::from(count))..]
                else {
                    return false;
                };
                let needed = [first == 0 && approximation >> 4 == 0, last > 0];
                for [_, of_component] in components {
                    let numbers = [of_component >> 4, of_component & 15].map(usize::from);
                    for class in 0..2 {
                        has_tables &= !needed[class] || tables[class][numbers[class]];
                    }
                }
            }
            _ => {}
        }
    }
    false
}
