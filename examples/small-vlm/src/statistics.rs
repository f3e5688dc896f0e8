//! What a difference between two routings on the same scenes is worth.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Samples of a bootstrap.
const SAMPLES: usize = 10_000;
/// Ends of an interval of 95 %, as shares of the samples.
const ENDS: [f64; 2] = [0.025, 0.975];

/// The mean of numbers.
pub fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len() as f64
}

/// An interval of 95 % of the mean of numbers that belong to scenes: percentiles of the means of scenes drawn with
/// repetition (Efron, 1979). Numbers that are differences on the same scenes make it a paired one.
pub fn interval(numbers: &[f64], seed: u64) -> [f64; 2] {
    let mut rng = StdRng::seed_from_u64(seed);
    let count = numbers.len();
    let mut drawn = || numbers[rng.random_range(0..count)];
    let mut means: Vec<f64> = (0..SAMPLES)
        .map(|_| (0..count).map(|_| drawn()).sum::<f64>() / count as f64)
        .collect();
    means.sort_by(f64::total_cmp);
    ENDS.map(|end| means[((SAMPLES - 1) as f64 * end).round() as usize])
}

/// The probability that two routings of equal accuracy differ as much as these do on scenes that just one of them
/// gets right (McNemar's test, exact, two-sided): `gains` and `losses` are tosses of a fair coin.
pub fn exact_test(gains: usize, losses: usize) -> f64 {
    let tosses = gains + losses;
    let logarithms: Vec<f64> = (1..=tosses).map(|n| (n as f64).ln()).collect();
    let factorial = |n: usize| logarithms[..n].iter().sum::<f64>();
    let probability = |k: usize| {
        let ways = factorial(tosses) - factorial(k) - factorial(tosses - k);
        (ways - tosses as f64 * 2f64.ln()).exp()
    };
    let tail: f64 = (0..=gains.min(losses)).map(probability).sum();
    (2.0 * tail).min(1.0)
}

/// Probabilities corrected for their number (Holm, 1979): the smallest times their number, the next times one less,
/// none smaller than the one before.
pub fn holm(probabilities: &[f64]) -> Vec<f64> {
    let count = probabilities.len();
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b]));
    let (mut corrected, mut largest) = (vec![0.0; count], 0.0_f64);
    for (rank, at) in order.into_iter().enumerate() {
        largest = largest
            .max(probabilities[at] * (count - rank) as f64)
            .min(1.0);
        corrected[at] = largest;
    }
    corrected
}

/// How far two lists of numbers rise together (Spearman, 1904): 1 if one is the larger where the other is, −1 if the smaller, 0
/// if they have nothing in common or one does not change.
pub fn ranks_agree(a: &[f64], b: &[f64]) -> f64 {
    let [a, b] = [a, b].map(ranks);
    let middle = (a.len() as f64 - 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| (a - middle) * (b - middle));
        products.sum()
    };
    let size = (product(&a, &a) * product(&b, &b)).sqrt();
    if size == 0.0 {
        0.0
    } else {
        product(&a, &b) / size
    }
}

/// The place of each number among all; equal ones share the mean of theirs.
fn ranks(numbers: &[f64]) -> Vec<f64> {
    let rank = |x: &f64| {
        let below = numbers.iter().filter(|other| *other < x).count();
        let alike = numbers.iter().filter(|other| *other == x).count();
        below as f64 + (alike as f64 - 1.0) / 2.0
    };
    numbers.iter().map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_corrected_step_by_step() {
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        let corrected = holm(&[0.01, 0.04, 0.03, 0.005]);
        assert!(
            close(&corrected, &[0.03, 0.06, 0.06, 0.02]),
            "{corrected:?}"
        );
        assert!(close(&holm(&[0.9, 0.8]), &[1.0, 1.0]));
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn a_fair_coin_is_tossed() {
        assert!((exact_test(0, 5) - 2.0 / 32.0).abs() < 1e-12);
        assert!((exact_test(1, 9) - 22.0 / 1024.0).abs() < 1e-12);
        assert_eq!(exact_test(4, 4), 1.0);
        assert_eq!(exact_test(0, 0), 1.0);
    }

    #[test]
    fn an_interval_is_that_of_the_normal_distribution() {
        // 300 of 1000: the deviation of the share is √(0.3 · 0.7 / 1000).
        let numbers: Vec<f64> = (0..1000).map(|at| f64::from(at % 10 < 3)).collect();
        let [low, high] = interval(&numbers, 1);
        let half = 1.96 * (0.21f64 / 1000.0).sqrt();
        assert!((low - (0.3 - half)).abs() < 0.004, "{low}");
        assert!((high - (0.3 + half)).abs() < 0.004, "{high}");
        assert_eq!(interval(&numbers, 1), [low, high]);
        assert_eq!(interval(&[1.0; 9], 2), [1.0, 1.0]);
    }

    /// Pairs matter: where one is always right when the other is, a small gain is certain.
    #[test]
    fn differences_are_paired() {
        let base: Vec<f64> = (0..500).map(|at| f64::from(at % 2 == 0)).collect();
        let better: Vec<f64> = (0..500)
            .map(|at| f64::from(at % 2 == 0 || at % 40 == 1))
            .collect();
        let gains: Vec<f64> = better.iter().zip(&base).map(|(a, b)| a - b).collect();
        let [low, high] = interval(&gains, 3);
        assert!(low > 0.01 && high < 0.05, "{low} {high}");
        let alone = interval(&better, 3);
        assert!(alone[0] < mean(&base));
    }

    /// Values from the definition by hand; equal numbers share a rank.
    #[test]
    fn ranks_agree_as_in_the_definition() {
        assert_eq!(ranks_agree(&[1.0, 2.0, 3.0], &[10.0, 20.0, 90.0]), 1.0);
        assert_eq!(ranks_agree(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]), -1.0);
        assert_eq!(ranks_agree(&[1.0, 2.0], &[5.0, 5.0]), 0.0);
        let half = ranks_agree(&[1.0, 2.0, 3.0], &[1.0, 3.0, 2.0]);
        assert!((half - 0.5).abs() < 1e-12);
        assert_eq!(ranks(&[4.0, 1.0, 4.0]), [1.5, 0.0, 1.5]);
    }
}
