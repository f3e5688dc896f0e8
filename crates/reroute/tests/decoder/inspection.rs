//! What is only looked at: drift, and the type that positions pass through.

use burn::tensor::{DType, Tensor};
use reducers::{Action, ReducerError, Scorer, Standing};

use crate::support::{B, DEVICE, decoder, observed, prompt, schedule};

/// Ranks by the place in the prompt, the last first.
struct Backwards;

impl Scorer<B> for Backwards {
    fn score(&self, standing: &dyn Standing<B>) -> Result<Tensor<B, 1>, ReducerError> {
        let scores: Vec<f32> = (0..standing.rows()).map(|row| row as f32).collect();
        Ok(Tensor::from_data(scores.as_slice(), (&DEVICE, DType::F32)))
    }
}

#[test]
fn drift_is_that_of_the_rule_that_ranks() {
    let (decoder, prompt) = (decoder(3), prompt(&[9], 3));
    let schedule = schedule(Action::Reroute, &[(1, 2), (3, 2)]);
    let own = decoder.drift(Some(&Backwards), &prompt, &schedule).unwrap();
    assert_eq!(own.len(), 1);
    assert_eq!(own[0].tokens, (0..7).collect::<Vec<_>>());
    let built_in = decoder.drift(None, &prompt, &schedule).unwrap();
    let routed = observed(&decoder, &prompt, &schedule).unwrap();
    let kept = &routed.trace.decisions[0].selected;
    let waited: Vec<usize> = (0..9).filter(|token| !kept.contains(token)).collect();
    assert_eq!(built_in[0].tokens, waited);
    assert_ne!(own[0].tokens, built_in[0].tokens);
}
