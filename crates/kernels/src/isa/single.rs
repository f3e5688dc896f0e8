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

/// `A · B`, on all threads, in memory that nothing is written to before.
///
/// # Shapes
/// - returns `[rows of A, columns of B]`
///
/// # Panics
/// If A has not as many columns as B has rows, or there are none.
pub(crate) fn product([a, b]: [Operand<'_>; 2]) -> Vec<f32> {
    assert_eq!(a.columns, b.rows, "columns of A, rows of B");
    assert!(a.columns > 0, "a sum of nothing");
    let count = a.rows.checked_mul(b.columns);
    let count = count.expect("as many numbers as memory has");
    let mut y = Vec::with_capacity(count);
    if count > 0 {
        // SAFETY: there is room for rows of as many numbers as B has columns; nobody else has it. The product
        // is not added to what is there, so that nothing is read, and all of it is written: every number is a
        // sum of one product at least.
        unsafe {
            gemm_into(
                [a, b],
                (y.as_mut_ptr(), b.columns),
                false,
                Parallelism::Rayon(0),
            );
            y.set_len(count);
        }
    }
    y
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
    let [weight, x] = operands(weight, x, features);
    assert_eq!(y.len(), weight.rows * x.columns);
    multiply_into([weight, x], (y, x.columns), false, Parallelism::Rayon(0));
}

/// A weight and inputs, row by row; shapes as [`multiply`].
///
/// # Panics
/// If the slices are not whole rows, or there are no features.
pub(crate) fn operands<'a>(weight: &'a [f32], x: &'a [f32], features: usize) -> [Operand<'a>; 2] {
    let (output, rows) = (weight.len() / features, x.len() / features);
    assert_eq!(weight.len(), output * features);
    assert_eq!(x.len(), features * rows);
    [
        Operand::new(weight, [output, features], features),
        Operand::new(x, [features, rows], rows),
    ]
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
    // SAFETY: `y` has room for these rows, as was checked, and is borrowed mutably.
    unsafe { gemm_into([a, b], (y.as_mut_ptr(), stride), adds, threads) }
}

/// The same into memory.
///
/// # Safety
/// There must be room for `a.rows` rows of `b.columns` numbers, `stride` apart, that do not overlap and nobody else has; where
/// it `adds`, they must have been written to. The operands must fit each other.
unsafe fn gemm_into(
    [a, b]: [Operand<'_>; 2],
    (y, stride): (*mut f32, usize),
    adds: bool,
    threads: Parallelism,
) {
    let strides = |of: Operand<'_>| of.strides.map(|stride| stride as isize);
    let ([a_row, a_column], [b_row, b_column]) = (strides(a), strides(b));
    // SAFETY: both operands lie within their slices, as was checked when they were made; no stride is so large that
    // a row would lie outside. Of `y` the caller says the same.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            y,
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
