use std::f64::consts::PI;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

/// `x · σ(x)` (SiLU, also "swish", arXiv 1702.03118).
pub fn silu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    swish(x, 1.0)
}

/// `x · σ(1.702 x)`, the approximation of GELU that CLIP uses (arXiv 1606.08415, §2).
pub fn quick_gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    swish(x, 1.702)
}

/// GELU with `tanh` for the error function (arXiv 1606.08415, §2):
/// `x · (1 + tanh u) / 2 = x · σ(2u)`, `u = √(2/π) · (x + 0.044715 x³)`.
pub fn gelu_tanh<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let scale = -(8.0 / PI).sqrt();
    sigmoid_weighted(x, |x| {
        let square = x.clone() * x.clone();
        x * square.mul_scalar(0.044715 * scale).add_scalar(scale)
    })
}

/// `x · σ(βx)`
fn swish<B: Backend, const D: usize>(x: Tensor<B, D>, beta: f64) -> Tensor<B, D> {
    sigmoid_weighted(x, |x| x.mul_scalar(-beta))
}

/// Largest exponent: its power is finite in f32, and `x` divided by it as good as zero.
const MAX_EXPONENT: f64 = 80.0;

/// `x / (1 + e^exponent(x))`, which is `x · σ(−exponent(x))`, in f32: on CPU backends about half of
/// the time of the sigmoid form. The exponent is bounded so that gradients stay finite too.
fn sigmoid_weighted<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    exponent: impl FnOnce(Tensor<B, D>) -> Tensor<B, D>,
) -> Tensor<B, D> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let power = exponent(x.clone()).clamp_max(MAX_EXPONENT).exp();
    (x / power.add_scalar(1.0)).cast(dtype)
}
