//! A routed prefill as the release of Reroute (arXiv 2606.12412) does it, to compare with: a decision
//! projects queries and keys of all rows and forms the whole attention matrix of its layer, to read
//! one row of it, and the layer then projects queries and keys again.
//!
//! Between decisions the rows run through the very layers that the router uses, so that the two
//! differ in how they decide and in nothing else.

use anyhow::{Context, ensure};
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, DType, Int, Tensor};
use layers::Rotary;
use reducers::{Action, Schedule, top_k};
use reroute::{DecoderLayer, PrefillOptions, Prompt, SampleLayout};
use reroute_cli::backend::Backend;

use crate::setup::Setup;
use crate::timing::wait;

/// Prefills the prompt and returns what each decision has selected.
pub fn prefill(setup: &Setup, schedule: &Schedule) -> anyhow::Result<Vec<Vec<usize>>> {
    ensure!(
        schedule.action() == Action::Reroute && !schedule.monotonic(),
        "the reference design is written for rerouting"
    );
    let config = setup.decoder.config();
    let rope = config.rope.table(
        setup.prompt.positions.clone(),
        setup.prompt.embeddings.dtype(),
    );
    let visual = &setup.prompt.samples[0].visual;
    let keep_counts = schedule.keep_counts(setup.visual);
    let mut rows = setup.prompt.embeddings.clone();
    let mut active: Vec<usize> = (0..setup.rows()).collect();
    let (mut selections, mut done) = (Vec::new(), 0);
    for (stage, keep) in schedule.stages().iter().zip(keep_counts) {
        rows = run(setup, done..stage.layer, rows, &active)?;
        done = stage.layer;
        let layer = setup.decoder.layers().get(done).context("no such layer")?;
        let attention = attention_matrix(setup, layer, &rows, &rope);
        let last = attention.narrow(2, setup.rows() - 1, 1);
        let heads = last.dims()[0] * last.dims()[1];
        let scores = last.reshape([heads, setup.rows()]).mean_dim(0);
        let scores: Vec<f32> = scores.try_into_data()?.iter().collect();
        let of_visual: Vec<f32> = visual.iter().map(|&row| scores[row]).collect();
        let selected = top_k(&of_visual, keep)?;
        active = (0..setup.rows())
            .filter(|row| match visual.binary_search(row) {
                Ok(token) => selected.binary_search(&token).is_ok(),
                Err(_) => true,
            })
            .collect();
        selections.push(selected);
    }
    let rows = run(setup, done..setup.decoder.layers().len(), rows, &active)?;
    let last = rows.narrow(1, setup.rows() - 1, 1);
    wait(setup.decoder.logits(last))?;
    Ok(selections)
}

/// Runs the active rows through some layers and puts them back among the others.
///
/// # Shapes
/// - `rows` and the result: `[hidden_size, rows]`
fn run(
    setup: &Setup,
    layers: std::ops::Range<usize>,
    rows: Tensor<Backend, 2>,
    active: &[usize],
) -> anyhow::Result<Tensor<Backend, 2>> {
    if layers.is_empty() {
        return Ok(rows);
    }
    let all = rows.dims()[1];
    let layers = setup.decoder.layers()[layers].to_vec();
    let decoder = setup.decoder.clone().with_layers(layers);
    let index = indices(active, setup);
    let prompt = Prompt {
        embeddings: rows.clone().select(1, index.clone()),
        positions: setup.prompt.positions.clone().select(1, index),
        deepstack: Vec::new(),
        samples: vec![SampleLayout {
            rows: active.len(),
            visual: Vec::new(),
            next_position: all as i64,
            salience: None,
            cells: Vec::new(),
        }],
    };
    let options = PrefillOptions {
        hidden_states: true,
        ..Default::default()
    };
    let prefill = decoder.prefill(&prompt, &Schedule::dense(), options)?;
    let output = prefill.hidden_states.last().context("no layers")?;
    let both = Tensor::cat(vec![rows, output.values.clone()], 1);
    let place = |row: usize| active.binary_search(&row).map_or(row, |at| all + at);
    let order: Vec<usize> = (0..all).map(place).collect();
    Ok(both.select(1, indices(&order, setup)))
}

/// Causal attention of all rows to all rows.
///
/// # Shapes
/// - `rows`: `[hidden_size, rows]`
/// - returns `[kv_heads, group, rows, rows]`
fn attention_matrix(
    setup: &Setup,
    layer: &DecoderLayer<Backend>,
    rows: &Tensor<Backend, 2>,
    rope: &Rotary<Backend>,
) -> Tensor<Backend, 4> {
    let config = setup.decoder.config();
    let (kv_heads, head_dim) = (config.num_key_value_heads, config.head_dim);
    let group = config.num_attention_heads / kv_heads;
    let count = rows.dims()[1];
    let normed = layer.input_layernorm.forward(rows.clone());
    let queries = layer.self_attn.queries(normed.clone(), rope);
    let keys = layer.self_attn.keys(normed, rope);
    let queries = queries.reshape([kv_heads, group, head_dim, count]);
    let keys = keys.reshape([kv_heads, 1, head_dim, count]);
    let queries = queries.mul_scalar((head_dim as f64).powf(-0.5));
    let scores = queries.swap_dims(2, 3).matmul(keys).cast(DType::F32);
    let future = Tensor::<Backend, 2, Bool>::tril_mask([count; 2], 0, &setup.device());
    let mask = future.float().cast(DType::F32).mul_scalar(-1e30);
    let heads = kv_heads * group;
    let flat = scores.reshape([heads, count * count]) + mask.reshape([1, count * count]);
    softmax(flat.reshape([kv_heads, group, count, count]), 3)
}

fn indices(rows: &[usize], setup: &Setup) -> Tensor<Backend, 1, Int> {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    Tensor::from_data(rows.as_slice(), &setup.device())
}
