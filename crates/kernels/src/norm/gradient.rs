//! What norms give back to their inputs and parameters.

use super::{FEATURES, column_sums, inverse_rms, means, statistics};
use crate::split::pieces;

/// What [`rms_norm`](super::rms_norm) gives back to `x` and to the weight, where its result gets `gradient`.
///
/// # Shapes
/// - `x`, `gradient`: `[features, rows]`
/// - `weight`: `[features]`
/// - returns `[features, rows]`, `[features]`
pub fn rms_norm_gradient(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    gradient: &[f32],
) -> [Vec<f32>; 2] {
    let scale = inverse_rms(x, weight.len(), epsilon);
    let zeros = vec![0.0; scale.len()];
    let normed = Normed {
        x,
        weight,
        gradient,
        mean: &zeros,
        scale: &scale,
    };
    // The mean is taken for 0, whatever it is, and nothing is given back through it.
    [normed.of_inputs(&zeros), normed.of_weight()]
}

/// What [`layer_norm`](super::layer_norm) gives back to `x`, the weight and the bias.
///
/// # Shapes
/// - `x`, `gradient`: `[features, rows]`
/// - `weight`: `[features]`
/// - returns `[features, rows]`, `[features]`, `[features]`
pub fn layer_norm_gradient(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    gradient: &[f32],
) -> [Vec<f32>; 3] {
    let features = weight.len();
    let (mean, scale) = statistics(x, features, epsilon);
    let normed = Normed {
        x,
        weight,
        gradient,
        mean: &mean,
        scale: &scale,
    };
    let shares = column_sums(
        [gradient],
        features,
        #[inline(always)]
        |[feature, _], [gradient]| gradient * weight[feature],
    );
    let of_bias = normed.row_sums(
        #[inline(always)]
        |_, _, gradient| gradient,
    );
    let of_inputs = normed.of_inputs(&means(shares, features));
    [of_inputs, normed.of_weight(), of_bias]
}

/// `n = (x − mean) · scale`, and the gradient of `n · weight`.
struct Normed<'a> {
    /// `[features, rows]`
    x: &'a [f32],
    /// `[features]`
    weight: &'a [f32],
    /// `[features, rows]`
    gradient: &'a [f32],
    /// `[rows]`
    mean: &'a [f32],
    /// `[rows]`
    scale: &'a [f32],
}

