mod ranked;

use std::collections::{HashMap, HashSet};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::RerouteError;
use ranked::Ranked;

/// How the next token is chosen. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 means greedy.
    pub temperature: f32,
    /// Keeps the smallest set of tokens whose probabilities reach this sum (arXiv 1904.09751): 0 keeps the likeliest, 1 all.
    pub top_p: f32,
    /// Keeps this many of the most likely tokens; 0 means all.
    pub top_k: usize,
    /// Divides positive and multiplies negative logits of tokens seen before (arXiv 1909.05858); > 0.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens that were drawn before, as OpenAI's API has it: -2 to 2.
    pub presence_penalty: f32,
    /// Taken from them as often as they were drawn: -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; negative infinity forbids one.
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be chosen; `None` allows all.
    pub allowed_tokens: Option<Vec<u32>>,
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
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_tokens: None,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`RerouteError::Sampling`]
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
        check((0.0..=1.0).contains(&p), "top_p", "in [0, 1]", p)?;
        let r = self.repetition_penalty;
        check(
            r.is_finite() && r > 0.0,
            "repetition_penalty",
            "a number > 0",
            r,
        )?;
        for (option, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            let is_penalty = (-2.0..=2.0).contains(&penalty);
            check(is_penalty, option, "in [-2, 2]", penalty)?;
        }
        let bias = self.logit_bias.iter().map(|&(_, bias)| bias);
        let is_bias = |bias: &f32| bias.is_finite() || *bias == f32::NEG_INFINITY;
        match { bias }.find(|bias| !is_bias(bias)) {
            Some(bias) => check(false, "logit_bias", "a number, or -infinity", bias),
            None => Ok(()),
        }
    }

    /// Whether the tokens that bias and mask name are of this vocabulary, and leave one to choose.
    ///
    /// # Errors
    /// [`RerouteError::TokenId`], [`RerouteError::Sampling`]
    pub fn check_vocabulary(&self, vocab_size: usize) -> Result<(), RerouteError> {
        let biased = self.logit_bias.iter().map(|&(id, _)| ("logit_bias", id));
        let allowed = self.allowed_tokens.iter().flatten();
        let allowed = allowed.map(|&id| ("allowed_tokens", id));
        let mut ids = biased.chain(allowed);
        if let Some((option, id)) = ids.find(|&(_, id)| id as usize >= vocab_size) {
            return Err(RerouteError::Sampling {
                option,
                range: "of ids that the model's vocabulary has",
                value: id.to_string(),
            });
        }
        if self.logit_bias.is_empty() && self.allowed_tokens.is_none() {
            return Ok(());
        }
        let mut logits = vec![0.0; vocab_size];
        self.bias(&mut logits);
        match logits.iter().any(|logit| logit.is_finite()) {
            true => Ok(()),
            false => Err(RerouteError::Sampling {
                option: "allowed_tokens",
                range: "such that a token is left that logit_bias does not forbid",
                value: "nothing".into(),
            }),
        }
    }

    /// Whether tokens count that were drawn.
    fn counts(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether logits are others than the model's.
    fn changes_logits(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.counts()
            || !self.logit_bias.is_empty()
            || self.allowed_tokens.is_some()
    }

    /// Adds the bias, and forbids what is not allowed. Tokens beyond the vocabulary are nobody's.
    fn bias(&self, logits: &mut [f32]) {
        for &(id, bias) in &self.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        let Some(allowed) = &self.allowed_tokens else {
            return;
        };
        let of = |&id: &u32| Some((id, *logits.get(id as usize)?));
        let kept: Vec<(u32, f32)> = allowed.iter().filter_map(of).collect();
        logits.fill(f32::NEG_INFINITY);
        for (id, logit) in kept {
            logits[id as usize] = logit;
        }
    }
}

/// How likely the model finds a token: natural logarithms of probabilities, of the logits as they come,
/// before penalty, bias and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was chosen.
    pub logprob: f32,
    /// The most likely tokens, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// Of a token, and the `count` likeliest; `None` if the token is none.
    pub(crate) fn of(logits: &[f32], token: u32, count: usize) -> Option<Self> {
        let largest = logits.iter().copied().reduce(f32::max)?;
        let relative = |logit: f32| f64::from(logit) - f64::from(largest);
        let sum: f64 = logits.iter().map(|&logit| relative(logit).exp()).sum();
        let logprob = |logit: f32| (relative(logit) - sum.ln()) as f32;
        let mut ranked = Ranked::new(logits);
        ranked.keep(count);
        let top = (0..count.min(logits.len())).filter_map(|rank| ranked.get(rank));
        Some(Self {
            logprob: logprob(*logits.get(token as usize)?),
            top: top.map(|id| (id, logprob(logits[id as usize]))).collect(),
        })
    }
}

