use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::gelu;
use burn::tensor::backend::Backend;
use reroute_layers::{Linear, LinearConfig, linears};

use crate::LlavaConfig;

/// The two-layer MLP from vision features to visual tokens (arXiv 2310.03744, §3.3).
#[derive(Module, Debug)]
pub struct Projector<B: Backend> {
    linear_1: Linear<B>,
    linear_2: Linear<B>,
}

linears!(Projector: linear_1, linear_2);

impl<B: Backend> Projector<B> {
    pub(crate) fn new(config: &LlavaConfig, device: &B::Device) -> Self {
        let (vision, text) = (config.feature_size(), config.text.hidden_size);
        let linear = |input| {
            LinearConfig::new(input, text)
                .with_bias(config.projector_bias)
                .init(device)
        };
        Self {
            linear_1: linear(vision),
            linear_2: linear(text),
        }
    }

    /// # Shapes
    /// - `features`: `[feature_size, rows]`, see [`LlavaConfig::feature_size`]
    /// - returns `[text hidden_size, rows]`
    pub fn forward(&self, features: Tensor<B, 2>) -> Tensor<B, 2> {
        self.linear_2.forward(gelu(self.linear_1.forward(features)))
    }
}
