//! Where the time goes: every operation of a layer at several row counts.

use anyhow::Context;
use burn::tensor::{Int, Tensor};
use reroute_layers::{CausalMask, attention, silu_product};
use serde::Serialize;

use crate::model::TEXT;
use crate::setup::Setup;
use crate::timing::{Spread, repeated_seconds, wait_for_one};

/// Text tokens of the prompt plus 576, 192, 64 and 11 visual ones.
const VISUAL: [usize; 4] = [576, 192, 64, 11];

const REPEATS: usize = 5;

/// One operation at one row count.
#[derive(Serialize)]
pub struct Row {
    operation: &'static str,
    rows: usize,
    ms: Spread,
    /// Time per row relative to the largest row count: 1 if it shrinks in proportion to the rows.
    relative: f64,
}

/// Measures every operation at every row count, prints the table and returns it.
pub fn run(setup: &Setup) -> anyhow::Result<Vec<Row>> {
    let mut columns = Vec::new();
    for visual in VISUAL {
        let rows = (TEXT + visual).min(setup.rows());
        columns.push((rows, measure(setup, rows)?));
    }
    let (all, full) = columns.first().context("no row counts")?;
    println!("\nMilliseconds per operation; in brackets: µs per row relative to {all} rows");
    print!("{:<28}", "operation");
    columns
        .iter()
        .for_each(|(rows, _)| print!(" {:>11} rows", rows));
    println!();
    let mut table = Vec::new();
    for (at, (operation, whole)) in full.iter().enumerate() {
        print!("{operation:<28}");
        for (rows, times) in &columns {
            let (_, ms) = times.get(at).context("an operation is missing")?;
            let relative = ms.median / whole.median * *all as f64 / *rows as f64;
            print!(" {:>8.2} ({relative:4.2})", ms.median);
            table.push(Row {
                operation,
                rows: *rows,
                ms: *ms,
                relative,
            });
        }
        println!();
    }
    Ok(table)
}

/// Milliseconds of every operation.
fn measure(setup: &Setup, rows: usize) -> anyhow::Result<Vec<(&'static str, Spread)>> {
    let config = setup.decoder.config();
    let layer = setup.decoder.layers().first().context("no layers")?;
    let selfattn = &layer.self_attn;
    let device = &setup.device();
    let index = Tensor::<_, 1, Int>::arange(0..rows as i64, device);
    let x = setup.prompt.embeddings.clone().select(1, index.clone());
    let positions = setup.prompt.positions.clone().select(1, index.clone());
    let rope = config.rope.table(positions.clone(), x.dtype());
    let mask = CausalMask::new(setup.rows(), device);
    let (kv_heads, head_dim) = (config.num_key_value_heads, config.head_dim);
    let group = config.num_attention_heads / kv_heads;
    let heads = x.clone().reshape([kv_heads, head_dim, rows]);
    let query = x.clone().reshape([kv_heads, group, head_dim, rows]);
    let wide = Tensor::cat(vec![x.clone(); 3], 0).narrow(0, 0, config.intermediate_size);
    // As in a model, where it is the output of a product and not a part of something larger.
    let wide = wide.clone() + wide.zeros_like();

    let mut times = Vec::new();
    let mut time = |name, work: &mut dyn FnMut() -> anyhow::Result<()>| {
        times.push((
            name,
            Spread::milliseconds(&repeated_seconds(REPEATS, work)?),
        ));
        anyhow::Ok(())
    };
    time("RMS norm", &mut || {
        wait_for_one(layer.input_layernorm.forward(x.clone()))
    })?;
    time("q projection and rotation", &mut || {
        wait_for_one(selfattn.queries(x.clone(), &rope))
    })?;
    time("v projection", &mut || {
        wait_for_one(selfattn.values(x.clone()))
    })?;
    time("rotation", &mut || wait_for_one(rope.apply(x.clone())))?;
    time("causal attention", &mut || {
        wait_for_one(attention(
            query.clone(),
            heads.clone(),
            heads.clone(),
            Some(&mask),
        ))
    })?;
    time("residual addition", &mut || {
        wait_for_one(x.clone() + x.clone())
    })?;
    time("MLP", &mut || wait_for_one(layer.mlp.forward(x.clone())))?;
    time("SiLU and product", &mut || {
        wait_for_one(silu_product(wide.clone(), wide.clone()))
    })?;
    time("select rows", &mut || {
        wait_for_one(x.clone().select(1, index.clone()))
    })?;
    time("rotary table", &mut || {
        let table = config.rope.table(positions.clone(), x.dtype());
        wait_for_one(table.apply(x.clone().narrow(0, 0, head_dim)))
    })?;
    time("causal mask", &mut || {
        let mask = CausalMask::new(setup.rows(), device);
        let one = heads.clone().narrow(2, 0, 2);
        let query = query.clone().narrow(3, 0, 2);
        wait_for_one(attention(query, one.clone(), one, Some(&mask)))
    })?;
    Ok(times)
}
