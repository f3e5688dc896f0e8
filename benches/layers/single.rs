//! The criterion benchmarks: each thing alone.

use std::time::{Duration, Instant};

use anyhow::Context;
use burn::tensor::Tensor;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode};
use reducers::{Action, Schedule, Stage};
use reroute::{KvCache, Routed, Router};
use reroute_cli::backend::Backend;

use crate::setup::{Setup, VISION_LAYERS};
use crate::timing::{wait, wait_for_one};

/// The prefills timed here, one per action; the table has every method and budget.
const METHODS: [&str; 2] = ["pdrop", "reroute-pdrop"];
const BUDGET: usize = 128;

/// Tokens decoded before the cache is made anew: it must stay about as long as the prompt.
const MAX_DECODED: usize = 100;

/// Few samples: a dense prefill takes seconds. Flags such as `--sample-size` go first.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(2))
        .without_plots()
        .configure_from_args()
}

/// Runs all benchmarks that the command line selects.
pub fn run(criterion: &mut Criterion, setup: &Setup) -> anyhow::Result<()> {
    vision(&mut group(criterion, "vision"), setup);
    prefill(&mut group(criterion, "prefill"), setup)?;
    layer_entry(&mut group(criterion, "layer entry"), setup)?;
    decode(&mut group(criterion, "decode"), setup)
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    // The same number of runs in every sample: with growing samples the last would take a minute.
    group.sampling_mode(SamplingMode::Flat);
    group
}

/// Times `work`, which reads a result back and so cannot be optimised away. Its inputs are ours: a
/// failure is a bug of the benchmark.
fn bench(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    mut work: impl FnMut() -> anyhow::Result<()>,
) {
    group.bench_function(name, |bencher| {
        bencher.iter(|| work().expect("a good input"));
    });
}

/// One image through the patch embedding, and through some layers as well.
fn vision(group: &mut BenchmarkGroup<WallTime>, setup: &Setup) {
    for (name, layers) in [("embedding", 0), ("embedding and 2 layers", VISION_LAYERS)] {
        bench(group, name, || {
            wait_for_one(setup.tower.patch_features(setup.pixels.clone(), layers)?)
        });
    }
}

/// A whole prompt through all layers.
fn prefill(group: &mut BenchmarkGroup<WallTime>, setup: &Setup) -> anyhow::Result<()> {
    bench(group, "dense", || {
        setup.prefill(&Schedule::dense()).map(drop)
    });
    for method in METHODS {
        let schedule = setup.schedule(method, BUDGET)?;
        let name = format!("{method}@{BUDGET}-exact");
        bench(group, &name, || setup.prefill(&schedule).map(drop));
    }
    Ok(())
}

/// Input norm and keys of all rows; with a decision also scores, selection and gathering.
fn layer_entry(group: &mut BenchmarkGroup<WallTime>, setup: &Setup) -> anyhow::Result<()> {
    let keep = (setup.visual * BUDGET).div_ceil(576);
    // A second stage, so that deferred rows are parked as they are in a prefill.
    let stages = vec![Stage::count(0, keep), Stage::count(1, keep)];
    let decides = Schedule::new(Action::Reroute, false, stages)?;
    for (name, schedule) in [("plain", Schedule::dense()), ("decision", decides)] {
        bench(group, name, || {
            let hidden_states = setup.prompt.embeddings.clone();
            let mut router = start(setup, &schedule);
            let layer = setup.decoder.layers().first().context("no layers")?;
            settle(&router.enter(0, layer, hidden_states, &nothing_cached(setup))?)
        });
    }
    Ok(())
}

/// A router before its first layer.
pub fn start<'a>(setup: &'a Setup, schedule: &'a Schedule) -> Router<'a, Backend> {
    Router::new(&setup.decoder, &setup.prompt, schedule)
}

/// The cache before the first turn.
pub fn nothing_cached(setup: &Setup) -> KvCache<Backend> {
    KvCache::new(setup.decoder.layers().len(), setup.prompt.samples.len())
}

/// Waits for a layer's input.
pub fn settle(routed: &Routed<Backend>) -> anyhow::Result<()> {
    wait_for_one(routed.keys.clone())?;
    wait_for_one(routed.hidden_states.clone())
}

/// One token after the prompt, with a cache of all rows and with a routed one.
fn decode(group: &mut BenchmarkGroup<WallTime>, setup: &Setup) -> anyhow::Result<()> {
    let routed = setup.schedule("reroute-pdrop", BUDGET)?;
    for (name, schedule) in [("dense", Schedule::dense()), ("routed", routed)] {
        let mut decoding = Decoding::new(setup, schedule);
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|tokens| {
                (0..tokens)
                    .map(|_| decoding.next_token().expect("a good input"))
                    .sum()
            });
        });
    }
    Ok(())
}

/// Decodes token after token.
pub struct Decoding<'a> {
    setup: &'a Setup,
    schedule: Schedule,
    /// The cache and the number of tokens decoded into it; made on first use.
    state: Option<(KvCache<Backend>, usize)>,
}

impl<'a> Decoding<'a> {
    /// Nothing decoded, nothing prefilled yet.
    pub fn new(setup: &'a Setup, schedule: Schedule) -> Self {
        Self {
            setup,
            schedule,
            state: None,
        }
    }

    /// The time of one token; prefills without counting it when there is no cache or it has grown.
    pub fn next_token(&mut self) -> anyhow::Result<Duration> {
        let fresh = self
            .state
            .take()
            .filter(|(_, decoded)| *decoded < MAX_DECODED);
        let (mut cache, decoded) = match fresh {
            Some(state) => state,
            None => {
                let mut cache = self.setup.prefill(&self.schedule)?.cache;
                // The first token makes room for more.
                wait(self.decode(&mut cache)?)?;
                (cache, 1)
            }
        };
        let started = Instant::now();
        wait(self.decode(&mut cache)?)?;
        let elapsed = started.elapsed();
        self.state = Some((cache, decoded + 1));
        Ok(elapsed)
    }

    fn decode(&self, cache: &mut KvCache<Backend>) -> anyhow::Result<Tensor<Backend, 2>> {
        Ok(self.setup.decoder.decode(&[(0, 1)], cache)?)
    }
}
