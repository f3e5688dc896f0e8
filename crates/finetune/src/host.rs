//! Where the host waits for the device: once a forward pass, a step, a checkpoint.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

use crate::TuneError;

/// The numbers of a tensor, in f32.
pub(crate) fn data<B: Backend, const D: usize>(
    tensor: Tensor<B, D>,
) -> Result<TensorData, TuneError> {
    let data = tensor.cast(DType::F32).try_into_data();
    data.map_err(|error| TuneError::Device {
        reason: format!("{error:?}"),
    })
}

/// The sum of all numbers.
pub(crate) fn sum<B: Backend>(tensor: Tensor<B, 1>) -> Result<f64, TuneError> {
    Ok(data(tensor)?.iter::<f64>().sum())
}