/// Draws one sample's tokens.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: StdRng,
    /// Distinct tokens of the prompt and of what was drawn, if there is a penalty on them.
    seen: HashSet<u32>,
    /// How often each token was drawn, if that counts.
    drawn: HashMap<u32, u32>,
}

impl Sampler {
    /// A sampler for the sample with this index in the batch.
    ///
    /// # Errors
    /// [`RerouteError::Sampling`] for options out of range.
    pub fn new(options: &SamplingOptions, sample: usize) -> Result<Self, RerouteError> {
        options.validate()?;
        Ok(Self {
            random: StdRng::seed_from_u64(options.seed.wrapping_add(sample as u64)),
            options: options.clone(),
            seen: HashSet::new(),
            drawn: HashMap::new(),
        })
    }

    /// Counts tokens as seen, as those of a prompt. Those drawn count by themselves.
    pub fn see(&mut self, tokens: &[u32]) {
        if self.options.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }

    /// Chooses a token: penalties, bias and mask, then temperature, top-k, top-p, then the draw.
    /// Returns `None`, and leaves the logits as they are, if one is NaN or the largest is not finite.
    pub fn next(&mut self, logits: &mut [f32]) -> Option<u32> {
        let largest = logits.iter().copied().reduce(f32::max)?;
        if !largest.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        self.penalise(logits);
        self.options.bias(logits);
        // Numbers that are finite by themselves may not be together.
        let largest = logits.iter().copied().reduce(f32::max)?;
        if self.options.changes_logits()
            && (!largest.is_finite() || logits.iter().any(|x| x.is_nan()))
        {
            return None;
        }
        let token = match self.options.temperature == 0.0 {
            true => argmax(logits),
            false => self.draw(logits)?,
        };
        self.see(&[token]);
        if self.options.counts() {
            *self.drawn.entry(token).or_default() += 1;
        }
        Some(token)
    }

    fn draw(&mut self, logits: &[f32]) -> Option<u32> {
        let mut ranked = Ranked::new(logits);
        if self.options.top_k > 0 {
            ranked.keep(self.options.top_k);
        }
        let highest = logits[ranked.get(0)? as usize];
        let weight = |token: u32| {
            f64::from((logits[token as usize] - highest) / self.options.temperature).exp()
        };
        let total: f64 = ranked.tokens.iter().map(|&token| weight(token)).sum();
        // Of the tokens that reach `top_p` together; the draw falls among them.
        let mass = match self.options.top_p {
            1.0 => total,
            top_p => {
                let (mut mass, mut rank) = (0.0, 0);
                while (rank == 0 || mass < f64::from(top_p) * total)
                    && let Some(token) = ranked.get(rank)
                {
                    mass += weight(token);
                    rank += 1;
                }
                ranked.keep(rank);
                mass
            }
        };
        let mut draw = self.random.random::<f64>() * mass;
        let mut last = ranked.get(0)?;
        let mut rank = 0;
        while draw >= 0.0
            && let Some(token) = ranked.get(rank)
        {
            draw -= weight(token);
            (last, rank) = (token, rank + 1);
        }
        Some(last)
    }

