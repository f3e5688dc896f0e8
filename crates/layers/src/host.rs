//! The way from a backend's tensors to [`kernels`], for backends that compute in this program's
//! memory: the extension point for operations that such a backend runs one number at a time.
//!
//! Elsewhere nothing here finds anything, and the caller computes with operations of `B`. That covers
//! `Autodiff<B>` too, which must record every operation: its tensors are of another type.

use std::any::Any;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Element, Tensor, TensorData, TensorPrimitive};
#[cfg(feature = "flex")]
use burn_flex::FlexTensor;
use half::f16;

/// A share in a tensor that is in this program's memory, if it is.
pub(crate) struct HostTensor(Option<FlexTensor>);

impl HostTensor {
    pub(crate) fn of<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Self {
        match tensor.clone().into_primitive() {
            TensorPrimitive::Float(tensor) => Self((&tensor as &dyn Any).downcast_ref().cloned()),
            TensorPrimitive::QFloat(_) => Self(None),
        }
    }

    /// With the numbers side by side: copied if they are strewn over a larger tensor.
    pub(crate) fn packed(self) -> Self {
        Self(self.0.map(|tensor| tensor.to_contiguous()))
    }

    /// The numbers in row-major order, if they are within reach, packed and f32.
    pub(crate) fn f32s(&self) -> Option<&[f32]> {
        self.0.as_ref()?.as_slice()
    }

    /// The numbers in row-major order, if they are within reach, packed and f16.
    pub(crate) fn f16s(&self) -> Option<&[f16]> {
        self.0.as_ref()?.as_slice()
    }

    /// What the numbers are, if they are within reach and packed.
    fn packed_dtype(&self) -> Option<DType> {
        let f32s = self.f32s().map(|_| DType::F32);
        f32s.or(self.f16s().map(|_| DType::F16))
    }
}

/// Stands in where the one backend that computes in this program's memory is not compiled in: no
/// tensor is of this type.
#[cfg(not(feature = "flex"))]
#[derive(Clone)]
enum FlexTensor {}

#[cfg(not(feature = "flex"))]
impl FlexTensor {
    fn to_contiguous(&self) -> Self {
        match *self {}
    }

    fn as_slice<E>(&self) -> Option<&[E]> {
        match *self {}
    }
}

/// Lets `work` change a packed tensor of f32 or f16 in this program's memory; any other is given back.
///
/// A tensor that nothing else refers to is not copied.
pub(crate) fn in_place<B: Backend, const D: usize, E: Element>(
    tensor: Tensor<B, D>,
    work: impl FnOnce(&mut [E]),
) -> Result<Tensor<B, D>, Tensor<B, D>> {
    if HostTensor::of(&tensor).packed_dtype() != Some(E::dtype()) {
        return Err(tensor);
    }
    let device = tensor.device();
    let mut data = tensor.into_data();
    let done = data.as_mut_slice().map(work);
    let tensor = Tensor::from_data(data, (&device, E::dtype()));
    match done {
        Ok(()) => Ok(tensor),
        Err(_) => Err(tensor),
    }
}

/// A tensor of numbers computed here.
pub(crate) fn tensor<B: Backend, const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &B::Device,
) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}
