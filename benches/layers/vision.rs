//! The vision tower: CLIP's on its one size of picture, Qwen's against the number of patches.

use burn::tensor::{Distribution, Tensor};
use reroute_cli::backend::{Backend, Device};
use serde::Serialize;
use serde_json::{Value, json};
use vision_encoder::clip::ClipConfig;
use vision_encoder::qwen::{Grid, QwenTowerConfig};

use crate::model::{Model, Tower, toy_qwen_tower};
use crate::options::Options;
use crate::peak::Peak;
use crate::sizes::exponent;
use crate::timing::{Spread, mebibytes, median, repeated_seconds, seconds_and_peak, wait_for_one};

/// Layers of CLIP's tower that are timed.
const CLIP_LAYERS: usize = 2;

/// Sides of the pictures in patches: 1024, 2304 (672 × 672 pixels, 576 visual tokens), 4096 and 16384.
const SIDES: [usize; 4] = [32, 48, 64, 128];
const TOY_SIDES: [usize; 2] = [8, 16];

/// The largest picture takes minutes; its differences are large enough for few rounds.
const FEW_ROUNDS_FROM: usize = 8192;

/// Measures the model's tower; all kinds of towers in a smoke test.
pub fn run(
    model: &Model,
    peak: &Peak,
    device: &Device,
    options: &Options,
) -> anyhow::Result<Value> {
    if options.smoke {
        qwen(&toy_qwen_tower()?, peak, device, options)?;
    }
    match &model.tower {
        Tower::Clip(config) => clip(config, peak, device, options),
        Tower::Qwen(config) => qwen(config, peak, device, options),
    }
}

/// Patch embedding and one layer of CLIP's tower.
fn clip(
    config: &ClipConfig,
    peak: &Peak,
    device: &Device,
    options: &Options,
) -> anyhow::Result<Value> {
    let config = ClipConfig {
        num_layers: CLIP_LAYERS,
        ..config.clone()
    };
    let tower = config.init::<Backend>(device);
    let side = config.image_size;
    let pixels = Tensor::random([1, 3, side, side], Distribution::Default, device);
    let time = |layers| {
        repeated_seconds(options.rounds(), || {
            wait_for_one(tower.patch_features(pixels.clone(), layers)?)
        })
    };
    let (embedding, both) = (time(0)?, time(CLIP_LAYERS)?);
    let layers = both.iter().zip(&embedding);
    let layers: Vec<f64> = layers
        .map(|(both, embedding)| (both - embedding).max(0.0) / CLIP_LAYERS as f64)
        .collect();
    let (d, m) = (config.hidden_size as f64, config.intermediate_size as f64);
    let rows = (config.patches() + 1) as f64;
    let flops = 2.0 * rows * (4.0 * d * d + 2.0 * d * m + 2.0 * rows * d);
    let (embedding, layer) = (
        Spread::milliseconds(&embedding),
        Spread::milliseconds(&layers),
    );
    let of_peak = flops / layer.median * 1e3 / peak.flops_per_second;
    println!(
        "\nCLIP tower, one image: embedding {} ms; a layer {} ms, {:.0} % of the peak",
        embedding.show(1),
        layer.show(1),
        100.0 * of_peak
    );
    Ok(json!({
        "embedding_ms": embedding,
        "layer_ms": layer,
        "layer_flops": flops,
        "layer_of_peak": of_peak,
    }))
}

/// One size of picture in Qwen's tower.
#[derive(Serialize)]
struct Row {
    patches: usize,
    /// Patch embedding and merger.
    rest_ms: f64,
    /// Where the tower has windows.
    windowed: Option<Layer>,
    full: Layer,
    /// During the call of two layers, one of them with full attention.
    peak_bytes: Option<usize>,
}

/// One layer at one size.
#[derive(Serialize)]
struct Layer {
    ms: f64,
    flops: f64,
    of_peak: f64,
}

