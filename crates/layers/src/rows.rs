use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use half::{bf16, f16};

use crate::LayerError;
use crate::host::{self, HostTensor, Number};

/// Sends indices of rows to a device, to select by.
///
/// # Shapes
/// - returns `[rows]`
pub fn indices<B: Backend>(rows: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    Tensor::from_data(rows.as_slice(), device)
}

/// Overwrites rows of a buffer, from `start` on.
///
/// Without a copy where the buffer is in this program's memory and nothing else refers to it.
///
/// # Shapes
/// - `buffer`: `[heads, head_dim, capacity]`
/// - `rows`: `[heads, head_dim, rows]`
/// - returns the shape of `buffer`
///
/// # Errors
/// [`LayerError::Rows`] if they do not fit or are of another type.
pub fn write_rows<B: Backend>(
    buffer: Tensor<B, 3>,
    start: usize,
    rows: Tensor<B, 3>,
) -> Result<Tensor<B, 3>, LayerError> {
    let [heads, head_dim, capacity] = buffer.dims();
    let [row_heads, row_channels, count] = rows.dims();
    let same = (heads, head_dim, buffer.dtype()) == (row_heads, row_channels, rows.dtype());
    if !same || start.checked_add(count).is_none_or(|end| end > capacity) {
        return Err(LayerError::Rows {
            rows: format!("{:?} {:?}", rows.dims(), rows.dtype()),
            buffer: format!("{:?} {:?}", buffer.dims(), buffer.dtype()),
            start,
        });
    }
    let written = on_host::<B, f32>(buffer, start, &rows)
        .or_else(|buffer| on_host::<B, f16>(buffer, start, &rows))
        .or_else(|buffer| on_host::<B, bf16>(buffer, start, &rows));
    Ok(written.unwrap_or_else(|buffer| {
        buffer.slice_assign([0..heads, 0..head_dim, start..start + count], rows)
    }))
}

fn on_host<B: Backend, E: Number>(
    buffer: Tensor<B, 3>,
    start: usize,
    rows: &Tensor<B, 3>,
) -> Result<Tensor<B, 3>, Tensor<B, 3>> {
    let (capacity, count) = (buffer.dims()[2], rows.dims()[2]);
    let rows = HostTensor::of(rows).packed();
    match rows.slice::<E>() {
        Some(rows) => host::in_place(buffer, |buffer| {
            reroute_kernels::write_columns(buffer, capacity, start, rows, count);
        }),
        None => Err(buffer),
    }
}
