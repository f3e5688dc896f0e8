use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

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
        }
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
        let (dtype, down) = (x.dtype(), self.down.val());
        let x = x.cast(down.dtype());
        let inner = product(down, x).mul_scalar(self.factor());
        product(self.up.val(), inner).cast(dtype)
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
