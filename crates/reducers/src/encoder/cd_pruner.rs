use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::cosines::Cosines;
use super::host::argmax;
use super::{EncoderReducer, EncoderShape, Reduced, Seen, Tap};
use crate::{About, ReducerError, Support};

/// A token that adds less volume than this adds rounding errors.
const NO_VOLUME: f64 = 1e-14;

/// CDPruner (arXiv 2506.10967): tokens unlike each other, those that matter to the question first.
///
/// A determinantal point process prefers sets whose kernel, cosine similarity weighted by relevance
/// on both sides, has a large determinant; the greedy choice adds the token that enlarges it most
/// (fast MAP inference, arXiv 1709.05135).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CdPruner {
    /// Whether those tokens are relevant that are *un*like the question, as released.
    pub negative: bool,
}

impl Default for CdPruner {
    fn default() -> Self {
        Self { negative: true }
    }
}

impl CdPruner {
    /// What to know before comparing.
    pub const ABOUT: About = About {
        description: "greedy determinant of similarity weighted by relevance to the question",
        source: "arXiv 2506.10967; github.com/Theia-4869/CDPruner (LLaVA)",
        exact: "similarity after the projector, relevance scaled to the range 0 to 1, the kernel, the \
                greedy choice",
        interpretation: "relevance compares what the decoder would see with the embeddings of the \
                         question's tokens, since checkpoints lack the text tower of CLIP that the \
                         release loads beside LLaVA (OpenVINO's version for Qwen does the same); \
                         its minus sign is kept; equal relevance counts as 1; pictures are reduced \
                         one by one",
        llava: Support::Yes,
        qwen: Support::Yes,
    };

    /// How much each token matters, from 0 (nearly) to 1, by its mean cosine to the text tokens.
    fn relevance<B: Backend>(
        &self,
        cosines: &Cosines<B>,
        seen: &Seen<B>,
    ) -> Result<Vec<f64>, ReducerError> {
        let question = seen.get(Tap::Question)?;
        if question.dims()[1] == 0 {
            return Ok(vec![1.0; seen.tokens()]);
        }
        let cosines = cosines.mean_to(question)?;
        let sign = if self.negative { -1.0 } else { 1.0 };
        let mut relevance: Vec<f64> = cosines.iter().map(|&c| sign * f64::from(c)).collect();
        let low = relevance.iter().copied().fold(f64::INFINITY, f64::min);
        let high = relevance.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for value in &mut relevance {
            *value = if high > low {
                (*value - low + 1e-6) / (high - low)
            } else {
                1.0
            };
        }
        Ok(relevance)
    }
}

impl<B: Backend> EncoderReducer<B> for CdPruner {
    fn needs(&self, _encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        Ok(vec![Tap::Embeddings, Tap::Question])
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError> {
        let cosines = Cosines::new(seen.get(Tap::Embeddings)?)?;
        let relevance = self.relevance(&cosines, seen)?;
        // Squared volume that each token would add to the chosen, and the rows of the Cholesky factor
        // that say how much of it is there already.
        let mut volumes: Vec<f64> = relevance
            .iter()
            .map(|relevance| relevance.powi(2))
            .collect();
        let mut factor: Vec<Vec<f64>> = Vec::with_capacity(keep);
        let mut chosen = Vec::with_capacity(keep);
        while chosen.len() < keep {
            let best = argmax(volumes.iter().copied());
            chosen.push(best);
            let volume = volumes[best];
            if volume > NO_VOLUME {
                let cosines = cosines.row(best)?;
                let kernel = cosines.iter().zip(&relevance);
                let mut row: Vec<f64> = kernel
                    .map(|(&cosine, other)| relevance[best] * f64::from(cosine) * other)
                    .collect();
                for earlier in &factor {
                    let share = earlier[best];
                    let pairs = row.iter_mut().zip(earlier);
                    pairs.for_each(|(value, earlier)| *value -= share * earlier);
                }
                for (value, volume_left) in row.iter_mut().zip(&mut volumes) {
                    *value /= volume.sqrt();
                    *volume_left -= *value * *value;
                }
                factor.push(row);
            }
            volumes[best] = f64::NEG_INFINITY;
        }
        Ok(Reduced::selection(chosen))
    }
}
