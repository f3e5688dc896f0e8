use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::encoder::{Tap, Taps};

/// The layers whose received attention is asked for.
pub fn received_layers(taps: &[Tap]) -> Vec<usize> {
    let layer = |tap: &Tap| match *tap {
        Tap::ReceivedAttention { layer } => Some(layer),
        _ => None,
    };
    taps.iter().filter_map(layer).collect()
}

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
        // Number 0 is the input of the tower, number `layer + 1` the output of the layer.
        let is_first = first == 0 && layer == 0;
        let is_output = (first..=last).contains(&layer.saturating_add(1));
        let share = 1.0 / last.saturating_sub(first).saturating_add(1) as f64;
        let shown = [(is_output, output), (is_first, input)].into_iter();
        let shown = shown.filter(|&(is_shown, _)| is_shown);
        let shown = shown.map(|(_, x)| rows(x) * share);
        let Some(sum) = shown.reduce(|sum, x| sum + x) else {
            return;
        };
        let sum = match seen.remove(&tap) {
            Some(before) => before + sum,
            None => sum,
        };
        seen.insert(tap, sum);
    }
}
