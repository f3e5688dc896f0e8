use crate::exp::exp;
use crate::split::pieces;

/// Softmax of every column of matrices that stand one after another; with `earlier`, column `c` has
/// weights in its first `earlier + c + 1` rows only.
///
/// Columns are vector lanes: no sum runs across a register.
///
/// # Shapes
/// - `scores`: `[matrices, rows, columns]`
pub fn softmax_columns(scores: &mut [f32], [rows, columns]: [usize; 2], earlier: Option<usize>) {
    // The first column that has a weight in a row.
    let first = |row: usize| match earlier {
        Some(earlier) => row.saturating_sub(earlier).min(columns),
        None => 0,
    };
    pieces(
        scores,
        rows * columns,
        #[inline(always)]
        |_, matrix| {
            if columns == 1 {
                let visible = earlier.map_or(rows, |earlier| rows.min(earlier + 1));
                let (scores, hidden) = matrix.split_at_mut(visible);
                softmax(scores);
                hidden.fill(0.0);
                return;
            }
            let mut largest = vec![f32::NEG_INFINITY; columns];
            for (row, scores) in matrix.chunks_exact(columns).enumerate() {
                let first = first(row);
                for (largest, &score) in largest[first..].iter_mut().zip(&scores[first..]) {
                    *largest = if score > *largest { score } else { *largest };
                }
            }
            let mut total = vec![0.0; columns];
            for (row, scores) in matrix.chunks_exact_mut(columns).enumerate() {
                let (hidden, scores) = scores.split_at_mut(first(row));
                hidden.fill(0.0);
                let column = hidden.len()..;
                let statistics = largest[column.clone()].iter().zip(&mut total[column]);
                for (score, (largest, total)) in scores.iter_mut().zip(statistics) {
                    *score = exp(*score - largest);
                    *total += *score;
                }
            }
            total.iter_mut().for_each(|total| *total = 1.0 / *total);
            for (row, weights) in matrix.chunks_exact_mut(columns).enumerate() {
                let first = first(row);
                for (weight, inverse) in weights[first..].iter_mut().zip(&total[first..]) {
                    *weight *= inverse;
                }
            }
        },
    );
}

/// Numbers that are worked on at a time: one register of AVX-512, two of AVX2.
const LANES: usize = 16;

/// Softmax of a single column.
#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for scores in scores.chunks(LANES) {
        for (lane, &score) in lanes.iter_mut().zip(scores) {
            *lane = larger(*lane, score);
        }
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
    let mut lanes = [0.0; LANES];
    for scores in scores.chunks_mut(LANES) {
        for (lane, score) in lanes.iter_mut().zip(scores) {
            *score = exp(*score - largest);
            *lane += *score;
        }
    }
    let total: f32 = lanes.iter().sum();
    let inverse = 1.0 / total;
    scores.iter_mut().for_each(|weight| *weight *= inverse);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Column by column in f64.
    fn naive(scores: &[f32], [rows, columns]: [usize; 2], earlier: Option<usize>) -> Vec<f64> {
        let mut weights = vec![0.0; scores.len()];
        let size = rows * columns;
        for start in (0..scores.len()).step_by(size.max(1)) {
            for column in 0..columns {
                let visible = earlier.map_or(rows, |earlier| rows.min(earlier + column + 1));
                let at = |row: usize| start + row * columns + column;
                let power = |row: usize| f64::from(scores[at(row)]).exp();
                let total: f64 = (0..visible).map(power).sum();
                for row in 0..visible {
                    weights[at(row)] = power(row) / total;
                }
            }
        }
        weights
    }

    #[test]
    fn is_the_formula() {
        for [matrices, rows, columns] in [
            [1usize, 1, 1],
            [3, 40, 1],
            [2, 5, 5],
            [4, 37, 33],
            [2, 300, 128],
            [2, 3, 0],
            [0, 3, 3],
        ] {
            for earlier in [
                None,
                Some(0),
                Some(rows.saturating_sub(columns)),
                Some(rows),
            ] {
                let count = matrices * rows * columns;
                let scores: Vec<f32> = (0..count).map(|i| (i as f32 * 1.3).sin() * 9.0).collect();
                let mut weights = scores.clone();
                softmax_columns(&mut weights, [rows, columns], earlier);
                let exact = naive(&scores, [rows, columns], earlier);
                for (weight, exact) in weights.iter().zip(exact) {
                    assert!(
                        (f64::from(*weight) - exact).abs() < 1e-6,
                        "{weight}, {exact}"
                    );
                }
            }
        }
    }

    /// A column's weights do not depend on the columns beside it.
    #[test]
    fn columns_are_independent() {
        let scores: Vec<f32> = (0..50 * 70).map(|i| (i as f32 * 0.7).cos() * 5.0).collect();
        let mut all = scores.clone();
        softmax_columns(&mut all, [50, 70], None);
        let part =
            |x: &[f32]| -> Vec<f32> { x.chunks(70).flat_map(|row| row[3..20].to_vec()).collect() };
        let mut some = part(&scores);
        softmax_columns(&mut some, [50, 17], None);
        assert_eq!(part(&all), some);
    }

    #[test]
    fn undefined_scores_are_seen() {
        let mut scores = [0.0, f32::NAN, 1.0, 0.0];
        softmax_columns(&mut scores, [2, 2], None);
        assert!(scores[1].is_nan() && scores[3].is_nan());
        assert!((scores[0] + scores[2] - 1.0).abs() < 1e-6);
    }
}
