//! The vision tower: CLIP's on its one size of picture, Qwen's against the number of patches.

use burn::module::Module;
use burn::tensor::{Distribution, Tensor};
use reroute_cli::backend::{Backend, Device};
use serde::Serialize;
use serde_json::{Value, json};
use vision_encoder::Grid;
use vision_encoder::qwen::{QwenTowerConfig, QwenVisionTower};
use vision_encoder::vit::VitConfig;

use crate::model::{Model, Tower, toy_qwen_tower};
use crate::options::Options;
use crate::peak::Peak;
use crate::setup::{Cast, dtype_name};
use crate::sizes::exponent;
use crate::timing::{Spread, mebibytes, seconds_and_peak, wait_for_one};

/// Layers of LLaVA's tower that are timed.
const VIT_LAYERS: usize = 2;

/// Sides of the pictures in patches: 1024, 2304 (672 × 672 pixels, 576 visual tokens), 4096 and 16384.
const SIDES: [usize; 4] = [32, 48, 64, 128];
const TOY_SIDES: [usize; 2] = [8, 16];

/// What a layer takes is measured on so many: the difference of a single one drowns in that of two runs.
const MORE_LAYERS: usize = 4;

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
        Tower::Vit(config) => vit(config, peak, device, options),
        Tower::Qwen(config) => qwen(config, peak, device, options),
    }
}

/// Patch embedding and one layer of LLaVA's tower.
fn vit(
    config: &VitConfig,
    peak: &Peak,
    device: &Device,
    options: &Options,
) -> anyhow::Result<Value> {
    let config = VitConfig {
        num_layers: VIT_LAYERS,
        ..config.clone()
    };
    let dtype = options.dtype.floats();
    let tower = config.init::<Backend>(device).map(&mut Cast(dtype));
    let side = config.image_size;
    let pixels: Tensor<Backend, 4> =
        Tensor::random([1, 3, side, side], Distribution::Default, device);
    let pixels = pixels.cast(dtype);
    let time =
        |layers| seconds_and_peak(|| wait_for_one(tower.patch_features(pixels.clone(), layers)?));
    let (first, _) = time(VIT_LAYERS)?;
    let (mut embedding, mut layers) = (Vec::new(), Vec::new());
    let mut peak_bytes = None;
    for _ in 0..options.rounds() {
        let (alone, _) = time(0)?;
        let (both, bytes) = time(VIT_LAYERS)?;
        embedding.push(alone);
        layers.push((both - alone).max(0.0) / VIT_LAYERS as f64);
        peak_bytes = bytes;
    }
    let (d, m) = (config.hidden_size as f64, config.intermediate_size as f64);
    let rows = (config.patches() + 1) as f64;
    let flops = 2.0 * rows * (4.0 * d * d + 2.0 * d * m + 2.0 * rows * d);
    let (embedding, layer) = (
        Spread::milliseconds(&embedding),
        Spread::milliseconds(&layers),
    );
    let of_peak = flops / layer.median * 1e3 / peak.flops_per_second;
    println!(
        "\nCLIP tower, one image: embedding {} ms; a layer {} ms, {:.0} % of the peak; peak memory {} MiB; \
         first run {:.1} s",
        embedding.show(1),
        layer.show(1),
        100.0 * of_peak,
        mebibytes(peak_bytes),
        first
    );
    Ok(json!({
        "embedding_ms": embedding,
        "layer_ms": layer,
        "layer_flops": flops,
        "layer_of_peak": of_peak,
        "peak_bytes": peak_bytes,
        "first_seconds": first,
    }))
}

/// One size of picture in Qwen's tower.
#[derive(Serialize)]
struct Row {
    patches: usize,
    /// First runs of everything: weights made, kernels compiled and tuned.
    first_seconds: f64,
    /// Patch embedding and merger.
    rest_ms: Spread,
    /// Where the tower has windows.
    windowed: Option<Layer>,
    full: Layer,
    /// During a call, attention to the whole picture included.
    peak_bytes: Option<usize>,
}

