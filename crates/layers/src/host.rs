//! The way from a backend's tensors to [`reroute_kernels`], for backends that compute in this program's
//! memory: the extension point for operations that such a backend runs one number at a time.
//!
//! Elsewhere nothing here finds anything, and the caller computes with operations of `B`. That covers
//! `Autodiff<B>` too, whose tensors are of another type: [`recorded`] reaches them and gives them a gradient.

#[cfg(all(feature = "flex", feature = "autodiff"))]
mod recorded;

use std::any::Any;
use std::borrow::Cow;

use burn::tensor::backend::Backend;
use burn::tensor::{
    BasicOps, DType, Element, Float, Int, Shape, Tensor, TensorData, TensorPrimitive,
};
#[cfg(feature = "flex")]
use burn_flex::FlexTensor;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
#[cfg(all(feature = "flex", feature = "autodiff"))]
pub(crate) use recorded::{recorded, untracked};
#[cfg(not(all(feature = "flex", feature = "autodiff")))]
pub(crate) use unrecorded::{recorded, untracked};

/// A share in a tensor that is in this program's memory, if it is.
#[derive(Debug, Clone)]
pub(crate) struct HostTensor(Option<FlexTensor>);

impl HostTensor {
    pub(crate) fn of<B: Backend, const D: usize, K: Kind<B>>(tensor: &Tensor<B, D, K>) -> Self {
        K::on_host(tensor.clone().into_primitive())
    }

    fn reached<T: 'static>(tensor: &T) -> Self {
        Self((tensor as &dyn Any).downcast_ref().cloned())
    }

    /// With the numbers side by side: copied if they are strewn over a larger tensor.
    pub(crate) fn packed(self) -> Self {
        Self(self.0.map(|tensor| tensor.to_contiguous()))
    }

    /// Whether it is.
    pub(crate) fn is_here(&self) -> bool {
        self.0.is_some()
    }

    /// The numbers in row-major order, if they are within reach, packed and of this type.
    pub(crate) fn slice<E: Element + bytemuck::Pod>(&self) -> Option<&[E]> {
        self.0.as_ref()?.as_slice()
    }

    /// The numbers as rows that lie side by side in a larger tensor, if they are within reach and of this
    /// type, and how far one row is from the next.
    ///
    /// # Shapes
    /// - `self`: `[matrices, rows, columns]`
    pub(crate) fn rows<E: Number>(&self) -> Option<(&[E], usize)> {
        strided_rows(self.0.as_ref()?)
    }

    /// The same of a tensor that is known to be so; nothing of another.
    pub(crate) fn numbers(&self) -> Cow<'_, [f32]> {
        self.singles().unwrap_or_default()
    }

    /// The numbers in row-major order as f32, if they are within reach, packed and f32, f16 or bf16.
    pub(crate) fn singles(&self) -> Option<Cow<'_, [f32]>> {
        let singles = self.slice().map(Cow::Borrowed);
        let halves = || self.slice::<f16>().map(widened);
        let uppers = || self.slice::<bf16>().map(widened);
        singles.or_else(|| halves().or_else(uppers).map(Cow::Owned))
    }
}

/// Whole numbers, copied from their device.
pub(crate) fn ints<B: Backend>(tensor: Tensor<B, 2, Int>) -> Vec<i32> {
    tensor.into_data().into_vec().unwrap_or_default()
}

/// Kinds of tensors that hold numbers.
pub(crate) trait Kind<B: Backend>: BasicOps<B> {
    /// A share in a tensor, if it is within reach.
    fn on_host(primitive: Self::Primitive) -> HostTensor;
}

impl<B: Backend> Kind<B> for Float {
    fn on_host(primitive: Self::Primitive) -> HostTensor {
        match primitive {
            TensorPrimitive::Float(tensor) => HostTensor::reached(&tensor),
            TensorPrimitive::QFloat(_) => HostTensor(None),
        }
    }
}

impl<B: Backend> Kind<B> for Int {
    fn on_host(primitive: Self::Primitive) -> HostTensor {
        HostTensor::reached(&primitive)
    }
}

/// What numbers of a tensor may be.
pub(crate) trait Number: Element + bytemuck::Pod {}

impl Number for f32 {}
impl Number for f16 {}
impl Number for bf16 {}
impl Number for i8 {}

