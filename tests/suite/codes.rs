//! Weights that stay in fewer bits: every product is that of the numbers which the codes stand for.

mod files;

use std::fs;

use burn::module::AutodiffModule;
use burn::tensor::{DType, Distribution, Tensor, TensorData};
use burn_autodiff::Autodiff;
use reducers::presets;
use reroute_checkpoint::Gguf;
use reroute_cli::backend::{self, Backend, Device};
use reroute_layers::{CodeFormat, Coded, Linear, LinearConfig, Linears, LowRank, Scaling, Weight};
use reroute_zoo::{
    Folder, Model, OpenOptions, PixelTensors, TensorInputs, TensorOutputs, Visual, Vlm, Weights,
};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::doctor::doctor;
use crate::golden::{Reference, fixture, picture, values};
use crate::program::{refuses, reroute};
use crate::support::{alone, gap};

/// Checkpoints of all families, and what a prompt of them is.
const MODELS: [&str; 4] = ["llava", "qwen2vl", "qwen25vl", "qwen3vl"];

/// Pairs of GGUF files whose language models have blocks.
const BLOCKS: [&str; 2] = ["qwen3vl_q8_0", "llava_q4_k"];

/// The most that logits are off by, of the largest: inputs are rounded to bf16 or to bytes before every product,
/// and of random weights nothing averages out.
const APART: f32 = 0.05;

fn open(path: &str, dtype: DType, weights: Weights) -> Vlm<Backend> {
    let folder = Folder::open(fixture(path)).expect("the fixture is complete");
    open_folder(&folder, dtype, weights)
}

fn open_folder(folder: &Folder, dtype: DType, weights: Weights) -> Vlm<Backend> {
    let options = OpenOptions {
        dtype,
        weights,
        ..OpenOptions::default()
    };
    let device = backend::device().expect("a device");
    let opened = Vlm::open(folder, &options, &device);
    opened.unwrap_or_else(|error| panic!("{}: {error}", folder.describe()))
}

/// The same model with the numbers that the codes stand for, in f32; and of how many weights.
fn widened(vlm: Vlm<Backend>) -> (Vlm<Backend>, usize) {
    let mut count = 0;
    let vlm = vlm.map_model(|mut model: Model<Backend>| {
        let mut weights = Vec::new();
        model.weights("", &mut weights);
        for block in weights.into_iter().flat_map(|(_, blocks)| blocks) {
            if block.format().is_some() {
                *block = block.val().cast(DType::F32).into();
                count += 1;
            }
        }
        model
    });
    (vlm, count)
}

/// The share of the largest logit that logits are apart.
fn apart(found: &TensorOutputs<Backend>, expected: &TensorOutputs<Backend>) -> f32 {
    let logits = |out: &TensorOutputs<Backend>| out.generations[0].logits.concat();
    let (found, expected) = (logits(found), logits(expected));
    assert_eq!(found.len(), expected.len());
    let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    differences.fold(0f32, f32::max) / most
}

fn prefill(vlm: &Vlm<Backend>, reference: &Reference, routing: &str) -> TensorOutputs<Backend> {
    let depth = vlm.model().decoder().layers().len();
    let schedule = match routing {
        "dense" => reducers::Schedule::dense(),
        preset => presets::find(preset)
            .and_then(|preset| preset.schedule_at(vec![0, 1], depth))
            .expect("a schedule"),
    };
    let image = Visual::Image(picture("llava/input.png"));
    let (_, prepared) = vlm.preprocessor().prepare(&image).expect("a good image");
    let inputs = TensorInputs {
        samples: reference.samples(),
        pixels: PixelTensors::of(vec![prepared], vlm.device()).expect("one image"),
        second_per_grid_ts: Vec::new(),
    };
    let out = vlm.run_tensors(inputs, schedule, 1, false);
    out.expect("it runs")
}

/// What a file has is what products see, to the last bit where the formula rounds once.
#[test]
fn blocks_that_stay_are_those_of_the_reference() {
    let folder = Folder::on_disk(&fixture("gguf")).expect("the fixture is complete");
    let gguf = Gguf::open(&folder, "blocks.gguf").expect("a good file");
    let file = fs::read(fixture("gguf/expected.safetensors")).expect("the fixture is complete");
    let expected = SafeTensors::deserialize(&file).expect("safetensors");
    let mut formats = Vec::new();
    for (name, view) in expected.tensors() {
        let codes = gguf.tensors.stored_codes(&name, 0..3).expect("rows");
        let Some(codes) = codes else { continue };
        formats.push(codes.format);
        let device = backend::device().expect("a device");
        let coded = Coded::<Backend>::new(
            codes.format,
            codes.columns,
            codes.words,
            (&device, DType::F32),
        );
        let numbers = values(Weight::Coded(coded.expect("whole rows")).val());
        let words = view.data().as_chunks().0.iter();
        for (found, &word) in numbers.iter().zip(words) {
            let expected = f32::from_le_bytes(word);
            let error = (found - expected).abs();
            assert!(
                error <= expected.abs() * 2e-7,
                "{name}: {found}, {expected}"
            );
        }
        // A row by itself.
        let part = gguf.tensors.stored_codes(&name, 1..2).expect("rows");
        let part = part.expect("the same format");
        let row =
            Coded::<Backend>::new(part.format, part.columns, part.words, (&device, DType::F32));
        let row = values(Weight::Coded(row.expect("a whole row")).val());
        assert_eq!(row, numbers[part.columns..2 * part.columns], "{name}");
    }
    formats.sort_by_key(|format| format.name());
    formats.dedup();
    assert_eq!(formats.len(), 5, "{formats:?}");
}

