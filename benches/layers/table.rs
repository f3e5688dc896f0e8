//! Measured speed-up of every method and budget beside its FLOP ceiling.

use std::time::Duration;

use anyhow::{Context, ensure};
use burn::tensor::{Int, Tensor};
use reducers::{Cost, Schedule};
use reroute::{DecoderLayer, Prefill};
use reroute_cli::backend::Backend;

use crate::options::Options;
use crate::report::{Decode, Report, Row, Vision};
use crate::setup::{Setup, VISION_LAYERS};
use crate::single::{Decoding, nothing_cached, settle, start};
use crate::timing::{median, median_seconds, seconds, wait_for_one};

const METHODS: [&str; 4] = ["fastv", "pdrop", "reroute-fastv", "reroute-pdrop"];
const BUDGETS: [usize; 3] = [192, 128, 64];

/// Budget of the routed cache that decoding is timed with.
const DECODE_BUDGET: usize = 128;

/// Bytes of a number in the cache (f32).
const CACHE_BYTES: usize = 4;

/// One schedule and what was measured of it, in seconds, round by round.
struct Candidate {
    name: String,
    schedule: Schedule,
    cost: Cost,
    prefill: Vec<f64>,
    /// The dense prefills around it, divided by its own time.
    speedup: Vec<f64>,
    selection: Vec<Selection>,
}

/// What the decisions of one prefill take, in seconds, beyond an ordinary entry of their layers.
#[derive(Clone, Copy, Default)]
struct Selection {
    /// Beyond entering with all rows that were scored: scores, selection, gathering.
    beyond_pool: f64,
    /// Beyond entering with the rows that were kept: also the keys of those that were not.
    beyond_kept: f64,
}

/// Measures everything in rounds, prints the table and returns what it says.
pub fn run(setup: &Setup, options: &Options) -> anyhow::Result<Report> {
    let shape = setup.decoder.config().shape();
    let cost =
        |schedule: &Schedule| Cost::of(&shape, schedule, setup.visual, setup.text, CACHE_BYTES);
    let mut candidates = Vec::new();
    for budget in BUDGETS {
        for method in METHODS {
            let schedule = setup.schedule(method, budget)?;
            candidates.push(Candidate {
                name: format!("{method}@{budget}"),
                cost: cost(&schedule),
                schedule,
                prefill: Vec::new(),
                speedup: Vec::new(),
                selection: Vec::new(),
            });
        }
    }
    let dense_cost = cost(&Schedule::dense());
    let mut dense = Vec::new();
    for _ in 0..options.rounds {
        measure_round(setup, &mut candidates, &mut dense)?;
    }

    let dense = median(dense);
    let row = |candidate: Candidate| candidate.into_row(setup, &dense_cost, dense);
    let report = Report {
        full_depth: options.shapes.depth(),
        layers: shape.num_layers,
        visual_tokens: setup.visual,
        text_tokens: setup.text,
        head_rows: setup.decoder.config().vocab_size,
        rounds: options.rounds,
        warm_up_seconds: setup.warm_up.as_secs_f64(),
        dense_ms: dense * 1e3,
        dense_gflops_per_second: dense_cost.total_flops() / dense / 1e9,
        vision: vision(setup, options.rounds)?,
        decode: decode(setup, 2 * options.rounds)?,
        rows: candidates.into_iter().map(row).collect(),
    };
    report.print();
    Ok(report)
}

/// One round: clocks drift on a shared machine, so that a routed prefill is compared with the mean
/// of the dense prefills right before and right after those of its budget.
fn measure_round(
    setup: &Setup,
    candidates: &mut [Candidate],
    dense: &mut Vec<f64>,
) -> anyhow::Result<()> {
    let time_dense = || seconds(|| setup.prefill(&Schedule::dense()).map(drop));
    let mut before = time_dense()?;
    dense.push(before);
    for budget in candidates.chunks_mut(METHODS.len()) {
        let mut times = Vec::new();
        for candidate in budget.iter() {
            times.push(candidate.seconds(setup)?);
        }
        let after = time_dense()?;
        dense.push(after);
        for (candidate, time) in budget.iter_mut().zip(times) {
            candidate.prefill.push(time);
            candidate.speedup.push(before.midpoint(after) / time);
        }
        before = after;
    }
    for candidate in candidates {
        candidate
            .selection
            .push(selection(setup, &candidate.schedule)?);
    }
    Ok(())
}

