//! Operations on numbers in this program's memory that an autodiff backend records as one step each, with
//! a gradient of its own, instead of the operations that they stand for.

use std::fmt::Debug;

use burn::tensor::backend::Backend;
use burn::tensor::{Element, Tensor, TensorData, TensorPrimitive};

use crate::host::HostTensor;
pub(crate) use crate::host::{recorded, untracked};

/// A tensor of any rank.
pub(crate) struct Unranked<B: Backend>(pub(crate) B::FloatTensorPrimitive);

impl<B: Backend> Unranked<B> {
    pub(crate) fn ranked<const D: usize>(self) -> Tensor<B, D> {
        Tensor::from_primitive(TensorPrimitive::Float(self.0))
    }
}

impl<B: Backend, const D: usize> From<Tensor<B, D>> for Unranked<B> {
    fn from(tensor: Tensor<B, D>) -> Self {
        Self(tensor.into_primitive().tensor())
    }
}

/// An operation with `N` inputs and a gradient.
#[cfg_attr(
    not(all(feature = "flex", feature = "autodiff")),
    expect(
        dead_code,
        reason = "only the one backend that is not compiled in calls it"
    )
)]
pub(crate) trait Operation<const N: usize>: Debug + Clone + Send + 'static {
    /// The result where there are no gradients, if the inputs are within reach.
    fn forward<B: Backend>(&self, inputs: [Unranked<B>; N]) -> Option<Unranked<B>>;

    /// Which inputs the gradients of those that are wanted are made of.
    fn needs(&self, wanted: [bool; N]) -> [bool; N];

    /// Gradients of the inputs that are wanted: their numbers, row by row, in any type.
    ///
    /// Inputs that it needs and the gradient of the result are within reach and packed.
    fn backward(
        &self,
        inputs: [HostTensor; N],
        gradient: &HostTensor,
        wanted: [bool; N],
    ) -> [Option<TensorData>; N];
}

/// The result of an operation, recorded where gradients are, if the inputs are within reach.
pub(crate) fn run<B: Backend, O: Operation<N>, const N: usize, const D: usize>(
    operation: O,
    inputs: [Unranked<B>; N],
) -> Option<Tensor<B, D>> {
    recorded(operation.clone(), &inputs).or_else(|| operation.forward(inputs).map(Unranked::ranked))
}

/// Numbers whose shape is known elsewhere.
pub(crate) fn flat<E: Element>(numbers: Vec<E>) -> TensorData {
    let count = numbers.len();
    TensorData::new(numbers, [count])
}
