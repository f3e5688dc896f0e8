use std::borrow::Cow;
use std::ops::Range;

/// Some columns of a matrix; nothing is copied where they are all.
///
/// # Shapes
/// - `matrix`: `[features, width]`
/// - returns `[features, columns]`
pub fn read_columns<T: Copy>(matrix: &[T], width: usize, columns: Range<usize>) -> Cow<'_, [T]> {
    if columns == (0..width) {
        return Cow::Borrowed(matrix);
    }
    let features = matrix.chunks_exact(width.max(1));
    Cow::Owned(
        features
            .flat_map(|feature| &feature[columns.clone()])
            .copied()
            .collect(),
    )
}

/// Overwrites columns of a matrix, from `start` on.
///
/// # Shapes
/// - `matrix`: `[features, width]`
/// - `columns`: `[features, count]`; `start + count ≤ width`
pub fn write_columns<T: Copy>(
    matrix: &mut [T],
    width: usize,
    start: usize,
    columns: &[T],
    count: usize,
) {
    if count == 0 {
        return;
    }
    let features = matrix.chunks_exact_mut(width);
    for (feature, columns) in features.zip(columns.chunks_exact(count)) {
        feature[start..start + count].copy_from_slice(columns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_these_and_no_other() {
        let mut matrix = [0, 1, 2, 3, 4, 5, 6, 7];
        write_columns(&mut matrix, 4, 1, &[10, 20, 30, 40], 2);
        assert_eq!(matrix, [0, 10, 20, 3, 4, 30, 40, 7]);
        write_columns(&mut matrix, 4, 4, &[], 0);
        assert_eq!(matrix, [0, 10, 20, 3, 4, 30, 40, 7]);
        assert_eq!(*read_columns(&matrix, 4, 1..3), [10, 20, 30, 40]);
        assert_eq!(*read_columns(&matrix, 4, 0..4), matrix);
        assert!(read_columns(&matrix, 4, 2..2).is_empty());
    }
}
