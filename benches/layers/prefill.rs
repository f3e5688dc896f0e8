//! Dense and routed prefills side by side: speed-ups beside the ceilings that floating-point operations
//! set, what decisions take, and what the reference design takes instead.

use anyhow::{Context, ensure};
use burn::tensor::{DType, Int, Tensor};
use reducers::{Cost, Schedule};
use reroute::{DecoderLayer, Prefill};
use reroute_cli::backend::Backend;
use serde::Serialize;

use crate::model::{Model, TEXT};
use crate::options::Options;
use crate::peak::Peak;
use crate::reference::{self, OurLayers, PortedLayers};
use crate::setup::{Setup, settle};
use crate::timing::{Spread, kv_mebibytes, mebibytes, seconds, seconds_and_peak, wait_for_one};

const METHODS: [&str; 6] = [
    "fastv",
    "pdrop",
    "reroute-fastv",
    "reroute-pdrop",
    "reroute-sparsevlm",
    "reroute-dart",
];

/// The method that the reference design is measured beside.
const REFERENCE_METHOD: &str = "reroute-pdrop";

/// Share of the selected tokens on which the reference design may differ in f32: in a model of random
/// weights scores are close, and a full matrix rounds differently from one row of it. In half
/// precision rounding decides far more often, so that the share is told and no more.
const TIES: f64 = 0.02;

/// What was measured of prefills.
#[derive(Serialize)]
pub struct Report {
    visual_tokens: usize,
    text_tokens: usize,
    layers: usize,
    dtype: String,
    full_depth: usize,
    rounds: usize,
    head_rows: usize,
    weights_seconds: f64,
    first_prefill_seconds: f64,
    /// First runs of everything routed: beyond the later ones, compiling and tuning kernels.
    first_routed_seconds: f64,
    dense_ms: Spread,
    dense_flops_per_second: f64,
    /// Of the measured peak.
    dense_of_peak: f64,
    dense_kv_bytes: u64,
    /// By the cost model.
    dense_kv_bytes_predicted: u64,
    dense_peak_bytes: Option<usize>,
    presets: Vec<Row>,
}

/// What was measured of one method at one budget.
#[derive(Serialize)]
struct Row {
    preset: String,
    method: &'static str,
    budget: usize,
    decision_layers: Vec<usize>,
    keep_counts: Vec<usize>,
    average_tokens: f64,
    routed_ms: Spread,
    /// The dense prefills around it, divided by its own time, round by round.
    speedup: Spread,
    /// Ratio of operations, layers and decisions.
    ceiling: f64,
    of_ceiling: f64,
    /// Scores, selection and gathering, of the routed prefill, round by round.
    selection_share: Spread,
    /// The same and the keys of the rows that are not kept.
    selection_and_keys_share: Spread,
    /// What the ceiling counts for that.
    selection_and_keys_flop_share: f64,
    kv_bytes: u64,
    /// By the cost model.
    kv_bytes_predicted: u64,
    peak_bytes: Option<usize>,
    /// The reference design ported to Burn's own modules.
    reference: Option<Reference>,
    /// The reference design on our layers: it differs in how it decides, and in nothing else.
    reference_on_our_layers: Option<Reference>,
    /// Largest share of a decision's tokens that a reference design selects and ours does not.
    reference_selects_others: Option<f64>,
}

/// The reference design on the same schedule.
#[derive(Serialize)]
struct Reference {
    ms: Spread,
    /// Its time divided by ours, round by round.
    speedup_over_it: Spread,
}

/// The reference design on both kinds of layers.
struct References<'a> {
    ported: PortedLayers<'a>,
    ours: OurLayers<'a>,
}

