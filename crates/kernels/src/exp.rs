//! The exponential function, in a form that compilers vectorise.

/// Adding it rounds to a whole number and leaves that number in the lowest bits: 1.5 · 2²³.
const ROUND: f32 = 12_582_912.0;

/// Below, the result is 0 (it would be a subnormal number).
const LOWEST: f32 = -87.3;

/// Above, the result is that of this number: finite.
const HIGHEST: f32 = 88.3;

/// `ln 2` in two parts: the first has few digits, so that its products with whole numbers are exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// `eˣ` to within 2 units in the last place; NaN stays NaN.
///
/// `x = n · ln 2 + r`, `|r| ≤ ln 2 / 2`, and `eʳ` by the polynomial of Cephes' `expf`.
#[inline(always)]
#[allow(clippy::manual_clamp)] // `clamp` compares in an order that loses NaN on some processors.
pub(crate) fn exp(x: f32) -> f32 {
    let bounded = if x < LOWEST { LOWEST } else { x };
    let bounded = if bounded > HIGHEST { HIGHEST } else { bounded };
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * LN_2[0] - n * LN_2[1];
    let mut tail = 1.987_569_1e-4;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        tail = tail * r + coefficient;
    }
    let power = tail * r * r + r + 1.0;
    // 2ⁿ: n goes to where the exponent is; the upper bits of `shifted` fall off.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < LOWEST { 0.0 } else { power * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_exact_function() {
        for step in -87_000..88_000 {
            let x = step as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "{x}: {error}");
        }
    }

    #[test]
    fn ends_well() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert!(exp(f32::INFINITY).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }
}
