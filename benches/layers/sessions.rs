//! What a running batch buys: requests at once against one after the other, what a long prompt costs those
//! who are being answered, memory over time, and answers of great length.

use std::time::Instant;

use anyhow::{Context, bail};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use reducers::presets;
use reroute::GenerationOptions;
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::messages::Role;
use reroute_zoo::session::{Event, Part, Request, Session, SessionOptions, Turn};
use reroute_zoo::{Folder, OpenOptions, Plan, Question, RgbImage, Vlm, embedded};
use serde::Serialize;

use crate::options::Options;
use crate::timing::Spread;

/// Requests at once.
const COUNTS: [usize; 5] = [1, 2, 4, 8, 16];
const ROUTINGS: [&str; 2] = ["dense", "reroute-pdrop@64"];
const SEED: u64 = 0;
/// Words of a long prompt.
const LONG_WORDS: usize = 300;
/// Tokens of an answer of great length, and of the parts that are timed.
const LONG_ANSWER: usize = 4096;
const PART: usize = 512;
/// Longest that a long answer may take.
const MOST_SECONDS: f64 = 180.0;

#[derive(Serialize)]
pub struct Report {
    model: String,
    new_tokens: usize,
    batches: Vec<Batch>,
    /// Milliseconds from one token of a running answer to the next.
    interruptions: Vec<Interruption>,
    /// Milliseconds a token, of each part of a long answer.
    long_answer_ms: Vec<f64>,
}

/// So many requests.
#[derive(Serialize)]
struct Batch {
    routing: String,
    requests: usize,
    /// All at once, and one after the other.
    at_once: Served,
    in_turn: Served,
    /// Milliseconds from the start, and bytes of keys, values and caches, while all are served at once.
    memory: Vec<(f64, u64)>,
}

#[derive(Serialize)]
struct Served {
    tokens_per_second: Spread,
    /// Milliseconds from the start of the run to the first token: of the request in the middle, and of the
    /// last.
    first_token_ms: Spread,
    last_first_token_ms: Spread,
}

/// A long prompt comes while an answer is running.
#[derive(Serialize)]
struct Interruption {
    routing: String,
    prompt_rows: usize,
    layers_per_step: usize,
    /// Without the prompt.
    alone_ms: Spread,
    /// While it is prefilled.
    beside_ms: Spread,
    /// The prefill by itself, divided by its layers.
    layer_ms: f64,
}

pub fn run(device: &Device, options: &Options) -> anyhow::Result<Report> {
    let folder = match &options.checkpoint {
        Some(path) => Folder::open(path)?,
        None => embedded::checkpoint(),
    };
    let opened = OpenOptions {
        dtype: options.dtype.floats(),
        ..Default::default()
    };
    let vlm = Vlm::<Backend>::open(&folder, &opened, device)?;
    let new_tokens = if options.smoke { 3 } else { 16 };
    let bench = Bench {
        vlm: &vlm,
        new_tokens,
    };
    let counts = if options.smoke { &COUNTS[..2] } else { &COUNTS };
    let (mut batches, mut interruptions) = (Vec::new(), Vec::new());
    println!(
        "\nSessions: {new_tokens} tokens each; tokens a second, ms to the first token (middle, last)"
    );
    for routing in ROUTINGS {
        let in_turn = bench.in_turn(routing, counts, options.rounds())?;
        for (&requests, in_turn) in counts.iter().zip(in_turn) {
            let batch = bench.batch(routing, requests, options.rounds(), in_turn)?;
            batch.print();
            batches.push(batch);
        }
        let interruption = bench.interruption(routing, options.rounds())?;
        interruption.print();
        interruptions.push(interruption);
    }
    let long_answer_ms = match options.smoke {
        true => Vec::new(),
        false => bench.long_answer()?,
    };
    if !long_answer_ms.is_empty() {
        println!("ms a token of a long answer, {PART} at a time: {long_answer_ms:.3?}");
    }
    Ok(Report {
        model: folder.describe(),
        new_tokens,
        batches,
        interruptions,
        long_answer_ms,
    })
}

struct Bench<'v> {
    vlm: &'v Vlm<Backend>,
    new_tokens: usize,
}

/// A run: when first tokens came, when all was over, how many tokens there were.
#[derive(Clone, Default)]
struct Run {
    firsts: Vec<f64>,
    seconds: f64,
    tokens: usize,
    memory: Vec<(f64, u64)>,
}

impl<'v> Bench<'v> {
    fn plan(&self, routing: &str) -> anyhow::Result<Plan> {
        let (layers, encoder) = (
            self.vlm.config().decoder().num_layers,
            self.vlm.config().encoder(),
        );
        Ok(presets::find(routing)?.plan(layers, &encoder)?)
    }

