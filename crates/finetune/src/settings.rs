use reroute_zoo::{AdapterConfig, Trained};
use serde::{Deserialize, Serialize};

use crate::TuneError;

/// Most forward passes of a step.
const MOST_PASSES: usize = 1 << 16;

/// How a model is trained.
#[derive(Debug, Clone)]
pub struct Settings {
    /// A low-rank adapter, in f32 whatever the type of the weights.
    pub adapter: Option<AdapterConfig>,
    /// What is trained besides the adapter, in f32.
    pub trained: Vec<Trained>,
    /// Presets of the forward pass; of several one is drawn for every step.
    pub routings: Vec<String>,
    /// How long, in what portions, from what seed.
    pub course: Course,
    /// The optimizer.
    pub optimizer: OptimizerSettings,
}

/// How long it takes, and in what portions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Course {
    /// Steps of the optimizer.
    pub steps: usize,
    /// Examples that are rows of one forward pass.
    pub batch: usize,
    /// Forward passes of a step.
    pub accumulate: usize,
    /// Seed of the order of examples and of what is drawn.
    pub seed: u64,
    /// Steps from one validation to the next; 0 for the end alone.
    pub validate_every: usize,
    /// Validations without a better loss after which training ends; 0 for never.
    pub patience: usize,
    /// Steps from one checkpoint to the next; 0 for the end alone.
    pub save_every: usize,
    /// Most bytes of visual tokens that are kept where tower and projector are frozen.
    pub cache_bytes: u64,
    /// Whether the decoder's layers keep nothing but what enters them, and compute everything once more on the way back: less
    /// memory for more time ([`Vlm::learn_recomputing`](reroute_zoo::Vlm::learn_recomputing)). Of the plain model alone.
    #[serde(default)]
    pub recompute: bool,
}

/// AdamW (arXiv 1711.05101) as PyTorch has it, and what it follows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimizerSettings {
    /// The largest rate.
    pub learning_rate: f64,
    /// Steps until it is reached.
    pub warmup: usize,
    /// What comes then.
    pub decay: Decay,
    /// Decay rates of the two moments.
    pub betas: [f32; 2],
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Share of a weight, times the rate, that a step takes off.
    pub weight_decay: f32,
    /// Longest gradient of all parameters together; 0 for any.
    pub clip: f64,
}

/// What the learning rate does behind the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Half a cosine down to 0 at the last step.
    Cosine,
    /// A line down to 0 at the last step.
    Linear,
    /// Nothing.
    Constant,
}

impl Default for Course {
    fn default() -> Self {
        Self {
            steps: 100,
            batch: 1,
            accumulate: 1,
            seed: 0,
            validate_every: 0,
            patience: 0,
            save_every: 100,
            cache_bytes: 1 << 30,
            recompute: false,
        }
    }
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            warmup: 0,
            decay: Decay::Cosine,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
        }
    }
}

impl OptimizerSettings {
    /// The learning rate of a step, counted from 0: that of `get_cosine_schedule_with_warmup` and its kin in
    /// transformers, whose first step with a warm-up has the rate 0.
    pub fn rate(&self, step: usize, steps: usize) -> f64 {
        if step < self.warmup {
            return self.learning_rate * step as f64 / self.warmup as f64;
        }
        let left = steps.saturating_sub(self.warmup).max(1);
        let done = ((step - self.warmup) as f64 / left as f64).min(1.0);
        let share = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Decay::Linear => 1.0 - done,
            Decay::Constant => 1.0,
        };
        self.learning_rate * share
    }
}

impl Settings {
    /// Whether they make sense for so many examples, learnt and measured on.
    pub(crate) fn check(&self, examples: usize, validation: usize) -> Result<(), TuneError> {
        let Self {
            course, optimizer, ..
        } = self;
        let refused = |setting: &'static str, reason: &'static str| {
            Err(TuneError::Setting { setting, reason })
        };
        let is_rate = |x: f64| x.is_finite() && x >= 0.0;
        if self.adapter.is_none() && self.trained.is_empty() {
            return refused("train", "says nothing: name an adapter or parameters");
        }
        if self.routings.is_empty() {
            return refused("routing", "names no preset: `dense` is the plain model");
        }
        if course.recompute && self.routings.iter().any(|name| name != "dense") {
            return refused(
                "recompute",
                "is of the plain model: leave it out, or the routings",
            );
        }
        if course.steps == 0 || course.batch == 0 || course.accumulate == 0 {
            return refused("steps, batch and accumulate", "are 1 at least");
        }
        if examples == 0 {
            return refused("examples", "are none");
        }
        if course.batch > examples || course.accumulate > MOST_PASSES {
            return refused(
                "batch and accumulate",
                "are at most the number of examples, and 65536",
            );
        }
        if course.patience > 0 && course.validate_every == 0 {
            return refused(
                "patience",
                "counts validations on the way: set validate_every, too",
            );
        }
        if course.validate_every > 0 && validation == 0 {
            return refused(
                "validate_every",
                "means nothing without examples to measure on",
            );
        }
        if !is_rate(optimizer.learning_rate) {
            return refused("learning_rate", "is a finite number, 0 at least");
        }
        if !is_rate(optimizer.weight_decay.into()) || !is_rate(optimizer.clip) {
            return refused("weight_decay and clip", "are finite numbers, 0 at least");
        }
        if !optimizer.betas.iter().all(|beta| (0.0..1.0).contains(beta)) {
            return refused("betas", "lie between 0 and 1, 1 excluded");
        }
        if !(optimizer.epsilon.is_normal() && optimizer.epsilon > 0.0) {
            return refused("epsilon", "is a positive number");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_and_fall() {
        let settings = OptimizerSettings {
            learning_rate: 2.0,
            warmup: 4,
            ..OptimizerSettings::default()
        };
        let rates: Vec<f64> = (0..20).map(|step| settings.rate(step, 20)).collect();
        assert_eq!(rates[..5], [0.0, 0.5, 1.0, 1.5, 2.0]);
        assert!((rates[12] - 1.0).abs() < 1e-12);
        assert!(rates[4..].is_sorted_by(|a, b| a > b) && rates[19] > 0.0);
        assert_eq!(settings.rate(20, 20), 0.0);
        let constant = OptimizerSettings {
            decay: Decay::Constant,
            ..settings.clone()
        };
        assert_eq!(constant.rate(19, 20), 2.0);
        let linear = OptimizerSettings {
            decay: Decay::Linear,
            ..settings
        };
        assert_eq!(linear.rate(8, 20), 1.5);
    }
}
