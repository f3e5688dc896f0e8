mod gradient;

pub use gradient::{layer_norm_gradient, rms_norm_gradient};

use crate::precision::Number;
use crate::split::pieces;

/// Features whose columns are summed together before the sums are added: bounds both the length of a
/// sum and the work of a thread.
const FEATURES: usize = 128;

/// `x / √(mean(x²) + ε) · weight`, column by column (arXiv 1910.07467).
///
/// # Shapes
/// - `x`: `[features, rows]`
/// - `weight`: `[features]`
/// - returns `[features, rows]`
pub fn rms_norm<T: Number>(x: &[T], weight: &[f32], epsilon: f32) -> Vec<T> {
    let features = weight.len();
    let rows = x.len() / features.max(1);
    let scale = inverse_rms(x, features, epsilon);
    let mut normed = vec![T::default(); features * rows];
    pieces(
        &mut normed,
        FEATURES * rows,
        #[inline(always)]
        |block, normed| {
            let start = block * FEATURES;
            let inputs = x[start * rows..].chunks_exact(rows);
            let features = normed.chunks_exact_mut(rows).zip(inputs);
            for ((normed, x), weight) in features.zip(&weight[start..]) {
                for ((normed, x), scale) in normed.iter_mut().zip(x).zip(&scale) {
                    *normed = T::of(x.to_f32() * scale * weight);
                }
            }
        },
    );
    normed
}

/// `(x − mean) / √(var + ε) · weight + bias`, column by column (arXiv 1607.06450).
///
/// # Shapes
/// - `x`: `[features, rows]`
/// - `weight`, `bias`: `[features]`
/// - returns `[features, rows]`
pub fn layer_norm<T: Number>(x: &[T], weight: &[f32], bias: &[f32], epsilon: f32) -> Vec<T> {
    let features = weight.len();
    let rows = x.len() / features.max(1);
    let (means, scale) = statistics(x, features, epsilon);
    let mut normed = vec![T::default(); features * rows];
    pieces(
        &mut normed,
        FEATURES * rows,
        #[inline(always)]
        |block, normed| {
            let start = block * FEATURES;
            let inputs = x[start * rows..].chunks_exact(rows);
            let affine = weight[start..].iter().zip(&bias[start..]);
            let features = normed.chunks_exact_mut(rows).zip(inputs);
            for ((normed, x), (weight, bias)) in features.zip(affine) {
                let statistics = means.iter().zip(&scale);
                for ((normed, x), (mean, scale)) in normed.iter_mut().zip(x).zip(statistics) {
                    *normed = T::of((x.to_f32() - mean) * scale * weight + bias);
                }
            }
        },
    );
    normed
}

/// `1 / √(mean(x²) + ε)` of every row.
fn inverse_rms<T: Number>(x: &[T], features: usize, epsilon: f32) -> Vec<f32> {
    let squares = column_sums(
        [x],
        features,
        #[inline(always)]
        |_, [x]| x * x,
    );
    inverse_roots(squares, features, epsilon)
}

/// The mean and `1 / √(var + ε)` of every row.
fn statistics<T: Number>(x: &[T], features: usize, epsilon: f32) -> (Vec<f32>, Vec<f32>) {
    let sums = column_sums(
        [x],
        features,
        #[inline(always)]
        |_, [x]| x,
    );
    let means = means(sums, features);
    let squares = column_sums(
        [x],
        features,
        #[inline(always)]
        |[_, row], [x]| (x - means[row]) * (x - means[row]),
    );
    let scale = inverse_roots(squares, features, epsilon);
    (means, scale)
}

