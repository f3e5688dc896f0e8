//! Which size a picture is resized to: that of `transformers`, in the number types that Python goes
//! through.

use crate::VisionError;

/// Longest side that a picture may have, in shortest sides.
const MAX_ASPECT: usize = 200;

/// Bounds on an area, in pixels; neither is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PixelBounds {
    pub(super) min: usize,
    pub(super) max: usize,
}

/// Height and width of an image after resizing: multiples of `factor`, nearest to the image's own
/// shape, whose area is within the bounds where that shape and rounding leave a choice.
pub(super) fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    bounds: PixelBounds,
) -> Result<[usize; 2], VisionError> {
    fit(1, 1, [height, width], factor, bounds)
}

/// The same of a video of `frames` pictures, with bounds on the pixels of all pictures together
/// (Qwen3-VL); pictures are counted in groups of `temporal_factor`.
///
/// Where versions of the library differ: pictures that fill up the last group count (5.4), and
/// pictures smaller than `factor` are enlarged first (5.23) instead of refused.
pub(super) fn smart_resize_video(
    frames: usize,
    height: usize,
    width: usize,
    temporal_factor: usize,
    factor: usize,
    bounds: PixelBounds,
) -> Result<[usize; 2], VisionError> {
    let size = match height.min(width) < factor {
        true => {
            let scale = (factor as f64 / height as f64).max(factor as f64 / width as f64);
            [height, width].map(|side| (side as f64 * scale) as usize)
        }
        false => [height, width],
    };
    let padded = frames
        .div_ceil(temporal_factor)
        .saturating_mul(temporal_factor);
    fit(frames, padded, size, factor, bounds)
}

/// `padded` pictures take the place of `frames`, of `[height, width]` pixels each.
fn fit(
    frames: usize,
    padded: usize,
    [height, width]: [usize; 2],
    factor: usize,
    PixelBounds { min, max }: PixelBounds,
) -> Result<[usize; 2], VisionError> {
    let short = height.min(width);
    if short == 0 || height.max(width) > short.saturating_mul(MAX_ASPECT) {
        return Err(VisionError::AspectRatio { width, height });
    }
    let size = [height, width].map(|side| side as f64);
    let steps = |count: f64| (count as usize).saturating_mul(factor);
    let nearest = size.map(|side| steps((side / factor as f64).round_ties_even()));
    let area = nearest
        .iter()
        .fold(padded, |area, &side| area.saturating_mul(side));
    let own_area = frames as f64 * size[0] * size[1];
    Ok(if area > max {
        let shrink = (own_area / max as f64).sqrt();
        size.map(|side| steps((side / shrink / factor as f64).floor()).max(factor))
    } else if area < min {
        let grow = (min as f64 / own_area).sqrt();
        size.map(|side| steps((side * grow / factor as f64).ceil()))
    } else {
        nearest
    })
}