impl Normed<'_> {
    /// `scale · (g − through_mean − n · mean(n · g))`, where `g = weight · gradient`.
    fn of_inputs(&self, through_mean: &[f32]) -> Vec<f32> {
        let Self {
            x,
            weight,
            gradient,
            mean,
            scale,
        } = self;
        let (features, rows) = (weight.len(), mean.len());
        let through_scale = column_sums(
            [x, gradient],
            features,
            #[inline(always)]
            |[feature, row], [x, gradient]| (x - mean[row]) * (weight[feature] * gradient),
        );
        let through_scale: Vec<f32> = means(through_scale, features)
            .iter()
            .zip(*scale)
            .map(|(through, scale)| through * scale)
            .collect();
        let mut found = vec![0.0; features * rows];
        pieces(
            &mut found,
            FEATURES * rows,
            #[inline(always)]
            |block, found| {
                for (at, found) in found.chunks_exact_mut(rows).enumerate() {
                    let feature = block * FEATURES + at;
                    let [x, gradient] = [x, gradient].map(|x| &x[feature * rows..][..rows]);
                    let [mean, scale, through_mean, through_scale] =
                        [mean, scale, through_mean, &through_scale].map(|x| &x[..rows]);
                    for (row, found) in found.iter_mut().enumerate() {
                        let normed = (x[row] - mean[row]) * scale[row];
                        let given = weight[feature] * gradient[row] - through_mean[row];
                        *found = (given - normed * through_scale[row]) * scale[row];
                    }
                }
            },
        );
        found
    }

    /// `Σ n · gradient` over the rows.
    fn of_weight(&self) -> Vec<f32> {
        self.row_sums(
            #[inline(always)]
            |row, x, gradient| (x - self.mean[row]) * self.scale[row] * gradient,
        )
    }

    /// The sum of `term(row, x, gradient)` over the rows of every feature.
    fn row_sums(&self, term: impl Fn(usize, f32, f32) -> f32 + Sync) -> Vec<f32> {
        /// Independent sums.
        const LANES: usize = 16;
        let rows = self.mean.len();
        let mut sums = vec![0.0; self.weight.len()];
        pieces(
            &mut sums,
            FEATURES,
            #[inline(always)]
            |block, sums| {
                for (at, sum) in sums.iter_mut().enumerate() {
                    let start = (block * FEATURES + at) * rows;
                    let [x, gradient] = [self.x, self.gradient].map(|x| &x[start..][..rows]);
                    let mut lanes = [0.0; LANES];
                    for first in (0..rows).step_by(LANES) {
                        for row in first..rows.min(first + LANES) {
                            lanes[row - first] += term(row, x[row], gradient[row]);
                        }
                    }
                    *sum = lanes.iter().sum();
                }
            },
        );
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The derivative of `Σ g · norm(x)` by each number of x, weight and bias, in f64, by its formula.
    fn exact(
        [x, weight, gradient]: [&[f32]; 3],
        epsilon: f64,
        centred: bool,
    ) -> (Vec<f64>, Vec<f64>) {
        let (features, rows) = (weight.len(), x.len() / weight.len());
        let (mut of_x, mut of_weight) = (vec![0.0; x.len()], vec![0.0; features]);
        for row in 0..rows {
            let of = |x: &[f32], feature: usize| f64::from(x[feature * rows + row]);
            let mean_of = |term: &dyn Fn(usize) -> f64| {
                (0..features).map(term).sum::<f64>() / features as f64
            };
            let mean = if centred { mean_of(&|f| of(x, f)) } else { 0.0 };
            let root = (mean_of(&|f| (of(x, f) - mean).powi(2)) + epsilon).sqrt();
            let normed = |f: usize| (of(x, f) - mean) / root;
            let given = |f: usize| of(gradient, f) * f64::from(weight[f]);
            let through_mean = if centred { mean_of(&given) } else { 0.0 };
            let through_scale = mean_of(&|f| given(f) * normed(f));
            for feature in 0..features {
                of_x[feature * rows + row] =
                    (given(feature) - through_mean - normed(feature) * through_scale) / root;
                of_weight[feature] += of(gradient, feature) * normed(feature);
            }
        }
        (of_x, of_weight)
    }

    #[track_caller]
    fn assert_near(found: &[f32], exact: &[f64]) {
        assert_eq!(found.len(), exact.len());
        let largest = exact.iter().fold(0f64, |most, x| most.max(x.abs()));
        for (found, exact) in found.iter().zip(exact) {
            let error = (f64::from(*found) - exact).abs();
            assert!(error <= 2e-6 * largest + 1e-7, "{found}, {exact}");
        }
    }

    #[test]
    fn are_the_derivatives_across_blocks() {
        let value = |i: usize| (i as f32 * 0.77).sin() * 3.0 + 1.0;
        for [features, rows] in [[1, 1], [5, 3], [FEATURES, 17], [2 * FEATURES + 3, 33]] {
            let x: Vec<f32> = (0..features * rows).map(value).collect();
            let gradient: Vec<f32> = (0..features * rows).map(|i| value(3 * i + 1)).collect();
            let weight: Vec<f32> = (0..features).map(|i| value(i + 3)).collect();
            let [of_x, of_weight] = rms_norm_gradient(&x, &weight, 1e-2, &gradient);
            let (exact_x, exact_weight) = exact([&x, &weight, &gradient], 1e-2, false);
            assert_near(&of_x, &exact_x);
            assert_near(&of_weight, &exact_weight);
            let [of_x, of_weight, of_bias] = layer_norm_gradient(&x, &weight, 1e-2, &gradient);
            let (exact_x, exact_weight) = exact([&x, &weight, &gradient], 1e-2, true);
            assert_near(&of_x, &exact_x);
            assert_near(&of_weight, &exact_weight);
            let sum = |row: &[f32]| row.iter().map(|x| f64::from(*x)).sum();
            let sums: Vec<f64> = gradient.chunks(rows).map(sum).collect();
            assert_near(&of_bias, &sums);
        }
        assert!(rms_norm_gradient(&[], &[1.0], 1e-2, &[])[0].is_empty());
    }
}
