use std::f64::consts::PI;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::host::{self, HostTensor};

/// `x · σ(x)` (SiLU, also "swish", arXiv 1702.03118).
pub fn silu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    swish(x, 1.0)
}

/// `silu(gate) · up`, the gate of SwiGLU (arXiv 2002.05202).
///
/// # Shapes
/// - `gate`, `up`: the same
pub fn silu_product<B: Backend, const D: usize>(
    gate: Tensor<B, D>,
    up: Tensor<B, D>,
) -> Tensor<B, D> {
    let host = HostTensor::of(&up);
    let product = match host.singles() {
        Some(up) => host::in_singles(gate, |gate| reroute_kernels::swish_product(gate, 1.0, &up)),
        None => Err(gate),
    };
    product.unwrap_or_else(|gate| silu(gate) * up)
}

/// `x · σ(1.702 x)`, the approximation of GELU that CLIP uses (arXiv 1606.08415, §2).
pub fn quick_gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    swish(x, 1.702)
}

/// GELU with `tanh` for the error function (arXiv 1606.08415, §2):
/// `x · (1 + tanh u) / 2 = x · σ(2u)`, `u = √(2/π) · (x + 0.044715 x³)`.
pub fn gelu_tanh<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    by_number(x, reroute_kernels::gelu_tanh, |x| {
        let scale = -(8.0 / PI).sqrt();
        let square = x.clone() * x.clone();
        sigmoid_weighted(
            x.clone(),
            x * square.mul_scalar(0.044715 * scale).add_scalar(scale),
        )
    })
}

/// `x · σ(βx)`
fn swish<B: Backend, const D: usize>(x: Tensor<B, D>, beta: f32) -> Tensor<B, D> {
    by_number(
        x,
        |x| reroute_kernels::swish(x, beta),
        |x| sigmoid_weighted(x.clone(), x.mul_scalar(-beta)),
    )
}

/// A function of each number, in f32: the loop if the numbers are within reach, or else operations.
fn by_number<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    kernel: impl FnOnce(&mut [f32]),
    operations: impl FnOnce(Tensor<B, D>) -> Tensor<B, D>,
) -> Tensor<B, D> {
    let dtype = x.dtype();
    host::in_singles(x, kernel).unwrap_or_else(|x| operations(x.cast(DType::F32)).cast(dtype))
}

/// Largest exponent: its power is finite in f32, and `x` divided by it as good as zero.
const MAX_EXPONENT: f64 = 80.0;

/// `x / (1 + e^exponent)`, which is `x · σ(−exponent)`: on CPU backends about half of the time of the
/// sigmoid form. The exponent is bounded so that gradients stay finite too.
fn sigmoid_weighted<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    exponent: Tensor<B, D>,
) -> Tensor<B, D> {
    let power = exponent.clamp_max(MAX_EXPONENT).exp();
    x / power.add_scalar(1.0)
}