/// Times every decision of a schedule. The layers between them are left out: what a decision takes
/// depends on how many rows come and go, not on their values.
fn selection(setup: &Setup, schedule: &Schedule) -> anyhow::Result<Selection> {
    let mut router = start(setup, schedule);
    let cache = nothing_cached(setup);
    let mut hidden_states = setup.prompt.embeddings.clone();
    let mut total = Selection::default();
    for stage in schedule.stages() {
        let layer = setup
            .decoder
            .layers()
            .get(stage.layer)
            .context("a decision below the model")?;
        let (mut kept, mut pool) = (None, 0);
        let decision = seconds(|| {
            let routed = router.enter(stage.layer, layer, hidden_states.clone(), &cache)?;
            settle(&routed)?;
            pool = setup.text
                + routed
                    .decisions
                    .iter()
                    .map(|d| d.candidates.len())
                    .sum::<usize>();
            kept = Some(routed.hidden_states);
            Ok(())
        })?;
        hidden_states = kept.context("the decision returned nothing")?;
        total.beyond_pool += decision - plain_entry(setup, layer, pool)?;
        total.beyond_kept += decision - plain_entry(setup, layer, hidden_states.dims()[1])?;
    }
    Ok(total)
}

/// Seconds of input norm and keys of a number of rows.
fn plain_entry(setup: &Setup, layer: &DecoderLayer<Backend>, rows: usize) -> anyhow::Result<f64> {
    let rows = Tensor::<Backend, 1, Int>::arange(0..rows as i64, setup.device());
    let hidden_states = setup.prompt.embeddings.clone().select(1, rows.clone());
    let positions = setup.prompt.positions.clone().select(1, rows);
    let rope = setup
        .decoder
        .config()
        .rope
        .table(positions, hidden_states.dtype());
    wait_for_one(hidden_states.clone())?;
    seconds(|| {
        let normed = layer.input_layernorm.forward(hidden_states.clone());
        wait_for_one(layer.self_attn.keys(normed, &rope))?;
        wait_for_one(hidden_states)
    })
}

fn vision(setup: &Setup, repeats: usize) -> anyhow::Result<Vision> {
    let time = |layers| {
        median_seconds(repeats, || {
            wait_for_one(setup.tower.patch_features(setup.pixels.clone(), layers)?)
        })
    };
    let (embedding, all) = (time(0)?, time(VISION_LAYERS)?);
    Ok(Vision {
        layers: VISION_LAYERS,
        embedding_ms: embedding * 1e3,
        layer_ms: (all - embedding) / VISION_LAYERS as f64 * 1e3,
    })
}

/// Dense and routed tokens in turn.
fn decode(setup: &Setup, tokens: usize) -> anyhow::Result<Decode> {
    let name = format!("reroute-pdrop@{DECODE_BUDGET}");
    let schedule = setup.schedule("reroute-pdrop", DECODE_BUDGET)?;
    let mut dense = Decoding::new(setup, Schedule::dense());
    let mut routed = Decoding::new(setup, schedule);
    let (mut dense_times, mut routed_times) = (Vec::new(), Vec::new());
    for _ in 0..tokens {
        dense_times.push(milliseconds(dense.next_token()?));
        routed_times.push(milliseconds(routed.next_token()?));
    }
    Ok(Decode {
        dense_ms: median(dense_times),
        routed_ms: median(routed_times),
        routed_by: name,
    })
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Candidate {
    /// Times a prefill and checks that its layers work on, and cache, the rows that the ceiling
    /// assumes.
    fn seconds(&self, setup: &Setup) -> anyhow::Result<f64> {
        let mut prefill = None;
        let time = seconds(|| {
            prefill = Some(setup.prefill(&self.schedule)?);
            Ok(())
        })?;
        let Prefill { trace, cache, .. } = prefill.context("the prefill returned nothing")?;
        let rows: Vec<usize> = trace.rows.iter().flatten().copied().collect();
        ensure!(
            rows == self.cost.rows && cache.lengths(0) == self.cost.rows,
            "{} works on {rows:?} rows, its cost assumes {:?}",
            self.name,
            self.cost.rows
        );
        Ok(time)
    }

    fn into_row(self, setup: &Setup, dense_cost: &Cost, dense: f64) -> Row {
        let prefill = median(self.prefill);
        let share = |part: fn(&Selection) -> f64| {
            median(self.selection.iter().map(part).collect()) / prefill
        };
        Row {
            decision_layers: self
                .schedule
                .stages()
                .iter()
                .map(|stage| stage.layer)
                .collect(),
            keep_counts: self.schedule.keep_counts(setup.visual),
            average_tokens: self.cost.average_tokens(),
            dense_ms: dense * 1e3,
            routed_ms: prefill * 1e3,
            speedup: median(self.speedup),
            ceiling: self.cost.speedup_ceiling(dense_cost),
            selection_share: share(|selection| selection.beyond_pool),
            selection_and_keys_share: share(|selection| selection.beyond_kept),
            selection_and_keys_flop_share: self.cost.total_scorer_flops() / self.cost.total_flops(),
            preset: self.name,
        }
    }
}