#[test]
fn models_in_codes_are_those_of_the_numbers_that_they_stand_for() {
    for name in MODELS {
        let reference = Reference::open(&format!("{name}/golden"));
        for format in [CodeFormat::Int8, CodeFormat::Int4] {
            let coded = open(
                &format!("{name}/ckpt"),
                DType::F32,
                Weights::Decoder(format),
            );
            let (wide, decoder) = widened(open(
                &format!("{name}/ckpt"),
                DType::F32,
                Weights::Decoder(format),
            ));
            let layers = coded.model().decoder().layers().len();
            assert_eq!(decoder, 7 * layers, "{name}");
            let (_, all) = widened(open(
                &format!("{name}/ckpt"),
                DType::F32,
                Weights::All(format),
            ));
            assert!(all > decoder, "{name}");
            let [found, expected] = [&coded, &wide].map(|vlm| prefill(vlm, &reference, "dense"));
            let share = apart(&found, &expected);
            assert!(share <= APART, "{name} {format:?}: {share}");
            // Of random weights many scores are nearly the same.
            let routed = [&coded, &wide].map(|vlm| prefill(vlm, &reference, "reroute-pdrop@128"));
            let selected = |out: &TensorOutputs<Backend>| out.trace.decisions[0].selected.clone();
            let [found, expected] = [selected(&routed[0]), selected(&routed[1])];
            let same = expected
                .iter()
                .filter(|token| found.contains(token))
                .count();
            let overlap = same as f64 / expected.len().max(1) as f64;
            assert!(overlap >= 0.9, "{name} {format:?}: {overlap}");
        }
    }
}

#[test]
fn models_in_gguf_keep_their_blocks() {
    for name in BLOCKS {
        let path = format!("gguf_models/{name}");
        let stored = open(&path, DType::F32, Weights::Stored);
        let (wide, count) = widened(open(&path, DType::F32, Weights::Stored));
        assert!(count > 0, "{name}");
        let expected = fs::read(fixture(&format!("{path}/expected.json"))).expect("a fixture");
        let expected: Value = serde_json::from_slice(&expected).expect("JSON");
        let ids = serde_json::from_value(expected["text"]["ids"].clone()).expect("tokens");
        // Four more tokens, which are products of one row each.
        let [found, exact] = [&stored, &wide].map(|vlm| {
            let inputs = TensorInputs {
                samples: vec![Vec::clone(&ids)],
                pixels: Default::default(),
                second_per_grid_ts: Vec::new(),
            };
            let out = vlm.run_tensors(inputs, reducers::Schedule::dense(), 4, false);
            out.expect("it runs")
        });
        assert_eq!(
            found.generations[0].tokens, exact.generations[0].tokens,
            "{name}"
        );
        let share = apart(&found, &exact);
        assert!(share <= APART, "{name}: {share}");
        let floats = open(&path, DType::F32, Weights::Floats);
        // The same numbers, whichever way they were widened.
        let mut models = [wide, floats].map(|vlm| {
            let mut weights = Vec::new();
            vlm.map_model(|mut model: Model<Backend>| {
                let mut found = Vec::new();
                model.weights("", &mut found);
                for block in found.into_iter().flat_map(|(_, blocks)| blocks) {
                    weights.extend(values(block.val()));
                }
                model
            });
            weights
        });
        let [wide, floats] = &mut models;
        let error = wide
            .iter()
            .zip(floats)
            .map(|(a, b)| (*a - *b).abs() / b.abs().max(1e-3));
        assert!(error.fold(0f32, f32::max) < 1e-6, "{name}");
        assert!(
            stored.model().decoder().layers()[0]
                .mlp
                .up_proj
                .weight
                .format()
                .is_some()
        );
    }
}

