//! The run: every sample under every routing, in one session.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File, TryLockError};
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;

use burn::tensor::backend::Backend;
use reroute_zoo::grounding::BoundingBox;
use reroute_zoo::session::{self, Part, Request, RequestId, Session, SessionOptions, Turn};
use reroute_zoo::{
    Answer, DecodeLimits, FinishReason, GenerationOptions, Plan, RgbImage, SamplingOptions, Visual,
    Vlm, decode,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::data::Data;
use crate::record::{Header, Log, Record, Records, VERSION, file_name};
use crate::sample::{PictureAt, Sample, Truth};
use crate::score::{Answered, Score};
use crate::{EvalError, GroundingPrompt, Task};

/// File that is locked while somebody measures.
const LOCK: &str = ".lock";
/// Requests that are made ready before there is room for them.
const AHEAD: usize = 2;
/// Samples that fail in the model one after the other until it is the device that fails, and not they.
const FAILURES: usize = 16;

/// A part of the samples; the whole by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// From 1.
    pub index: usize,
    /// Of so many.
    pub of: usize,
}

impl Default for Shard {
    fn default() -> Self {
        let (index, of) = (1, 1);
        Self { index, of }
    }
}

impl Shard {
    /// What the names of its files end in: nothing for the whole.
    pub fn suffix(self) -> String {
        match self.of {
            1 => String::new(),
            of => format!("-shard-{}-of-{of}", self.index),
        }
    }

    /// Its samples of so many: whole neighbourhoods, so that few pictures are seen by several shards.
    pub fn samples(self, count: usize) -> Range<usize> {
        let bound = |part: usize| (count as u128 * part as u128 / self.of.max(1) as u128) as usize;
        bound(self.index.saturating_sub(1))..bound(self.index)
    }
}

impl std::str::FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/');
        let parts = parts.and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
        match parts {
            Some((index, of)) if (1..=of).contains(&index) => Ok(Self { index, of }),
            _ => Err("give i/n with 1 ≤ i ≤ n, such as 3/8".into()),
        }
    }
}

/// What becomes of a sample that cannot be answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnError {
    /// The run stops there.
    #[default]
    Stop,
    /// It is recorded with its error and counted apart; a run that is resumed tries it again.
    Skip,
}

/// How it is measured.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Routings by their names, in the order of the report.
    pub routings: Vec<(String, Plan)>,
    /// The first so many samples; all without.
    pub limit: Option<usize>,
    /// The part of them.
    pub shard: Shard,
    /// How boxes are asked for.
    pub prompt: GroundingPrompt,
    /// Tokens of an answer at most; what the task says without.
    pub max_new_tokens: Option<usize>,
    /// Answers side by side. At 1, every answer is computed as if it were alone, bit for bit.
    pub batch: usize,
    /// What becomes of a sample that cannot be answered.
    pub on_error: OnError,
    /// Go on behind the records that are there.
    pub resume: bool,
    /// The model and how it is opened, for the header of the records.
    pub model: Value,
}

/// What a run tells of itself.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// It begins.
    Began {
        /// Answers that are there already.
        done: usize,
        /// Answers in all.
        all: usize,
    },
    /// An answer is written.
    Wrote {
        /// Those that are there.
        done: usize,
        /// Its score; none if it has failed.
        score: Option<f64>,
    },
    /// A sample cannot be answered and was recorded as such.
    Failed(EvalError),
}

