//! What activations give back to their inputs.

use super::{gelu_exponent, sigmoid_weighted};
use crate::exp::exp;
use crate::split::{PIECE, pieces};

/// `gradient ← gradient · d(x · σ(βx))/dx`, of as many numbers as the shorter of both has.
pub fn swish_gradient(x: &[f32], beta: f32, gradient: &mut [f32]) {
    multiply(
        x,
        gradient,
        #[inline(always)]
        |x| slope(x, -beta * x, -beta),
    );
}

/// What `x · σ(βx) · y` gives back to `x` and to `y`; all are as long.
pub fn swish_product_gradient(x: &[f32], beta: f32, y: &[f32], gradient: &[f32]) -> [Vec<f32>; 2] {
    let of_x = combined(
        [x, y, gradient],
        #[inline(always)]
        |[x, y, gradient]| gradient * y * slope(x, -beta * x, -beta),
    );
    let of_y = combined(
        [x, gradient],
        #[inline(always)]
        |[x, gradient]| gradient * sigmoid_weighted(x, -beta * x),
    );
    [of_x, of_y]
}

/// A function of the numbers that stand in the same places.
fn combined<const N: usize>(inputs: [&[f32]; N], of: impl Fn([f32; N]) -> f32 + Sync) -> Vec<f32> {
    let mut found = vec![0.0; inputs[0].len()];
    pieces(
        &mut found,
        PIECE,
        #[inline(always)]
        |index, found| {
            let inputs = inputs.map(|x| &x[index * PIECE..][..found.len()]);
            for (at, found) in found.iter_mut().enumerate() {
                *found = of(inputs.map(|x| x[at]));
            }
        },
    );
    found
}

/// `gradient ← gradient · d gelu_tanh(x)/dx`, of as many numbers as the shorter of both has.
pub fn gelu_tanh_gradient(x: &[f32], gradient: &mut [f32]) {
    multiply(
        x,
        gradient,
        #[inline(always)]
        |x| {
            let (exponent, change) = gelu_exponent(x);
            slope(x, exponent, change)
        },
    );
}

/// `gradient ← gradient · slope(x)`
fn multiply(x: &[f32], gradient: &mut [f32], slope: impl Fn(f32) -> f32 + Sync) {
    pieces(
        gradient,
        PIECE,
        #[inline(always)]
        |index, gradient| {
            let x = x.get(index * PIECE..).unwrap_or_default();
            for (gradient, x) in gradient.iter_mut().zip(x) {
                *gradient *= slope(*x);
            }
        },
    );
}

/// The slope of `x · σ(−exponent)` where the exponent changes by so much with `x`.
#[inline(always)]
fn slope(x: f32, exponent: f32, change: f32) -> f32 {
    /// Beyond, the sigmoid does not change in f32; what it is multiplied with might be infinite.
    const FAR: f32 = 80.0;
    let sigmoid = 1.0 / (1.0 + exp(exponent));
    let bent = x * sigmoid * (1.0 - sigmoid) * change;
    sigmoid - if exponent.abs() < FAR { bent } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::super::{gelu_tanh, swish};
    use super::*;

    /// The slope of a function of f64 numbers.
    fn numeric(f: impl Fn(f64) -> f64, x: f32) -> f64 {
        let (x, step) = (f64::from(x), 1e-4);
        (f(x + step) - f(x - step)) / (2.0 * step)
    }

    fn swished(x: f64, beta: f64) -> f64 {
        x / (1.0 + (-beta * x).exp())
    }

    #[track_caller]
    fn assert_near(found: f32, exact: f64) {
        let error = (f64::from(found) - exact).abs();
        assert!(error < 2e-6 * (1.0 + exact.abs()), "{found}, {exact}");
    }

    #[test]
    fn are_the_slopes_across_pieces() {
        for count in [0, 1, 17, PIECE + 33] {
            let x: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin() * 9.0).collect();
            let y: Vec<f32> = x.iter().map(|x| 1.0 - x / 3.0).collect();
            let [mut swish, mut gelu] = [0; 2].map(|_| vec![2.0; count]);
            swish_gradient(&x, 1.702, &mut swish);
            gelu_tanh_gradient(&x, &mut gelu);
            let [of_x, of_y] = swish_product_gradient(&x, 1.0, &y, &vec![2.0; count]);
            for at in 0..count {
                let y = f64::from(y[at]);
                assert_near(swish[at], 2.0 * numeric(|x| swished(x, 1.702), x[at]));
                assert_near(of_x[at], 2.0 * y * numeric(|x| swished(x, 1.0), x[at]));
                assert_near(of_y[at], 2.0 * swished(f64::from(x[at]), 1.0));
                let exact = |x: f64| {
                    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                    0.5 * x * (1.0 + u.tanh())
                };
                assert_near(gelu[at], 2.0 * numeric(exact, x[at]));
            }
        }
    }

    /// Far out the functions are 0 and x, and so are their loops.
    #[test]
    fn are_finite_far_from_zero() {
        for (x, slope) in [(-1e30, 0.0), (-300.0, 0.0), (300.0, 1.0), (1e30, 1.0)] {
            let [mut of_swish, mut of_gelu] = [[1.0]; 2];
            swish_gradient(&[x], 1.0, &mut of_swish);
            gelu_tanh_gradient(&[x], &mut of_gelu);
            assert!((of_swish[0] - slope).abs() < 1e-6, "{x}: {of_swish:?}");
            assert!((of_gelu[0] - slope).abs() < 1e-6, "{x}: {of_gelu:?}");
            let [mut swished, mut gelued] = [[x]; 2];
            swish(&mut swished, 1.0);
            gelu_tanh(&mut gelued);
            assert!(swished[0].is_finite() && gelued[0].is_finite());
        }
        let mut undefined = [1.0];
        swish_gradient(&[f32::NAN], 1.0, &mut undefined);
        assert!(undefined[0].is_nan());
    }
}
