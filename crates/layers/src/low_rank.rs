use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Distribution, Tensor, TensorData};
use half::{bf16, f16};
use reroute_kernels::{Inputs, Weight, product_with_transposed};

use crate::gradient::{Operation, Unranked, flat, run};
use crate::host::{HostTensor, Number};
use crate::linear::dense_product as product;

/// A low-rank change of a weight (LoRA, arXiv 2106.09685): `W` becomes `W + factor · up · down`, and with a gain
/// every row of that is multiplied by its number.
///
/// Its parameters may be of another type than the weight: they are f32 beside a weight of half
/// precision, whose eight or eleven bits would swallow the steps of an optimizer.
#[derive(Module, Debug)]
pub struct LowRank<B: Backend> {
    /// `[rank, in]`; PEFT calls it `lora_A`.
    pub down: Param<Tensor<B, 2>>,
    /// `[out, rank]`; PEFT calls it `lora_B`.
    pub up: Param<Tensor<B, 2>>,
    /// `[out]`: what every row of the changed weight is multiplied by (DoRA, arXiv 2402.09353). It is not
    /// trained.
    pub gain: Option<Param<Tensor<B, 1>>>,
    /// How much it counts.
    #[module(skip)]
    pub scaling: Scaling,
    /// Share of the inputs that are left out while it is trained, on a backend with gradients.
    #[module(skip)]
    pub dropout: f64,
}

/// How much a low-rank change counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    /// What is divided.
    pub alpha: f64,
    /// By the root of the rank (rsLoRA, arXiv 2312.03732) instead of by the rank.
    pub rank_stabilized: bool,
}

impl Scaling {
    /// The factor of a change of this rank: `alpha / rank`, or `alpha / √rank`.
    pub fn factor(self, rank: usize) -> f64 {
        let rank = rank as f64;
        match self.rank_stabilized {
            true => self.alpha / rank.sqrt(),
            false => self.alpha / rank,
        }
    }
}

impl<B: Backend> LowRank<B> {
    /// A change that is to be trained.
    ///
    /// # Shapes
    /// - `down`: `[rank, in]`
    /// - `up`: `[out, rank]`
    pub fn new(down: Tensor<B, 2>, up: Tensor<B, 2>, scaling: Scaling) -> Self {
        Self {
            down: Param::from_tensor(down),
            up: Param::from_tensor(up),
            gain: None,
            scaling,
            dropout: 0.0,
        }
    }

    /// The same with a share of the inputs left out while it is trained: others in every forward pass, drawn
    /// by the backend, and what is left made larger by as much.
    pub fn with_dropout(self, dropout: f64) -> Self {
        Self { dropout, ..self }
    }

    /// The same where the rows of the changed weight have these lengths: the gain of row `i` is
    /// `magnitudes[i] / ‖(W + factor · up · down)[i]‖` (DoRA, equation 5).
    ///
    /// # Shapes
    /// - `magnitudes`: `[out]`, f32
    /// - `weight`: `[out, in]`
    pub fn with_magnitudes(mut self, magnitudes: Tensor<B, 1>, weight: Tensor<B, 2>) -> Self {
        let changed = self.weight(weight);
        let lengths = changed.powi_scalar(2).sum_dim(1).sqrt().squeeze_dim(1);
        let gain = Param::from_tensor(magnitudes / lengths);
        self.gain = Some(gain.set_require_grad(false));
        self
    }

    /// Several changes of the same weight as one, each as much as it counts; `None` if there are none, or one
    /// of several changes the lengths of rows.
    pub fn sum(mut changes: Vec<Self>) -> Option<Self> {
        if changes.len() < 2 {
            return changes.pop();
        }
        if changes.iter().any(|change| change.gain.is_some()) {
            return None;
        }
        let up = |change: &Self| change.up.val().mul_scalar(change.factor());
        let down = Tensor::cat(changes.iter().map(|change| change.down.val()).collect(), 0);
        let up = Tensor::cat(changes.iter().map(up).collect(), 1);
        let scaling = Scaling {
            alpha: down.dims()[0] as f64,
            rank_stabilized: false,
        };
        Some(Self::new(down.detach(), up.detach(), scaling))
    }

    /// Columns of `up`, rows of `down`.
    pub fn rank(&self) -> usize {
        self.down.lazy_shape()[0]
    }

    /// What the product of the weight changes by: `factor · up · (down · x)`.
    ///
    /// # Shapes
    /// - `x`: `[in, rows]`
    /// - returns `[out, rows]`, of the type of `x`
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = match self.dropout > 0.0 && B::ad_enabled(&x.device()) {
            true => {
                let kept = 1.0 - self.dropout;
                let drawn = x.random_like(Distribution::Bernoulli(kept));
                x * drawn.div_scalar(kept)
            }
            false => x,
        };
        let (dtype, down, up) = (x.dtype(), self.down.val(), self.up.val());
        let change = Change {
            sizes: [up.dims()[0], down.dims()[0], down.dims()[1]],
            factor: self.factor() as f32,
        };
        let inputs = [down.clone().into(), up.clone().into(), x.clone().into()];
        // A single row is multiplied by loops of its own.
        if x.dims()[1] > 1
            && let Some(y) = run(change, inputs)
        {
            return y;
        }
        let x = x.cast(down.dtype());
        let inner = product(down, x).mul_scalar(self.factor());
        product(up, inner).cast(dtype)
    }

    /// `W · x`, given as `product`, with the weight changed.
    ///
    /// # Shapes
    /// - `product`: `[out, rows]`
    /// - `x`: `[in, rows]`
    /// - returns `[out, rows]`, of the type of `product`
    pub fn changed(&self, product: Tensor<B, 2>, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let dtype = product.dtype();
        self.lengthened(product + self.forward(x), dtype)
    }

    /// The changed weight, in f32 and without gradients.
    ///
    /// # Shapes
    /// - `weight`: `[out, in]`
    /// - returns `[out, in]`, f32
    pub fn weight(&self, weight: Tensor<B, 2>) -> Tensor<B, 2> {
        let change = self.change().detach().cast(DType::F32);
        self.lengthened(weight.detach().cast(DType::F32) + change, DType::F32)
    }

    /// Rows times their gains.
    fn lengthened(&self, x: Tensor<B, 2>, dtype: DType) -> Tensor<B, 2> {
        match &self.gain {
            Some(gain) => x * gain.val().cast(dtype).unsqueeze_dim(1),
            None => x,
        }
    }

    /// What the weight changes by: `factor · up · down`.
    ///
    /// # Shapes
    /// - returns `[out, in]`
    pub fn change(&self) -> Tensor<B, 2> {
        let product = self.up.val().matmul(self.down.val());
        product.mul_scalar(self.factor())
    }

    fn factor(&self) -> f64 {
        self.scaling.factor(self.rank())
    }
}

