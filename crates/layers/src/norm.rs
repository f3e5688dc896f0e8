use burn::module::{Initializer, Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::host::{self, HostTensor};

/// Root-mean-square normalisation (arXiv 1910.07467): `x / √(mean(x²) + ε) · weight`.
#[derive(Module, Debug)]
pub struct RmsNorm<B: Backend> {
    /// `[features]`
    pub weight: Param<Tensor<B, 1>>,
    /// ε, added to the mean square.
    pub epsilon: f64,
}

/// Sizes of an [`RmsNorm`].
#[derive(Debug, Clone, Copy)]
pub struct RmsNormConfig {
    /// Features that are normalised together.
    pub features: usize,
    /// ε, added to the mean square.
    pub epsilon: f64,
}

impl RmsNormConfig {
    /// Builds the module with unit weights.
    pub fn init<B: Backend>(self, device: &B::Device) -> RmsNorm<B> {
        RmsNorm {
            weight: Initializer::Ones.init([self.features], device),
            epsilon: self.epsilon,
        }
    }
}

impl<B: Backend> RmsNorm<B> {
    /// Normalises every column; statistics are computed in f32, as the reference does.
    ///
    /// # Shapes
    /// - `x`: `[.., features, rows]`; the second-to-last axis is normalised
    /// - returns the shape of `x`
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        if D == 2 {
            let (input, weight) = (HostTensor::of(&x), HostTensor::of(&self.weight.val()));
            if let (Some(input), Some(weight)) = (input.singles(), weight.singles()) {
                let normed = reroute_kernels::rms_norm(&input, &weight, self.epsilon as f32);
                return host::tensor(normed, x.dims(), x.dtype(), &x.device());
            }
        }
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let mean_square = (x.clone() * x.clone()).mean_dim(D - 2);
        let normed = x / mean_square.add_scalar(self.epsilon).sqrt();
        normed.cast(dtype) * per_feature(self.weight.val())
    }
}

/// Layer normalisation (arXiv 1607.06450): `(x − mean) / √(var + ε) · weight + bias`.
#[derive(Module, Debug)]
pub struct LayerNorm<B: Backend> {
    /// `[features]`
    pub weight: Param<Tensor<B, 1>>,
    /// `[features]`
    pub bias: Param<Tensor<B, 1>>,
    /// ε, added to the variance.
    pub epsilon: f64,
}

/// Sizes of a [`LayerNorm`].
#[derive(Debug, Clone, Copy)]
pub struct LayerNormConfig {
    /// Features that are normalised together.
    pub features: usize,
    /// ε, added to the variance.
    pub epsilon: f64,
}

impl LayerNormConfig {
    /// Builds the module with unit weights and zero biases.
    pub fn init<B: Backend>(self, device: &B::Device) -> LayerNorm<B> {
        LayerNorm {
            weight: Initializer::Ones.init([self.features], device),
            bias: Initializer::Zeros.init([self.features], device),
            epsilon: self.epsilon,
        }
    }
}

impl<B: Backend> LayerNorm<B> {
    /// Normalises every column, in f32.
    ///
    /// # Shapes
    /// - `x`: `[features, rows]`
    /// - returns `[features, rows]`
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let (input, weight) = (HostTensor::of(&x), HostTensor::of(&self.weight.val()));
        let bias = HostTensor::of(&self.bias.val());
        if let (Some(input), Some(weight), Some(bias)) =
            (input.singles(), weight.singles(), bias.singles())
        {
            let normed = reroute_kernels::layer_norm(&input, &weight, &bias, self.epsilon as f32);
            return host::tensor(normed, x.dims(), x.dtype(), &x.device());
        }
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let centred = x.clone() - x.mean_dim(0);
        let variance = (centred.clone() * centred.clone()).mean_dim(0);
        let normed = centred / variance.add_scalar(self.epsilon).sqrt();
        normed.cast(dtype) * per_feature(self.weight.val()) + per_feature(self.bias.val())
    }
}

/// `[features]` → `[1, .., features, 1]`, to broadcast over rows.
fn per_feature<B: Backend, const D: usize>(vector: Tensor<B, 1>) -> Tensor<B, D> {
    let mut shape = [1; D];
    shape[D - 2] = vector.dims()[0];
    vector.reshape(shape)
}