    /// What is finite stays so, however far the penalty is from 1.
    fn penalise(&self, logits: &mut [f32]) {
        let penalty = self.options.repetition_penalty;
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize).filter(|x| x.is_finite()) {
                let penalised = match *logit > 0.0 {
                    true => *logit / penalty,
                    false => *logit * penalty,
                };
                *logit = penalised.clamp(f32::MIN, f32::MAX);
            }
        }
        let [once, each] = [
            self.options.presence_penalty,
            self.options.frequency_penalty,
        ];
        for (&token, &count) in &self.drawn {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= once + each * count as f32;
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
        sampler.see(seen);
        let mut draw = || sampler.next(&mut logits.to_vec()).unwrap();
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
        let none = SamplingOptions {
            temperature: 5.0,
            top_p: 0.0,
            ..Default::default()
        };
        assert!(draws(none, &logits, &[], 200).iter().all(|&t| t == 1));
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
            .map(|_| other.next(&mut logits.to_vec()).unwrap())
            .collect();
        assert_ne!(draws(options, &logits, &[], 20), other);
    }

    #[test]
    fn nan_logits_are_refused() {
        let mut sampler = Sampler::new(&SamplingOptions::default(), 0).unwrap();
        assert_eq!(sampler.next(&mut [0.0, f32::NAN]), None);
    }

    /// A head in half precision overflows to infinity before it comes to NaN.
    #[test]
    fn infinite_logits_are_refused() {
        for temperature in [0.0, 1.0] {
            let options = SamplingOptions {
                temperature,
                ..Default::default()
            };
            let next = |logits: &[f32]| {
                Sampler::new(&options, 0)
                    .unwrap()
                    .next(&mut logits.to_vec())
            };
            assert_eq!(next(&[0.0, f32::INFINITY]), None);
            assert_eq!(next(&[f32::NEG_INFINITY; 3]), None);
            assert_eq!(next(&[]), None);
            // What the caller rules out.
            assert_eq!(next(&[f32::NEG_INFINITY, 0.0]), Some(1));
        }
    }

    /// What a token drawn from everything sorted would be: one pass, as the rule reads.
    fn by_sorting(options: &SamplingOptions, random: &mut StdRng, logits: &[f32]) -> u32 {
        let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
        let of = |token: &u32| logits[*token as usize];
        ranked.sort_by(|a, b| of(b).total_cmp(&of(a)).then(a.cmp(b)));
        if options.top_k > 0 {
            ranked.truncate(options.top_k);
        }
        let highest = of(&ranked[0]);
        let weight = |token| f64::from((of(token) - highest) / options.temperature).exp();
        let weights: Vec<f64> = ranked.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let (mut kept, mut mass) = (0, 0.0);
        while kept < weights.len() && (kept == 0 || mass < f64::from(options.top_p) * total) {
            mass += weights[kept];
            kept += 1;
        }
        let mut draw = random.random::<f64>() * mass;
        let hit = weights[..kept].iter().position(|weight| {
            draw -= weight;
            draw < 0.0
        });
        ranked[hit.unwrap_or(kept - 1)]
    }

    #[test]
    fn sorting_less_draws_the_same_tokens() {
        let mut random = StdRng::seed_from_u64(11);
        for (size, spread) in [(1, 1.0), (7, 3.0), (500, 0.0), (3000, 0.1), (3000, 8.0)] {
            for (top_k, top_p) in [
                (0, 1.0),
                (0, 0.9),
                (0, 0.2),
                (1, 1.0),
                (40, 1.0),
                (900, 0.95),
            ] {
                let options = SamplingOptions {
                    temperature: 0.7,
                    top_k,
                    top_p,
                    seed: 5,
                    ..Default::default()
                };
                let mut sampler = Sampler::new(&options, 3).unwrap();
                let mut reference = StdRng::seed_from_u64(5 + 3);
                for draw in 0..100 {
                    // Rounded, so that there are ties.
                    let logit = |_| (random.random::<f32>() * spread * 16.0).round() / 16.0;
                    let logits: Vec<f32> = (0..size).map(logit).collect();
                    let expected = by_sorting(&options, &mut reference, &logits);
                    let token = sampler.next(&mut logits.clone()).unwrap();
                    assert_eq!(token, expected, "{size} {spread} {top_k} {top_p}: {draw}");
                }
            }
        }
    }

    #[test]
    fn penalties_without_measure_leave_numbers() {
        let draws = |repetition_penalty, temperature| {
            let options = SamplingOptions {
                repetition_penalty,
                temperature,
                ..Default::default()
            };
            draws(options, &[30.0, -20.0, 10.0], &[0, 1], 2)
        };
        for temperature in [0.0, 1e-30, 1.0] {
            assert_eq!(draws(1e-40, temperature), [0, 0]);
            assert_eq!(draws(f32::MAX, temperature)[0], 2);
        }
    }

    #[test]
    fn what_was_drawn_counts_as_seen() {
        let options = SamplingOptions {
            repetition_penalty: 10.0,
            ..Default::default()
        };
        assert_eq!(draws(options, &[3.0, 2.0, 1.0], &[], 3), [0, 1, 2]);
    }

    #[test]
    fn drawn_tokens_are_penalised_once_and_each_time_and_those_of_the_prompt_are_not() {
        let draws = |presence_penalty, frequency_penalty| {
            let options = SamplingOptions {
                presence_penalty,
                frequency_penalty,
                ..Default::default()
            };
            draws(options, &[3.0, 1.8, 0.0], &[0], 6)
        };
        assert_eq!(draws(0.0, 0.0), [0; 6]);
        assert_eq!(draws(1.0, 0.0), [0; 6]);
        // 3 falls to 1.5, and no further; 1.8 to 0.3.
        assert_eq!(draws(1.5, 0.0), [0, 1, 0, 0, 0, 0]);
        // 3, 2.5, 2, 1.5 | 1.8, 1.3 | 1.5, 1 | 1.3.
        assert_eq!(draws(0.0, 0.5), [0, 0, 0, 1, 0, 1]);
        assert_eq!(draws(-2.0, -2.0), [0; 6]);
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
                top_p: -0.1,
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
            SamplingOptions {
                presence_penalty: 2.5,
                ..Default::default()
            },
            SamplingOptions {
                frequency_penalty: f32::NAN,
                ..Default::default()
            },
        ] {
            assert!(options.validate().is_err(), "{options:?}");
        }
    }
}