/// A schedule and what was measured of it, in seconds, round by round.
struct Candidate {
    method: &'static str,
    budget: usize,
    schedule: Schedule,
    cost: Cost,
    prefill: Vec<f64>,
    speedup: Vec<f64>,
    selection: Vec<Selection>,
    reference: Vec<f64>,
    reference_on_our_layers: Vec<f64>,
    reference_selects_others: Option<f64>,
    kv_bytes: u64,
    peak_bytes: Option<usize>,
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
pub fn run(setup: &Setup, model: &Model, peak: &Peak, options: &Options) -> anyhow::Result<Report> {
    let shape = setup.decoder.config().shape();
    let kv = setup.decoder.kv_type();
    let cost = |schedule: &Schedule| Cost::of(&shape, schedule, setup.visual, TEXT, kv);
    let mut candidates = Vec::new();
    for &budget in &options.budgets {
        for method in METHODS {
            let schedule = setup.schedule(method, budget)?;
            let cost = cost(&schedule);
            candidates.push(Candidate::new(method, budget, schedule, cost));
        }
    }
    let plain = Schedule::dense();
    let dense_cost = cost(&plain);
    let mut dense = Candidate::new("dense", setup.visual, plain, dense_cost);
    let references = References {
        ported: PortedLayers::new(setup),
        ours: OurLayers::new(setup),
    };
    let first_routed_seconds = seconds(|| {
        for candidate in &mut candidates {
            candidate.first_run(setup, &references)?;
        }
        Ok(())
    })?;
    for _ in 0..options.rounds() {
        measure_round(setup, &references, &mut candidates, &mut dense)?;
    }

    let dense_cost = dense.cost;
    let dense_ms = Spread::milliseconds(&dense.prefill);
    let dense_flops_per_second = dense_cost.total_flops() / dense_ms.median * 1e3;
    let report = Report {
        visual_tokens: setup.visual,
        text_tokens: TEXT,
        layers: shape.num_layers.into(),
        dtype: setup.kind.name().into(),
        full_depth: model.full_depth,
        rounds: options.rounds(),
        head_rows: setup.decoder.config().vocab_size,
        weights_seconds: setup.weights_seconds,
        first_prefill_seconds: setup.first_prefill_seconds,
        first_routed_seconds,
        dense_ms,
        dense_flops_per_second,
        dense_of_peak: dense_flops_per_second / peak.flops_per_second,
        dense_kv_bytes: dense.kv_bytes,
        dense_kv_bytes_predicted: dense_cost.total_kv_bytes(),
        dense_peak_bytes: dense.peak_bytes,
        presets: candidates
            .into_iter()
            .map(|candidate| candidate.into_row(setup, &dense_cost))
            .collect(),
    };
    report.print();
    Ok(report)
}

/// One round: clocks drift on a shared machine, so that a routed prefill is compared with the mean
/// of the dense prefills right before and right after those of its budget.
fn measure_round(
    setup: &Setup,
    references: &References<'_>,
    candidates: &mut [Candidate],
    dense: &mut Candidate,
) -> anyhow::Result<()> {
    let mut before = dense.measure(setup)?;
    for budget in candidates.chunks_mut(METHODS.len()) {
        let mut times = Vec::new();
        for candidate in budget.iter_mut() {
            times.push(candidate.measure(setup)?);
            if candidate.method == REFERENCE_METHOD {
                let schedule = &candidate.schedule;
                let ported = || reference::prefill(setup, schedule, &references.ported).map(drop);
                let ours = || reference::prefill(setup, schedule, &references.ours).map(drop);
                candidate.reference.push(seconds(ported)?);
                candidate.reference_on_our_layers.push(seconds(ours)?);
            }
        }
        let after = dense.measure(setup)?;
        for (candidate, time) in budget.iter_mut().zip(times) {
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
    let mut router = setup.router(schedule)?;
    let cache = setup.nothing_cached()?;
    let mut hidden_states = setup.prompt.embeddings.clone();
    let mut total = Selection::default();
    for stage in schedule.stages() {
        let layer = setup
            .decoder
            .layers()
            .get(stage.layer)
            .context("a decision below the model")?;
        let (mut kept, mut pool) = (None, 0);
        // The weights of the keys are then as near to the processor as for the entries below.
        plain_entry(setup, layer, setup.rows())?;
        let decision = seconds(|| {
            let routed = router.enter(stage.layer, hidden_states.clone(), &cache, None)?;
            settle(&routed)?;
            let candidates = routed.decisions.iter().map(|d| d.candidates.len());
            pool = TEXT + candidates.sum::<usize>();
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
    let rows = Tensor::<Backend, 1, Int>::arange(0..rows as i64, &setup.device());
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

impl Candidate {
    /// Nothing measured yet.
    fn new(method: &'static str, budget: usize, schedule: Schedule, cost: Cost) -> Self {
        Self {
            method,
            budget,
            schedule,
            cost,
            prefill: Vec::new(),
            speedup: Vec::new(),
            selection: Vec::new(),
            reference: Vec::new(),
            reference_on_our_layers: Vec::new(),
            reference_selects_others: None,
            kv_bytes: 0,
            peak_bytes: None,
        }
    }

    /// A run that does not count. In f32 the reference design must come to the same selections.
    fn first_run(&mut self, setup: &Setup, references: &References<'_>) -> anyhow::Result<()> {
        let decisions = setup.prefill(&self.schedule)?.trace.decisions;
        if self.method != REFERENCE_METHOD {
            return Ok(());
        }
        let ported = reference::prefill(setup, &self.schedule, &references.ported)?;
        let ours = reference::prefill(setup, &self.schedule, &references.ours)?;
        let expected = [&ported, &ours];
        ensure!(
            expected.iter().all(|it| it.len() == decisions.len()),
            "decisions are missing"
        );
        let twice = decisions.iter().chain(&decisions);
        let mut most = 0f64;
        for (expected, decision) in expected.into_iter().flatten().zip(twice) {
            let found = |token: &&usize| decision.selected.binary_search(token).is_ok();
            let different = expected.len() - expected.iter().filter(found).count();
            most = most.max(different as f64 / expected.len().max(1) as f64);
            ensure!(
                most <= TIES || setup.dtype() != DType::F32,
                "layer {}: {different} of {} selected tokens are not those of the reference design",
                decision.layer,
                expected.len()
            );
        }
        self.reference_selects_others = Some(most);
        Ok(())
    }

    /// Times a prefill and checks that its layers work on, and cache, the rows that the ceiling
    /// assumes.
    fn measure(&mut self, setup: &Setup) -> anyhow::Result<f64> {
        let mut prefill = None;
        let (time, peak_bytes) = seconds_and_peak(|| {
            prefill = Some(setup.prefill(&self.schedule)?);
            Ok(())
        })?;
        let Prefill { trace, cache, .. } = prefill.context("the prefill returned nothing")?;
        let rows: Vec<usize> = trace.rows.iter().flatten().copied().collect();
        ensure!(
            rows == self.cost.rows && cache.lengths(0) == self.cost.rows,
            "{} works on {rows:?} rows, its cost assumes {:?}",
            self.method,
            self.cost.rows
        );
        self.kv_bytes = cache.bytes(0).iter().sum();
        self.peak_bytes = peak_bytes;
        self.prefill.push(time);
        Ok(time)
    }

    fn into_row(self, setup: &Setup, dense_cost: &Cost) -> Row {
        let share = |part: fn(&Selection) -> f64| {
            let rounds = self.selection.iter().zip(&self.prefill);
            let shares: Vec<f64> = rounds.map(|(it, prefill)| part(it) / prefill).collect();
            Spread::of(&shares)
        };
        let reference = |seconds: &[f64]| {
            let ratios = seconds.iter().zip(&self.prefill);
            let ratios: Vec<f64> = ratios.map(|(theirs, ours)| theirs / ours).collect();
            (!ratios.is_empty()).then(|| Reference {
                ms: Spread::milliseconds(seconds),
                speedup_over_it: Spread::of(&ratios),
            })
        };
        let stages = self.schedule.stages().iter();
        let speedup = Spread::of(&self.speedup);
        let ceiling = self.cost.speedup_ceiling(dense_cost);
        Row {
            preset: format!("{}@{}", self.method, self.budget),
            method: self.method,
            budget: self.budget,
            decision_layers: stages.map(|stage| stage.layer).collect(),
            keep_counts: self.schedule.keep_counts(setup.visual),
            average_tokens: self.cost.average_tokens(),
            routed_ms: Spread::milliseconds(&self.prefill),
            speedup,
            ceiling,
            of_ceiling: speedup.median / ceiling,
            selection_share: share(|selection| selection.beyond_pool),
            selection_and_keys_share: share(|selection| selection.beyond_kept),
            selection_and_keys_flop_share: self.cost.total_scorer_flops() / self.cost.total_flops(),
            kv_bytes: self.kv_bytes,
            kv_bytes_predicted: self.cost.total_kv_bytes(),
            peak_bytes: self.peak_bytes,
            reference: reference(&self.reference),
            reference_on_our_layers: reference(&self.reference_on_our_layers),
            reference_selects_others: self.reference_selects_others,
        }
    }
}

impl Report {
    fn print(&self) {
        println!(
            "\nPrefill of {} visual + {} text tokens, {} layers, {}; medians of {} rounds (fastest–slowest).\n\
             Weights made in {:.1} s, first dense prefill {:.1} s, first routed ones {:.1} s.\n\
             Dense: {} ms, {:.0} GFLOP/s, {:.0} % of the peak; KV {} MiB, peak memory {} MiB.\n\
             Ceiling: ratio of FLOPs of the layers (a head of {} rows is timed, not counted). Selection: of the \
             routed prefill; `+ keys` with the keys of rows not kept. KV: measured of what the cost model predicts.\n",
            self.visual_tokens,
            self.text_tokens,
            self.layers,
            self.dtype,
            self.rounds,
            self.weights_seconds,
            self.first_prefill_seconds,
            self.first_routed_seconds,
            self.dense_ms.show(0),
            self.dense_flops_per_second / 1e9,
            100.0 * self.dense_of_peak,
            kv_mebibytes(self.dense_kv_bytes, self.dense_kv_bytes_predicted),
            mebibytes(self.dense_peak_bytes),
            self.head_rows,
        );
        println!(
            "{:<22} {:<11} {:>8} {:>20} {:>18} {:>8} {:>10} {:>16} {:>16} {:>14} {:>10} {:>21} {:>18}",
            "preset",
            "decides at",
            "average",
            "routed ms",
            "speed-up",
            "ceiling",
            "of ceiling",
            "selection, %",
            "+ keys, %",
            "KV MiB",
            "peak MiB",
            "over reference design",
            "on our layers"
        );
        for row in &self.presets {
            let layers: Vec<String> = row.decision_layers.iter().map(usize::to_string).collect();
            let over = |reference: &Option<Reference>| {
                let shown = reference.as_ref().map(|it| it.speedup_over_it.show(2));
                shown.unwrap_or("–".into())
            };
            println!(
                "{:<22} {:<11} {:>8.1} {:>20} {:>18} {:>7.2}x {:>10.2} {:>16} {:>16} {:>14} {:>10} {:>21} {:>18}",
                row.preset,
                layers.join(" "),
                row.average_tokens,
                row.routed_ms.show(0),
                row.speedup.show(2),
                row.ceiling,
                row.of_ceiling,
                row.selection_share.times(100.0).show(1),
                row.selection_and_keys_share.times(100.0).show(1),
                kv_mebibytes(row.kv_bytes, row.kv_bytes_predicted),
                mebibytes(row.peak_bytes),
                over(&row.reference),
                over(&row.reference_on_our_layers),
            );
        }
        if self.layers < self.full_depth {
            println!(
                "The full model takes as many decisions in {} layers: there they weigh {:.1} times less \
                 than here, in the measurements and in the ceiling.",
                self.full_depth,
                self.full_depth as f64 / self.layers as f64
            );
        }
    }
}
