//! The baselines that keep everyone honest: they look at nothing.

use burn::tensor::backend::Backend;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use super::mixture::Mixture;
use super::{EncoderReducer, EncoderShape, Reduced, Seen, Tap};
use crate::{About, ReducerError, Support, top_k};

/// Tokens by chance; the same for the same seed and number of tokens.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandomTokens {
    /// Seed of the random numbers.
    pub seed: u64,
}

/// Tokens as evenly spread over the picture as their number allows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UniformGrid {}

/// The means of as many rectangles as tokens are kept, which cover the picture.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AveragePooling {}

const BASELINE: About = About {
    description: "",
    source: "baseline",
    exact: "",
    interpretation: "",
    llava: Support::Yes,
    qwen: Support::Yes,
};

impl RandomTokens {
    /// What to know before comparing.
    pub const ABOUT: About = About {
        description: "tokens by chance, before the decoder",
        ..BASELINE
    };
}

impl UniformGrid {
    /// What to know before comparing.
    pub const ABOUT: About = About {
        description: "evenly spread tokens, before the decoder",
        interpretation: "bands of equal height, in each as many tokens as its share of the number",
        ..BASELINE
    };
}

impl AveragePooling {
    /// What to know before comparing.
    pub const ABOUT: About = About {
        description: "means of neighbouring tokens, before the decoder",
        source: "baseline; arXiv 2602.02951 (table 6) pools 24 × 24 to 64 and 128",
        interpretation: "the picture is cut into as many rectangles as tokens are kept, in bands as \
                         for the uniform grid; a mean stands at the middle of its rectangle",
        ..BASELINE
    };
}

impl<B: Backend> EncoderReducer<B> for RandomTokens {
    fn needs(&self, _: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        Ok(Vec::new())
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let scores: Vec<f32> = (0..seen.tokens()).map(|_| random.random()).collect();
        Ok(Reduced::selection(top_k(&scores, keep)?))
    }
}

impl<B: Backend> EncoderReducer<B> for UniformGrid {
    fn needs(&self, _: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        Ok(Vec::new())
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError> {
        let areas = areas(seen.grid, keep).into_iter();
        let middles = areas.map(|area| area.middle(seen.grid[1]));
        Ok(Reduced::selection(middles.collect()))
    }
}

impl<B: Backend> EncoderReducer<B> for AveragePooling {
    fn needs(&self, _: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        Ok(vec![Tap::Features])
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError> {
        let columns = seen.grid[1];
        let areas = areas(seen.grid, keep);
        let places = areas.iter().map(|area| Some(area.middle(columns)));
        let mut mixture = Mixture::new(places.collect(), seen.tokens());
        for (token, area) in areas.iter().enumerate() {
            let share = 1.0 / (area.rows.len() * area.columns.len()) as f32;
            for row in area.rows.clone() {
                for column in area.columns.clone() {
                    mixture.add(token, row * columns + column, share);
                }
            }
        }
        Ok(mixture.on(&seen.get(Tap::Features)?.device()))
    }
}

/// A rectangle of tokens.
struct Area {
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
}

impl Area {
    /// The token in its middle.
    fn middle(&self, columns: usize) -> usize {
        let middle = |range: &std::ops::Range<usize>| (range.start + range.end - 1) / 2;
        middle(&self.rows) * columns + middle(&self.columns)
    }
}

/// Cuts a grid into `count` rectangles, at most one per token: bands of nearly equal height, as
/// many as makes the rectangles nearly square, each cut into nearly equal pieces.
fn areas([rows, columns]: [usize; 2], count: usize) -> Vec<Area> {
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