/// [`LowRank::forward`] by kernels: parameters in f32, inputs of any type.
#[derive(Debug, Clone, Copy)]
struct Change {
    /// `[out, rank, in]`
    sizes: [usize; 3],
    factor: f32,
}

impl Change {
    /// `factor · down · x`
    fn inner<E: Number + reroute_kernels::Number>(self, down: &[f32], x: &[E]) -> Option<Vec<f32>> {
        let inner = Inputs::new(x, self.sizes[2])?.product(Weight::F32(down));
        Some(self.scaled(inner))
    }

    fn scaled(self, mut x: Vec<f32>) -> Vec<f32> {
        x.iter_mut().for_each(|x| *x *= self.factor);
        x
    }

    /// The result, if the inputs are of this type.
    fn result<E: Number + reroute_kernels::Number>(
        self,
        [down, up]: [&[f32]; 2],
        x: &HostTensor,
    ) -> Option<TensorData> {
        let inner = self.inner(down, x.slice::<E>()?)?;
        let inner = Inputs::new(&inner, self.sizes[1])?;
        Some(flat(inner.product::<E>(Weight::F32(up))))
    }

    /// What it gives back, if its gradient is of this type.
    fn give_back<E: Number + reroute_kernels::Number>(
        self,
        [down, up, x]: [&HostTensor; 3],
        gradient: &HostTensor,
        [of_down, of_up, of_x]: [bool; 3],
    ) -> Option<[Option<TensorData>; 3]> {
        let [output, rank, _] = self.sizes;
        let given = gradient.slice::<E>()?;
        let rows = given.len() / output.max(1);
        let to_inner = |up: &[f32]| {
            let given = Inputs::new(given, output)?.product_of_transposed(Weight::F32(up));
            Some(self.scaled(given))
        };
        let to_inner = (of_down || of_x).then(|| to_inner(&up.numbers())).flatten();
        let to_down = |inner: &[f32]| flat(product_with_transposed(inner, &x.numbers(), rows));
        let to_x = |inner: &[f32]| {
            let inner = Inputs::new(inner, rank)?;
            let down = down.numbers();
            Some(flat(inner.product_of_transposed::<E>(Weight::F32(&down))))
        };
        let to_up = || {
            let inner = self.inner(&down.numbers(), x.slice::<E>()?)?;
            Some(flat(product_with_transposed(
                &gradient.numbers(),
                &inner,
                rows,
            )))
        };
        Some([
            to_inner.as_deref().filter(|_| of_down).map(to_down),
            of_up.then(to_up).flatten(),
            to_inner.as_deref().filter(|_| of_x).and_then(to_x),
        ])
    }
}

impl Operation<3> for Change {
    fn forward<B: Backend>(&self, [down, up, x]: [Unranked<B>; 3]) -> Option<Unranked<B>> {
        let (down, up, x) = (down.ranked::<2>(), up.ranked::<2>(), x.ranked::<2>());
        let [output, rank, input] = self.sizes;
        let ([features, rows], device) = (x.dims(), x.device());
        if [features, up.dims()[1]] != [input, rank] {
            return None;
        }
        let [down, up, x] = [&down, &up, &x].map(|x| HostTensor::of(x).packed());
        let parameters = [down.slice()?, up.slice()?];
        let data = (self.result::<f32>(parameters, &x))
            .or_else(|| self.result::<f16>(parameters, &x))
            .or_else(|| self.result::<bf16>(parameters, &x))?;
        let data = TensorData {
            shape: [output, rows].into(),
            ..data
        };
        let dtype = data.dtype;
        Some(Tensor::<B, 2>::from_data(data, (&device, dtype)).into())
    }

    fn needs(&self, [of_down, of_up, of_x]: [bool; 3]) -> [bool; 3] {
        [of_up || of_x, of_down || of_x, of_down || of_up]
    }

    fn backward(
        &self,
        inputs: [HostTensor; 3],
        gradient: &HostTensor,
        wanted: [bool; 3],
    ) -> [Option<TensorData>; 3] {
        let inputs = inputs.each_ref();
        (self.give_back::<f32>(inputs, gradient, wanted))
            .or_else(|| self.give_back::<f16>(inputs, gradient, wanted))
            .or_else(|| self.give_back::<bf16>(inputs, gradient, wanted))
            .unwrap_or_default()
    }
}
