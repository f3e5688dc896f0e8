//! Between the host, which decides, and the device, which has the numbers.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Int, Tensor};

use crate::ReducerError;

/// Indices for a `select`.
pub(crate) fn indices<B: Backend>(
    of: impl IntoIterator<Item = usize>,
    device: &B::Device,
) -> Tensor<B, 1, Int> {
    let of: Vec<i64> = of.into_iter().map(|index| index as i64).collect();
    Tensor::from_data(of.as_slice(), device)
}

/// Numbers in f32, whatever the backend's own type.
pub(crate) fn upload<B: Backend>(values: &[f32], device: &B::Device) -> Tensor<B, 1> {
    Tensor::from_data(values, (device, DType::F32))
}

/// Numbers that a rule decides by. Waits for the device.
///
/// # Errors
/// [`ReducerError::Readback`], with the backend's reason.
pub(crate) fn read_back<B: Backend, const D: usize>(
    tensor: Tensor<B, D>,
) -> Result<Vec<f32>, ReducerError> {
    let data = tensor.cast(FloatDType::F32).try_into_data();
    data.map_err(|error| format!("{error:?}"))
        .and_then(|data| data.into_vec().map_err(|error| format!("{error:?}")))
        .map_err(|reason| ReducerError::Readback { reason })
}
