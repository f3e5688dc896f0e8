use burn::tensor::backend::Backend;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Reduction, Seen, Tap};
use crate::{About, ReducerError, top_k};

/// Tokens by chance; the same for the same seed and number of tokens. A baseline.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandomTokens {
    /// Seed of the random numbers.
    pub seed: u64,
}

impl BuiltIn for RandomTokens {
    const ABOUT: About = About {
        description: "tokens by chance, before the decoder",
        source: "baseline",
        ..About::NOTHING
    };
}

impl<B: Backend> EncoderReducer<B> for RandomTokens {
    fn needs(&self, _: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        Ok(Vec::new())
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let scores: Vec<f32> = (0..seen.tokens()).map(|_| random.random()).collect();
        Ok(Reduction::selection(top_k(&scores, keep)?))
    }
}
