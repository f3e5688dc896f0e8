//! Numbers that a source does not store.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::ConvertError;
use crate::source::BLOCK_BYTES;

/// Standard deviation of weights that are to be trained, as transformers' `initializer_range` has it.
const SPREAD: f32 = 0.02;
/// Of SplitMix64.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// Hands on `elements` numbers, little-endian f32, in blocks.
pub(crate) fn stream(
    elements: usize,
    number: impl Fn(u64) -> f32,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let mut block = Vec::new();
    for at in 0..elements as u64 {
        block.extend(number(at).to_le_bytes());
        if block.len() == BLOCK_BYTES {
            sink(&block)?;
            block.clear();
        }
    }
    sink(&block)
}

/// The numbers of a weight that is to be trained. Each depends on the seed, the name and its place alone: it is the
/// sum of twelve uniform ones, whose distribution is close to the normal one, and, of integers, the same on every
/// machine.
pub(crate) fn normal(seed: u64, name: &str) -> impl Fn(u64) -> f32 {
    let start = xxh3_64_with_seed(name.as_bytes(), seed);
    move |at| {
        let draws = (1..=3).map(|draw| mix(start.wrapping_add((3 * at + draw).wrapping_mul(STEP))));
        let sum: i32 = draws
            .flat_map(|draw| [0, 16, 32, 48].map(|shift| (draw >> shift) as u16))
            .map(i32::from)
            .sum();
        // Mean and standard deviation of twelve numbers from 0 to 65535.
        (sum - 393_210) as f32 / 65_536.0 * SPREAD
    }
}

/// The output function of SplitMix64.
fn mix(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    state ^ (state >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spread_as_they_should_be_and_always_the_same() {
        let number = normal(0, "a");
        let count = 100_000;
        let numbers: Vec<f64> = (0..count).map(|at| number(at).into()).collect();
        let moment = |power: i32| {
            let sum: f64 = numbers.iter().map(|x| (x / 0.02).powi(power)).sum();
            sum / count as f64
        };
        assert!(moment(1).abs() < 0.01, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "{}", moment(2));
        // 3 of a normal distribution, 2.9 of such a sum.
        assert!((moment(4) - 2.9).abs() < 0.1, "{}", moment(4));
        let first = |seed, name| normal(seed, name)(0);
        assert_eq!(first(0, "a"), number(0));
        assert!(first(1, "a") != number(0) && first(0, "b") != number(0));
    }
}
