//! What types of fewer bits cost in accuracy, on the built-in model and its 200 scenes, dense and routed.

use burn::tensor::DType;
use reducers::presets;
use reroute::Decision;
use reroute_cli::backend::{self, Backend, Device};
use reroute_layers::CodeFormat;
use reroute_zoo::{OpenOptions, Vlm, Weights, embedded};
use serde::Serialize;

use crate::options::Options;
use crate::scenes::{self, Answers};

/// One without decisions, one that removes and one that reroutes.
const ROUTINGS: [&str; 3] = ["dense", "pdrop@64", "reroute-pdrop@64"];

/// One type and one routing.
#[derive(Serialize)]
pub struct Row {
    weights: String,
    routing: String,
    accuracy: f64,
    /// 95 %, percentiles of the bootstrap.
    interval: [f64; 2],
    mean_iou: f64,
    /// Answers of the same tokens as in f32, as a share.
    same_answers: f64,
    /// Selected tokens that are selected in f32 too, as a share; 1 without decisions.
    same_selections: f64,
}

/// The types that the backend has: floats, and codes in the decoder alone or in the tower too.
fn types(device: &Device) -> Vec<(String, OpenOptions)> {
    let supported = backend::dtypes(device);
    let of = |name: &str, dtype, weights| {
        let options = OpenOptions {
            dtype,
            weights,
            ..Default::default()
        };
        (name.to_string(), options)
    };
    let floats = [
        ("f32", DType::F32),
        ("f16", DType::F16),
        ("bf16", DType::BF16),
    ];
    let floats = floats.into_iter().filter(|of| supported.contains(&of.1));
    let floats = floats.map(|(name, dtype)| of(name, dtype, Weights::Floats));
    let dtype = backend::or_f32(DType::BF16);
    let codes = [("int8", CodeFormat::Int8), ("q4", CodeFormat::Int4)];
    let codes = codes.into_iter().flat_map(|(name, format)| {
        let with_tower = format!("{name}, tower too");
        [
            of(name, dtype, Weights::Decoder(format)),
            of(&with_tower, dtype, Weights::All(format)),
        ]
    });
    floats.chain(codes).collect()
}

/// Measures every type and prints the table.
pub fn run(device: &Device, options: &Options) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut exact: Vec<Answers> = Vec::new();
    for (weights, open) in types(device) {
        let vlm = Vlm::<Backend>::open(&embedded::checkpoint(), &open, device)?;
        let mut scenes = scenes::scenes(&vlm)?;
        if options.smoke {
            scenes.truncate(2);
        }
        let layers = vlm.config().decoder().num_layers;
        for (at, routing) in ROUTINGS.into_iter().enumerate() {
            let plan = presets::find(routing)?.plan(layers, &vlm.config().encoder())?;
            let answers = scenes::answers(&vlm, &scenes, &plan)?;
            let hits = answers.hits();
            // The first type is f32, which every backend has.
            let beside = exact.get(at).unwrap_or(&answers);
            rows.push(Row {
                weights: weights.clone(),
                routing: routing.into(),
                accuracy: scenes::share(&hits),
                interval: scenes::bootstrap(&hits),
                mean_iou: answers.mean_iou(),
                same_answers: same_answers(&answers, beside),
                same_selections: same_selections(&answers, beside),
            });
            if exact.len() == at {
                exact.push(answers);
            }
        }
    }
    print(&rows);
    Ok(rows)
}

fn same_answers(one: &Answers, other: &Answers) -> f64 {
    let pairs = one.tokens.iter().zip(&other.tokens);
    let same: Vec<bool> = pairs.map(|(one, other)| one == other).collect();
    scenes::share(&same)
}

fn same_selections(one: &Answers, other: &Answers) -> f64 {
    let both = one.decisions.iter().zip(&other.decisions);
    let both = both.flat_map(|(one, other): (&Decision, &Decision)| {
        let other = &other.selected;
        one.selected
            .iter()
            .map(|token| other.binary_search(token).is_ok())
    });
    let both: Vec<bool> = both.collect();
    match both.is_empty() {
        true => 1.0,
        false => scenes::share(&both),
    }
}

fn print(rows: &[Row]) {
    println!(
        "\n| weights | routing | found, % | 95 % | mean IoU | same answers as f32, % | same selections, % |\n\
         |---|---|---|---|---|---|---|"
    );
    for row in rows {
        println!(
            "| {} | `{}` | {:.1} | {:.0}–{:.0} | {:.3} | {:.1} | {:.1} |",
            row.weights,
            row.routing,
            100.0 * row.accuracy,
            100.0 * row.interval[0],
            100.0 * row.interval[1],
            row.mean_iou,
            100.0 * row.same_answers,
            100.0 * row.same_selections,
        );
    }
}