/// The sum of `term([feature, row], numbers)` over the features of every row, of the numbers that the inputs
/// have there.
///
/// In f64: whatever a sum is off by, all features of the row are off by.
fn column_sums<const N: usize, T: Number>(
    inputs: [&[T]; N],
    features: usize,
    term: impl Fn([usize; 2], [f32; N]) -> f32 + Sync,
) -> Vec<f64> {
    let rows = inputs[0].len() / features.max(1);
    let mut partial = vec![0.0; features.div_ceil(FEATURES) * rows];
    pieces(
        &mut partial,
        rows,
        #[inline(always)]
        |block, sums| {
            let first = block * FEATURES;
            for feature in first..features.min(first + FEATURES) {
                let numbers = inputs.map(|x| &x[feature * rows..][..sums.len()]);
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum += f64::from(term([feature, row], numbers.map(|x| x[row].to_f32())));
                }
            }
        },
    );
    let mut total = vec![0.0; rows];
    for partial in partial.chunks_exact(rows.max(1)) {
        for (total, partial) in total.iter_mut().zip(partial) {
            *total += partial;
        }
    }
    total
}

/// `sum / features`
fn means(sums: Vec<f64>, features: usize) -> Vec<f32> {
    let mean = |sum: f64| (sum / features as f64) as f32;
    sums.into_iter().map(mean).collect()
}

/// `1 / √(sum / features + ε)`
fn inverse_roots(sums: Vec<f64>, features: usize, epsilon: f32) -> Vec<f32> {
    let root = |sum: f64| (sum / features as f64 + f64::from(epsilon)).sqrt();
    sums.into_iter()
        .map(|sum| root(sum).recip() as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In bf16 the same, rounded once.
    #[test]
    fn work_on_bf16_as_it_is() {
        let (features, rows) = (FEATURES + 3, 17);
        let value = |i: usize| ((i as f32 * 0.37).sin() * 3.0).to_bf16();
        let halves: Vec<half::bf16> = (0..features * rows).map(value).collect();
        let singles: Vec<f32> = halves.iter().map(|x| Number::to_f32(*x)).collect();
        let weight: Vec<f32> = (0..features).map(|i| 1.0 + i as f32 / 100.0).collect();
        let is_rounded = |halves: Vec<half::bf16>, singles: Vec<f32>| {
            let mut both = halves.iter().zip(&singles);
            halves.len() == singles.len() && both.all(|(x, y)| *x == Number::to_bf16(*y))
        };
        let x = rms_norm(&halves, &weight, 1e-5);
        assert!(is_rounded(x, rms_norm(&singles, &weight, 1e-5)));
        let x = layer_norm(&halves, &weight, &weight, 1e-5);
        assert!(is_rounded(x, layer_norm(&singles, &weight, &weight, 1e-5)));
    }

    #[test]
    fn are_the_formulas_across_blocks() {
        for [features, rows] in [
            [1, 1],
            [5, 3],
            [FEATURES, 17],
            [2 * FEATURES + 3, 33],
            [4, 0],
        ] {
            let value = |i: usize| (i as f32 * 0.77).sin() * 3.0 + 1.0;
            let x: Vec<f32> = (0..features * rows).map(value).collect();
            let weight: Vec<f32> = (0..features).map(|i| value(i + 3)).collect();
            let bias: Vec<f32> = (0..features).map(|i| value(i + 8)).collect();
            let rms = rms_norm(&x, &weight, 1e-5);
            let layer = layer_norm(&x, &weight, &bias, 1e-5);
            assert_eq!((rms.len(), layer.len()), (x.len(), x.len()));
            for row in 0..rows {
                let column = |feature: usize| f64::from(x[feature * rows + row]);
                let mean_of = |term: &dyn Fn(f64) -> f64| {
                    (0..features).map(|f| term(column(f))).sum::<f64>() / features as f64
                };
                let mean = mean_of(&|x| x);
                let variance = mean_of(&|x| (x - mean).powi(2));
                let square = mean_of(&|x| x * x);
                for feature in 0..features {
                    let (w, b) = (f64::from(weight[feature]), f64::from(bias[feature]));
                    let at = feature * rows + row;
                    let exact = column(feature) / (square + 1e-5).sqrt() * w;
                    assert!((f64::from(rms[at]) - exact).abs() < 1e-5);
                    let exact = (column(feature) - mean) / (variance + 1e-5).sqrt() * w + b;
                    assert!((f64::from(layer[at]) - exact).abs() < 2e-5);
                }
            }
        }
    }
}