/// One row and many, beside an adapter, on a backend that records operations: the result is what it is
/// without gradients, and only the gradient is rounded on its way to the inputs, at most to bf16.
#[test]
fn gradients_pass_through_codes() {
    type Ad = Autodiff<Backend>;
    let device = Device::default();
    let (output, input) = (24, 40);
    let weight = Tensor::<Backend, 2>::random([output, input], Distribution::Default, &device);
    let rows = CodeFormat::Int8
        .quantise_rows(&values(weight), input)
        .expect("finite");
    let words = rows
        .as_chunks()
        .0
        .iter()
        .map(|&word| i32::from_ne_bytes(word));
    let coded = Coded::<Ad>::new(
        CodeFormat::Int8,
        input,
        words.collect(),
        (&device, DType::F32),
    );
    let mut linear = LinearConfig::new(input, output).init::<Ad>(&device);
    linear.weight = Weight::Coded(coded.expect("whole rows"));
    let matrix = |rows: usize, columns: usize| {
        let numbers = (0..rows * columns).map(|i| (i as f32 * 0.37).sin());
        let data = TensorData::new(numbers.collect::<Vec<_>>(), [rows, columns]);
        Tensor::<Ad, 2>::from_data(data, &device)
    };
    let scaling = Scaling {
        alpha: 2.0,
        rank_stabilized: false,
    };
    linear.adapter = Some(LowRank::new(matrix(2, input), matrix(output, 2), scaling));
    let mut wide = linear.clone();
    wide.weight = linear.weight.val().into();
    let _alone = alone();
    for rows in [1, 5] {
        let x = matrix(input, rows).require_grad();
        let without = linear.valid().forward(x.clone().inner());
        assert_eq!(values(linear.forward(x.clone()).inner()), values(without));
        let [(of_x, of_up), (wide_x, wide_up)] = [&linear, &wide].map(|linear| {
            let result = linear.forward(x.clone());
            let gradients = (result * matrix(output, rows)).sum().backward();
            let adapter = linear.adapter.as_ref().expect("one");
            let up = adapter.up.val().grad(&gradients).expect("a gradient");
            (values(x.grad(&gradients).expect("a gradient")), values(up))
        });
        assert_eq!(of_up, wide_up);
        let difference = gap(&of_x, &wide_x);
        assert!(difference < 8e-3, "{difference}");
    }
    // It cannot take the adapter up, and keeps it.
    linear.merge();
    assert!(linear.adapter.is_some() && linear.weight.format().is_some());
}

#[test]
fn the_program_answers_with_weights_of_fewer_bits() {
    let photo = fixture("scenes/000.webp");
    let photo = photo.to_str().expect("UTF-8");
    let wide = reroute(&["ask", "--image", photo, "--prompt", "red circle"]).expect("an answer");
    for dtype in ["int8", "q4", "auto"] {
        let line = [
            "ask",
            "--image",
            photo,
            "--prompt",
            "red circle",
            "--dtype",
            dtype,
        ];
        let answer = reroute(&line).unwrap_or_else(|error| panic!("{dtype}: {error}"));
        assert!(!answer.is_empty(), "{dtype}");
        if dtype == "int8" {
            assert_eq!(answer, wide);
        }
    }
    refuses(
        &["ask", "--prompt", "x", "--dtype", "int3"],
        &["int3", "int8", "q4"],
    );
}

/// What doctor says of weights is what they take: a byte and a scale, or half a byte and an eighth.
#[test]
fn doctor_counts_codes_as_what_they_are() {
    let folder = fixture("qwen2vl/ckpt");
    let folder = folder.to_str().expect("UTF-8");
    let weights = |dtype: &str| {
        let (report, _) = doctor(&["--model", folder, "--dtype", dtype]);
        report["needs"][0]["weights_bytes"].as_u64().expect("bytes")
    };
    let coded = |format: CodeFormat| {
        let mut linears = 0;
        let mut bytes = 0;
        let vlm = open("qwen2vl/ckpt", DType::BF16, Weights::Decoder(format));
        vlm.map_model(|mut model: Model<Backend>| {
            let mut found: Vec<(String, &mut Linear<Backend>)> = Vec::new();
            model.linears("", &mut found);
            for (_, linear) in found {
                if let Weight::Coded(coded) = &linear.weight {
                    let [rows, columns] = linear.weight.dims();
                    linears += rows * columns;
                    bytes += coded.words.val().dims().iter().product::<usize>() * 4;
                }
            }
            model
        });
        (linears as u64, bytes as u64)
    };
    for (dtype, format) in [("int8", CodeFormat::Int8), ("q4", CodeFormat::Int4)] {
        let (numbers, bytes) = coded(format);
        assert_eq!(
            weights(dtype),
            weights("bf16") - 2 * numbers + bytes,
            "{dtype}"
        );
        assert!(bytes < 2 * numbers, "{dtype}");
    }
}