#[cfg(feature = "flex")]
fn strided_rows<E: Number>(tensor: &FlexTensor) -> Option<(&[E], usize)> {
    let layout = tensor.layout();
    let ([matrices, rows, _], &[matrix, row, 1]) = (layout.shape().dims(), layout.strides()) else {
        return None;
    };
    let evenly = matrices == 1 || matrix == rows as isize * row;
    if tensor.dtype() != E::dtype() || !evenly {
        return None;
    }
    let numbers = tensor.storage().get(layout.start_offset()..)?;
    Some((numbers, usize::try_from(row).ok()?))
}

#[cfg(not(feature = "flex"))]
fn strided_rows<E>(tensor: &FlexTensor) -> Option<(&[E], usize)> {
    match *tensor {}
}

/// Stands in where the one backend that computes in this program's memory is not compiled in: no
/// tensor is of this type.
#[cfg(not(feature = "flex"))]
#[derive(Debug, Clone)]
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

/// Lets `work` change a packed tensor in this program's memory; any other is given back.
///
/// A tensor that nothing else refers to is not copied.
pub(crate) fn in_place<B: Backend, const D: usize, K: Kind<B>, E: Number>(
    tensor: Tensor<B, D, K>,
    work: impl FnOnce(&mut [E]),
) -> Result<Tensor<B, D, K>, Tensor<B, D, K>> {
    if HostTensor::of(&tensor).slice::<E>().is_none() {
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

/// Lets `work` change the numbers of a packed tensor in this program's memory as f32, if they are that,
/// f16 or bf16; any other tensor is given back.
pub(crate) fn in_singles<B: Backend, const D: usize>(
    tensor: Tensor<B, D>,
    work: impl FnOnce(&mut [f32]),
) -> Result<Tensor<B, D>, Tensor<B, D>> {
    let dtype = tensor.dtype();
    if dtype == DType::F32 {
        return in_place(tensor, work);
    }
    let Some(Cow::Owned(mut singles)) = HostTensor::of(&tensor).singles() else {
        return Err(tensor);
    };
    work(&mut singles);
    Ok(self::tensor(
        singles,
        tensor.dims(),
        dtype,
        &tensor.device(),
    ))
}

/// A loop over numbers of any type, in place.
pub(crate) trait Loop {
    fn run<E: Number + reroute_kernels::Number>(&self, numbers: &mut [E]);
}

/// Runs a loop on the numbers of a packed tensor in this program's memory, if they are f32, bf16 or f16; any
/// other tensor is given back.
pub(crate) fn changed<B: Backend, const D: usize>(
    tensor: Tensor<B, D>,
    by: &impl Loop,
) -> Result<Tensor<B, D>, Tensor<B, D>> {
    match tensor.dtype() {
        DType::BF16 => in_place(tensor, |numbers: &mut [bf16]| by.run(numbers)),
        // f16 is rounded faster all at once.
        _ => in_singles(tensor, |numbers| by.run(numbers)),
    }
}

/// A tensor of numbers computed here, in `dtype`.
pub(crate) fn tensor<B: Backend, const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, D> {
    Tensor::from_data(data(values, shape.into(), dtype), (device, dtype))
}

/// The same as data; in f32 if `dtype` is none that is known here.
fn data(values: Vec<f32>, shape: Shape, dtype: DType) -> TensorData {
    match dtype {
        DType::F16 => narrowed::<f16>(&values, shape),
        DType::BF16 => narrowed::<bf16>(&values, shape),
        _ => TensorData::new(values, shape),
    }
}

/// The same numbers in f32.
pub(crate) fn widened<E: Number>(halves: &[E]) -> Vec<f32>
where
    [E]: HalfFloatSliceExt,
{
    let mut wide = vec![0.0; halves.len()];
    reroute_kernels::widen(halves, &mut wide);
    wide
}

fn narrowed<E: Number>(values: &[f32], shape: Shape) -> TensorData
where
    [E]: HalfFloatSliceExt,
{
    let mut halves = vec![E::zeroed(); values.len()];
    reroute_kernels::narrow(values, &mut halves);
    TensorData::new(halves, shape)
}

/// Stands in where no autodiff backend over that one is compiled in.
#[cfg(not(all(feature = "flex", feature = "autodiff")))]
mod unrecorded {
    use burn::tensor::Tensor;
    use burn::tensor::backend::Backend;

    use super::HostTensor;
    use crate::gradient::{Operation, Unranked};

    pub(crate) fn recorded<B: Backend, O: Operation<N>, const N: usize, const D: usize>(
        _: O,
        _: &[Unranked<B>; N],
    ) -> Option<Tensor<B, D>> {
        None
    }

    pub(crate) fn untracked<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> HostTensor {
        HostTensor::of(tensor)
    }
}
