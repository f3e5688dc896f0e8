//! A run: steps, validations, checkpoints.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use burn::tensor::backend::AutodiffBackend;
use reroute_zoo::grounding::iou;
use reroute_zoo::{Lesson, Plan, Question, Trained, VisualTokens, Vlm};

use crate::begun::{base, begin, described};
use crate::data::Example;
use crate::feed::{Feed, Portion, Seen, drawn};
use crate::log::{Line, Log, Step, Validation};
use crate::peers::{Alone, Peers, agree, sums};
use crate::state::{self, Progress};
use crate::trainer::diverged;
use crate::{Pass, Preparation, Settings, Trainer, TuneError, host};

/// What is trained on, and where the run keeps itself.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// How.
    pub settings: &'a Settings,
    /// What is learnt.
    pub examples: &'a [Example],
    /// What it is measured on; none is no validation.
    pub validation: &'a [Example],
    /// Leave out examples that cannot be used, instead of stopping there.
    pub skips: bool,
    /// Log, plot and checkpoints.
    pub folder: &'a Path,
    /// Go on with the run that is in the folder, if one is.
    pub resume: bool,
}

/// What happens in a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// It begins, or goes on.
    Began {
        /// Steps that are done already.
        step: usize,
        /// Paths and numbers of the parameters that are trained.
        trained: &'a [(String, usize)],
    },
    /// An example was left out.
    Skipped(&'a TuneError),
    /// A step is done.
    Step(&'a Step),
    /// A validation is done.
    Validated(&'a Validation),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Whoever watches a run; breaking stops it behind the step that it is at, with a checkpoint.
pub type Watch<'w> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'w;

/// Trains a model. With a validation the result is what answered it best, else what the last step left.
///
/// A kill at any moment costs what was done since the last checkpoint: resumed, a run goes on with the same
/// losses. Dropout draws from the backend's generator, which a step seeds: nothing else may draw from it meanwhile.
///
/// # Errors
/// [`TuneError`]; the last checkpoint is unharmed.
pub fn tune<B: AutodiffBackend>(
    vlm: Vlm<B>,
    run: &Run,
    watch: &mut Watch,
) -> Result<Vlm<B>, TuneError> {
    tune_among(vlm, run, &mut Alone, watch)
}

/// The same as one of several peers, which take turns at the forward passes of a step: what they learn is what one
/// alone would, but for the order in which numbers are added. All of them are given the same run, and the first one
/// alone writes to its folder. Whoever is told to stop stops all, behind the next step.
///
/// # Errors
/// [`TuneError`]; the last checkpoint is unharmed.
pub fn tune_among<B: AutodiffBackend>(
    vlm: Vlm<B>,
    run: &Run,
    peers: &mut dyn Peers<B::InnerBackend>,
    watch: &mut Watch,
) -> Result<Vlm<B>, TuneError> {
    let Run {
        settings, folder, ..
    } = *run;
    settings.check(run.examples.len(), run.validation.len())?;
    if peers.count() > settings.course.accumulate {
        return Err(TuneError::Setting {
            setting: "peers",
            reason: "are at most the forward passes of a step (accumulate), which they share",
        });
    }
    let base = base(&vlm)?;
    let vlm = prepared(vlm, settings)?;
    let plans = settings.routings.iter().map(|name| vlm.plan(name));
    let plans: Vec<Plan> = plans.collect::<Result<_, _>>()?;
    let mut described = described(run);
    described["base"] = base;
    let is_first = peers.peer() == 0;
    let _lock = is_first.then(|| begin(run, &described)).transpose()?;
    let device = vlm.device().clone();
    // No other looks into the folder before the first one has it.
    agree(
        peers,
        "data, settings or models",
        &described.to_string(),
        &device,
    )?;
    let mut trainer = Trainer::new(&settings.optimizer, settings.course.steps)
        .with_seed(settings.course.seed)
        .recomputing(settings.course.recompute);
    let (model, optimizer, progress) =
        state::resume(folder, vlm.model().clone(), trainer.optimizer, &device)?;
    (trainer.optimizer, trainer.step) = (optimizer, progress.step);
    let vlm = vlm.map_model(|_| model);
    let stands = format!("{} {}", progress.step, state::trained(vlm.model())?);
    agree(peers, "checkpoints", &stands, &device)?;
    let trained = vlm.model().trained_parameters();
    let began = Event::Began {
        step: progress.step,
        trained: &trained,
    };
    let is_told = watch(began).is_break();
    let log = is_first.then(|| Log::open(folder, progress.step, progress.validated));
    let is_frozen = trained
        .iter()
        .all(|(path, _)| path.starts_with("language_model."));
    // What a reduction keeps depends on the question.
    let is_plain = plans.iter().all(|plan| plan.encoder.is_none());
    let mut running = Running {
        run,
        plans,
        trainer,
        log: log.transpose()?,
        progress,
        seen: Default::default(),
        visuals: HashMap::new(),
        room: (is_frozen && is_plain).then_some(settings.course.cache_bytes),
        validation: Vec::new(),
        saved: None,
        is_told,
        is_stopping: is_told && peers.count() == 1,
        peers,
        watch,
    };
    running.go(vlm)
}

/// The model with what is trained, everything else frozen.
fn prepared<B: AutodiffBackend>(vlm: Vlm<B>, settings: &Settings) -> Result<Vlm<B>, TuneError> {
    let model = match &settings.adapter {
        Some(adapter) => vlm.model().adapt(adapter)?,
        None => vlm.model().clone(),
    };
    let adapter = settings.adapter.as_ref().map(|_| Trained::Adapter);
    let trained: Vec<Trained> = adapter
        .into_iter()
        .chain(settings.trained.clone())
        .collect();
    let model = model.train(&trained)?;
    Ok(vlm.map_model(|_| model))
}

struct Running<'a, 'w, 'f, B: AutodiffBackend> {
    run: &'a Run<'a>,
    plans: Vec<Plan>,
    trainer: Trainer<B>,
    peers: &'a mut dyn Peers<B::InnerBackend>,
    /// That of the first peer.
    log: Option<Log>,
    progress: Progress,
    /// Lessons whose visual tokens are known.
    seen: Seen,
    /// Their visual tokens.
    visuals: HashMap<usize, VisualTokens<B>>,
    /// Bytes that are left for them; `None` where every step sees anew.
    room: Option<u64>,
    /// Examples that are measured on.
    validation: Vec<&'a Example>,
    /// Steps that were done at the last checkpoint, and at the validation before it.
    saved: Option<(usize, usize)>,
    /// Whoever watches has had enough.
    is_told: bool,
    /// And all peers know.
    is_stopping: bool,
    watch: &'w mut Watch<'f>,
}

impl<'a, B: AutodiffBackend> Running<'a, '_, '_, B> {
    fn go(&mut self, mut vlm: Vlm<B>) -> Result<Vlm<B>, TuneError> {
        let Run {
            settings, examples, ..
        } = *self.run;
        let course = &settings.course;
        let preparation = Preparation::new(vlm.tutor());
        self.choose_validation(&preparation)?;
        let feed = Feed {
            preparation: preparation.clone(),
            examples,
            course,
            skips: self.run.skips,
            seen: self.seen.clone(),
            peer: (self.peers.peer(), self.peers.count()),
        };
        let first = self.progress.step;
        if is_due(course.validate_every, first) {
            self.validate(&vlm, &preparation)?;
        }
        self.stop_if_told()?;
        vlm = std::thread::scope(|scope| {
            let portions = match self.has_had_its_chances() {
                true => return Ok(vlm),
                false => feed.start(scope, first),
            };
            for portion in portions {
                let portion = match portion {
                    Ok(portion) => portion,
                    // What was learnt until then is not lost.
                    Err(error) => {
                        self.save(&vlm)?;
                        return Err(error);
                    }
                };
                for error in &portion.skipped {
                    self.tell(Event::Skipped(error));
                }
                vlm = self.step(vlm, portion)?;
                let step = self.progress.step;
                if is_due(course.save_every, step) {
                    self.agree(&vlm)?;
                    self.save(&vlm)?;
                }
                if !self.is_stopping && is_due(course.validate_every, step) {
                    self.validate(&vlm, &preparation)?;
                }
                if self.is_stopping {
                    self.save(&vlm)?;
                }
                self.stop_if_told()?;
                if self.has_had_its_chances() {
                    break;
                }
            }
            Ok::<_, TuneError>(vlm)
        })?;
        // What was learnt is safe before it is measured.
        self.agree(&vlm)?;
        self.save(&vlm)?;
        self.validate(&vlm, &preparation)?;
        self.save(&vlm)?;
        self.stop_if_told()?;
        self.best(vlm)
    }

    /// The examples to measure on that can be used.
    fn choose_validation(&mut self, preparation: &Preparation) -> Result<(), TuneError> {
        let mut last = None;
        for example in self.run.validation {
            match preparation.lesson(example) {
                Ok(_) => self.validation.push(example),
                Err(error) if self.run.skips => {
                    self.tell(Event::Skipped(&error));
                    last = Some(error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        match last.filter(|_| self.validation.is_empty()) {
            Some(reason) => Err(TuneError::NoExample {
                what: "examples to measure on",
                reason,
            }),
            None => Ok(()),
        }
    }

    /// What answered the validation best.
    fn best(&self, vlm: Vlm<B>) -> Result<Vlm<B>, TuneError> {
        match self.progress.best {
            Some((_, step)) if step != self.progress.step && self.log.is_some() => {
                let model = vlm.model().clone();
                let model = state::best(self.run.folder, model, &self.progress)?;
                Ok(vlm.map_model(|_| model))
            }
            _ => Ok(vlm),
        }
    }

    fn has_had_its_chances(&self) -> bool {
        let patience = self.run.settings.course.patience;
        patience > 0 && self.progress.without_better >= patience
    }

    fn step(&mut self, vlm: Vlm<B>, portion: Portion) -> Result<Vlm<B>, TuneError> {
        let Settings {
            course, routings, ..
        } = self.run.settings;
        let which = drawn(course.seed, self.progress.step, self.plans.len());
        let mut passes = Vec::new();
        for pass in &portion.passes {
            passes.push(Pass {
                visuals: self.visuals_of(&vlm, pass)?,
                lessons: pass.iter().map(|(_, lesson)| &**lesson).collect(),
            });
        }
        let (plan, peers) = (&self.plans[which], &mut *self.peers);
        let (trainer, is_told) = (&mut self.trainer, self.is_told);
        let (vlm, line, stops) = trainer.step_among(vlm, &passes, plan, peers, is_told)?;
        self.is_stopping |= stops;
        self.progress.step += 1;
        if let Some(mut line) = line {
            line.routing.clone_from(&routings[which]);
            self.log(Line::Step(line.clone()))?;
            self.tell(Event::Step(&line));
        }
        Ok(vlm)
    }

    /// The visual tokens of lessons, if they are the same in every step.
    fn visuals_of(
        &mut self,
        vlm: &Vlm<B>,
        pass: &[(usize, Arc<Lesson>)],
    ) -> Result<Option<Vec<VisualTokens<B>>>, TuneError> {
        if self.room.is_none() {
            return Ok(None);
        }
        let mut all = Vec::new();
        for (index, lesson) in pass {
            let visuals = match self.visuals.get(index) {
                Some(visuals) => visuals.clone(),
                // Those of a later turn are seen when it comes.
                None if !lesson.shows_first() => VisualTokens::default(),
                None => {
                    let visuals = vlm.seen(lesson)?;
                    self.keep(*index, lesson, &visuals);
                    visuals
                }
            };
            all.push(visuals);
        }
        Ok(Some(all))
    }

    fn keep(&mut self, index: usize, lesson: &Lesson, visuals: &VisualTokens<B>) {
        let outputs = [&visuals.images, &visuals.videos].into_iter().flatten();
        let tensors = outputs.flat_map(|output| output.deepstack.iter().chain([&output.tokens]));
        let bytes = tensors.map(|x| (x.shape().num_elements() * x.dtype().size()) as u64);
        let Some(left) = self.room.and_then(|room| room.checked_sub(bytes.sum())) else {
            return;
        };
        self.room = Some(left);
        self.visuals.insert(index, visuals.clone());
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.insert(index, lesson.clone().without_pixels().into());
    }

    /// Measures, unless that is done, and keeps what is best.
    fn validate(&mut self, vlm: &Vlm<B>, preparation: &Preparation) -> Result<(), TuneError> {
        let step = self.progress.step;
        if self.validation.is_empty() || step == 0 || self.progress.validated == step {
            return Ok(());
        }
        let found = self.measured(vlm, preparation)?;
        if !found.loss.is_finite() {
            return Err(diverged("validation loss", step, found.loss));
        }
        self.log(Line::Validation(found.clone()))?;
        let progress = &mut self.progress;
        progress.validated = step;
        match progress.best {
            Some((best, _)) if best <= found.loss => progress.without_better += 1,
            _ => {
                progress.best = Some((found.loss, step));
                progress.without_better = 0;
                if self.log.is_some() {
                    let checksum = state::keep_best(self.run.folder, vlm.model())?;
                    progress.best_checksum = checksum;
                }
            }
        }
        self.tell(Event::Validated(&found));
        Ok(())
    }

    /// Peers take turns at the examples.
    fn measured(
        &mut self,
        vlm: &Vlm<B>,
        preparation: &Preparation,
    ) -> Result<Validation, TuneError> {
        let (vlm, plan) = (vlm.valid(), &self.plans[0]);
        let options = vlm.generation_defaults();
        let (mut loss, mut tokens) = (0.0, 0);
        let mut overlaps = Vec::new();
        let (peer, peers) = (self.peers.peer(), self.peers.count());
        for &example in self.validation.iter().skip(peer).step_by(peers) {
            let lesson = preparation.lesson(example)?;
            let answers = vlm.answer_logits(&[&lesson], None, plan)?;
            loss += host::sum(answers.losses().sum())?;
            tokens += lesson.answer_tokens();
            if let Some((sought, image)) = preparation.sought(example) {
                let question = Question::about(vec![image], sought.text);
                let answer = vlm.ask(&question, plan, &options, |_| {})?;
                let found = vlm.answered_box(&answer);
                overlaps.push(found.map_or(0.0, |found| iou(&found, &sought.corners)));
            }
        }
        let hits = overlaps.iter().filter(|&&overlap| overlap >= 0.5).count();
        let own = [
            loss,
            tokens as f64,
            overlaps.len() as f64,
            hits as f64,
            overlaps.iter().sum(),
        ];
        let all = sums(self.peers, &own, vlm.device())?;
        let share = |sum: f64| (all[2] > 0.0).then(|| sum / all[2]);
        Ok(Validation {
            step: self.progress.step,
            loss: all[0] / all[1],
            boxes: all[2] as usize,
            accuracy: share(all[3]),
            mean_iou: share(all[4]),
        })
    }

    /// Whether all peers have learnt the same, to the bit.
    fn agree(&mut self, vlm: &Vlm<B>) -> Result<(), TuneError> {
        if self.peers.count() == 1 {
            return Ok(());
        }
        let trained = state::trained(vlm.model())?;
        agree(self.peers, "parameters", &trained, vlm.device())
    }

    fn log(&mut self, line: Line) -> Result<(), TuneError> {
        match &mut self.log {
            Some(log) => log.push(line),
            None => Ok(()),
        }
    }

    fn save(&mut self, vlm: &Vlm<B>) -> Result<(), TuneError> {
        let Some(log) = &self.log else {
            return Ok(());
        };
        let now = (self.progress.step, self.progress.validated);
        if now.0 == 0 || self.saved == Some(now) {
            return Ok(());
        }
        self.saved = Some(now);
        let folder = self.run.folder;
        let path: PathBuf =
            state::save(folder, vlm.model(), &self.trainer.optimizer, &self.progress)?;
        let _ = log.plot(folder);
        self.tell(Event::Saved(&path));
        Ok(())
    }

    fn tell(&mut self, event: Event) {
        self.is_told |= (self.watch)(event).is_break();
        self.is_stopping |= self.is_told && self.peers.count() == 1;
    }

    fn stop_if_told(&self) -> Result<(), TuneError> {
        match self.is_stopping {
            false => Ok(()),
            true => Err(TuneError::Stopped {
                step: self.progress.step,
            }),
        }
    }
}

/// Whether a step is one of those that come every so many.
fn is_due(every: usize, step: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}
