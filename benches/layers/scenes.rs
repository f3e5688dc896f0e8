//! What every method of the registry costs in accuracy, on the built-in model and its 200 scenes: a
//! trained toy of 8 layers, no evidence about large models.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context;
use burn::tensor::{Distribution, Tensor};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use reducers::encoder::{Seen, Tap, Tower, Weights, reduce};
use reducers::presets::{self, Preset};
use reducers::{Plan, Schedule};
use reroute::Decision;
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::embedded;
use reroute_zoo::grounding::iou;
use reroute_zoo::{OpenOptions, Question, Visual, Vlm};
use serde::{Deserialize, Serialize};
use vision_encoder::{DecodeLimits, decode};

use crate::options::Options;
use crate::timing::seconds;

/// Scenes of one batch.
const BATCH: usize = 25;
/// Scenes whose deferred tokens are compared with what they would have become.
const DRIFT_SCENES: usize = 20;
const RESAMPLES: usize = 10_000;
const SEED: u64 = 0;
/// A box is found from this intersection over union on.
pub const FOUND: f64 = 0.5;
/// The shapes that a reduction before the decoder is timed at: CLIP ViT-L/14-336, LLaVA-1.5-7B.
const CLIP_FEATURES: usize = 1024;
const CLIP_SIDE: usize = 24;
const DECODER_FEATURES: usize = 4096;

#[derive(Deserialize)]
struct SceneFile {
    image: String,
    expression: String,
    r#box: [f64; 4],
}

/// A picture with a question, and where what it asks for is.
pub struct Scene {
    pub question: Question,
    /// In shares of the picture.
    truth: [f64; 4],
}

/// Everything about one preset.
#[derive(Serialize)]
pub struct Row {
    routing: String,
    /// Why it has no plan here; then nothing else is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    unplanned: Option<String>,
    average_tokens: f64,
    flops_of_dense: f64,
    kv_bytes_of_dense: f64,
    accuracy: f64,
    /// 95 %, percentiles of the bootstrap.
    interval: [f64; 2],
    mean_iou: f64,
    vision_ms: f64,
    prefill_ms: f64,
    /// Of one picture of 576 tokens at CLIP-L's sizes, for methods before the decoder.
    reduce_ms: Option<f64>,
    /// Decision layer and mean drift of the tokens that waited until it.
    drift: Vec<(usize, f32)>,
}

/// Measures every preset and prints the tables.
pub fn run(device: &Device, options: &Options) -> anyhow::Result<Vec<Row>> {
    let vlm = Vlm::open(&embedded::checkpoint(), &OpenOptions::default(), device)?;
    let mut scenes = scenes(&vlm)?;
    let mut presets: Vec<Preset> = presets::presets().collect();
    if options.smoke {
        scenes.truncate(2);
        presets.retain(|preset| preset.budget.is_none() || preset.budget == Some(192));
    }
    println!("\nMethods on {} scenes of the built-in model", scenes.len());
    // Twins side by side: budgets together, a method before the one that reroutes it.
    presets.sort_by_key(|preset| {
        let name = preset.method.name;
        let base = name.trim_start_matches("reroute-").to_string();
        (std::cmp::Reverse(preset.budget), base, name.len())
    });
    // The first answers make what later ones share.
    answers(&vlm, &scenes[..1], &Schedule::dense().into())?;
    let mut rows = Vec::new();
    for preset in presets {
        rows.push(measure(&vlm, &scenes, &preset, device)?);
    }
    print_accuracy(&rows);
    print_drift(&rows);
    print_times(&rows);
    Ok(rows)
}

/// The scenes of the built-in model.
pub fn scenes(vlm: &Vlm<Backend>) -> anyhow::Result<Vec<Scene>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/scenes");
    let lines =
        fs::read_to_string(folder.join("scenes.jsonl")).context("the scenes are missing")?;
    let scene = |line: &str| {
        let file: SceneFile = serde_json::from_str(line)?;
        let path: PathBuf = folder.join(&file.image);
        let image = decode(&fs::read(path)?, &DecodeLimits::default())?;
        let text = vlm.grounding().question(&file.expression);
        Ok(Scene {
            question: Question::about(vec![image], text),
            truth: file.r#box,
        })
    };
    lines.lines().map(scene).collect()
}

/// What answers to scenes come to.
#[derive(Default)]
pub struct Answers {
    pub ious: Vec<f64>,
    vision_seconds: f64,
    prefill_seconds: f64,
    /// Of every answer.
    pub tokens: Vec<Vec<u32>>,
    /// Of all answers.
    pub decisions: Vec<Decision>,
}

