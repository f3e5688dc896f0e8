use std::f64::consts::PI;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

use crate::gradient::{Operation, Unranked, flat, recorded};
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
    if let Some(product) = recorded(SiluProduct::<D>, &[gate.clone().into(), up.clone().into()]) {
        return product;
    }
    let product = with_other(gate, &up, Pairwise::SwishProduct);
    product.unwrap_or_else(|gate| silu(gate) * up)
}

/// `x + y`, the residual connection: in the place of `x` if nothing else refers to it.
pub fn add<B: Backend, const D: usize>(x: Tensor<B, D>, y: Tensor<B, D>) -> Tensor<B, D> {
    with_other(x, &y, Pairwise::Sum).unwrap_or_else(|x| x + y)
}

/// `x · σ(1.702 x)`, the approximation of GELU that CLIP uses (arXiv 1606.08415, §2).
pub fn quick_gelu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    swish(x, 1.702)
}

/// GELU with `tanh` for the error function (arXiv 1606.08415, §2):
/// `x · (1 + tanh u) / 2 = x · σ(2u)`, `u = √(2/π) · (x + 0.044715 x³)`.
pub fn gelu_tanh<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    by_number(x, Curve::GeluTanh, |x| {
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
    by_number(x, Curve::Swish(beta), |x| {
        sigmoid_weighted(x.clone(), x.mul_scalar(-beta))
    })
}

/// A function of each number, in f32: the loop if the numbers are within reach, or else operations.
fn by_number<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    curve: Curve<D>,
    operations: impl FnOnce(Tensor<B, D>) -> Tensor<B, D>,
) -> Tensor<B, D> {
    if let Some(y) = recorded(curve, &[x.clone().into()]) {
        return y;
    }
    let dtype = x.dtype();
    host::changed(x, &curve).unwrap_or_else(|x| operations(x.cast(DType::F32)).cast(dtype))
}

/// What is made of two tensors, number by number.
#[derive(Debug, Clone, Copy)]
enum Pairwise {
    Sum,
    SwishProduct,
}

/// The first of two tensors, changed by the second.
struct With<'a> {
    other: &'a HostTensor,
    how: Pairwise,
}

impl host::Loop for With<'_> {
    fn run<E: host::Number + reroute_kernels::Number>(&self, numbers: &mut [E]) {
        let mut work = |other: &[E]| match self.how {
            Pairwise::Sum => reroute_kernels::add(numbers, other),
            Pairwise::SwishProduct => reroute_kernels::swish_product(numbers, 1.0, other),
        };
        match self.other.slice() {
            Some(other) => work(other),
            None => work(&E::of_singles(self.other.numbers().into_owned())),
        }
    }
}

/// By a loop, if both are within reach; or else the first is given back.
fn with_other<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    other: &Tensor<B, D>,
    how: Pairwise,
) -> Result<Tensor<B, D>, Tensor<B, D>> {
    let is_alike = x.dims() == other.dims() && x.dtype() == other.dtype();
    let other = HostTensor::of(other).packed();
    match is_alike && other.is_here() {
        true => host::changed(x, &With { other: &other, how }),
        false => Err(x),
    }
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

/// A function of each number, to be recorded.
#[derive(Debug, Clone, Copy)]
enum Curve<const D: usize> {
    Swish(f32),
    GeluTanh,
}

impl<const D: usize> host::Loop for Curve<D> {
    fn run<E: host::Number + reroute_kernels::Number>(&self, numbers: &mut [E]) {
        match *self {
            Self::Swish(beta) => reroute_kernels::swish(numbers, beta),
            Self::GeluTanh => reroute_kernels::gelu_tanh(numbers),
        }
    }
}

impl<const D: usize> Operation<1> for Curve<D> {
    fn forward<B: Backend>(&self, [x]: [Unranked<B>; 1]) -> Option<Unranked<B>> {
        let x = x.ranked::<D>();
        Some(match *self {
            Self::Swish(beta) => swish(x, beta).into(),
            Self::GeluTanh => gelu_tanh(x).into(),
        })
    }

    fn needs(&self, wanted: [bool; 1]) -> [bool; 1] {
        wanted
    }

    fn backward(
        &self,
        [x]: [HostTensor; 1],
        gradient: &HostTensor,
        _: [bool; 1],
    ) -> [Option<TensorData>; 1] {
        let (x, mut gradient) = (x.numbers(), gradient.numbers().into_owned());
        match *self {
            Self::Swish(beta) => reroute_kernels::swish_gradient(&x, beta, &mut gradient),
            Self::GeluTanh => reroute_kernels::gelu_tanh_gradient(&x, &mut gradient),
        }
        [Some(flat(gradient))]
    }
}

/// [`silu_product`], to be recorded.
#[derive(Debug, Clone, Copy)]
struct SiluProduct<const D: usize>;

impl<const D: usize> Operation<2> for SiluProduct<D> {
    fn forward<B: Backend>(&self, [gate, up]: [Unranked<B>; 2]) -> Option<Unranked<B>> {
        Some(silu_product(gate.ranked::<D>(), up.ranked()).into())
    }

    fn needs(&self, _: [bool; 2]) -> [bool; 2] {
        [true; 2]
    }

    fn backward(
        &self,
        [gate, up]: [HostTensor; 2],
        gradient: &HostTensor,
        _: [bool; 2],
    ) -> [Option<TensorData>; 2] {
        let [gate, up, gradient] = [&gate, &up, gradient].map(HostTensor::numbers);
        reroute_kernels::swish_product_gradient(&gate, 1.0, &up, &gradient)
            .map(|numbers| Some(flat(numbers)))
    }
}
