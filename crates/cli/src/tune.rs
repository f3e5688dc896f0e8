//! `reroute tune`: trains a model on examples.

use std::io::{Write, stderr};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
#[cfg(feature = "collective")]
use std::time::Duration;

use anyhow::{bail, ensure};
use burn::backend::Autodiff;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use reroute_finetune::data::{Data, Example, OnBadLine, read};
#[cfg(feature = "collective")]
use reroute_finetune::{Collective, tune_among, tune_by_threads};
use reroute_finetune::{Course, Event, OptimizerSettings, Run, Settings, Step, Watch, tune};
use reroute_zoo::{AdapterConfig, SaveOptions, Targets, Trained, Vlm};

use crate::args::{Decay, OnBad, TuneArgs};
use crate::backend::Backend;
use crate::open;
use crate::progress::Progress;

type Tuned = Vlm<Autodiff<Backend>>;

/// What of a run becomes an adapter, or a whole model.
const ADAPTER: &str = "adapter";
const MODEL: &str = "model";

/// What an adapter changes that nothing else is said of.
const ATTENTION: [&str; 4] = [
    "model.language_model.*.q_proj",
    "model.language_model.*.k_proj",
    "model.language_model.*.v_proj",
    "model.language_model.*.o_proj",
];
const RANK: usize = 16;