impl Answers {
    /// Whether each scene's box was found.
    pub fn hits(&self) -> Vec<bool> {
        self.ious.iter().map(|iou| *iou >= FOUND).collect()
    }

    pub fn mean_iou(&self) -> f64 {
        self.ious.iter().sum::<f64>() / self.ious.len() as f64
    }
}

/// How many of these hold.
pub fn share(hits: &[bool]) -> f64 {
    hits.iter().filter(|hit| **hit).count() as f64 / hits.len() as f64
}

/// Asks about every scene, a batch at a time.
pub fn answers(vlm: &Vlm<Backend>, scenes: &[Scene], plan: &Plan) -> anyhow::Result<Answers> {
    let mut all = Answers::default();
    let options = vlm.generation_defaults();
    for batch in scenes.chunks(BATCH) {
        let questions: Vec<Question> = batch.iter().map(|scene| scene.question.clone()).collect();
        let go_on = &mut |_, _| ControlFlow::Continue(());
        let answers = vlm.ask_batch(&questions, plan, &options, go_on)?;
        all.tokens
            .extend(answers.iter().map(|it| it.tokens.clone()));
        let decisions = answers.iter().flat_map(|it| &it.trace.decisions);
        all.decisions.extend(decisions.cloned());
        all.vision_seconds += answers[0].timings.vision.as_secs_f64();
        all.prefill_seconds += answers[0].timings.prefill.as_secs_f64();
        for (scene, answer) in batch.iter().zip(&answers) {
            let Visual::Image(image) = &scene.question.visuals[0] else {
                continue;
            };
            let size = [image.width(), image.height(), image.width(), image.height()];
            let found = vlm.answered_box(answer).map(|found| {
                let mut shares = found;
                for (share, size) in shares.iter_mut().zip(size) {
                    *share /= size as f64;
                }
                iou(&shares, &scene.truth)
            });
            all.ious.push(found.unwrap_or(0.0));
        }
    }
    Ok(all)
}

fn measure(
    vlm: &Vlm<Backend>,
    scenes: &[Scene],
    preset: &Preset,
    device: &Device,
) -> anyhow::Result<Row> {
    let mut row = Row {
        routing: preset.name.clone(),
        unplanned: None,
        average_tokens: 0.0,
        flops_of_dense: 0.0,
        kv_bytes_of_dense: 0.0,
        accuracy: 0.0,
        interval: [0.0; 2],
        mean_iou: 0.0,
        vision_ms: 0.0,
        prefill_ms: 0.0,
        reduce_ms: None,
        drift: Vec::new(),
    };
    let shape = vlm.config().decoder().shape();
    let plan = match preset.plan(shape.num_layers.into(), &vlm.config().encoder()) {
        Ok(plan) => plan,
        Err(error) => {
            row.unplanned = Some(error.to_string());
            return Ok(row);
        }
    };
    let first = vlm.ask(
        &scenes[0].question,
        Schedule::dense(),
        &vlm.generation_defaults(),
        |_| {},
    )?;
    let (visual, kv) = (first.visual_tokens, vlm.kv_type());
    let text = first.prompt_rows - visual;
    let dense = Plan::from(Schedule::dense()).cost(&shape, visual, text, kv);
    let cost = plan.cost(&shape, visual, text, kv);
    row.average_tokens = cost.average_tokens();
    row.flops_of_dense = cost.total_flops() / dense.total_flops();
    row.kv_bytes_of_dense = cost.total_kv_bytes() as f64 / dense.total_kv_bytes() as f64;

    let answers = answers(vlm, scenes, &plan)?;
    let hits = answers.hits();
    let count = hits.len() as f64;
    row.accuracy = share(&hits);
    row.interval = bootstrap(&hits);
    row.mean_iou = answers.mean_iou();
    row.vision_ms = answers.vision_seconds * 1e3 / count;
    row.prefill_ms = answers.prefill_seconds * 1e3 / count;
    if let Some(encoder) = &plan.encoder {
        row.reduce_ms = Some(reduce_milliseconds(encoder, device)?);
    }
    row.drift = drift(vlm, &scenes[..scenes.len().min(DRIFT_SCENES)], &plan)?;
    Ok(row)
}

/// The 95 % interval of the share of hits, by resampling scenes.
pub fn bootstrap(hits: &[bool]) -> [f64; 2] {
    let mut random = StdRng::seed_from_u64(SEED);
    let mut shares: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let drawn = (0..hits.len()).filter(|_| hits[random.random_range(0..hits.len())]);
            drawn.count() as f64 / hits.len() as f64
        })
        .collect();
    shares.sort_by(f64::total_cmp);
    [0.025, 0.975].map(|quantile| shares[(quantile * (RESAMPLES - 1) as f64) as usize])
}

