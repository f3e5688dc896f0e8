use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use half::{bf16, f16};

use crate::host::{self, HostTensor, Number};

/// Overwrites rows of a buffer, from `start` on; they must fit.
///
/// Without a copy where the buffer is in this program's memory and nothing else refers to it.
///
/// # Shapes
/// - `buffer`: `[heads, head_dim, capacity]`
/// - `rows`: `[heads, head_dim, rows]`
/// - returns the shape of `buffer`
pub fn write_rows<B: Backend>(
    buffer: Tensor<B, 3>,
    start: usize,
    rows: Tensor<B, 3>,
) -> Tensor<B, 3> {
    let [heads, head_dim, _] = buffer.dims();
    let count = rows.dims()[2];
    let written = on_host::<B, f32>(buffer, start, &rows)
        .or_else(|buffer| on_host::<B, f16>(buffer, start, &rows))
        .or_else(|buffer| on_host::<B, bf16>(buffer, start, &rows));
    written.unwrap_or_else(|buffer| {
        buffer.slice_assign([0..heads, 0..head_dim, start..start + count], rows)
    })
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
