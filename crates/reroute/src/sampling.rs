use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::RerouteError;

/// How the next token is chosen. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 means greedy.
    pub temperature: f32,
    /// Keeps the smallest set of tokens whose probabilities reach this sum (arXiv 1904.09751).
    pub top_p: f32,
    /// Keeps this many of the most likely tokens; 0 means all.
    pub top_k: usize,
    /// Divides positive and multiplies negative logits of tokens seen before (arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Seed of the random numbers; sample `i` of a batch draws from stream `seed + i`.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// Checks the ranges.
    pub fn validate(&self) -> Result<(), RerouteError> {
        let check = |ok: bool, option, range, value: f32| match ok {
            true => Ok(()),
            false => Err(RerouteError::Sampling {
                option,
                range,
                value: value.to_string(),
            }),
        };
        let t = self.temperature;
        check(t.is_finite() && t >= 0.0, "temperature", "a number ≥ 0", t)?;
        let p = self.top_p;
        check(p > 0.0 && p <= 1.0, "top_p", "in (0, 1]", p)?;
        let r = self.repetition_penalty;
        check(
            r.is_finite() && r > 0.0,
            "repetition_penalty",
            "a number > 0",
            r,
        )
    }
}

/// Draws one sample's tokens.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: StdRng,
}

impl Sampler {
    /// A sampler for the sample with this index in the batch.
    pub fn new(options: &SamplingOptions, sample: usize) -> Result<Self, RerouteError> {
        options.validate()?;
        Ok(Self {
            random: StdRng::seed_from_u64(options.seed.wrapping_add(sample as u64)),
            options: options.clone(),
        })
    }

    /// Chooses a token: repetition penalty, then temperature, top-k, top-p, then the draw. `seen`
    /// are the prompt's and the generated tokens. Returns `None` if a logit is NaN.
    pub fn next(&mut self, logits: &mut [f32], seen: &[u32]) -> Option<u32> {
        if logits.is_empty() || logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        self.penalise(logits, seen);
        if self.options.temperature == 0.0 {
            return Some(argmax(logits));
        }
        let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| {
            logits[*b as usize]
                .total_cmp(&logits[*a as usize])
                .then(a.cmp(b))
        };
        let keep = match self.options.top_k {
            0 => ranked.len(),
            k => k.min(ranked.len()),
        };
        if keep < ranked.len() {
            ranked.select_nth_unstable_by(keep, by_logit);
            ranked.truncate(keep);
        }
        ranked.sort_unstable_by(by_logit);
        let highest = logits[ranked[0] as usize];
        let weight = |token: &u32| {
            f64::from((logits[*token as usize] - highest) / self.options.temperature).exp()
        };
        let weights: Vec<f64> = ranked.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let (mut kept, mut mass) = (0, 0.0);
        while kept < weights.len() && (kept == 0 || mass < f64::from(self.options.top_p) * total) {
            mass += weights[kept];
            kept += 1;
        }
        let mut draw = self.random.random::<f64>() * mass;
        let hit = weights[..kept].iter().position(|weight| {
            draw -= weight;
            draw < 0.0
        });
        Some(ranked[hit.unwrap_or(kept - 1)])
    }

    fn penalise(&self, logits: &mut [f32], seen: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen = seen.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
        }
    }
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(options: SamplingOptions, logits: &[f32], seen: &[u32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(&options, 0).unwrap();
        let mut draw = || sampler.next(&mut logits.to_vec(), seen).unwrap();
        (0..count).map(|_| draw()).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(
            draws(SamplingOptions::default(), &[1.0, 3.0, 3.0, 2.0], &[], 1),
            [1]
        );
    }

    #[test]
    fn repetition_penalty_moves_both_signs_down() {
        let options = SamplingOptions {
            repetition_penalty: 2.0,
            ..Default::default()
        };
        assert_eq!(draws(options.clone(), &[3.0, 2.0], &[0, 0], 1), [1]);
        assert_eq!(draws(options, &[-1.0, -1.5], &[0], 1), [1]);
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [0.0, 5.0, 4.9, -1.0];
        let top_k = SamplingOptions {
            temperature: 1.0,
            top_k: 2,
            ..Default::default()
        };
        assert!(
            draws(top_k, &logits, &[], 200)
                .iter()
                .all(|t| [1, 2].contains(t))
        );
        let top_p = SamplingOptions {
            temperature: 1.0,
            top_p: 0.5,
            ..Default::default()
        };
        assert!(draws(top_p, &logits, &[], 200).iter().all(|&t| t == 1));
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let options = SamplingOptions {
            temperature: 0.5,
            seed: 7,
            ..Default::default()
        };
        // Temperature ½ squares the odds: 3 : 1 becomes 9 : 1.
        let drawn = draws(options, &[3f32.ln(), 0.0], &[], 10_000);
        let share = drawn.iter().filter(|&&t| t == 0).count() as f64 / 10_000.0;
        assert!((share - 0.9).abs() < 0.01, "{share}");
    }

    #[test]
    fn a_seed_fixes_the_draws_and_samples_differ() {
        let options = SamplingOptions {
            temperature: 1.0,
            seed: 3,
            ..Default::default()
        };
        let logits = [0.0; 50];
        assert_eq!(
            draws(options.clone(), &logits, &[], 20),
            draws(options.clone(), &logits, &[], 20)
        );
        let mut other = Sampler::new(&options, 1).unwrap();
        let other: Vec<u32> = (0..20)
            .map(|_| other.next(&mut logits.to_vec(), &[]).unwrap())
            .collect();
        assert_ne!(draws(options, &logits, &[], 20), other);
    }

    #[test]
    fn nan_logits_are_refused() {
        let mut sampler = Sampler::new(&SamplingOptions::default(), 0).unwrap();
        assert_eq!(sampler.next(&mut [0.0, f32::NAN], &[]), None);
    }

    #[test]
    fn options_out_of_range_are_refused() {
        for options in [
            SamplingOptions {
                temperature: -1.0,
                ..Default::default()
            },
            SamplingOptions {
                temperature: f32::NAN,
                ..Default::default()
            },
            SamplingOptions {
                top_p: 0.0,
                ..Default::default()
            },
            SamplingOptions {
                top_p: 1.5,
                ..Default::default()
            },
            SamplingOptions {
                repetition_penalty: 0.0,
                ..Default::default()
            },
        ] {
            assert!(options.validate().is_err(), "{options:?}");
        }
    }
}
