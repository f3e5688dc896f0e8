use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// A layer of a vision tower at work, for those who look inside. All are `[hidden_size, rows]`.
#[derive(Debug, Clone)]
pub struct Inspected<B: Backend> {
    /// Index of the layer.
    pub layer: usize,
    /// What enters it.
    pub input: Tensor<B, 2>,
    /// Its queries, not scaled, heads one below the other.
    pub queries: Tensor<B, 2>,
    /// Its keys, heads one below the other.
    pub keys: Tensor<B, 2>,
    /// What leaves it.
    pub output: Tensor<B, 2>,
    /// `[1, rows]`: attention probability that each row receives, the mean over heads, summed over
    /// the rows that attend to it; for the layers for which it was asked.
    pub received: Option<Tensor<B, 2>>,
}