/// Measures the routings and leaves their records in a folder.
///
/// # Errors
/// What is wrong with settings, data, folder or model; [`EvalError::Stopped`] if `watch` breaks.
pub fn run<B: Backend>(
    vlm: &Vlm<B>,
    data: &Data,
    settings: &Settings,
    folder: &Path,
    watch: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<Vec<Records>, EvalError> {
    fs::create_dir_all(folder).map_err(EvalError::io(folder))?;
    let _lock = lock(folder, settings.shard)?;
    let count = settings.limit.unwrap_or(usize::MAX).min(data.samples.len());
    let samples = settings.shard.samples(count);
    if samples.is_empty() {
        return Err(EvalError::NoSamples {
            path: folder.to_owned(),
            what: format!(
                "shard {}/{} of {count}: give fewer shards",
                settings.shard.index, settings.shard.of
            ),
        });
    }
    let mut logs = Vec::new();
    for (name, plan) in &settings.routings {
        let path = folder.join(file_name(name, settings.shard));
        let same = |log: &Log| {
            file_name(&log.records.header.routing, settings.shard)
                == file_name(name, settings.shard)
        };
        if logs.iter().any(same) {
            return Err(EvalError::Setting {
                setting: "the routing",
                reason: format!("{name} is given twice, or called like another in file names"),
            });
        }
        let header = header(vlm, data, settings, count, (name, plan));
        logs.push(Log::open(path, header, settings.resume)?);
    }
    let mut runner = Runner::new(vlm, data, settings, logs)?;
    runner.plan_work(samples);
    runner.run(watch)?;
    Ok(runner.logs.into_iter().map(|log| log.records).collect())
}

/// All that decides the numbers.
fn header<B: Backend>(
    vlm: &Vlm<B>,
    data: &Data,
    settings: &Settings,
    samples: usize,
    (routing, plan): (&str, &Plan),
) -> Header {
    Header {
        version: VERSION,
        task: data.task,
        split: data.split.clone(),
        data: data.fingerprint.clone(),
        samples,
        shard: settings.shard,
        model: settings.model.clone(),
        routing: routing.into(),
        plan: plan.to_json(),
        prompt: settings.prompt,
        grounding: format!("{:?}", vlm.grounding()),
        max_new_tokens: settings
            .max_new_tokens
            .unwrap_or(data.task.max_new_tokens()),
        apart: settings.batch == 1,
    }
}

/// The right to write a shard's records in a folder, as long as it is held.
pub(crate) fn lock(folder: &Path, shard: Shard) -> Result<File, EvalError> {
    let path = folder.join(format!("{LOCK}{}", shard.suffix()));
    let file = File::create(&path).map_err(EvalError::io(&path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(EvalError::Busy {
            path: folder.to_owned(),
        }),
        // Where files cannot be locked nobody is kept out.
        _ => Ok(file),
    }
}

/// A picture that is asked about.
#[derive(Clone)]
struct Seen {
    at: PictureAt,
    hash: String,
    visual: Arc<Visual>,
}

struct Runner<'r, B: Backend> {
    vlm: &'r Vlm<B>,
    data: &'r Data,
    settings: &'r Settings,
    session: Session<'r, B>,
    pictures: crate::Pictures<'r>,
    /// The last picture.
    seen: Option<Seen>,
    logs: Vec<Log>,
    /// Samples and routings that are to be asked, those of a picture side by side.
    work: VecDeque<(usize, usize)>,
    asked: BTreeMap<RequestId, (usize, usize, String)>,
    done: usize,
    /// Samples that have failed in the model since it answered one.
    failures: usize,
}

impl<'r, B: Backend> Runner<'r, B> {
    fn new(
        vlm: &'r Vlm<B>,
        data: &'r Data,
        settings: &'r Settings,
        logs: Vec<Log>,
    ) -> Result<Self, EvalError> {
        let options = SessionOptions {
            max_answers: settings.batch.max(1),
            max_waiting: usize::MAX,
            layers_per_step: usize::MAX,
            apart: settings.batch == 1,
            ..SessionOptions::default()
        };
        Ok(Self {
            vlm,
            data,
            settings,
            session: Session::new(vlm, options)?,
            pictures: data.pictures(),
            seen: None,
            logs,
            work: VecDeque::new(),
            asked: BTreeMap::new(),
            done: 0,
            failures: 0,
        })
    }

    fn plan_work(&mut self, samples: Range<usize>) {
        let mut order: Vec<usize> = samples.collect();
        order.sort_by_key(|&sample| (&self.data.samples[sample].picture, sample));
        for sample in order {
            for (routing, log) in self.logs.iter().enumerate() {
                match log.records.records.contains_key(&sample) {
                    true => self.done += 1,
                    false => self.work.push_back((sample, routing)),
                }
            }
        }
    }

    fn run(&mut self, watch: &mut dyn FnMut(Event) -> ControlFlow<()>) -> Result<(), EvalError> {
        let all = self.done + self.work.len();
        let began = Event::Began {
            done: self.done,
            all,
        };
        let mut flow = watch(began);
        while flow.is_continue() {
            while self.session.load().0 < AHEAD
                && flow.is_continue()
                && let Some((sample, routing)) = self.work.pop_front()
            {
                if let Err(error) = self.ask(sample, routing) {
                    flow = self.failed(sample, routing, error, watch)?;
                }
            }
            if self.session.is_idle() && self.work.is_empty() {
                return Ok(());
            }
            for event in self.session.step() {
                let asked = self.asked.get(&event.id()).cloned();
                let Some((sample, routing, hash)) = asked else {
                    continue;
                };
                match event {
                    session::Event::Finished { id, answer, .. } => {
                        self.asked.remove(&id);
                        self.failures = 0;
                        let record = self.answered(sample, hash, &answer);
                        let score = record.score.as_ref().map(|score| score.score);
                        self.logs[routing].push(record)?;
                        self.done += 1;
                        let done = self.done;
                        if watch(Event::Wrote { done, score }).is_break() {
                            flow = ControlFlow::Break(());
                        }
                    }
                    session::Event::Failed { id, error } => {
                        self.asked.remove(&id);
                        self.failures += 1;
                        if self.failures >= FAILURES {
                            let (count, reason) = (self.failures, error.to_string());
                            return Err(EvalError::Failing { count, reason });
                        }
                        let failed = self.failed(sample, routing, error.into(), watch)?;
                        if failed.is_break() {
                            flow = failed;
                        }
                    }
                    _ => {}
                }
            }
        }
        Err(EvalError::Stopped { records: self.done })
    }

    fn ask(&mut self, sample: usize, routing: usize) -> Result<(), EvalError> {
        let about = &self.data.samples[sample];
        let seen = self.see(&about.picture)?;
        let task = self.data.task;
        if let (Task::Own, Truth::Box(corners), Visual::Image(image)) =
            (task, &about.truth, &*seen.visual)
        {
            inside(corners, image)?;
        }
        let text = task.prompt(about, self.settings.prompt, self.vlm.grounding());
        let turns = vec![Turn::user([Part::Visual(seen.visual), Part::Text(text)])];
        let options = GenerationOptions {
            max_new_tokens: { self.settings.max_new_tokens }.unwrap_or(task.max_new_tokens()),
            sampling: SamplingOptions::default(),
            ..self.vlm.generation_defaults()
        };
        let (_, plan) = &self.settings.routings[routing];
        let mut request = Request::new(turns, plan, options);
        request.stop = task.stop();
        let id = self.session.admit(request)?;
        self.asked.insert(id, (sample, routing, seen.hash));
        Ok(())
    }

    fn see(&mut self, at: &PictureAt) -> Result<Seen, EvalError> {
        if let Some(seen) = self.seen.as_ref().filter(|seen| seen.at == *at) {
            return Ok(seen.clone());
        }
        let bytes = self.pictures.read(at)?;
        let image = decode(&bytes, &DecodeLimits::default())
            .map_err(|error| EvalError::Picture(error.to_string()))?;
        let seen = Seen {
            at: at.clone(),
            hash: format!("{:016x}", xxh3_64(&bytes)),
            visual: Arc::new(Visual::Image(image)),
        };
        self.seen = Some(seen.clone());
        Ok(seen)
    }

    /// Records that a sample has no answer, or stops.
    fn failed(
        &mut self,
        sample: usize,
        routing: usize,
        error: EvalError,
        watch: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, EvalError> {
        let about = &self.data.samples[sample];
        let reason = error.to_string();
        let error = EvalError::Sample {
            sample,
            place: self.pictures.describe(&about.picture),
            reason: reason.clone(),
        };
        if self.settings.on_error == OnError::Stop {
            return Err(error);
        }
        let record = Record {
            error: Some(reason),
            ..record(about)
        };
        self.logs[routing].push(record)?;
        self.done += 1;
        let _ = watch(Event::Failed(error));
        let (done, score) = (self.done, None);
        Ok(watch(Event::Wrote { done, score }))
    }

    fn answered(&self, sample: usize, hash: String, answer: &Answer) -> Record {
        let about = &self.data.samples[sample];
        let text_rows = answer.prompt_rows.saturating_sub(answer.visual_tokens);
        let visual = answer
            .kv_rows
            .iter()
            .map(|rows| rows.saturating_sub(text_rows));
        let view = answer.views.first();
        let score = about.truth.score(&Answered {
            text: &answer.text,
            found: self.vlm.answered_box(answer),
            units: self.vlm.grounding().units,
            picture: view.map_or([1, 1], |view| view.original),
        });
        Record {
            picture: Some(hash),
            answer: Some(answer.text.clone()),
            cut_off: answer.finish != FinishReason::Stop,
            score: Some(score),
            visual_tokens: answer.visual_tokens,
            average_tokens: visual.sum::<usize>() as f64 / answer.kv_rows.len().max(1) as f64,
            ..record(about)
        }
    }
}

/// Whether a picture has a box, give or take a pixel: width and height are often given for corners.
fn inside([x1, y1, x2, y2]: &BoundingBox, image: &RgbImage) -> Result<(), EvalError> {
    let (width, height) = (image.width(), image.height());
    let has = |from: f64, to: f64, size: usize| from >= -1.0 && to <= size as f64 + 1.0;
    match has(*x1, *x2, width) && has(*y1, *y2, height) {
        true => Ok(()),
        false => Err(EvalError::Beyond { width, height }),
    }
}

/// A record of a sample of which nothing is known yet.
fn record(sample: &Sample) -> Record {
    Record {
        sample: sample.index,
        id: sample.id.clone(),
        picture: None,
        category: sample.category.clone(),
        answer: None,
        cut_off: false,
        score: None::<Score>,
        visual_tokens: 0,
        average_tokens: 0.0,
        error: None,
    }
}
