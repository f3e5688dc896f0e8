//! What a product is measured against.

use std::time::{Duration, Instant};

use crate::isa;

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
        rounds as f64 / started.elapsed().as_secs_f64()
    });
    Some(Limit {
        instruction: work.instruction,
        operations_per_second: counts.iter().sum::<f64>() * work.operations,
        threads: counts.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_none_or_it_is_plausible() {
        for of in [Multiplied::F32, Multiplied::BF16, Multiplied::Bytes] {
            if let Some(limit) = limit(of) {
                assert!(limit.operations_per_second > 1e9, "{limit:?}");
            }
        }
    }
}
