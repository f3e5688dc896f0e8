//! Steps of training, for loops of one's own.

use std::time::Instant;

use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{AdamW, AdamWConfig, GradientsAccumulator, GradientsParams, Optimizer};
use burn::tensor::backend::AutodiffBackend;
use reroute_zoo::{Lesson, Model, Plan, VisualTokens, Vlm};

use crate::feed::mixed;
use crate::gradients::clip;
use crate::log::Step;
use crate::peers::{Alone, Peers, Total};
use crate::settings::OptimizerSettings;
use crate::{TuneError, host};

/// The optimizer of a model, and how far it is.
pub struct Trainer<B: AutodiffBackend> {
    pub(crate) optimizer: OptimizerAdaptor<AdamW, Model<B>, B>,
    settings: OptimizerSettings,
    steps: usize,
    pub(crate) step: usize,
    seed: u64,
    recomputes: bool,
}

/// What goes through a model at once.
#[derive(Debug)]
pub struct Pass<'a, B: AutodiffBackend> {
    /// Rows of one prompt.
    pub lessons: Vec<&'a Lesson>,
    /// Their visual tokens, where these are known ([`Vlm::seen`]).
    pub visuals: Option<Vec<VisualTokens<B>>>,
}

impl<B: AutodiffBackend> Trainer<B> {
    /// Begins; the learning rate falls over so many steps.
    pub fn new(settings: &OptimizerSettings, steps: usize) -> Self {
        let [first, second] = settings.betas;
        let optimizer = AdamWConfig::new()
            .with_beta_1(first)
            .with_beta_2(second)
            .with_epsilon(settings.epsilon)
            .with_weight_decay(settings.weight_decay);
        Self {
            optimizer: optimizer.init(),
            settings: settings.clone(),
            steps,
            step: 0,
            seed: 0,
            recomputes: false,
        }
    }

    /// The same with another seed of what is drawn in a step (dropout).
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// The same in less memory and more time, for steps through the plain model ([`Course::recompute`](crate::Course::recompute));
    /// others are as before.
    pub fn recomputing(self, recomputes: bool) -> Self {
        Self { recomputes, ..self }
    }

    /// Takes a step towards the answers of all passes: on the mean cross-entropy of their tokens, with the
    /// gradients of everything that is trained clipped together. Returns the model behind it.
    ///
    /// # Errors
    /// [`TuneError::Diverged`], and what the model refuses.
    pub fn step(
        &mut self,
        vlm: Vlm<B>,
        passes: &[Pass<'_, B>],
        plan: &Plan,
    ) -> Result<(Vlm<B>, Step), TuneError> {
        let at = self.step;
        let (vlm, step, _) = self.step_among(vlm, passes, plan, &mut Alone, false)?;
        let none = Step {
            step: at + 1,
            ..Step::default()
        };
        Ok((vlm, step.unwrap_or(none)))
    }

    /// The same with the passes that others compute. No step comes of nothing to learn. Says whether somebody was
    /// told to stop.
    pub(crate) fn step_among(
        &mut self,
        vlm: Vlm<B>,
        passes: &[Pass<'_, B>],
        plan: &Plan,
        peers: &mut dyn Peers<B::InnerBackend>,
        is_told: bool,
    ) -> Result<(Vlm<B>, Option<Step>, bool), TuneError> {
        let started = Instant::now();
        let lessons = || passes.iter().flat_map(|pass| &pass.lessons);
        let tokens: usize = lessons().map(|lesson| lesson.answer_tokens()).sum();
        let (mut sum, mut loss) = (GradientsAccumulator::new(), 0.0);
        for (index, pass) in passes.iter().enumerate() {
            // A pass draws the same wherever a run has begun, and whoever computes it.
            let place = peers.peer() + index * peers.count();
            let (seed, share) = (
                mixed(mixed(self.seed, self.step), place),
                1.0 / tokens as f64,
            );
            B::seed(vlm.device(), seed);
            let (lessons, visuals) = (&pass.lessons, pass.visuals.as_deref());
            let mut take = |gradients| sum.accumulate(vlm.model(), gradients);
            loss += if self.recomputes && plan.encoder.is_none() && plan.schedule.is_dense() {
                host::sum(vlm.learn_recomputing(lessons, visuals, (share, seed), take)?)?
            } else {
                let answers = vlm.answer_logits(lessons, visuals, plan)?;
                let loss = answers.losses().sum().div_scalar(tokens as f64);
                let of_loss = host::sum(loss.clone())?;
                take(GradientsParams::from_grads(loss.backward(), vlm.model()));
                of_loss
            };
        }
        let own = Total {
            loss,
            tokens,
            examples: lessons().count(),
            rows: lessons().map(|lesson| lesson.rows()).sum(),
            stops: is_told,
        };
        let (total, gradients) = own.joined(vlm.model(), sum.grads(), peers, vlm.device())?;
        let loss = total.loss;
        if !loss.is_finite() {
            return Err(diverged("loss", self.step + 1, loss));
        }
        if total.tokens == 0 {
            self.step += 1;
            return Ok((vlm, None, total.stops));
        }
        let (gradients, norm) = clip(vlm.model(), gradients, self.settings.clip)?;
        if !norm.is_finite() {
            return Err(diverged("gradient", self.step + 1, norm));
        }
        let rate = self.settings.rate(self.step, self.steps);
        let vlm = vlm.map_model(|model| self.optimizer.step(rate, model, gradients));
        self.step += 1;
        let step = Step {
            step: self.step,
            loss,
            norm,
            rate,
            routing: String::new(),
            examples: total.examples,
            tokens: total.tokens,
            rows: total.rows,
            seconds: started.elapsed().as_secs_f64(),
        };
        Ok((vlm, Some(step), total.stops))
    }
}

pub(crate) fn diverged(what: &'static str, step: usize, value: f64) -> TuneError {
    TuneError::Diverged { what, step, value }
}
