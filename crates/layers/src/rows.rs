use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};
use half::{bf16, f16};

use crate::LayerError;
use crate::host::{self, HostTensor, Kind, Number};

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
    let of = |x: &Tensor<B, 3>| (x.dims(), x.dtype());
    fits(of(&buffer), start, of(&rows))?;
    Ok(write(buffer, start, rows))
}

/// Whether rows fit into a buffer, from `start` on.
pub(crate) fn fits(
    (buffer, dtype): ([usize; 3], DType),
    start: usize,
    (rows, row_type): ([usize; 3], DType),
) -> Result<(), LayerError> {
    let ([heads, head_dim, capacity], [row_heads, row_channels, count]) = (buffer, rows);
    let same = (heads, head_dim, dtype) == (row_heads, row_channels, row_type);
    match same && start.checked_add(count).is_some_and(|end| end <= capacity) {
        true => Ok(()),
        false => Err(LayerError::Rows {
            rows: format!("{rows:?} {row_type:?}"),
            buffer: format!("{buffer:?} {dtype:?}"),
            start,
        }),
    }
}

/// The same for rows that fit, of any kind.
pub(crate) fn write<B: Backend, K: Kind<B>>(
    buffer: Tensor<B, 3, K>,
    start: usize,
    rows: Tensor<B, 3, K>,
) -> Tensor<B, 3, K> {
    let written = on_host::<B, K, f32>(buffer, start, &rows)
        .or_else(|buffer| on_host::<B, K, f16>(buffer, start, &rows))
        .or_else(|buffer| on_host::<B, K, bf16>(buffer, start, &rows))
        .or_else(|buffer| on_host::<B, K, i8>(buffer, start, &rows));
    written.unwrap_or_else(|buffer| {
        let [heads, channels, count] = rows.dims();
        buffer.slice_assign([0..heads, 0..channels, start..start + count], rows)
    })
}

fn on_host<B: Backend, K: Kind<B>, E: Number>(
    buffer: Tensor<B, 3, K>,
    start: usize,
    rows: &Tensor<B, 3, K>,
) -> Result<Tensor<B, 3, K>, Tensor<B, 3, K>> {
    let (capacity, count) = (buffer.dims()[2], rows.dims()[2]);
    let rows = HostTensor::of(rows).packed();
    match rows.slice::<E>() {
        Some(rows) => host::in_place(buffer, |buffer| {
            reroute_kernels::write_columns(buffer, capacity, start, rows, count);
        }),
        None => Err(buffer),
    }
}
