//! A routed prefill as the release of Reroute (arXiv 2606.12412) does it, to compare with: a decision
//! projects queries and keys of all rows and forms the whole attention matrix of its layer, to read
//! one row of it, and the layer then projects queries and keys again.
//!
//! On two kinds of layers: ported operation by operation, as one would who takes the release to Burn,
//! and on the layers of this project, where only the way to decide differs.

mod ours;
mod ported;

use std::ops::Range;

use anyhow::ensure;
use burn::tensor::{Int, Tensor};
use reducers::{Action, Schedule, top_k};
use reroute_cli::backend::Backend;

use crate::setup::Setup;
use crate::timing::wait;
pub use ours::OurLayers;
pub use ported::PortedLayers;

/// The layers of a decoder.
pub trait Layers {
    /// The axis of a matrix of hidden states along which its rows stand.
    const ROWS: usize;

    /// Runs some layers on the active rows.
    ///
    /// # Shapes
    /// - `hidden_states` and the result: hidden states of the active rows
    fn run(
        &self,
        layers: Range<usize>,
        hidden_states: Tensor<Backend, 2>,
        active: &[usize],
    ) -> anyhow::Result<Tensor<Backend, 2>>;

    /// Attention of all rows to all rows.
    ///
    /// The release masks nothing here: it reads the last row, which sees everything.
    ///
    /// # Shapes
    /// - `hidden_states`: hidden states of all rows, the layer's input
    /// - returns `[heads, rows, rows]`
    fn attention_matrix(
        &self,
        layer: usize,
        hidden_states: Tensor<Backend, 2>,
    ) -> Tensor<Backend, 3>;
}

/// Prefills the prompt and returns what each decision has selected.
pub fn prefill<L: Layers>(
    setup: &Setup,
    schedule: &Schedule,
    layers: &L,
) -> anyhow::Result<Vec<Vec<usize>>> {
    ensure!(
        schedule.action() == Action::Reroute && !schedule.monotonic(),
        "the reference design is written for rerouting"
    );
    let rows = setup.rows();
    let visual = &setup.prompt.samples[0].visual;
    let keep_counts = schedule.keep_counts(setup.visual);
    let mut all = match L::ROWS {
        0 => setup.prompt.embeddings.clone().transpose(),
        _ => setup.prompt.embeddings.clone(),
    };
    let mut active: Vec<usize> = (0..rows).collect();
    let (mut selections, mut done) = (Vec::new(), 0);
    for (stage, keep) in schedule.stages().iter().zip(keep_counts) {
        let computed = run(setup, layers, done..stage.layer, &all, &active)?;
        all = scatter::<L>(setup, all, computed, &active);
        done = stage.layer;
        let attention = layers.attention_matrix(done, all.clone());
        let last = attention.narrow(1, rows - 1, 1);
        let scores = last.mean_dim(0).reshape([rows]);
        let scores: Vec<f32> = scores.try_into_data()?.iter().collect();
        let of_visual: Vec<f32> = visual.iter().map(|&row| scores[row]).collect();
        let selected = top_k(&of_visual, keep)?;
        active = (0..rows)
            .filter(|row| match visual.binary_search(row) {
                Ok(token) => selected.binary_search(&token).is_ok(),
                Err(_) => true,
            })
            .collect();
        selections.push(selected);
    }
    let depth = setup.decoder.layers().len();
    let computed = run(setup, layers, done..depth, &all, &active)?;
    let last = computed.narrow(L::ROWS, active.len() - 1, 1);
    let hidden_size = setup.decoder.config().hidden_size;
    wait(setup.decoder.logits(last.reshape([hidden_size, 1]))?)?;
    Ok(selections)
}

/// Gathers the active rows and runs them through some layers.
fn run<L: Layers>(
    setup: &Setup,
    layers: &L,
    range: Range<usize>,
    all: &Tensor<Backend, 2>,
    active: &[usize],
) -> anyhow::Result<Tensor<Backend, 2>> {
    let rows = all.clone().select(L::ROWS, indices(active, setup));
    match range.is_empty() {
        true => Ok(rows),
        false => layers.run(range, rows, active),
    }
}

/// All rows, with the active ones as computed.
fn scatter<L: Layers>(
    setup: &Setup,
    all: Tensor<Backend, 2>,
    computed: Tensor<Backend, 2>,
    active: &[usize],
) -> Tensor<Backend, 2> {
    let count = all.dims()[L::ROWS];
    let both = Tensor::cat(vec![all, computed], L::ROWS);
    let place = |row: usize| active.binary_search(&row).map_or(row, |at| count + at);
    let order: Vec<usize> = (0..count).map(place).collect();
    both.select(L::ROWS, indices(&order, setup))
}

fn indices(rows: &[usize], setup: &Setup) -> Tensor<Backend, 1, Int> {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    Tensor::from_data(rows.as_slice(), &setup.device())
}
