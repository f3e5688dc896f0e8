use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::encoder::{Tap, Taps};

/// A tap that is a mean over hidden states, while a tower runs.
pub struct MeanHidden;

impl MeanHidden {
    /// Adds what layer `layer` contributes to a mean over hidden states, the input of the tower with
    /// the first; `rows` are those of an input or output of the layer that the tap shows.
    pub fn add<B: Backend>(
        seen: &mut Taps<B>,
        tap: Tap,
        layer: usize,
        [input, output]: [&Tensor<B, 2>; 2],
        rows: impl Fn(&Tensor<B, 2>) -> Tensor<B, 2>,
    ) {
        let (Tap::MeanHidden { first, last } | Tap::MeanHiddenInWindows { first, last }) = tap
        else {
            return;
        };
        let after = layer + 1;
        if !(first..=last).contains(&after) {
            return;
        }
        let share = 1.0 / (last - first + 1) as f64;
        let mut sum = rows(output) * share;
        if first == 0 && layer == 0 {
            sum = sum + rows(input) * share;
        }
        let sum = match seen.remove(&tap) {
            Some(before) => before + sum,
            None => sum,
        };
        seen.insert(tap, sum);
    }
}