/// Every size of picture in Qwen's tower.
fn qwen(
    config: &QwenTowerConfig,
    peak: &Peak,
    device: &Device,
    options: &Options,
) -> anyhow::Result<Value> {
    let sides: &[usize] = match options.smoke {
        true => &TOY_SIDES,
        false => &SIDES,
    };
    println!("\nQwen tower, f32: a windowed and a full-attention layer against the picture's size");
    println!(
        "{:>7}  {:>12} {:>8}  {:>12} {:>8}  {:>10}  {:>9}",
        "patches", "windowed ms", "of peak", "full ms", "of peak", "others ms", "peak MiB"
    );
    let mut rows = Vec::new();
    for &side in sides {
        let row = measure(config, side, peak, device, options)?;
        let windowed = row.windowed.as_ref();
        println!(
            "{:>7}  {:>12} {:>8}  {:>12.1} {:>6.0} %  {:>10.1}  {:>9}",
            row.patches,
            windowed.map_or("–".into(), |layer| format!("{:.1}", layer.ms)),
            windowed.map_or("–".into(), |layer| format!(
                "{:.0} %",
                100.0 * layer.of_peak
            )),
            row.full.ms,
            100.0 * row.full.of_peak,
            row.rest_ms,
            mebibytes(row.peak_bytes),
        );
        rows.push(row);
    }
    let fit = |of: fn(&Row) -> Option<f64>| -> Option<f64> {
        let pairs = rows.iter().map(|row| Some((row.patches as f64, of(row)?)));
        pairs
            .collect::<Option<Vec<_>>>()
            .map(|pairs| exponent(&pairs))
    };
    let exponents = json!({
        "windowed": fit(|row| Some(row.windowed.as_ref()?.ms)),
        "full": fit(|row| Some(row.full.ms)),
        "memory": fit(|row| Some(row.peak_bytes? as f64)),
    });
    println!("exponents of time and memory against patches: {exponents}");
    Ok(json!({"sizes": rows, "exponents": exponents}))
}

/// Times one size. Layers are the differences of towers: embedding, layers, merger.
fn measure(
    config: &QwenTowerConfig,
    side: usize,
    peak: &Peak,
    device: &Device,
    options: &Options,
) -> anyhow::Result<Row> {
    // One layer, two, two of which the second attends to everything; without windows all do.
    let configs = [
        cut(config, 1, &[]),
        cut(config, 2, &[]),
        cut(config, 2, &[1]),
    ];
    let patches = side * side;
    let shape = [config.patch_features(), patches];
    let input: Tensor<Backend, 2> = Tensor::random(shape, Distribution::Default, device);
    let grid = Grid {
        t: 1,
        h: side,
        w: side,
    };
    let towers = configs
        .each_ref()
        .map(|config| config.init::<Backend>(device));
    let rounds = match patches >= FEW_ROUNDS_FROM {
        true => 1,
        false => options.rounds(),
    };
    let mut times = [const { Vec::new() }; 3];
    let mut peak_bytes = None;
    for round in 0..=rounds {
        for (tower, times) in towers.iter().zip(&mut times) {
            let call = || wait_for_one(tower.forward(input.clone(), &[grid])?.tokens);
            let (time, bytes) = seconds_and_peak(call)?;
            // The first round makes the weights.
            if round > 0 {
                times.push(time);
                peak_bytes = peak_bytes.max(bytes);
            }
        }
    }
    let [one, windowed, full] = times.map(median);
    let layer = |seconds: f64, seen: usize| {
        let flops = layer_flops(config, patches, seen);
        Layer {
            ms: seconds * 1e3,
            flops,
            of_peak: flops / seconds / peak.flops_per_second,
        }
    };
    let in_window = config.windows.as_ref().map(|window| {
        let seen = (window.side * config.spatial_merge_size).pow(2);
        layer(windowed - one, seen.min(patches))
    });
    Ok(Row {
        patches,
        rest_ms: (2.0 * one - windowed).max(0.0) * 1e3,
        windowed: in_window,
        full: layer(full - one, patches),
        peak_bytes,
    })
}

/// The first layers of a tower, some of which attend to the whole picture.
fn cut(config: &QwenTowerConfig, layers: usize, full: &[usize]) -> QwenTowerConfig {
    let mut config = config.clone();
    config.num_layers = layers;
    config.deepstack_layers = Vec::new();
    if let Some(windows) = &mut config.windows {
        windows.full_attention_layers = full.to_vec();
    }
    config
}

/// Four projections, an MLP (gated where the generation has one), and attention of every patch to
/// `seen` patches.
fn layer_flops(config: &QwenTowerConfig, patches: usize, seen: usize) -> f64 {
    let (d, m) = (config.hidden_size as f64, config.intermediate_size as f64);
    // Only Qwen2.5-VL's MLP is gated, as only its attention has windows.
    let products = if config.windows.is_some() { 3.0 } else { 2.0 };
    2.0 * patches as f64 * (4.0 * d * d + products * d * m + 2.0 * seen as f64 * d)
}
