use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::{DecisionView, Rule, Scorer};
use crate::ReducerError;
use crate::device::upload;

/// What the reduction before the decoder gave each token.
pub(super) struct Encoder;

impl Rule for Encoder {}

impl<B: Backend> Scorer<B> for Encoder {
    fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
        let salience = view.salience().ok_or(ReducerError::NoSalience)?;
        let mut scores = vec![0.0; view.rows()];
        for (&row, salience) in view.candidates().iter().zip(salience) {
            scores[row] = salience;
        }
        Ok(upload(&scores, &view.hidden_states().device()))
    }
}
