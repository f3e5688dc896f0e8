//! Pillow's resize, to the byte.
//!
//! Two passes, horizontal then vertical, through an 8-bit intermediate; coefficients are fixed-point
//! numbers of 22 bits; when shrinking, the filter widens with the scale (antialiasing). Each output
//! pixel depends on its own coefficients alone, so any window of the result can be computed without
//! the rest.
//!
//! This is Pillow up to 12. Pillow 13 turns the passes around where the height shrinks more than the
//! width, which moves bytes by a level, seldom by a few.

use std::ops::Range;

use crate::{RgbImage, VisionError};

/// Bits behind the point: 32 less 8 for the pixel and 2 for sums that overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// What rounds a fixed-point sum to the nearest.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// How a pixel of the result is weighed out of those of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Resample {
    /// A triangle, one pixel to either side.
    Bilinear,
    /// Catmull–Rom's cubic (a = −0.5), two pixels to either side.
    Bicubic,
}

impl Resample {
    /// Radius of the filter, in pixels of the smaller image.
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Bicubic => bicubic(x),
        }
    }
}

/// An image on a larger canvas of one colour; nothing of the canvas is stored.
#[derive(Debug, Clone, Copy)]
pub struct Canvas<'a> {
    /// The image.
    pub image: &'a RgbImage,
    /// Where its left edge lies.
    pub left: usize,
    /// Where its top edge lies.
    pub top: usize,
    /// Width of the canvas, at least `left` plus the image's.
    pub width: usize,
    /// Height of the canvas, at least `top` plus the image's.
    pub height: usize,
    /// Colour around the image.
    pub fill: [u8; 3],
}

/// Longest side of a canvas: more than any decoder reads.
const MAX_SIDE: usize = 1 << 24;

/// Most pixels that a resize makes.
const MAX_PIXELS: usize = 1 << 29;

/// A part of a resized image: columns and rows of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Columns.
    pub x: Range<usize>,
    /// Rows.
    pub y: Range<usize>,
}

impl<'a> Canvas<'a> {
    /// The image itself.
    pub fn of(image: &'a RgbImage) -> Self {
        Self {
            image,
            left: 0,
            top: 0,
            width: image.width(),
            height: image.height(),
            fill: [0; 3],
        }
    }

    /// The image in the middle of the smallest square around it.
    pub fn square(image: &'a RgbImage, fill: [u8; 3]) -> Self {
        let side = image.width().max(image.height());
        Self {
            image,
            left: (side - image.width()) / 2,
            top: (side - image.height()) / 2,
            width: side,
            height: side,
            fill,
        }
    }

    /// Whether the image lies within the canvas.
    fn holds_image(&self) -> bool {
        let image = [
            (self.left, self.image.width()),
            (self.top, self.image.height()),
        ];
        let fits = |((start, length), side): (&(usize, usize), usize)| {
            side <= MAX_SIDE && start.checked_add(*length).is_some_and(|end| end <= side)
        };
        image.iter().zip([self.width, self.height]).all(fits)
    }

    /// Columns of the image.
    fn columns(&self) -> Range<usize> {
        self.left..self.left + self.image.width()
    }

    /// Rows of the image.
    fn rows(&self) -> Range<usize> {
        self.top..self.top + self.image.height()
    }
}

/// [`resize`] by the bicubic filter.
pub fn resize_bicubic(
    canvas: &Canvas,
    width: usize,
    height: usize,
    window: &Window,
) -> Result<RgbImage, VisionError> {
    resize(canvas, width, height, window, Resample::Bicubic)
}

/// Resizes to `width` × `height` and returns the part in `window`.
///
/// # Errors
/// [`VisionError::ImageData`] for a window that is empty or not within the result;
/// [`VisionError::Resize`] for one of more than 2²⁹ pixels, and for a canvas that its image does not lie
/// within.
pub fn resize(
    canvas: &Canvas,
    width: usize,
    height: usize,
    window: &Window,
    resample: Resample,
) -> Result<RgbImage, VisionError> {
    let (columns, rows) = (window.x.len(), window.y.len());
    let fits = window.x.end <= width && window.y.end <= height && columns > 0 && rows > 0;
    if !fits {
        return Err(VisionError::ImageData {
            width,
            height,
            bytes: 0,
        });
    }
    if !canvas.holds_image() {
        return Err(VisionError::Resize(format!(
            "a canvas of {}×{} pixels must hold its image, and have sides of at most {MAX_SIDE}",
            canvas.width, canvas.height
        )));
    }
    if columns.saturating_mul(rows) > MAX_PIXELS {
        return Err(VisionError::Resize(format!(
            "{columns}×{rows} pixels are more than the {MAX_PIXELS} that are made at a time"
        )));
    }
    let pass = |input, output, window: &Range<usize>, image| {
        Filter::new(resample, [input, output], window.clone(), image)
    };
    let horizontal = pass(canvas.width, width, &window.x, canvas.columns());
    let vertical = pass(canvas.height, height, &window.y, canvas.rows());

    // A row above or below the image after the horizontal pass.
    let mut blank = Vec::with_capacity(columns * 3);
    horizontal.across(&[], canvas.fill, &mut blank);

    // Rows of the image after the horizontal pass: those that the current output row reads.
    let mut narrowed = Vec::new();
    let (mut first, mut next) = (0, 0);
    let mut data = Vec::with_capacity(rows * columns * 3);
    for tap in &vertical.taps {
        next = next.max(tap.start);
        let passed = (tap.start - first) * columns * 3;
        narrowed.drain(..passed.min(narrowed.len()));
        first = tap.start;
        while next < tap.start + tap.weights.len() {
            horizontal.across(canvas.image.row(next), canvas.fill, &mut narrowed);
            next += 1;
        }
        vertical.down(tap, &narrowed, &blank, &mut data);
    }
    RgbImage::new(columns, rows, data)
}