/// Runs the command.
pub fn run(args: &TuneArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let on_bad = match args.on_bad {
        OnBad::Stop => OnBadLine::Stop,
        OnBad::Skip => OnBadLine::Skip,
    };
    let mut examples = Vec::new();
    for path in &args.data {
        examples.extend(examples_of(path, args, on_bad)?);
    }
    let validation = match &args.validation {
        Some(path) => examples_of(path, args, on_bad)?,
        None => held_out(&mut examples, args)?,
    };
    check(args, examples.len(), validation.len())?;
    ensure!(
        args.warmup.is_finite() && (0.0..=1.0).contains(&args.warmup),
        "--warmup is a share of the steps, from 0 to 1"
    );
    let settings = settings(args, examples.len());
    let folder = args.model.folder()?;
    let vlm = open::model_on::<Autodiff<Backend>>(&args.model)?;
    // A whole model where more than an adapter was trained.
    let is_whole = args.merge || settings.adapter.is_none() || !settings.trained.is_empty();
    ensure!(
        !args.merge || vlm.model().coded().is_empty(),
        "--merge adds the adapter to the weights, which are in codes of fewer bits here: leave it out, or open the \
         model in floats (--dtype bf16)"
    );
    let run = Run {
        settings: &settings,
        examples: &examples,
        validation: &validation,
        skips: args.on_bad == OnBad::Skip,
        folder: &args.to,
        resume: args.resume,
    };
    let mut shown = Shown::new(&settings.course);
    let is_told = stop_when_told();
    let result = train(args, vlm, &run, &mut |event| {
        shown.show(&event);
        match is_told.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    shown.bar.close();
    let vlm = result?.valid();
    if args.peer.is_some_and(|peer| peer > 0) {
        return Ok(());
    }
    let model = vlm.model();
    if settings.adapter.is_some() && settings.trained.is_empty() && is_whole {
        model.save_adapter(args.to.join(ADAPTER))?;
    }
    let to = args.to.join(if is_whole { MODEL } else { ADAPTER });
    match is_whole {
        true => {
            let merged = model.clone().merge_adapters();
            merged.save(&to, &folder, &SaveOptions::default())?;
        }
        false => model.save_adapter(&to)?,
    }
    writeln!(out, "{}", to.display())?;
    Ok(())
}

/// Trains alone, by threads, or as one of several processes.
#[cfg(feature = "collective")]
fn train(args: &TuneArgs, vlm: Tuned, run: &Run, watch: &mut Watch) -> anyhow::Result<Tuned> {
    let patience = Duration::from_secs(args.peer_timeout);
    Ok(match (args.peer, args.peer_port) {
        (Some(peer), Some(port)) => {
            // Before Burn's logger is, which writes to stdout.
            let _ =
                tracing::subscriber::set_global_default(tracing::subscriber::NoSubscriber::new());
            let (peers, device) = (args.peers, vlm.device().to_owned());
            let mut peers = Collective::process(peer, peers, port, run.folder, patience, &device)?;
            tune_among(vlm, run, &mut peers, watch)?
        }
        _ if args.peers > 1 => tune_by_threads(vlm, run, args.peers, patience, watch)?,
        _ => tune(vlm, run, watch)?,
    })
}

/// Trains alone.
#[cfg(not(feature = "collective"))]
fn train(args: &TuneArgs, vlm: Tuned, run: &Run, watch: &mut Watch) -> anyhow::Result<Tuned> {
    ensure!(
        args.peers == 1 && args.peer.is_none(),
        "--peers and --peer need a program that is built with the feature `collective`"
    );
    Ok(tune(vlm, run, watch)?)
}

/// Becomes true when somebody interrupts or ends the program; at the second time it ends at once.
fn stop_when_told() -> Arc<AtomicBool> {
    let is_told = Arc::new(AtomicBool::new(false));
    let told = is_told.clone();
    // Where signals cannot be caught, the last checkpoint is as good as after any other end.
    let _ = ctrlc::set_handler(move || match told.swap(true, Ordering::Relaxed) {
        true => std::process::exit(130),
        false => {
            let _ = writeln!(
                stderr(),
                "stopping behind this step, with a checkpoint; once more to stop at once"
            );
        }
    });
    is_told
}

/// Refuses flags that would mean nothing.
fn check(args: &TuneArgs, examples: usize, validation: usize) -> anyhow::Result<()> {
    let has_adapter = args.train.iter().any(|what| what == ADAPTER);
    let is_about_adapter = args.rank.is_some()
        || args.alpha.is_some()
        || args.rslora
        || args.dropout.is_some()
        || !args.target.is_empty()
        || args.merge;
    ensure!(examples > 0, "there is no example to learn from");
    ensure!(
        has_adapter || !is_about_adapter,
        "--target, --rank, --alpha, --rslora, --dropout and --merge are about an adapter: name it in --train"
    );
    ensure!(
        validation > 0 || args.validate_every == 0 && args.patience == 0,
        "--validate-every and --patience need examples to measure on: add --validation FILE or --hold-out N"
    );
    ensure!(
        args.model.adapter.is_empty()
            || args.model.merge_adapter
                && (args.merge || args.train.iter().any(|what| what != ADAPTER)),
        "an adapter that is trained beside another is worth nothing without it: add --merge-adapter, and --merge \
         for a whole model of both"
    );
    Ok(())
}

fn examples_of(path: &Path, args: &TuneArgs, on_bad: OnBadLine) -> anyhow::Result<Vec<Example>> {
    let beside = path.parent().unwrap_or(Path::new("."));
    let images = args.images.as_deref().unwrap_or(beside);
    let Data { examples, skipped } = read(path, images, on_bad)?;
    for error in skipped {
        let _ = writeln!(stderr(), "skipped: {error}");
    }
    Ok(examples)
}

/// Takes out what is set aside for measuring.
fn held_out(examples: &mut Vec<Example>, args: &TuneArgs) -> anyhow::Result<Vec<Example>> {
    let count = examples.len();
    if args.hold_out > 0 && args.hold_out >= count {
        bail!(
            "--hold-out {} leaves none of {count} examples to learn",
            args.hold_out
        );
    }
    if args.hold_out > 0 {
        examples.shuffle(&mut StdRng::seed_from_u64(args.seed));
    }
    Ok(examples.split_off(count - args.hold_out))
}

fn settings(args: &TuneArgs, examples: usize) -> Settings {
    let has_adapter = args.train.iter().any(|what| what == ADAPTER);
    let others = args.train.iter().filter(|what| *what != ADAPTER);
    let targets = match &args.target[..] {
        [] => Targets::from(ATTENTION.map(String::from).to_vec()),
        [one] => Targets::from(one.as_str()),
        several => Targets::from(several.to_vec()),
    };
    let rank = args.rank.unwrap_or(RANK);
    let adapter = AdapterConfig {
        alpha: args.alpha.unwrap_or(2.0 * rank as f64),
        rank_stabilized: args.rslora,
        dropout: args.dropout.unwrap_or(0.0),
        seed: args.seed,
        ..AdapterConfig::new(targets, rank)
    };
    let a_step = args.batch.saturating_mul(args.accumulate);
    let epochs = args.epochs.unwrap_or(1);
    let steps = args
        .steps
        .unwrap_or_else(|| examples.saturating_mul(epochs).div_ceil(a_step));
    Settings {
        adapter: has_adapter.then_some(adapter),
        trained: others.map(|name| Trained::named(name)).collect(),
        routings: args.routing.clone(),
        course: Course {
            steps,
            batch: args.batch,
            accumulate: args.accumulate,
            seed: args.seed,
            validate_every: args.validate_every,
            patience: args.patience,
            save_every: args.save_every,
            recompute: args.recompute,
            ..Course::default()
        },
        optimizer: OptimizerSettings {
            learning_rate: args.learning_rate,
            // A single step is not taken at a rate of 0.
            warmup: ((args.warmup * steps as f64).ceil() as usize).min(steps.saturating_sub(1)),
            decay: match args.decay {
                Decay::Cosine => reroute_finetune::Decay::Cosine,
                Decay::Linear => reroute_finetune::Decay::Linear,
                Decay::Constant => reroute_finetune::Decay::Constant,
            },
            weight_decay: args.weight_decay,
            clip: args.clip,
            ..OptimizerSettings::default()
        },
    }
}

/// Progress on stderr.
struct Shown {
    bar: Progress,
    steps: usize,
    tokens: usize,
}

impl Shown {
    fn new(course: &Course) -> Self {
        Self {
            bar: Progress::new(course.steps),
            steps: course.steps,
            tokens: 0,
        }
    }

    fn show(&mut self, event: &Event) {
        match event {
            Event::Began { step, trained } => {
                self.bar.begin(*step, self.steps);
                let numbers = trained.iter().map(|(_, numbers)| *numbers).sum::<usize>();
                let count = trained.len();
                self.bar.line(&format!(
                    "{numbers} numbers in {count} tensors are trained; {step} of {} steps are done",
                    self.steps
                ));
            }
            Event::Skipped(error) => self.bar.line(&format!("skipped: {error}")),
            Event::Step(step) => self.step(step),
            Event::Validated(found) => {
                let boxes = match (found.accuracy, found.mean_iou) {
                    (Some(accuracy), Some(mean)) => format!(
                        ", {:.1} % of {} boxes at IoU 0.5, mean IoU {mean:.3}",
                        accuracy * 100.0,
                        found.boxes
                    ),
                    _ => String::new(),
                };
                self.bar.line(&format!(
                    "step {}: validation loss {:.4}{boxes}",
                    found.step, found.loss
                ));
            }
            _ => {}
        }
    }

    fn step(&mut self, step: &Step) {
        self.tokens += step.tokens;
        let tokens = self.tokens as f64;
        self.bar.show(step.step, |passed| {
            format!("loss {:.4}  {:.1} tokens/s", step.loss, tokens / passed)
        });
    }
}