/// Mean drift before every decision but the first.
fn drift(vlm: &Vlm<Backend>, scenes: &[Scene], plan: &Plan) -> anyhow::Result<Vec<(usize, f32)>> {
    let mut sums: Vec<(usize, f32)> = Vec::new();
    for scene in scenes {
        for (at, drift) in vlm.drift(&scene.question, plan)?.iter().enumerate() {
            if at == sums.len() {
                sums.push((drift.layer, 0.0));
            }
            sums[at].1 += drift.mean() / scenes.len() as f32;
        }
    }
    Ok(sums)
}

/// What the rule itself takes for one picture, the tower's own work aside; the median of five.
fn reduce_milliseconds(plan: &reducers::EncoderPlan, device: &Device) -> anyhow::Result<f64> {
    let encoder = reducers::encoder::EncoderShape {
        num_layers: 24,
        feature_layer: 23,
        num_heads: 16,
        class_token: true,
        position_axes: 1,
        tower: Tower::Clip,
    };
    let reducer = plan.method.reducer::<Backend>();
    let tokens = CLIP_SIDE * CLIP_SIDE;
    let mut taps = reducer.needs(&encoder)?;
    taps.push(Tap::Features);
    let tensor = |tap: Tap| {
        let size = match tap {
            Tap::ClassToken | Tap::ClassQuery { .. } | Tap::ClassKey { .. } => [CLIP_FEATURES, 1],
            Tap::ClassAttention { .. } => [16, tokens],
            Tap::ReceivedAttention { .. } => [1, tokens],
            Tap::Embeddings => [DECODER_FEATURES, tokens],
            Tap::Question => [DECODER_FEATURES, 16],
            _ => [CLIP_FEATURES, tokens],
        };
        let values = Tensor::random(size, Distribution::Uniform(0.001, 1.0), device);
        (tap, values)
    };
    let seen = Seen {
        grid: [CLIP_SIDE, CLIP_SIDE],
        taps: taps.into_iter().map(tensor).collect(),
        encoder,
    };
    let mut times = Vec::new();
    for _ in 0..5 {
        times.push(seconds(|| {
            let reduced = reduce(reducer, &seen, plan.keep.count(tokens))?;
            if let Weights::Dense(weights) = reduced.weights {
                drop(weights.into_data());
            }
            Ok(())
        })?);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[2] * 1e3)
}

fn print_accuracy(rows: &[Row]) {
    println!("\n| routing | average | FLOPs | KV | IoU ≥ 0.5 | 95 % | mean IoU |");
    println!("|---|---|---|---|---|---|---|");
    for row in rows {
        match &row.unplanned {
            Some(reason) => println!("| `{}` | {reason} | | | | | |", row.routing),
            None => println!(
                "| `{}` | {:.2} | {:.0} % | {:.0} % | {:.1} % | {:.1} – {:.1} | {:.3} |",
                row.routing,
                row.average_tokens,
                100.0 * row.flops_of_dense,
                100.0 * row.kv_bytes_of_dense,
                100.0 * row.accuracy,
                100.0 * row.interval[0],
                100.0 * row.interval[1],
                row.mean_iou
            ),
        }
    }
}

fn print_drift(rows: &[Row]) {
    println!("\nDrift of tokens that waited, as a share of what they would have become");
    println!("\n| routing | before decision at layer: mean drift |");
    println!("|---|---|");
    for row in rows.iter().filter(|row| !row.drift.is_empty()) {
        let drift = row.drift.iter();
        let drift: Vec<String> = drift
            .map(|(layer, mean)| format!("{layer}: {mean:.2}"))
            .collect();
        println!("| `{}` | {} |", row.routing, drift.join(", "));
    }
}

fn print_times(rows: &[Row]) {
    println!("\nTimes per scene in batches of {BATCH}; a rule before the decoder at 576 tokens");
    println!("\n| routing | vision | prefill | of dense | FLOPs | reduction of 576 tokens |");
    println!("|---|---|---|---|---|---|");
    let dense = rows.iter().find(|row| row.routing == "dense");
    let dense = dense.map_or(f64::NAN, |row| row.prefill_ms);
    for row in rows.iter().filter(|row| row.unplanned.is_none()) {
        let reduce = row.reduce_ms.map_or("–".into(), |ms| format!("{ms:.2} ms"));
        println!(
            "| `{}` | {:.2} ms | {:.2} ms | {:.0} % | {:.0} % | {reduce} |",
            row.routing,
            row.vision_ms,
            row.prefill_ms,
            100.0 * row.prefill_ms / dense,
            100.0 * row.flops_of_dense
        );
    }
}