/// One layer at one size.
#[derive(Serialize)]
struct Layer {
    ms: Spread,
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
    println!(
        "\nQwen tower, {}: a windowed and a full-attention layer against the picture's size",
        dtype_name(options.dtype.floats())
    );
    println!(
        "{:>7} {:>8}  {:>24} {:>8}  {:>24} {:>8}  {:>24}  {:>10}",
        "patches",
        "first s",
        "windowed ms",
        "of peak",
        "full ms",
        "of peak",
        "others ms",
        "peak MiB"
    );
    let mut rows = Vec::new();
    for &side in sides {
        let row = measure(config, side, peak, device, options)?;
        let windowed = row.windowed.as_ref();
        println!(
            "{:>7} {:>8.1}  {:>24} {:>8}  {:>24} {:>6.0} %  {:>24}  {:>10}",
            row.patches,
            row.first_seconds,
            windowed.map_or("–".into(), |layer| layer.ms.show(1)),
            windowed.map_or("–".into(), |layer| format!(
                "{:.0} %",
                100.0 * layer.of_peak
            )),
            row.full.ms.show(1),
            100.0 * row.full.of_peak,
            row.rest_ms.show(1),
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
        "windowed": fit(|row| Some(row.windowed.as_ref()?.ms.median)),
        "full": fit(|row| Some(row.full.ms.median)),
        "memory": fit(|row| Some(row.peak_bytes? as f64)),
    });
    println!("exponents of time and memory against patches: {exponents}");
    Ok(json!({"sizes": rows, "exponents": exponents}))
}

/// Times one size. A layer is its share of what [`MORE_LAYERS`] add to a tower of one.
fn measure(
    config: &QwenTowerConfig,
    side: usize,
    peak: &Peak,
    device: &Device,
    options: &Options,
) -> anyhow::Result<Row> {
    // One layer, more, more that attend to everything; without windows all do.
    let all: Vec<usize> = (1..=MORE_LAYERS).collect();
    let configs = [
        cut(config, 1, &[]),
        cut(config, 1 + MORE_LAYERS, &[]),
        cut(config, 1 + MORE_LAYERS, &all),
    ];
    let patches = side * side;
    let shape = [config.patch_features(), patches];
    let dtype = options.dtype.floats();
    let input: Tensor<Backend, 2> = Tensor::random(shape, Distribution::Default, device);
    let input = input.cast(dtype);
    let grid = Grid {
        t: 1,
        h: side,
        w: side,
    };
    let towers = configs
        .each_ref()
        .map(|config| config.init::<Backend>(device).map(&mut Cast(dtype)));
    let rounds = options.rounds();
    let call = |tower: &QwenVisionTower<Backend>| {
        seconds_and_peak(|| wait_for_one(tower.forward(input.clone(), &[grid])?.tokens))
    };
    let mut first_seconds = 0.0;
    for tower in &towers {
        first_seconds += call(tower)?.0;
    }
    let (mut rest, mut windowed, mut full) = (Vec::new(), Vec::new(), Vec::new());
    let mut peak_bytes = None;
    for _ in 0..rounds {
        let mut times = [0.0; 3];
        for (tower, time) in towers.iter().zip(&mut times) {
            let (seconds, bytes) = call(tower)?;
            *time = seconds;
            peak_bytes = peak_bytes.max(bytes);
        }
        let [one, more, with_full] = times;
        let layer = (more - one) / MORE_LAYERS as f64;
        windowed.push(layer);
        rest.push(one - layer);
        full.push((with_full - one) / MORE_LAYERS as f64);
    }
    let layer = |seconds: &[f64], seen: usize| {
        let flops = layer_flops(config, patches, seen);
        let ms = Spread::milliseconds(seconds);
        Layer {
            ms,
            flops,
            of_peak: flops / ms.median * 1e3 / peak.flops_per_second,
        }
    };
    let in_window = config.windows.as_ref().map(|window| {
        let seen = (window.side * config.spatial_merge_size).pow(2);
        layer(&windowed, seen.min(patches))
    });
    Ok(Row {
        patches,
        first_seconds,
        rest_ms: Spread::milliseconds(&rest),
        windowed: in_window,
        full: layer(&full, patches),
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