    /// A request that answers so many tokens, whatever they are, about noise.
    fn request(
        &self,
        routing: &str,
        text: &str,
        seed: Option<u64>,
        new_tokens: usize,
    ) -> anyhow::Result<Request<'v, Backend>> {
        let mut parts: Vec<Part> = Vec::new();
        if let Some(seed) = seed {
            let mut random = StdRng::seed_from_u64(SEED + seed);
            let side = 448;
            let pixels = (0..side * side * 3).map(|_| random.random());
            parts.push(RgbImage::new(side, side, pixels.collect())?.into());
        }
        parts.push(text.into());
        let turn = Turn {
            role: Role::User,
            parts,
        };
        let mut options = GenerationOptions {
            max_new_tokens: new_tokens,
            ..self.vlm.generation_defaults()
        };
        let stops = options.stop_tokens.drain(..);
        options.sampling.logit_bias = stops.map(|id| (id, f32::NEG_INFINITY)).collect();
        Ok(Request::new(vec![turn], self.plan(routing)?, options))
    }

    fn session(&self) -> anyhow::Result<Session<'v, Backend>> {
        let options = SessionOptions {
            cache_bytes: 0,
            ..Default::default()
        };
        Ok(Session::new(self.vlm, options)?)
    }

    fn requests(&self, routing: &str, count: usize) -> anyhow::Result<Vec<Request<'v, Backend>>> {
        let request = |seed| self.request(routing, "find the cross", Some(seed), self.new_tokens);
        (0..count as u64).map(request).collect()
    }

    /// One after the other: of each count, its first so many requests.
    fn in_turn(
        &self,
        routing: &str,
        counts: &[usize],
        rounds: usize,
    ) -> anyhow::Result<Vec<Served>> {
        let most = counts.iter().copied().max().unwrap_or(0);
        let mut runs: Vec<Vec<Run>> = counts.iter().map(|_| Vec::new()).collect();
        // Everything is touched once before.
        self.serve(self.requests(routing, 1)?)?;
        for _ in 0..rounds {
            let mut all = Run::default();
            for request in self.requests(routing, most)? {
                let run = self.serve(vec![request])?;
                all.firsts
                    .extend(run.firsts.iter().map(|first| all.seconds + first));
                all.seconds += run.seconds;
                all.tokens += run.tokens;
                if let Some(at) = counts.iter().position(|&count| count == all.firsts.len()) {
                    runs[at].push(all.clone());
                }
            }
        }
        Ok(runs.iter().map(|runs| Served::of(runs)).collect())
    }

    fn batch(
        &self,
        routing: &str,
        requests: usize,
        rounds: usize,
        in_turn: Served,
    ) -> anyhow::Result<Batch> {
        let serve = |_| self.serve(self.requests(routing, requests)?);
        let at_once = (0..rounds)
            .map(serve)
            .collect::<anyhow::Result<Vec<Run>>>()?;
        Ok(Batch {
            routing: routing.into(),
            requests,
            memory: at_once.first().map_or(Vec::new(), |run| run.memory.clone()),
            at_once: Served::of(&at_once),
            in_turn,
        })
    }

    /// Admits all and serves them.
    fn serve(&self, requests: Vec<Request<'v, Backend>>) -> anyhow::Result<Run> {
        let mut session = self.session()?;
        let (started, mut run) = (Instant::now(), Run::default());
        let mut ids = Vec::new();
        for request in requests {
            ids.push(session.admit(request)?);
        }
        let mut firsts = vec![None; ids.len()];
        while !session.is_idle() {
            let events = session.step();
            let now = started.elapsed().as_secs_f64();
            run.memory.push((now * 1e3, session.bytes()));
            for event in events {
                match event {
                    Event::Token { id, .. } => {
                        run.tokens += 1;
                        let at = ids.iter().position(|&other| other == id).context("an id")?;
                        firsts[at].get_or_insert(now);
                    }
                    Event::Failed { error, .. } => return Err(error.into()),
                    _ => {}
                }
            }
        }
        run.seconds = started.elapsed().as_secs_f64();
        run.firsts = firsts.into_iter().flatten().collect();
        Ok(run)
    }

    /// As many words as are long, of those that the model has room for.
    fn long_text(&self) -> anyhow::Result<String> {
        let room = self.vlm.config().decoder().context().0 / 2;
        let mut words = LONG_WORDS;
        loop {
            let text = "the cross ".repeat(words);
            let rows = self
                .vlm
                .encode(&Question::about(Vec::new(), text.as_str()))?
                .len();
            if rows <= room || words == 1 {
                return Ok(text);
            }
            words /= 2;
        }
    }

    /// How long a running answer waits for its next token while a long prompt is prefilled.
    fn interruption(&self, routing: &str, rounds: usize) -> anyhow::Result<Interruption> {
        let text = self.long_text()?;
        let (mut alone, mut beside, mut layer_ms) = (Vec::new(), Vec::new(), Vec::new());
        let (layers, mut prompt_rows) = (self.vlm.config().decoder().num_layers, 0);
        for _ in 0..rounds {
            let mut session = self.session()?;
            session.admit(self.request(routing, "find the cross", Some(0), 200)?)?;
            while session.load().1 == 0 {
                session.step();
            }
            for _ in 0..8 {
                alone.push(step(&mut session));
            }
            session.admit(self.request(routing, &text, None, 1)?)?;
            while session.load().0 > 0 {
                beside.push(step(&mut session));
            }
            let by_itself = self.request(routing, &text, None, 1)?;
            let mut session = self.session()?;
            session.admit(by_itself)?;
            while !session.is_idle() {
                for event in session.step() {
                    match event {
                        Event::Finished { answer, .. } => {
                            prompt_rows = answer.prompt_rows;
                            let ms = answer.timings.prefill.as_secs_f64() * 1e3;
                            layer_ms.push(ms / layers as f64);
                        }
                        Event::Failed { error, .. } => return Err(error.into()),
                        _ => {}
                    }
                }
            }
        }
        Ok(Interruption {
            routing: routing.into(),
            prompt_rows,
            layers_per_step: SessionOptions::default().layers_per_step,
            alone_ms: Spread::milliseconds(&alone),
            beside_ms: Spread::milliseconds(&beside),
            layer_ms: Spread::of(&layer_ms).median,
        })
    }

    /// Milliseconds a token of an answer of great length, part by part.
    fn long_answer(&self) -> anyhow::Result<Vec<f64>> {
        let room = self.vlm.config().decoder().context().0;
        let tokens = LONG_ANSWER.min(room.saturating_sub(64));
        if tokens < 2 * PART {
            return Ok(Vec::new());
        }
        let mut session = self.session()?;
        session.admit(self.request("dense", "find the cross", None, tokens)?)?;
        let mut times = Vec::new();
        while !session.is_idle() {
            let started = Instant::now();
            let events = session.step();
            if events
                .iter()
                .any(|event| matches!(event, Event::Token { .. }))
            {
                times.push(started.elapsed().as_secs_f64());
            }
            if times.len() == 16 && times.iter().sum::<f64>() / 16.0 * tokens as f64 > MOST_SECONDS
            {
                println!(
                    "an answer of {tokens} tokens would take more than {MOST_SECONDS} s: left out"
                );
                return Ok(Vec::new());
            }
        }
        if times.len() < tokens {
            bail!("an answer of {tokens} tokens ended after {}", times.len());
        }
        let parts = times[1..].chunks_exact(PART);
        Ok(parts
            .map(|part| Spread::milliseconds(part).median)
            .collect())
    }
}