/// One pass of the resize: for every output position, where to start and what to weigh with.
///
/// Only what falls on the image has weights of its own, so the cost is that of the image, however
/// large the canvas.
struct Filter {
    taps: Vec<Tap>,
    /// The weights of all taps, one after the other.
    weights: Vec<i32>,
}

struct Tap {
    /// First source position, counted from the image's edge.
    start: usize,
    /// Where its weights lie.
    weights: Range<usize>,
    /// Sum of the weights that fall beside the image.
    beside: i32,
}

impl Filter {
    /// From `input` to `output` positions; `image` are those of the canvas that the image covers.
    fn new(
        resample: Resample,
        [input, output]: [usize; 2],
        window: Range<usize>,
        image: Range<usize>,
    ) -> Self {
        let mut filter = Self {
            taps: Vec::with_capacity(window.len()),
            weights: Vec::new(),
        };
        let scale = input as f64 / output as f64;
        let stretch = scale.max(1.0);
        for at in window {
            if input == output {
                // Pillow leaves a pass out when the size stays.
                filter.push(at, std::iter::once(1 << PRECISION_BITS), &image);
                continue;
            }
            let centre = (at as f64 + 0.5) * scale;
            let reach = resample.support() * stretch;
            let first = (centre - reach + 0.5).max(0.0) as usize;
            let last = ((centre + reach + 0.5) as usize).min(input);
            // In the order of Pillow's operations, so that the last bit agrees.
            let shrink = 1.0 / stretch;
            let weight = |source: usize| resample.weight((source as f64 - centre + 0.5) * shrink);
            let weights: Vec<f64> = (first..last).map(weight).collect();
            let total: f64 = weights.iter().sum();
            let fixed = weights.iter().map(|w| {
                let w = if total != 0.0 { w / total } else { *w };
                // Rounds half away from zero.
                (w * f64::from(1 << PRECISION_BITS) + if w < 0.0 { -0.5 } else { 0.5 }) as i32
            });
            filter.push(first, fixed, &image);
        }
        filter
    }

    /// Adds the tap whose weights begin at position `first` of the canvas.
    fn push(&mut self, first: usize, weights: impl Iterator<Item = i32>, image: &Range<usize>) {
        let (start, mut beside) = (self.weights.len(), 0);
        for (at, weight) in (first..).zip(weights) {
            match image.contains(&at) {
                true => self.weights.push(weight),
                false => beside += weight,
            }
        }
        self.taps.push(Tap {
            start: first.clamp(image.start, image.end) - image.start,
            weights: start..self.weights.len(),
            beside,
        });
    }

    /// Filters a row of RGB pixels; an empty row is one beside the image.
    fn across(&self, row: &[u8], fill: [u8; 3], output: &mut Vec<u8>) {
        for tap in &self.taps {
            let weights = &self.weights[tap.weights.clone()];
            let beside = match row.is_empty() {
                true => tap.beside + weights.iter().sum::<i32>(),
                false => tap.beside,
            };
            let mut sums = fill.map(|value| HALF + i32::from(value) * beside);
            let pixels = row.chunks_exact(3).skip(tap.start);
            for (pixel, weight) in pixels.zip(weights) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * weight;
                }
            }
            output.extend(sums.map(clip));
        }
    }

    /// Filters rows as long as `blank`, which is what lies beside the image, into one row.
    fn down(&self, tap: &Tap, rows: &[u8], blank: &[u8], output: &mut Vec<u8>) {
        let beside = blank
            .iter()
            .map(|value| HALF + i32::from(*value) * tap.beside);
        let mut sums: Vec<i32> = beside.collect();
        for (row, weight) in rows
            .chunks_exact(blank.len())
            .zip(&self.weights[tap.weights.clone()])
        {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        output.extend(sums.into_iter().map(clip));
    }
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}
