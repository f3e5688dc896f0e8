use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::encoder::cosines::Cosines;
use crate::encoder::host::argmax;
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Reduction, Seen, Tap};
use crate::{About, ReducerError};

/// DivPrune (arXiv 2503.02175): tokens as unlike each other as possible, whatever the question.
///
/// Greedy max-min: the first token is the one farthest from its nearest neighbour, each further one
/// the one farthest from all chosen; distance is one minus the cosine of what the decoder would see.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DivPrune {}

impl BuiltIn for DivPrune {
    const ABOUT: About = About {
        description: "greedy max-min cosine distance between the embeddings",
        source: "arXiv 2503.02175; github.com/vbdi/divprune",
        exact: "distances after the projector, the first token by nearest neighbour, the others by \
                distance to the chosen",
        interpretation: "a chosen token is not chosen again, which the release does not rule out \
                         when all others equal chosen ones; pictures are reduced one by one; the \
                         release covers LLaVA, the rule needs nothing of it",
        towers: &[],
    };
}

impl<B: Backend> EncoderReducer<B> for DivPrune {
    fn needs(&self, _encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        Ok(vec![Tap::Embeddings])
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let cosines = Cosines::new(seen.get(Tap::Embeddings)?)?;
        let nearest = cosines.to_nearest()?;
        let mut chosen = vec![argmax(nearest.into_iter().map(|cosine| 1.0 - cosine))];
        let mut distances = vec![f32::INFINITY; seen.tokens()];
        while chosen.len() < keep {
            let last = chosen[chosen.len() - 1];
            for (distance, cosine) in distances.iter_mut().zip(cosines.row(last)?.iter()) {
                *distance = distance.min(1.0 - cosine);
            }
            distances[last] = f32::NEG_INFINITY;
            chosen.push(argmax(distances.iter().copied()));
        }
        Ok(Reduction::selection(chosen))
    }
}
