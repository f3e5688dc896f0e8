use burn::module::{Initializer, Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use half::bf16;

use crate::gradient::{Operation, Unranked, flat, run};
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
        let rms = Rms {
            epsilon: self.epsilon as f32,
        };
        if D == 2
            && let Some(normed) = run(rms, [x.clone().into(), self.weight.val().into()])
        {
            return normed;
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
        let centred = Centred {
            epsilon: self.epsilon as f32,
        };
        let parameters = [&self.weight, &self.bias].map(|parameter| parameter.val().into());
        let [weight, bias] = parameters;
        if let Some(normed) = run(centred, [x.clone().into(), weight, bias]) {
            return normed;
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

/// As many numbers as another tensor has, in its shape.
fn like<B: Backend>(numbers: Vec<bf16>, x: &Tensor<B, 2>) -> Tensor<B, 2> {
    let data = TensorData::new(numbers, x.dims());
    Tensor::from_data(data, (&x.device(), DType::BF16))
}

/// [`RmsNorm`] by a kernel.
#[derive(Debug, Clone, Copy)]
struct Rms {
    epsilon: f32,
}

impl Operation<2> for Rms {
    fn forward<B: Backend>(&self, [x, weight]: [Unranked<B>; 2]) -> Option<Unranked<B>> {
        let (x, weight) = (x.ranked::<2>(), weight.ranked::<1>());
        let (input, weight) = (HostTensor::of(&x), HostTensor::of(&weight));
        let weight = weight.singles()?;
        if let Some(input) = input.slice::<bf16>() {
            let normed = reroute_kernels::rms_norm(input, &weight, self.epsilon);
            return Some(like(normed, &x).into());
        }
        let normed = reroute_kernels::rms_norm(&input.singles()?, &weight, self.epsilon);
        Some(host::tensor::<B, 2>(normed, x.dims(), x.dtype(), &x.device()).into())
    }

    fn needs(&self, _: [bool; 2]) -> [bool; 2] {
        [true; 2]
    }

    fn backward(
        &self,
        [x, weight]: [HostTensor; 2],
        gradient: &HostTensor,
        _: [bool; 2],
    ) -> [Option<TensorData>; 2] {
        let [x, weight, gradient] = [&x, &weight, gradient].map(HostTensor::numbers);
        reroute_kernels::rms_norm_gradient(&x, &weight, self.epsilon, &gradient)
            .map(|numbers| Some(flat(numbers)))
    }
}

/// [`LayerNorm`] by a kernel.
#[derive(Debug, Clone, Copy)]
struct Centred {
    epsilon: f32,
}

impl Operation<3> for Centred {
    fn forward<B: Backend>(&self, [x, weight, bias]: [Unranked<B>; 3]) -> Option<Unranked<B>> {
        let (x, weight, bias) = (x.ranked::<2>(), weight.ranked::<1>(), bias.ranked::<1>());
        let input = HostTensor::of(&x);
        let [weight, bias] = [weight, bias].map(|x| HostTensor::of(&x));
        let (weight, bias) = (weight.singles()?, bias.singles()?);
        if let Some(input) = input.slice::<bf16>() {
            let normed = reroute_kernels::layer_norm(input, &weight, &bias, self.epsilon);
            return Some(like(normed, &x).into());
        }
        let normed = reroute_kernels::layer_norm(&input.singles()?, &weight, &bias, self.epsilon);
        Some(host::tensor::<B, 2>(normed, x.dims(), x.dtype(), &x.device()).into())
    }

    fn needs(&self, _: [bool; 3]) -> [bool; 3] {
        [true, true, false]
    }

    fn backward(
        &self,
        [x, weight, _]: [HostTensor; 3],
        gradient: &HostTensor,
        _: [bool; 3],
    ) -> [Option<TensorData>; 3] {
        let [x, weight, gradient] = [&x, &weight, gradient].map(HostTensor::numbers);
        reroute_kernels::layer_norm_gradient(&x, &weight, self.epsilon, &gradient)
            .map(|numbers| Some(flat(numbers)))
    }
}
