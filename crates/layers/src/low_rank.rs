use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::linear::product;

/// A low-rank change of a weight (LoRA, arXiv 2106.09685): `factor · up · down`.
///
/// Its parameters may be of another type than the weight: they are f32 beside a weight of half
/// precision, whose eight or eleven bits would swallow the steps of an optimizer.
#[derive(Module, Debug)]
pub struct LowRank<B: Backend> {
    /// `[rank, in]`; PEFT calls it `lora_A`.
    pub down: Param<Tensor<B, 2>>,
    /// `[out, rank]`; PEFT calls it `lora_B`.
    pub up: Param<Tensor<B, 2>>,
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
            scaling,
        }
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
