use std::cmp::Reverse;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};

use super::QwenTowerConfig;
use crate::Grid;

/// Segments of equal length, side by side; a row attends to the rows of its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) segments: usize,
    /// Rows of a segment.
    pub(super) length: usize,
}

/// How the rows of one call lie while they pass the blocks, and which of them attend to each other.
pub(super) struct Arrangement<B: Backend> {
    /// One segment per frame.
    frames: Vec<Run>,
    windows: Option<Windows<B>>,
}

/// Rows window by window; within a frame larger windows come first, so that windows of equal size
/// make one run.
struct Windows<B: Backend> {
    runs: Vec<Run>,
    /// Visual token, in the order of the grids, at every place.
    order: Tensor<B, 1, Int>,
    /// Place of every visual token.
    inverse: Tensor<B, 1, Int>,
    full_attention_layers: Vec<usize>,
}

impl<B: Backend> Arrangement<B> {
    pub(super) fn new(config: &QwenTowerConfig, grids: &[Grid], device: &B::Device) -> Self {
        let frames = grids.iter().flat_map(|grid| {
            let frame = Run {
                segments: 1,
                length: grid.h * grid.w,
            };
            std::iter::repeat_n(frame, grid.t)
        });
        let windows = config.windows.as_ref().map(|windows| {
            let (runs, order) = window_order(grids, config.spatial_merge_size, windows.side);
            let mut inverse = vec![0; order.len()];
            (0..)
                .zip(&order)
                .for_each(|(place, &token)| inverse[token] = place);
            let order: Vec<i64> = order.iter().map(|&token| token as i64).collect();
            Windows {
                runs,
                order: Tensor::from_data(&order[..], device),
                inverse: Tensor::from_data(&inverse[..], device),
                full_attention_layers: windows.full_attention_layers.clone(),
            }
        });
        Self {
            frames: frames.collect(),
            windows,
        }
    }

    /// Which rows attend to each other in a layer.
    pub(super) fn runs(&self, layer: usize) -> &[Run] {
        match &self.windows {
            Some(windows) if !windows.full_attention_layers.contains(&layer) => &windows.runs,
            _ => &self.frames,
        }
    }

    /// From the order of the grids into this arrangement.
    ///
    /// # Shapes
    /// - `x`: `[features, rows]`; the rows are visual tokens, or patches token by token
    /// - returns the shape of `x`
    pub(super) fn arrange(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.windows {
            Some(windows) => select_tokens(x, &windows.order),
            None => x,
        }
    }

    /// The inverse of [`Self::arrange`].
    pub(super) fn restore(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.windows {
            Some(windows) => select_tokens(x, &windows.inverse),
            None => x,
        }
    }
}

fn select_tokens<B: Backend>(x: Tensor<B, 2>, tokens: &Tensor<B, 1, Int>) -> Tensor<B, 2> {
    let [features, rows] = x.dims();
    let count = tokens.dims()[0];
    x.reshape([features, count, rows / count])
        .select(1, tokens.clone())
        .reshape([features, rows])
}

/// Runs of windows, in patches, and the visual tokens window by window.
///
/// Windows are squares of `side · side` tokens from the top left corner of a frame; those at the
/// right and at the bottom are as small as the frame leaves them.
fn window_order(grids: &[Grid], merge: usize, side: usize) -> (Vec<Run>, Vec<usize>) {
    let (mut runs, mut order) = (Vec::new(), Vec::new());
    for grid in grids {
        let mut windows = windows(grid, merge, side);
        windows.sort_by_key(|window| Reverse(window.len()));
        for _ in 0..grid.t {
            let start = order.len();
            order.extend(windows.iter().flatten().map(|token| start + token));
            runs.extend(
                windows
                    .chunk_by(|a, b| a.len() == b.len())
                    .map(|equal| Run {
                        segments: equal.len(),
                        length: equal[0].len() * merge * merge,
                    }),
            );
        }
    }
    (runs, order)
}

/// The visual tokens of each window of a frame, windows row by row.
fn windows(grid: &Grid, merge: usize, side: usize) -> Vec<Vec<usize>> {
    let (rows, columns) = (grid.h / merge, grid.w / merge);
    let corners = (0..rows).step_by(side);
    let corners = corners.flat_map(|top| (0..columns).step_by(side).map(move |left| (top, left)));
    let window = |(top, left)| {
        let tokens = |row| (left..columns.min(left + side)).map(move |x| row * columns + x);
        (top..rows.min(top + side)).flat_map(tokens).collect()
    };
    corners.map(window).collect()
}

/// The visual tokens of all grids, frame by frame, windows row by row.
pub(super) fn windows_in_rows(grids: &[Grid], merge: usize, side: usize) -> Vec<i64> {
    let mut order = Vec::new();
    for grid in grids {
        let windows = windows(grid, merge, side).concat();
        for _ in 0..grid.t {
            let start = order.len();
            order.extend(windows.iter().map(|token| (start + token) as i64));
        }
    }
    order
}
