use burn::module::{Initializer, Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use kernels::Weight;

use crate::host::{self, HostTensor};

/// An affine map with the weight laid out as checkpoints store it.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[out, in]`
    pub weight: Param<Tensor<B, 2>>,
    /// `[out]`
    pub bias: Option<Param<Tensor<B, 1>>>,
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
            weight: init.init_with([self.output, self.input], fan_in, fan_out, device),
            bias: self
                .bias
                .then(|| init.init_with([self.output], fan_in, fan_out, device)),
        }
    }
}

impl<B: Backend> Linear<B> {
    /// `W · x + b`.
    ///
    /// # Shapes
    /// - `x`: `[in, rows]`
    /// - returns `[out, rows]`
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let weight = self.weight.val();
        let y = match x.dims() {
            [_, 1] => matrix_vector(weight, x),
            _ => weight.matmul(x),
        };
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze_dim(1),
            None => y,
        }
    }
}

/// The product with a single column.
///
/// # Shapes
/// - `weight`: `[out, in]`
/// - `x`: `[in, 1]`
/// - returns `[out, 1]`
fn matrix_vector<B: Backend>(weight: Tensor<B, 2>, x: Tensor<B, 2>) -> Tensor<B, 2> {
    let [output, input] = weight.dims();
    let (matrix, column) = (
        HostTensor::of(&weight),
        HostTensor::of(&x.clone().cast(DType::F32)),
    );
    let single = matrix.f32s().map(Weight::F32);
    let known = single.or_else(|| matrix.f16s().map(Weight::F16));
    if let (Some(matrix), Some(column)) = (known, column.f32s()) {
        let y = kernels::matrix_vector(matrix, column, output);
        return host::tensor(y, [output, 1], &x.device()).cast(x.dtype());
    }
    // A product of a row with Wᵀ streams the weight once; W · column does not.
    let row = x.reshape([1, input]).matmul(weight.transpose());
    row.reshape([output, 1])
}
