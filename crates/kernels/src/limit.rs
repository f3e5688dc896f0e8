//! What a product is measured against.

use std::time::{Duration, Instant};

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::isa;
use crate::split::reading;

/// What numbers are multiplied as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Multiplied {
    /// Single precision.
    F32,
    /// Pairs of bf16.
    BF16,
    /// Bytes in fours.
    Bytes,
}

/// The most that all threads together multiply and add.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// The instruction that does most of it.
    pub instruction: &'static str,
    /// Multiplications and additions a second, measured.
    pub operations_per_second: f64,
    /// Threads that did it.
    pub threads: usize,
    /// Cycles a second of a thread meanwhile, measured by additions of which each waits for the one before:
    /// with `operations_per_second` it says how many operations a cycle does.
    pub clock: f64,
}

/// Measures for about a fifth of a second; `None` where it is not known with which instruction.
pub fn limit(of: Multiplied) -> Option<Limit> {
    const MEASURED: Duration = Duration::from_millis(200);
    const ROUNDS: usize = 100_000;
    let work = isa::multiply_loop(of)?;
    let counts = rayon::broadcast(|_| {
        work.run(ROUNDS);
        let (started, mut rounds) = (Instant::now(), 0);
        while started.elapsed() < MEASURED {
            work.run(ROUNDS);
            rounds += ROUNDS;
        }
        let rate = rounds as f64 / started.elapsed().as_secs_f64();
        (rate, isa::clock())
    });
    let threads = counts.len();
    let (rates, clocks): (Vec<f64>, Vec<f64>) = counts.into_iter().unzip();
    Some(Limit {
        instruction: work.instruction,
        operations_per_second: rates.iter().sum::<f64>() * work.operations,
        threads,
        clock: clocks.iter().sum::<f64>() / threads as f64,
    })
}

/// Numbers in memory, far more than caches hold, to measure how fast all threads together read them.
pub struct Reading(Vec<f32>);

impl Reading {
    /// 2 GiB.
    pub const BYTES: usize = 2 << 30;

    /// So many bytes.
    pub fn new(bytes: usize) -> Self {
        let mut numbers = vec![0.0; (bytes / size_of::<f32>()).max(1)];
        // Pages that nobody has written are all the same page of zeros.
        numbers.par_chunks_mut(PART).for_each(|part| part.fill(1.0));
        Self(numbers)
    }

    /// Bytes a second: of the sum of all numbers, once.
    pub fn bytes_per_second(&self) -> f64 {
        let started = Instant::now();
        let sums = self.0.par_chunks(PART);
        let sum: f64 = sums.map(|part| reading().dispatch(Sum(part))).sum();
        let elapsed = started.elapsed().as_secs_f64();
        std::hint::black_box(sum);
        (self.0.len() * size_of::<f32>()) as f64 / elapsed
    }
}

/// Numbers that a thread takes at a time (4 MiB).
const PART: usize = 1 << 20;

/// The sum of numbers, in eight registers, so that none waits for another.
struct Sum<'a>(&'a [f32]);

impl WithSimd for Sum<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        let (head, tail) = S::as_simd_f32s(self.0);
        let mut sums = [simd.splat_f32s(0.0); 8];
        let (whole, rest) = head.as_chunks::<8>();
        for numbers in whole {
            for (sum, x) in sums.iter_mut().zip(numbers) {
                *sum = simd.add_f32s(*sum, *x);
            }
        }
        let sums = sums.iter().chain(rest);
        let sums: f32 = sums.map(|sum| simd.reduce_sum_f32s(*sum)).sum();
        f64::from(sums + tail.iter().sum::<f32>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_none_or_it_is_plausible() {
        for of in [Multiplied::F32, Multiplied::BF16, Multiplied::Bytes] {
            if let Some(limit) = limit(of) {
                assert!(limit.operations_per_second > 1e9, "{limit:?}");
                assert!((1e8..1e11).contains(&limit.clock), "{limit:?}");
            }
        }
    }

    #[test]
    fn reading_takes_time() {
        let rate = Reading::new(64 << 20).bytes_per_second();
        assert!((1e8..1e13).contains(&rate), "{rate}");
        assert_eq!(reading().dispatch(Sum(&[1.0; 131])), 131.0);
    }
}
