use std::borrow::Cow;

use burn::module::{Initializer, Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use half::{bf16, f16};
use reroute_kernels::{Inputs, Weight as Matrix};

use crate::gradient::{Operation, Unranked, flat, recorded};
use crate::host::{self, HostTensor, Number};
use crate::{LowRank, Weight};

/// An affine map with the weight laid out as checkpoints store it.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[out, in]`
    pub weight: Weight<B>,
    /// `[out]`
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// A change of the weight that is kept beside it.
    pub adapter: Option<LowRank<B>>,
}

/// Sizes of a [`Linear`].
#[derive(Debug, Clone, Copy)]
pub struct LinearConfig {
    /// Features of the input.
    pub input: usize,
    /// Features of the output.
    pub output: usize,
    /// Whether a bias is added.
    pub bias: bool,
}

impl LinearConfig {
    /// A map without bias.
    pub fn new(input: usize, output: usize) -> Self {
        Self {
            input,
            output,
            bias: false,
        }
    }

    /// The same map with (or without) a bias.
    pub fn with_bias(self, bias: bool) -> Self {
        Self { bias, ..self }
    }

    /// Builds the module; parameters are lazily random (Kaiming uniform) until loaded.
    pub fn init<B: Backend>(self, device: &B::Device) -> Linear<B> {
        let init = Initializer::KaimingUniform {
            gain: 1.0 / 3f64.sqrt(),
            fan_out_only: false,
        };
        let (fan_in, fan_out) = (Some(self.input), Some(self.output));
        Linear {
            weight: Weight::init(&init, [self.output, self.input], device),
            bias: self
                .bias
                .then(|| init.init_with([self.output], fan_in, fan_out, device)),
            adapter: None,
        }
    }
}

impl<B: Backend> Linear<B> {
    /// `W · x + b`, and what the adapter adds.
    ///
    /// # Shapes
    /// - `x`: `[in, rows]`
    /// - returns `[out, rows]`
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let y = match &self.adapter {
            Some(adapter) => adapter.changed(self.weight.product(x.clone()), x),
            None => self.weight.product(x),
        };
        match &self.bias {
            Some(bias) => add_bias(y, bias.val()),
            None => y,
        }
    }

    /// Adds the adapter to the weight: in f32, rounded once to the weight's type. No gradient reaches the
    /// adapter through it. Codes of fewer bits cannot take it up: there it stays beside them.
    pub fn merge(&mut self) {
        let (Weight::Float(weight), Some(adapter)) = (&self.weight, &self.adapter) else {
            return;
        };
        self.weight = Weight::Float(weight.clone().map(|weight| {
            let (dtype, is_trained) = (weight.dtype(), weight.is_require_grad());
            let merged = adapter.weight(weight);
            merged.cast(dtype).set_require_grad(is_trained)
        }));
        self.adapter = None;
    }
}

/// # Shapes
/// - `x`: `[features, rows]`
/// - `bias`: `[features]`
fn add_bias<B: Backend>(x: Tensor<B, 2>, bias: Tensor<B, 1>) -> Tensor<B, 2> {
    let host = HostTensor::of(&bias);
    let sum = match host.singles() {
        Some(bias) => host::changed(x, &Bias(bias)),
        None => Err(x),
    };
    sum.unwrap_or_else(|x| x + bias.unsqueeze_dim(1))
}

struct Bias<'a>(Cow<'a, [f32]>);

impl host::Loop for Bias<'_> {
    fn run<E: Number + reroute_kernels::Number>(&self, numbers: &mut [E]) {
        reroute_kernels::add_bias(numbers, &self.0);
    }
}

/// `W · x`
///
/// # Shapes
/// - `weight`: `[out, in]`
/// - `x`: `[in, rows]`
/// - returns `[out, rows]`
pub(crate) fn dense_product<B: Backend>(weight: Tensor<B, 2>, x: Tensor<B, 2>) -> Tensor<B, 2> {
    let is_column = x.dims()[1] == 1;
    let output = weight.dims()[0];
    let inputs = [weight.clone().into(), x.clone().into()];
    if let Some(product) = recorded(DenseProduct { output }, &inputs) {
        return product;
    }
    let matrix = HostTensor::of(&weight);
    let product = known(&matrix).and_then(|matrix| host_product(matrix, weight.dims(), &x));
    product.unwrap_or_else(|| match is_column {
        true => matrix_vector(weight, x),
        false => weight.matmul(x),
    })
}

/// The numbers of a weight, if they are within reach.
fn known(weight: &HostTensor) -> Option<Matrix<'_>> {
    let half = (weight.slice().map(Matrix::F16)).or_else(|| weight.slice().map(Matrix::BF16));
    half.or_else(|| weight.slice().map(Matrix::F32))
}

