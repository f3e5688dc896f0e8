use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// Visual tokens of images, or of videos, side by side.
#[derive(Debug, Clone)]
pub struct VisionOutput<B: Backend> {
    /// `[hidden_size, tokens]`: visual tokens row by row, frame after frame, image after image.
    pub tokens: Tensor<B, 2>,
    /// One `[hidden_size, tokens]` for each of the decoder's first layers (DeepStack, arXiv 2406.04334);
    /// empty where the tower makes none.
    pub deepstack: Vec<Tensor<B, 2>>,
}
