use burn::module::{Initializer, Module, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reroute_layers::{LayerNorm, RmsNorm};

/// The reference has it written into every norm of the towers.
const EPSILON: f64 = 1e-6;

/// Layer normalisation, or root-mean-square normalisation where it has no bias.
#[derive(Module, Debug)]
pub(super) struct Norm<B: Backend> {
    /// `[features]`
    weight: Param<Tensor<B, 1>>,
    /// `[features]`
    bias: Option<Param<Tensor<B, 1>>>,
}

impl<B: Backend> Norm<B> {
    /// Unit weights, zero biases.
    pub(super) fn new(features: usize, bias: bool, device: &B::Device) -> Self {
        Self {
            weight: Initializer::Ones.init([features], device),
            bias: bias.then(|| Initializer::Zeros.init([features], device)),
        }
    }

    /// Normalises every column.
    ///
    /// # Shapes
    /// - `x`: `[features, rows]`
    /// - returns `[features, rows]`
    pub(super) fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let (weight, epsilon) = (self.weight.clone(), EPSILON);
        match self.bias.clone() {
            Some(bias) => {
                let norm = LayerNorm {
                    weight,
                    bias,
                    epsilon,
                };
                norm.forward(x)
            }
            None => RmsNorm { weight, epsilon }.forward(x),
        }
    }
}