/// The same by kernels, if the inputs are within their reach and fit.
pub(crate) fn host_product<B: Backend>(
    weight: Matrix<'_>,
    [output, input]: [usize; 2],
    x: &Tensor<B, 2>,
) -> Option<Tensor<B, 2>> {
    let [features, rows] = x.dims();
    if features != input {
        return None;
    }
    let numbers = HostTensor::of(x).packed();
    if rows == 1 {
        let y = reroute_kernels::matrix_vector(weight, &numbers.singles()?, output);
        return Some(host::tensor(y, [output, 1], x.dtype(), &x.device()));
    }
    let product = (of_inputs::<f32>(&numbers, weight, input))
        .or_else(|| of_inputs::<f16>(&numbers, weight, input))
        .or_else(|| of_inputs::<bf16>(&numbers, weight, input))?;
    // The shape is the product's own: as many numbers.
    let data = TensorData {
        shape: [output, rows].into(),
        ..product
    };
    let dtype = data.dtype;
    Some(Tensor::from_data(data, (&x.device(), dtype)))
}

/// The product with inputs of this type, in that type, if they are that.
fn of_inputs<E: Number + reroute_kernels::Number>(
    x: &HostTensor,
    weight: Matrix<'_>,
    features: usize,
) -> Option<TensorData> {
    let inputs = Inputs::new(x.slice::<E>()?, features)?;
    let product = inputs.product::<E>(weight);
    let count = product.len();
    Some(TensorData::new(product, [count]))
}

/// The product with a single column, of which a backend's own reads a weight at half the speed.
///
/// # Shapes
/// - `weight`: `[out, in]`
/// - `x`: `[in, 1]`
/// - returns `[out, 1]`
fn matrix_vector<B: Backend>(weight: Tensor<B, 2>, x: Tensor<B, 2>) -> Tensor<B, 2> {
    // A product of a row with Wᵀ streams the weight once; W · column does not.
    let [output, input] = weight.dims();
    let row = x.reshape([1, input]).matmul(weight.transpose());
    row.reshape([output, 1])
}

/// [`dense_product`], to be recorded.
#[derive(Debug, Clone, Copy)]
struct DenseProduct {
    output: usize,
}

impl Operation<2> for DenseProduct {
    fn forward<B: Backend>(&self, [weight, x]: [Unranked<B>; 2]) -> Option<Unranked<B>> {
        let x = x.ranked::<2>();
        let is_empty = self.output == 0 || x.dims().contains(&0);
        (!is_empty).then(|| dense_product(weight.ranked(), x).into())
    }

    /// Each is made of the other.
    fn needs(&self, [of_weight, of_x]: [bool; 2]) -> [bool; 2] {
        [of_x, of_weight]
    }

    fn backward(
        &self,
        [weight, x]: [HostTensor; 2],
        gradient: &HostTensor,
        _: [bool; 2],
    ) -> [Option<TensorData>; 2] {
        let of_weight = (to_weight::<f32>(gradient, &x, self.output))
            .or_else(|| to_weight::<f16>(gradient, &x, self.output))
            .or_else(|| to_weight::<bf16>(gradient, &x, self.output));
        let of_x = known(&weight).and_then(|weight| to_inputs(weight, gradient, self.output));
        [of_weight, of_x]
    }
}

/// What a product gives back to its inputs, in the type of its gradient.
pub(crate) fn to_inputs(
    weight: Matrix<'_>,
    gradient: &HostTensor,
    output: usize,
) -> Option<TensorData> {
    fn of<E: Number + reroute_kernels::Number>(
        weight: Matrix<'_>,
        gradient: &HostTensor,
        output: usize,
    ) -> Option<TensorData> {
        let gradient = Inputs::new(gradient.slice::<E>()?, output)?;
        Some(flat(gradient.product_of_transposed::<E>(weight)))
    }
    of::<f32>(weight, gradient, output)
        .or_else(|| of::<f16>(weight, gradient, output))
        .or_else(|| of::<bf16>(weight, gradient, output))
}

/// What it gives back to its weight, if the numbers are of this type.
fn to_weight<E: Number + reroute_kernels::Number>(
    gradient: &HostTensor,
    x: &HostTensor,
    output: usize,
) -> Option<TensorData> {
    let (gradient, x) = (gradient.slice::<E>()?, x.slice::<E>()?);
    let rows = gradient.len() / output;
    Some(flat(reroute_kernels::product_with_transposed(
        gradient, x, rows,
    )))
}
