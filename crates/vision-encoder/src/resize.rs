//! Pillow's bicubic resize, to the byte.
//!
//! Two passes, horizontal then vertical, through an 8-bit intermediate; coefficients are fixed-point
//! numbers of 22 bits; when shrinking, the filter widens with the scale (antialiasing). Each output
//! pixel depends on its own coefficients alone, so any window of the result can be computed without
//! the rest.

use std::ops::Range;

use crate::{RgbImage, VisionError};

/// Bits behind the point: 32 less 8 for the pixel and 2 for sums that overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Radius of the bicubic filter, in pixels of the smaller image.
const SUPPORT: f64 = 2.0;

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

    /// Copies one row of the canvas; returns whether it crosses the image.
    fn read_row(&self, y: usize, row: &mut [u8]) -> bool {
        let inside = (self.top..self.top + self.image.height()).contains(&y);
        row.chunks_exact_mut(3)
            .for_each(|pixel| pixel.copy_from_slice(&self.fill));
        if inside {
            let source = self.image.row(y - self.top);
            row[self.left * 3..][..source.len()].copy_from_slice(source);
        }
        inside
    }
}

/// Resizes to `width` × `height` and returns the part in `window`.
pub fn resize_bicubic(
    canvas: &Canvas,
    width: usize,
    height: usize,
    window: &Window,
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
    let horizontal = Filter::new(canvas.width, width, window.x.clone());
    let vertical = Filter::new(canvas.height, height, window.y.clone());

    // Horizontal pass over the source rows that the window needs.
    let needed = vertical.sources();
    let mut narrowed = Vec::with_capacity(needed.len() * columns * 3);
    let mut row = vec![0; canvas.width * 3];
    let mut blank: Option<Vec<u8>> = None;
    for y in needed.clone() {
        if canvas.read_row(y, &mut row) {
            horizontal.across(&row, &mut narrowed);
        } else {
            let blank = blank.get_or_insert_with(|| {
                let mut blank = Vec::with_capacity(columns * 3);
                horizontal.across(&row, &mut blank);
                blank
            });
            narrowed.extend_from_slice(blank);
        }
    }

    let mut data = Vec::with_capacity(rows * columns * 3);
    for tap in &vertical.taps {
        vertical.down(tap, &narrowed, needed.start, columns * 3, &mut data);
    }
    RgbImage::new(columns, rows, data)
}

/// One pass of the resize: for every output position, where to start and what to weigh with.
struct Filter {
    taps: Vec<Tap>,
    /// The weights of all taps, one after the other.
    weights: Vec<i32>,
}

struct Tap {
    /// First source position.
    start: usize,
    /// Where its weights lie.
    weights: Range<usize>,
}

impl Filter {
    fn new(input: usize, output: usize, window: Range<usize>) -> Self {
        let mut filter = Self {
            taps: Vec::with_capacity(window.len()),
            weights: Vec::new(),
        };
        let scale = input as f64 / output as f64;
        let stretch = scale.max(1.0);
        for at in window {
            let start = filter.weights.len();
            if input == output {
                // Pillow leaves a pass out when the size stays.
                filter.weights.push(1 << PRECISION_BITS);
                filter.taps.push(Tap {
                    start: at,
                    weights: start..start + 1,
                });
                continue;
            }
            let centre = (at as f64 + 0.5) * scale;
            let reach = SUPPORT * stretch;
            let first = (centre - reach + 0.5).max(0.0) as usize;
            let last = ((centre + reach + 0.5) as usize).min(input);
            // In the order of Pillow's operations, so that the last bit agrees.
            let shrink = 1.0 / stretch;
            let weight = |source: usize| bicubic((source as f64 - centre + 0.5) * shrink);
            let weights: Vec<f64> = (first..last).map(weight).collect();
            let total: f64 = weights.iter().sum();
            let fixed = weights.iter().map(|w| {
                let w = if total != 0.0 { w / total } else { *w };
                // Rounds half away from zero.
                (w * f64::from(1 << PRECISION_BITS) + if w < 0.0 { -0.5 } else { 0.5 }) as i32
            });
            filter.weights.extend(fixed);
            filter.taps.push(Tap {
                start: first,
                weights: start..filter.weights.len(),
            });
        }
        filter
    }

    /// All source positions that any tap reads.
    fn sources(&self) -> Range<usize> {
        let start = self.taps.iter().map(|tap| tap.start).min().unwrap_or(0);
        let end = |tap: &Tap| tap.start + tap.weights.len();
        start..self.taps.iter().map(end).max().unwrap_or(0)
    }

    /// Filters a row of RGB pixels.
    fn across(&self, row: &[u8], output: &mut Vec<u8>) {
        for tap in &self.taps {
            let mut sums = [1i32 << (PRECISION_BITS - 1); 3];
            let pixels = row[tap.start * 3..].chunks_exact(3);
            for (pixel, weight) in pixels.zip(&self.weights[tap.weights.clone()]) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * weight;
                }
            }
            output.extend(sums.map(clip));
        }
    }

    /// Filters rows of `stride` bytes, the first of which is source row `first`, into one row.
    fn down(&self, tap: &Tap, rows: &[u8], first: usize, stride: usize, output: &mut Vec<u8>) {
        let mut sums = vec![1i32 << (PRECISION_BITS - 1); stride];
        let rows = rows[(tap.start - first) * stride..].chunks_exact(stride);
        for (row, weight) in rows.zip(&self.weights[tap.weights.clone()]) {
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

/// Catmull–Rom's cubic (a = −0.5).
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
