mod gradient;

use std::f32::consts::PI;

pub use gradient::{gelu_tanh_gradient, swish_gradient, swish_product_gradient};

use crate::exp::exp;
use crate::precision::Number;
use crate::split::{PIECE, pieces};

/// `x ← x · σ(βx)`; SiLU for `beta` 1 (arXiv 1702.03118).
pub fn swish<T: Number>(x: &mut [T], beta: f32) {
    by_number(
        x,
        #[inline(always)]
        |x| sigmoid_weighted(x, -beta * x),
    );
}

/// `x ← x · σ(βx) · y`, the gate of SwiGLU (arXiv 2002.05202).
///
/// Works on as many numbers as the shorter of both has.
pub fn swish_product<T: Number>(x: &mut [T], beta: f32, y: &[T]) {
    pieces(
        x,
        PIECE,
        #[inline(always)]
        |index, x| {
            let y = y.get(index * PIECE..).unwrap_or_default();
            for (to, y) in x.iter_mut().zip(y) {
                let x = to.to_f32();
                *to = T::of(sigmoid_weighted(x, -beta * x) * y.to_f32());
            }
        },
    );
}

/// GELU with `tanh` for the error function (arXiv 1606.08415, §2):
/// `x · (1 + tanh u) / 2 = x · σ(2u)`, `u = √(2/π) · (x + 0.044715 x³)`.
pub fn gelu_tanh<T: Number>(x: &mut [T]) {
    by_number(
        x,
        #[inline(always)]
        |x| sigmoid_weighted(x, gelu_exponent(x).0),
    );
}

/// `x ← x + y`, number by number.
pub fn add<T: Number>(x: &mut [T], y: &[T]) {
    pieces(
        x,
        PIECE,
        #[inline(always)]
        |index, x| {
            let y = y.get(index * PIECE..).unwrap_or_default();
            for (x, y) in x.iter_mut().zip(y) {
                *x = T::of(x.to_f32() + y.to_f32());
            }
        },
    );
}

/// `x ← x + bias`, feature by feature.
///
/// # Shapes
/// - `x`: `[features, rows]`
/// - `bias`: `[features]`
pub fn add_bias<T: Number>(x: &mut [T], bias: &[f32]) {
    let rows = x.len() / bias.len().max(1);
    let features = (PIECE / rows.max(1)).max(1);
    pieces(
        x,
        features * rows,
        #[inline(always)]
        |index, x| {
            let bias = bias.get(index * features..).unwrap_or_default();
            for (x, bias) in x.chunks_exact_mut(rows.max(1)).zip(bias) {
                x.iter_mut().for_each(|x| *x = T::of(x.to_f32() + bias));
            }
        },
    );
}

/// A function of each number, in f32.
#[inline(always)]
fn by_number<T: Number>(x: &mut [T], of: impl Fn(f32) -> f32 + Sync) {
    pieces(
        x,
        PIECE,
        #[inline(always)]
        |_, x| x.iter_mut().for_each(|x| *x = T::of(of(x.to_f32()))),
    );
}

/// `−2u`, and how much it changes with `x`.
#[inline(always)]
fn gelu_exponent(x: f32) -> (f32, f32) {
    let scale = -(8.0 / PI).sqrt();
    let bent = x * x * (0.044715 * scale);
    (x * (bent + scale), 3.0 * bent + scale)
}

/// `x / (1 + e^exponent)`, which is `x · σ(−exponent)`.
#[inline(always)]
fn sigmoid_weighted(x: f32, exponent: f32) -> f32 {
    x / (1.0 + exp(exponent))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn samples(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.37).sin() * 20.0).collect()
    }

    fn assert_close(actual: &[f32], inputs: &[f32], exact: impl Fn(f64) -> f64) {
        for (actual, &x) in actual.iter().zip(inputs) {
            let exact = exact(f64::from(x));
            let error = (f64::from(*actual) - exact).abs();
            assert!(error <= 1e-6 * exact.abs() + 1e-7, "{x}: {actual}, {exact}");
        }
    }

    #[test]
    fn follow_their_formulas_across_pieces() {
        for count in [0, 1, 17, PIECE, PIECE + 1, 2 * PIECE + 33] {
            let inputs = samples(count);
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());

            let mut x = inputs.clone();
            swish(&mut x, 1.702);
            assert_close(&x, &inputs, |x| x * sigmoid(1.702 * x));

            let mut x = inputs.clone();
            swish_product(&mut x, 1.0, &inputs);
            assert_close(&x, &inputs, |x| x * x * sigmoid(x));

            let mut x = inputs.clone();
            gelu_tanh(&mut x);
            assert_close(&x, &inputs, |x| {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + u.tanh())
            });
        }
    }

    /// In bf16 the same, rounded once.
    #[test]
    fn work_on_bf16_as_it_is() {
        let count = PIECE + 33;
        let halves: Vec<bf16> = samples(count).iter().map(|x| Number::to_bf16(*x)).collect();
        let singles: Vec<f32> = halves.iter().map(|x| Number::to_f32(*x)).collect();
        let bias: Vec<f32> = samples(3);
        let rows = count / 3;
        type Works = (
            fn(&mut [f32], &[f32], &[f32]),
            fn(&mut [bf16], &[bf16], &[f32]),
        );
        let works: [Works; 5] = [
            (|x, _, _| swish(x, 1.0), |x, _, _| swish(x, 1.0)),
            (|x, _, _| gelu_tanh(x), |x, _, _| gelu_tanh(x)),
            (
                |x, y, _| swish_product(x, 1.0, y),
                |x, y, _| swish_product(x, 1.0, y),
            ),
            (|x, y, _| add(x, y), |x, y, _| add(x, y)),
            (
                |x, _, bias| add_bias(x, bias),
                |x, _, bias| add_bias(x, bias),
            ),
        ];
        for (on_singles, on_halves) in works {
            let (mut x, mut y) = (singles[..3 * rows].to_vec(), halves[..3 * rows].to_vec());
            on_singles(&mut x, &singles[..3 * rows], &bias);
            on_halves(&mut y, &halves[..3 * rows], &bias);
            assert!(x.iter().zip(&y).all(|(x, y)| Number::to_bf16(*x) == *y));
        }
        let mut x = vec![1.0; 6];
        add_bias(&mut x, &[1.0, 2.0, 3.0]);
        assert_eq!(x, [2.0, 2.0, 3.0, 3.0, 4.0, 4.0]);
        add_bias(&mut x[..0], &[]);
    }

    #[test]
    fn large_and_undefined_inputs() {
        let mut x = [f32::NAN, f32::INFINITY, -1e30, 1e30];
        swish(&mut x, 1.0);
        assert!(x[0].is_nan());
        assert_eq!(x[1], f32::INFINITY);
        assert!(x[2].abs() < 1e-6, "{}", x[2]);
        assert_eq!(x[3], 1e30);
    }
}
