//! Prefill against the number of visual tokens: how time and memory grow.

use anyhow::Context;
use reducers::{Cost, Schedule};
use serde::Serialize;

use crate::model::{Model, TEXT};
use crate::options::Options;
use crate::peak::Peak;
use crate::setup::{Setup, prompt};
use crate::timing::{Spread, kv_mebibytes, mebibytes, seconds_and_peak};

/// Visual tokens of the prompts.
const SIZES: [usize; 4] = [576, 1152, 2304, 4608];
const TOY_SIZES: [usize; 2] = [64, 128];

/// The method measured beside the dense prefill.
const METHOD: &str = "reroute-pdrop";

/// Times against sizes, dense and routed.
#[derive(Serialize)]
pub struct Report {
    curves: Vec<Curve>,
}

/// One way to prefill.
#[derive(Serialize)]
struct Curve {
    routing: String,
    points: Vec<Point>,
    /// `b` of the fit `time = a · visual tokens^b`.
    time_exponent: f64,
    /// The same of the peak memory.
    memory_exponent: Option<f64>,
}

/// One size.
#[derive(Serialize)]
struct Point {
    visual_tokens: usize,
    /// The first run: beyond the later ones, compiling and tuning kernels.
    first_ms: f64,
    ms: Spread,
    flops: f64,
    /// Of the measured peak.
    of_peak: f64,
    kv_bytes: u64,
    /// By the cost model.
    kv_bytes_predicted: u64,
    peak_bytes: Option<usize>,
}

/// Measures every size, prints the table and returns it.
pub fn run(setup: &Setup, model: &Model, peak: &Peak, options: &Options) -> anyhow::Result<Report> {
    let sizes: &[usize] = match options.smoke {
        true => &TOY_SIZES,
        false => &SIZES,
    };
    let budget = options.budgets[0];
    let schedules = [
        ("dense".to_string(), Schedule::dense()),
        (
            format!("{METHOD}@{budget}"),
            setup.schedule(METHOD, budget)?,
        ),
    ];
    let shape = setup.decoder.config().shape();
    let mut points = [Vec::new(), Vec::new()];
    for &visual in sizes {
        let prompt = prompt(model, visual, setup.dtype(), &setup.device());
        let mut times = [Vec::new(), Vec::new()];
        let mut last = [(0, None); 2];
        for _ in 0..=options.rounds() {
            for (at, (_, schedule)) in schedules.iter().enumerate() {
                let mut kv_bytes = 0;
                let (time, peak_bytes) = seconds_and_peak(|| {
                    let cache = setup.prefill_of(&prompt, schedule)?.cache;
                    kv_bytes = cache.bytes(0).iter().sum();
                    Ok(())
                })?;
                last[at] = (kv_bytes, peak_bytes);
                times[at].push(time);
            }
        }
        for (at, (_, schedule)) in schedules.iter().enumerate() {
            let (first, times) = times[at].split_first().context("no rounds")?;
            let ms = Spread::milliseconds(times);
            let cost = Cost::of(&shape, schedule, visual, TEXT, setup.decoder.kv_type());
            let (kv_bytes, peak_bytes) = last[at];
            points[at].push(Point {
                visual_tokens: visual,
                first_ms: first * 1e3,
                ms,
                flops: cost.total_flops(),
                of_peak: cost.total_flops() / ms.median * 1e3 / peak.flops_per_second,
                kv_bytes,
                kv_bytes_predicted: cost.total_kv_bytes(),
                peak_bytes,
            });
        }
    }
    let curves = schedules.into_iter().zip(points);
    let report = Report {
        curves: curves
            .map(|((routing, _), points)| Curve::new(routing, points))
            .collect(),
    };
    report.print();
    Ok(report)
}

impl Curve {
    fn new(routing: String, points: Vec<Point>) -> Self {
        let fit = |of: &dyn Fn(&Point) -> Option<f64>| {
            let pairs = points
                .iter()
                .map(|point| Some((point.visual_tokens as f64, of(point)?)));
            pairs
                .collect::<Option<Vec<_>>>()
                .map(|pairs| exponent(&pairs))
        };
        Self {
            routing,
            time_exponent: fit(&|point| Some(point.ms.median)).unwrap_or(f64::NAN),
            memory_exponent: fit(&|point| Some(point.peak_bytes? as f64)),
            points,
        }
    }
}

/// `b` of the least-squares fit `y = a · x^b`.
pub fn exponent(pairs: &[(f64, f64)]) -> f64 {
    let logs: Vec<(f64, f64)> = pairs.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = logs.len() as f64;
    let mean_x = logs.iter().map(|(x, _)| x).sum::<f64>() / count;
    let mean_y = logs.iter().map(|(_, y)| y).sum::<f64>() / count;
    let covariance: f64 = logs.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let variance: f64 = logs.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    covariance / variance
}

impl Report {
    fn print(&self) {
        println!(
            "\nPrefill against the number of visual tokens; speed beside a product's, KV beside the predicted"
        );
        println!(
            "{:<18} {:>7} {:>9} {:>20} {:>8} {:>16} {:>10}",
            "routing", "visual", "first ms", "ms", "of peak", "KV MiB", "peak MiB"
        );
        for curve in &self.curves {
            for point in &curve.points {
                println!(
                    "{:<18} {:>7} {:>9.0} {:>20} {:>6.0} % {:>16} {:>10}",
                    curve.routing,
                    point.visual_tokens,
                    point.first_ms,
                    point.ms.show(0),
                    100.0 * point.of_peak,
                    kv_mebibytes(point.kv_bytes, point.kv_bytes_predicted),
                    mebibytes(point.peak_bytes),
                );
            }
            println!(
                "{:<18} time grows as tokens to the power of {:.2}, memory {}",
                curve.routing,
                curve.time_exponent,
                curve
                    .memory_exponent
                    .map_or("–".into(), |exponent| format!("{exponent:.2}")),
            );
        }
    }
}
