use std::borrow::Cow;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::gradient::{Operation, Unranked, flat, recorded, untracked};
use crate::host::{self, HostTensor};

/// Rotary position table (RoFormer, arXiv 2104.09864), in the "rotate half" convention of Hugging
/// Face checkpoints: channel `i` is paired with channel `i + head_dim / 2`.
///
/// Built once per forward pass from explicit positions, shared by all layers.
#[derive(Debug, Clone)]
pub struct Rotary<B: Backend> {
    /// `[head_dim, rows]`
    cos: Tensor<B, 2>,
    /// `[head_dim, rows]`, negated in the first half so that rotation needs no negation.
    sin: Tensor<B, 2>,
}

impl<B: Backend> Rotary<B> {
    /// Takes the angles of the first half of the channels.
    ///
    /// # Shapes
    /// - `angles`: `[head_dim / 2, rows]`, radians, f32
    ///
    /// `dtype` is the type of the activations that will be rotated.
    pub fn from_angles(angles: Tensor<B, 2>, dtype: DType) -> Self {
        let (cos, sin) = (angles.clone().cos(), angles.sin());
        Self {
            cos: Tensor::cat(vec![cos.clone(), cos], 0).cast(dtype),
            sin: Tensor::cat(vec![sin.clone().neg(), sin], 0).cast(dtype),
        }
    }

    /// The table of some of the rows.
    ///
    /// # Shapes
    /// - `rows`: `[kept]`, indices into the rows of this table
    pub fn select(&self, rows: Tensor<B, 1, Int>) -> Self {
        Self {
            cos: self.cos.clone().select(1, rows.clone()),
            sin: self.sin.clone().select(1, rows),
        }
    }

    /// Rotates queries or keys.
    ///
    /// # Shapes
    /// - `x`: `[heads · head_dim, rows]`
    /// - returns `[heads · head_dim, rows]`
    pub fn apply(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let rotate = Rotate {
            cos: untracked(&self.cos),
            sin: untracked(&self.sin),
        };
        let rotated = rotate.on_host(x).or_else(|x| {
            let recorded = recorded(rotate, &[x.clone().into()]);
            recorded.ok_or(x)
        });
        rotated.unwrap_or_else(|x| self.turn(x, false))
    }

    /// Rotates back: the inverse of [`apply`](Self::apply), but for rounding.
    pub fn undo(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        self.turn(x, true)
    }

    fn turn(&self, x: Tensor<B, 2>, back: bool) -> Tensor<B, 2> {
        let [features, rows] = x.dims();
        let head_dim = self.cos.dims()[0];
        let heads = features / head_dim;
        let mut halves = x.clone().reshape([heads, head_dim, rows]).chunk(2, 1);
        halves.reverse();
        // Flat rows: the table broadcasts over heads along one axis, which every backend does fast.
        let flat = [heads, head_dim * rows];
        let turned = Tensor::cat(halves, 1).reshape(flat);
        let cos = self.cos.clone().reshape([1, head_dim * rows]);
        let sin = self.sin.clone().reshape([1, head_dim * rows]);
        let sin = match back {
            true => sin.neg(),
            false => sin,
        };
        (x.reshape(flat) * cos + turned * sin).reshape([features, rows])
    }
}

/// [`Rotary::apply`] by a kernel.
#[derive(Debug, Clone)]
struct Rotate {
    cos: HostTensor,
    sin: HostTensor,
}

impl Rotate {
    /// The result, if the numbers are within reach; or else they are given back.
    fn on_host<B: Backend>(&self, x: Tensor<B, 2>) -> Result<Tensor<B, 2>, Tensor<B, 2>> {
        match (self.cos.singles(), self.sin.singles()) {
            (Some(cos), Some(sin)) => host::changed(x, &Table { cos, sin }),
            _ => Err(x),
        }
    }
}

struct Table<'a> {
    cos: Cow<'a, [f32]>,
    sin: Cow<'a, [f32]>,
}

impl host::Loop for Table<'_> {
    fn run<E: host::Number + reroute_kernels::Number>(&self, numbers: &mut [E]) {
        reroute_kernels::rotate(numbers, &self.cos, &self.sin);
    }
}

impl Operation<1> for Rotate {
    fn forward<B: Backend>(&self, [x]: [Unranked<B>; 1]) -> Option<Unranked<B>> {
        self.on_host(x.ranked()).ok().map(Unranked::from)
    }

    fn needs(&self, _: [bool; 1]) -> [bool; 1] {
        [false]
    }

    fn backward(
        &self,
        _: [HostTensor; 1],
        gradient: &HostTensor,
        _: [bool; 1],
    ) -> [Option<TensorData>; 1] {
        let mut gradient = gradient.numbers().into_owned();
        let (cos, sin) = (self.cos.numbers(), self.sin.numbers());
        reroute_kernels::rotate_back(&mut gradient, &cos, &sin);
        [Some(flat(gradient))]
    }
}
