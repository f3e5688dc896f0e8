//! Keys and values in every type: what it changes of the answers of the built-in model, and how fast a token
//! reads them.

use reducers::{KvType, Plan};
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::embedded;
use reroute_zoo::{OpenOptions, Vlm};
use serde::Serialize;

use crate::decode::next_token;
use crate::model::{Model, TEXT};
use crate::options::Options;
use crate::scenes::{FOUND, Scene, answers, bootstrap, scenes};
use crate::setup::{Setup, prompt};
use crate::timing::{Spread, wait};

const ROUTINGS: [&str; 3] = ["dense", "reroute-pdrop@192", "reroute-pdrop@64"];

/// Scenes whose logits are compared.
const COMPARED: usize = 50;

/// Rows that a token attends to.
const CACHED: usize = 2000;

/// Tokens of a round.
const TOKENS: usize = 4;

/// Everything about one type.
#[derive(Serialize)]
pub struct Row {
    kv: String,
    /// Of a token in a layer.
    bytes: u64,
    routings: Vec<Scenes>,
    /// One more token of the decoder that is measured, behind [`CACHED`] rows.
    ms: Spread,
}

/// The answers to the scenes under one routing.
#[derive(Serialize)]
struct Scenes {
    routing: &'static str,
    /// The largest difference of a logit from that of the model's own type, over the largest logit.
    largest: f32,
    /// Of the tokens compared, the share with the same likeliest token behind them.
    same: f64,
    /// Of the visual tokens selected, the share that the model's own type selects.
    selected_in_both: f64,
    accuracy: f64,
    /// 95 %, percentiles of the bootstrap.
    interval: [f64; 2],
}

/// Measures every type that the backend keeps, and prints the tables.
pub fn run(
    setup: &Setup,
    model: &Model,
    device: &Device,
    options: &Options,
) -> anyhow::Result<Vec<Row>> {
    let kept = |kv: &KvType| reroute::check_kv_type::<Backend>(*kv, device).is_ok();
    let types: Vec<KvType> = KvType::ALL.into_iter().filter(kept).collect();
    let times = decode(setup, model, &types, device, options)?;
    let mut rows = Vec::new();
    for (&kv, ms) in types.iter().zip(times) {
        let opened = OpenOptions {
            kv: Some(kv),
            ..OpenOptions::default()
        };
        let vlm = Vlm::open(&embedded::checkpoint(), &opened, device)?;
        let mut scenes = scenes(&vlm)?;
        if options.smoke {
            scenes.truncate(2);
        }
        let routings = ROUTINGS.into_iter();
        let routings = routings.map(|routing| measure(&vlm, &scenes, routing));
        rows.push(Row {
            kv: kv.to_string(),
            bytes: setup.decoder.config().shape().kv_bytes(1, kv),
            routings: routings.collect::<anyhow::Result<_>>()?,
            ms,
        });
    }
    print(&rows);
    Ok(rows)
}

fn measure(vlm: &Vlm<Backend>, scenes: &[Scene], routing: &'static str) -> anyhow::Result<Scenes> {
    let plan: Plan = vlm.plan(routing)?;
    let answers = answers(vlm, scenes, &plan)?;
    let hits: Vec<bool> = answers.ious.iter().map(|iou| *iou >= FOUND).collect();
    let mut largest = 0f32;
    let [mut tokens, mut same, mut selected, mut in_both] = [0; 4];
    for (scene, answer) in scenes.iter().zip(&answers.tokens).take(COMPARED) {
        let error = vlm.kv_error(&scene.question, answer, &plan)?;
        largest = largest.max(error.largest);
        tokens += error.tokens;
        same += error.same;
        selected += error.selected;
        in_both += error.selected_in_both;
    }
    let share = |part: usize, of: usize| {
        if of == 0 {
            1.0
        } else {
            part as f64 / of as f64
        }
    };
    Ok(Scenes {
        routing,
        largest,
        same: share(same, tokens),
        selected_in_both: share(in_both, selected),
        accuracy: share(hits.iter().filter(|hit| **hit).count(), hits.len()),
        interval: bootstrap(&hits),
    })
}

/// Times of one more token, in each type in turn.
fn decode(
    setup: &Setup,
    model: &Model,
    types: &[KvType],
    device: &Device,
    options: &Options,
) -> anyhow::Result<Vec<Spread>> {
    let visual = if options.smoke {
        setup.visual
    } else {
        CACHED - TEXT
    };
    let prompt = prompt(model, visual, setup.dtype(), device);
    let mut decodings = Vec::new();
    for &kv in types {
        let mut decoder = setup.decoder.clone();
        decoder.set_kv_type(Some(kv))?;
        let prefill = decoder.prefill(&prompt, &reducers::Schedule::dense(), Default::default())?;
        wait(prefill.logits)?;
        decodings.push((decoder, prefill.cache, Vec::new()));
    }
    for round in 0..=options.rounds() * TOKENS {
        for (decoder, cache, times) in &mut decodings {
            let time = next_token(decoder, cache)?;
            // The first makes room.
            if round > 0 {
                times.push(time);
            }
        }
    }
    let times = decodings.iter();
    Ok(times
        .map(|(.., times)| Spread::milliseconds(times))
        .collect())
}

fn print(rows: &[Row]) {
    println!(
        "\nKeys and values by type; one more token behind {CACHED} rows, and the built-in model's scenes"
    );
    println!("\n| type | bytes | one token, ms |");
    println!("|---|---|---|");
    for row in rows {
        println!("| {} | {} | {} |", row.kv, row.bytes, row.ms.show(2));
    }
    println!(
        "\n| type | routing | logits off by | same token | same selection | IoU ≥ 0.5 | 95 % |"
    );
    println!("|---|---|---|---|---|---|---|");
    for row in rows {
        for of in &row.routings {
            println!(
                "| {} | `{}` | {:.3} % | {:.1} % | {:.1} % | {:.1} % | {:.1} – {:.1} |",
                row.kv,
                of.routing,
                100.0 * of.largest,
                100.0 * of.same,
                100.0 * of.selected_in_both,
                100.0 * of.accuracy,
                100.0 * of.interval[0],
                100.0 * of.interval[1],
            );
        }
    }
}
