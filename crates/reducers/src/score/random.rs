use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use super::{DecisionView, Rule, Scorer};
use crate::ReducerError;
use crate::device::upload;

/// Scores drawn by chance, anew at every decision; the same for the same seed, decision layer and
/// number of rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Random {
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Rule for Random {}

impl<B: Backend> Scorer<B> for Random {
    fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
        // One stream per decision layer: stages must not repeat each other's draw.
        let seed = self.seed.wrapping_mul(1 << 16) ^ view.layer() as u64;
        let mut random = StdRng::seed_from_u64(seed);
        let scores: Vec<f32> = (0..view.rows()).map(|_| random.random()).collect();
        Ok(upload(&scores, &view.hidden_states().device()))
    }
}
