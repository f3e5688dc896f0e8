use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::uniform_grid::areas;
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Part, Reduction, Seen, Tap};
use crate::{About, ReducerError};

/// The means of as many rectangles as tokens are kept, which cover the picture. A baseline.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AveragePooling {}

impl BuiltIn for AveragePooling {
    const ABOUT: About = About {
        description: "means of neighbouring tokens, before the decoder",
        source: "baseline; arXiv 2602.02951 (table 6) pools 24 × 24 to 64 and 128",
        interpretation: "the picture is cut into as many rectangles as tokens are kept, in bands as \
                         for the uniform grid; a mean stands at the middle of its rectangle",
        ..About::NOTHING
    };
}

impl<B: Backend> EncoderReducer<B> for AveragePooling {
    fn needs(&self, _: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        Ok(Vec::new())
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let columns = seen.grid[1];
        let areas = areas(seen.grid, keep);
        let places = areas.iter().map(|area| Some(area.middle(columns)));
        let mut parts = Vec::with_capacity(seen.tokens());
        for (token, area) in areas.iter().enumerate() {
            let weight = 1.0 / (area.rows.len() * area.columns.len()) as f32;
            for row in area.rows.clone() {
                parts.extend(area.columns.clone().map(|column| Part {
                    token,
                    source: row * columns + column,
                    weight,
                }));
            }
        }
        Ok(Reduction::of_parts(places.collect(), parts))
    }
}
