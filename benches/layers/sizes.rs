//! Prefill against the number of visual tokens: how time and memory grow.

use burn::tensor::DType;
use reducers::Schedule;
use serde::Serialize;

use crate::model::Model;
use crate::options::Options;
use crate::setup::{Setup, prompt};
use crate::timing::{Spread, mebibytes, seconds_and_peak};

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
    ms: Spread,
    kv_bytes: u64,
    peak_bytes: Option<usize>,
}

/// Measures every size, prints the table and returns it.
pub fn run(setup: &Setup, model: &Model, options: &Options) -> anyhow::Result<Report> {
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
    let mut points = [Vec::new(), Vec::new()];
    for &visual in sizes {
        let prompt = prompt(model, visual, DType::F32, &setup.device());
        let mut times = [Vec::new(), Vec::new()];
        let mut last = [(0, None); 2];
        // The first round compiles and tunes kernels.
        for round in 0..=options.rounds() {
            for (at, (_, schedule)) in schedules.iter().enumerate() {
                let mut kv_bytes = 0;
                let (time, peak_bytes) = seconds_and_peak(|| {
                    let cache = setup.prefill_of(&prompt, schedule)?.cache;
                    kv_bytes = cache.bytes(0).iter().sum();
                    Ok(())
                })?;
                last[at] = (kv_bytes, peak_bytes);
                if round > 0 {
                    times[at].push(time);
                }
            }
        }
        for ((points, times), (kv_bytes, peak_bytes)) in points.iter_mut().zip(times).zip(last) {
            points.push(Point {
                visual_tokens: visual,
                ms: Spread::milliseconds(&times),
                kv_bytes,
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
        println!("\nPrefill against the number of visual tokens");
        println!(
            "{:<18} {:>7} {:>20} {:>9} {:>9}",
            "routing", "visual", "ms", "KV MiB", "peak MiB"
        );
        for curve in &self.curves {
            for point in &curve.points {
                println!(
                    "{:<18} {:>7} {:>20} {:>9.1} {:>9}",
                    curve.routing,
                    point.visual_tokens,
                    point.ms.show(0),
                    point.kv_bytes as f64 / f64::from(1 << 20),
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
