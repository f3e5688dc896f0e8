//! Products in f32, which the crate `gemm` computes.

use gemm::Parallelism;

/// A matrix row by row, or its transpose.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operand<'a> {
    numbers: &'a [f32],
    rows: usize,
    columns: usize,
    /// From one row to the next, from one column to the next.
    strides: [usize; 2],
}

impl<'a> Operand<'a> {
    /// Rows that begin `stride` numbers apart.
    ///
    /// # Panics
    /// If there are not as many numbers.
    pub(crate) fn new(numbers: &'a [f32], [rows, columns]: [usize; 2], stride: usize) -> Self {
        assert_fits(numbers, [rows, columns], stride);
        Self {
            numbers,
            rows,
            columns,
            strides: [stride, 1],
        }
    }

    pub(crate) fn transposed(self) -> Self {
        let [row, column] = self.strides;
        Self {
            rows: self.columns,
            columns: self.rows,
            strides: [column, row],
            ..self
        }
    }
}

fn assert_fits(numbers: &[f32], [rows, columns]: [usize; 2], stride: usize) {
    assert!(columns <= stride || rows <= 1, "rows that overlap");
    let last = rows.saturating_sub(1).checked_mul(stride);
    let end = last.and_then(|last| last.checked_add(columns));
    assert!(
        rows == 0 || end.is_some_and(|end| end <= numbers.len()),
        "rows of a matrix"
    );
}

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
    let weight = Operand::new(weight, [output, features], features);
    let x = Operand::new(x, [features, rows], rows);
    multiply_into([weight, x], (y, rows), false, Parallelism::Rayon(0));
}

/// `Y = A · B`, or `Y += A · B` if it `adds`.
///
/// # Shapes
/// - `y`: `[rows of A, columns of B]`, rows so many numbers apart
///
/// # Panics
/// If these shapes do not fit each other.
pub(crate) fn multiply_into(
    [a, b]: [Operand<'_>; 2],
    (y, stride): (&mut [f32], usize),
    adds: bool,
    threads: Parallelism,
) {
    assert_eq!(a.columns, b.rows, "columns of A, rows of B");
    assert_fits(y, [a.rows, b.columns], stride);
    let strides = |of: Operand<'_>| of.strides.map(|stride| stride as isize);
    let ([a_row, a_column], [b_row, b_column]) = (strides(a), strides(b));
    // SAFETY: all three matrices lie within their slices, as was checked when they were made and here; no
    // stride is so large that a row would lie outside. `y` is borrowed mutably, so that it overlaps with
    // neither operand, and its rows do not overlap.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            y.as_mut_ptr(),
            1,
            stride as isize,
            adds,
            a.numbers.as_ptr(),
            a_column,
            a_row,
            b.numbers.as_ptr(),
            b_column,
            b_row,
            1.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}
