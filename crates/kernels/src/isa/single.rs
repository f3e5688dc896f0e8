//! Products in f32, which the crate `gemm` computes.

use gemm::Parallelism;

/// `Y = W · X`, all row by row.
///
/// # Shapes
/// - `weight`: `[output, features]`
/// - `x`: `[features, rows]`
/// - `y`: `[output, rows]`
///
/// # Panics
/// If the slices are not of these shapes, or there are no features.
pub(crate) fn multiply(weight: &[f32], x: &[f32], features: usize, y: &mut [f32]) {
    let (output, rows) = (weight.len() / features, x.len() / features);
    assert_eq!(weight.len(), output * features);
    assert_eq!(x.len(), features * rows);
    assert_eq!(y.len(), output * rows);
    // SAFETY: the matrices are as long as their shapes say, just checked; `y` is borrowed mutably, so that
    // it overlaps with neither operand.
    unsafe {
        gemm::gemm(
            output,
            rows,
            features,
            y.as_mut_ptr(),
            1,
            rows as isize,
            false,
            weight.as_ptr(),
            1,
            features as isize,
            x.as_ptr(),
            1,
            rows as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
}
