use std::ops::Range;

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Reduction, Seen, Tap};
use crate::{About, ReducerError};

/// Tokens as evenly spread over the picture as their number allows. A baseline.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UniformGrid {}

impl BuiltIn for UniformGrid {
    const ABOUT: About = About {
        description: "evenly spread tokens, before the decoder",
        source: "baseline",
        interpretation: "bands of equal height, in each as many tokens as its share of the number",
        ..About::NOTHING
    };
}

impl<B: Backend> EncoderReducer<B> for UniformGrid {
    fn needs(&self, _: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        Ok(Vec::new())
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let areas = areas(seen.grid, keep).into_iter();
        let middles = areas.map(|area| area.middle(seen.grid[1]));
        Ok(Reduction::selection(middles.collect()))
    }
}

/// A rectangle of tokens.
pub(super) struct Area {
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
}

impl Area {
    /// The token in its middle.
    pub(super) fn middle(&self, columns: usize) -> usize {
        let middle = |range: &Range<usize>| (range.start + range.end - 1) / 2;
        middle(&self.rows) * columns + middle(&self.columns)
    }
}

/// Cuts a grid into `count` rectangles, at most one per token: bands of nearly equal height, as
/// many as makes the rectangles nearly square, each cut into nearly equal pieces.
pub(super) fn areas([rows, columns]: [usize; 2], count: usize) -> Vec<Area> {
    let square = (count as f64 * rows as f64 / columns as f64).sqrt();
    let fewest = count.div_ceil(columns);
    let bands = (square.round() as usize).clamp(fewest, rows).min(count);
    let cut = |size: usize, pieces: usize, piece: usize| {
        piece * size / pieces..(piece + 1) * size / pieces
    };
    let band = |band: usize| {
        let pieces = cut(count, bands, band).len();
        let area = move |piece| Area {
            rows: cut(rows, bands, band),
            columns: cut(columns, pieces, piece),
        };
        (0..pieces).map(area)
    };
    (0..bands).flat_map(band).collect()
}
