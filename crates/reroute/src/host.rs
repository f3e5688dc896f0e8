//! Where the host waits for the device.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::RerouteError;

/// Copies a tensor to the host as f32.
pub(crate) fn read_back<B: Backend, const D: usize>(
    tensor: Tensor<B, D>,
    what: &'static str,
) -> Result<Vec<f32>, RerouteError> {
    let failed = |reason: String| RerouteError::Readback { what, reason };
    let data = tensor
        .try_into_data()
        .map_err(|error| failed(format!("{error:?}")))?;
    data.convert::<f32>()
        .into_vec()
        .map_err(|error| failed(format!("{error:?}")))
}
