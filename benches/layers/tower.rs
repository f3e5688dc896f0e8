//! The vision tower of Qwen2.5-VL-7B against the number of patches: time and memory of a windowed and
//! of a full-attention layer, beside what the machine's matrix product would take.

use anyhow::Context;
use burn::tensor::{Distribution, Tensor};
use reroute_cli::backend::{self, Backend, Device};
use serde_json::{Value, json};
use vision_encoder::qwen::{Grid, QwenGeneration, QwenTowerConfig, QwenVisionConfig};

use crate::options::Options;
use crate::timing::{median, median_seconds, seconds, wait_for_one};

/// Sides of the pictures in patches: 1024, 2304 (672 × 672 pixels, 576 visual tokens), 4096 and 16384.
const SIDES: [usize; 4] = [32, 48, 64, 128];

/// One size of picture.
struct Row {
    patches: usize,
    /// Patch embedding, one windowed layer, merger, in seconds.
    rest: f64,
    windowed: Layer,
    full: Layer,
    /// Bytes the heap grew by at its peak during the full layer's call, input and weights excluded.
    peak_bytes: usize,
}

/// One layer at one size.
struct Layer {
    seconds: f64,
    flops: f64,
}

/// Measures every size, prints the table and returns it.
pub fn run(options: &Options) -> anyhow::Result<Value> {
    let device = backend::device()?;
    let sides: &[usize] = if options.smoke { &[8, 16] } else { &SIDES };
    let product = product_flops_per_second(&device, options)?;
    println!(
        "\nVision tower of Qwen2.5-VL-7B{}, f32, {}; a 3420×1280 by 1280×2304 product runs at {:.0} GFLOP/s",
        if options.smoke { " (toy)" } else { "" },
        backend::NAME,
        product / 1e9,
    );
    println!(
        "{:>7}  {:>12} {:>9} {:>10}  {:>12} {:>9} {:>10}  {:>10}  {:>10}",
        "patches",
        "windowed ms",
        "GFLOP/s",
        "of product",
        "full ms",
        "GFLOP/s",
        "of product",
        "others ms",
        "peak MiB"
    );
    let mut rows = Vec::new();
    for &side in sides {
        let row = measure(side, &device, options)?;
        let of = |layer: &Layer| layer.flops / layer.seconds;
        println!(
            "{:>7}  {:>12.1} {:>9.0} {:>9.0}%  {:>12.1} {:>9.0} {:>9.0}%  {:>10.1}  {:>10.1}",
            row.patches,
            row.windowed.seconds * 1e3,
            of(&row.windowed) / 1e9,
            100.0 * of(&row.windowed) / product,
            row.full.seconds * 1e3,
            of(&row.full) / 1e9,
            100.0 * of(&row.full) / product,
            row.rest * 1e3,
            row.peak_bytes as f64 / f64::from(1 << 20),
        );
        rows.push(row);
    }
    let (first, last) = (
        rows.first().context("a size")?,
        rows.last().context("a size")?,
    );
    let exponent = |of: fn(&Row) -> f64| {
        (of(last) / of(first)).ln() / (last.patches as f64 / first.patches as f64).ln()
    };
    println!(
        "exponents from {} to {} patches: windowed layer {:.2}, full layer {:.2}, memory {:.2}",
        first.patches,
        last.patches,
        exponent(|row| row.windowed.seconds),
        exponent(|row| row.full.seconds),
        exponent(|row| row.peak_bytes as f64),
    );
    let layer = |layer: &Layer| json!({"ms": layer.seconds * 1e3, "flops": layer.flops});
    let row = |row: &Row| {
        json!({
            "patches": row.patches,
            "windowed_layer": layer(&row.windowed),
            "full_attention_layer": layer(&row.full),
            "embedding_and_merger_ms": row.rest * 1e3,
            "peak_bytes": row.peak_bytes,
        })
    };
    Ok(json!({
        "product_flops_per_second": product,
        "sizes": rows.iter().map(row).collect::<Vec<_>>(),
    }))
}

/// The speed of the tower's largest matrix product alone.
fn product_flops_per_second(device: &Device, options: &Options) -> anyhow::Result<f64> {
    let [m, k, n] = if options.smoke {
        [32; 3]
    } else {
        [3420, 1280, 2304]
    };
    let random = |shape: [usize; 2]| -> Tensor<Backend, 2> {
        Tensor::random(shape, Distribution::Default, device)
    };
    let (a, b) = (random([m, k]), random([k, n]));
    let time = median_seconds(7, || wait_for_one(a.clone().matmul(b.clone())))?;
    Ok(2.0 * (m * k * n) as f64 / time)
}

/// Times one size. Layers are the differences of towers: embedding, layers, merger.
fn measure(side: usize, device: &Device, options: &Options) -> anyhow::Result<Row> {
    let configs = [
        tower(1, &[], options)?,
        tower(2, &[], options)?,
        tower(2, &[1], options)?,
    ];
    let patches = side * side;
    let shape = [configs[0].patch_features(), patches];
    let input: Tensor<Backend, 2> = Tensor::random(shape, Distribution::Default, device);
    let grid = Grid {
        t: 1,
        h: side,
        w: side,
    };
    let towers = configs
        .each_ref()
        .map(|config| config.init::<Backend>(device));
    let call = |at: usize| wait_for_one(towers[at].forward(input.clone(), &[grid])?.tokens);
    // The largest takes minutes; its differences are large enough for few rounds.
    let rounds = if patches > 8192 { 1 } else { options.rounds };
    let mut times = [const { Vec::new() }; 3];
    let mut peak_bytes = 0;
    for round in 0..=rounds {
        for (at, times) in times.iter_mut().enumerate() {
            crate::HEAP.reset_peak_usage();
            let before = crate::HEAP.current_usage();
            let time = seconds(|| call(at))?;
            // The first round makes the weights.
            if round > 0 {
                times.push(time);
                peak_bytes = peak_bytes.max(crate::HEAP.peak_usage().saturating_sub(before));
            }
        }
    }
    let [one, windowed, full] = times.map(median);
    let config = &configs[0];
    let window = config.windows.as_ref().context("Qwen2.5-VL has windows")?;
    let seen = (window.side * config.spatial_merge_size)
        .pow(2)
        .min(patches);
    Ok(Row {
        patches,
        rest: (2.0 * one - windowed).max(0.0),
        windowed: Layer {
            seconds: windowed - one,
            flops: layer_flops(config, patches, seen),
        },
        full: Layer {
            seconds: full - one,
            flops: layer_flops(config, patches, patches),
        },
        peak_bytes,
    })
}

/// Four projections, a gated MLP, and attention of every patch to `seen` patches.
fn layer_flops(config: &QwenTowerConfig, patches: usize, seen: usize) -> f64 {
    let (d, m) = (config.hidden_size as f64, config.intermediate_size as f64);
    2.0 * patches as f64 * (4.0 * d * d + 3.0 * d * m + 2.0 * seen as f64 * d)
}

/// A tower of so many layers.
fn tower(depth: usize, full: &[usize], options: &Options) -> anyhow::Result<QwenTowerConfig> {
    let sizes = match options.smoke {
        true => {
            json!({"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64})
        }
        false => {
            json!({"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584})
        }
    };
    let mut config = json!({"depth": depth, "fullatt_block_indexes": full, "window_size": 112});
    for (name, size) in sizes.as_object().into_iter().flatten() {
        config[name] = size.clone();
    }
    let config: QwenVisionConfig = serde_json::from_value(config)?;
    Ok(config.resolve(QwenGeneration::Qwen2_5)?)
}