fn step(session: &mut Session<'_, Backend>) -> f64 {
    let started = Instant::now();
    session.step();
    started.elapsed().as_secs_f64()
}

impl Served {
    fn of(runs: &[Run]) -> Self {
        let of = |of: &dyn Fn(&Run) -> f64| Spread::of(&runs.iter().map(of).collect::<Vec<_>>());
        Self {
            tokens_per_second: of(&|run| run.tokens as f64 / run.seconds),
            first_token_ms: of(&|run| Spread::milliseconds(&run.firsts).median),
            last_first_token_ms: of(&|run| Spread::milliseconds(&run.firsts).most),
        }
    }
}

impl Batch {
    fn print(&self) {
        let served = |served: &Served| {
            format!(
                "{:>8.1} {:>8.1} {:>8.1}",
                served.tokens_per_second.median,
                served.first_token_ms.median,
                served.last_first_token_ms.median
            )
        };
        println!(
            "{:<18} {:>2} at once {}   in turn {}",
            self.routing,
            self.requests,
            served(&self.at_once),
            served(&self.in_turn)
        );
    }
}

impl Interruption {
    fn print(&self) {
        println!(
            "{:<18} a prompt of {} rows comes: a token every {} ms, {} before; a layer of it takes {:.2} ms",
            self.routing,
            self.prompt_rows,
            self.beside_ms.show(2),
            self.alone_ms.show(2),
            self.layer_ms
        );
    }
}
