use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use half::f16;

use crate::host::{self, HostTensor};

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
    let [heads, head_dim, capacity] = buffer.dims();
    let count = rows.dims()[2];
    let host = HostTensor::of(&rows).packed();
    let written = match (host.f32s(), host.f16s()) {
        (Some(rows), _) => host::in_place(buffer, |buffer: &mut [f32]| {
            kernels::write_columns(buffer, capacity, start, rows, count);
        }),
        (_, Some(rows)) => host::in_place(buffer, |buffer: &mut [f16]| {
            kernels::write_columns(buffer, capacity, start, rows, count);
        }),
        _ => Err(buffer),
    };
    written.unwrap_or_else(|buffer| {
        buffer.slice_assign([0..heads, 0..head_dim, start..start + count], rows)
    })
}
