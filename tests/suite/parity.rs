//! The reference outputs in `tests/fixtures`, made by the official implementations: same numbers,
//! same selections, same tokens, for every family.

use std::sync::LazyLock;

use burn::tensor::DType;
use reducers::Schedule;
use reroute_cli::backend::{self, Backend, Device};
use zoo::{PixelTensors, Question, TensorInputs, TensorOutputs, Visual, Vlm};

use crate::golden::{
    HIDDEN, Reference, assert_close, assert_positions, assert_routed, fixture, open, open_as,
    picture, rows, values,
};

struct Family {
    name: &'static str,
    /// Largest difference of hidden states and logits allowed.
    tolerance: f32,
    vlm: Vlm<Backend>,
    golden: Reference,
}

static FAMILIES: LazyLock<Vec<Family>> = LazyLock::new(|| {
    let family = |name| Family {
        name,
        tolerance: if name == "llava" { 2e-4 } else { HIDDEN },
        vlm: open(name),
        golden: Reference::open(&format!("{name}/golden")),
    };
    ["llava", "qwen2vl", "qwen25vl", "qwen3vl"]
        .map(family)
        .into()
});

impl Family {
    /// The goldens' prompt and picture.
    fn inputs(&self) -> TensorInputs<Backend> {
        let image = Visual::Image(picture("llava/input.png"));
        let (_, prepared) = self
            .vlm
            .preprocessor()
            .prepare(&image)
            .expect("a good image");
        TensorInputs {
            samples: self.golden.samples(),
            pixels: PixelTensors::of(vec![prepared], self.vlm.device()).expect("one image"),
            second_per_grid_ts: Vec::new(),
        }
    }

    fn run(&self, schedule: &Schedule) -> TensorOutputs<Backend> {
        let out = self.vlm.run_tensors(self.inputs(), schedule, 16, true);
        out.expect("the golden inputs are good")
    }

    /// Compares the hidden states that the reference has.
    fn assert_hidden(&self, reference: &Reference, out: &TensorOutputs<Backend>) {
        for (layer, hidden) in out.hidden_states.iter().enumerate() {
            let name = format!("hidden.{layer}");
            if reference.has(&name) {
                self.assert_close(reference, &name, &rows(&hidden.values));
            }
        }
    }

    fn assert_close(&self, reference: &Reference, name: &str, found: &[f32]) {
        let what = format!("{} {name}", self.name);
        assert_close(&what, found, &reference.floats(name), self.tolerance);
    }
}

#[test]
fn preprocessing_and_prompt_give_the_reference_inputs() {
    for family in FAMILIES.iter() {
        let Family {
            name, vlm, golden, ..
        } = family;
        match family.inputs().pixels {
            PixelTensors::Squares(pixels) => {
                let expected = golden.floats("in.pixel_values");
                assert_close(name, &values(pixels), &expected, 1e-6);
            }
            // The pixels are compared in the tests of `vision-encoder`.
            PixelTensors::Patches { images, .. } => {
                let (_, grids) = images.expect("an image");
                assert_eq!(grids, golden.grids("in.image_grid_thw"));
            }
            PixelTensors::Nothing => panic!("an image"),
        }
        let image = picture("llava/input.png");
        let question = Question::about(vec![image], "Describe this image in detail.");
        let ids = vlm.encode(&question).expect("a good question");
        assert_eq!([ids], golden.samples()[..], "{name}");
    }
}

#[test]
fn dense_model_equals_the_reference() {
    for family in FAMILIES.iter() {
        let Family { name, golden, .. } = family;
        let out = family.run(&Schedule::dense());
        let images = out.tokens.images.as_ref().expect("there is an image");
        match &out.tokens.features {
            Some(features) => {
                family.assert_close(golden, "vision_features", &rows(features));
                family.assert_close(golden, "image_embeds", &rows(&images.tokens));
                let embeddings = &out.prompt.embeddings;
                family.assert_close(golden, "inputs_embeds", &rows(embeddings));
            }
            None => {
                assert_positions(name, &out, golden);
                let tokens = rows(&images.tokens);
                let width = images.tokens.dims()[0];
                // Qwen2.5-VL's reference lists them window by window.
                let expected = golden.floats("vision.merger_out");
                let found = match golden.has("vision.window_index") {
                    true => {
                        let order = golden.indices("vision.window_index").into_iter();
                        let token = |at: usize| &tokens[at * width..(at + 1) * width];
                        order.flat_map(|at| token(at).iter().copied()).collect()
                    }
                    false => tokens,
                };
                assert_close(
                    &format!("{name} merger"),
                    &found,
                    &expected,
                    family.tolerance,
                );
            }
        }
        for (layer, features) in images.deepstack.iter().enumerate() {
            family.assert_close(
                golden,
                &format!("vision.deepstack.{layer}"),
                &rows(features),
            );
        }
        assert_eq!(images.deepstack.is_empty(), *name != "qwen3vl");
        family.assert_hidden(golden, &out);
        let logits = values(out.logits);
        let expected = golden.floats("logits");
        let last = &expected[expected.len() - logits.len()..];
        assert_close(&format!("{name} logits"), &logits, last, family.tolerance);
        assert!(out.trace.decisions.is_empty());
        assert_eq!(out.kv_lengths, [golden.indices("kv_lengths")]);
        assert_eq!(
            out.generations[0].tokens,
            golden.ids("decode.ids"),
            "{name}"
        );
        family.assert_close(golden, "decode.logits", &out.generations[0].logits.concat());
    }
}

#[test]
fn text_only_prompt_equals_the_reference() {
    for family in FAMILIES.iter() {
        let Family {
            name, vlm, golden, ..
        } = family;
        let inputs = TensorInputs {
            samples: vec![golden.ids("text_only.input_ids")],
            pixels: PixelTensors::Nothing,
            second_per_grid_ts: Vec::new(),
        };
        let out = vlm.run_tensors(inputs, &Schedule::dense(), 0, false);
        let logits = values(out.expect("a good prompt").logits);
        let expected = golden.floats("text_only.logits");
        let last = &expected[expected.len() - logits.len()..];
        assert_close(name, &logits, last, family.tolerance);
    }
}

#[test]
fn fastv_equals_the_reference() {
    routed_equals_the_reference("reroute_fastv");
}

#[test]
fn pdrop_equals_the_reference() {
    routed_equals_the_reference("reroute_pdrop");
}

#[test]
fn reroute_flat_equals_the_reference() {
    routed_equals_the_reference("reroute_reroute_flat");
}

#[test]
fn reroute_pyramid_equals_the_reference() {
    routed_equals_the_reference("reroute_reroute_pyramid");
}

fn schedule(path: &str) -> Schedule {
    let json = std::fs::read_to_string(fixture(path).with_extension("json"));
    Schedule::from_json(&json.expect("the fixture is complete")).expect("valid")
}

fn routed_equals_the_reference(variant: &str) {
    for family in FAMILIES.iter() {
        let path = format!("{}/{variant}", family.name);
        let reference = Reference::open(&path);
        let schedule = schedule(&path);
        let out = family.run(&schedule);
        assert_eq!(out.trace.decisions.len(), schedule.stages().len());
        family.assert_hidden(&reference, &out);
        assert_eq!(out.kv_lengths, [reference.indices("kv_lengths")], "{path}");
        assert_routed(&path, &out, &reference);
    }
}

/// In every other type that the backend has, the same pictures and schedules lead to nearly the same
/// logits, and to the same selections but where scores are as good as equal.
#[test]
fn half_precision_stays_near_the_reference() {
    let types = backend::dtypes(&Device::default());
    for dtype in types.into_iter().filter(|dtype| *dtype != DType::F32) {
        for family in FAMILIES.iter() {
            let vlm = open_as(family.name, dtype);
            for variant in ["reroute_fastv", "reroute_reroute_pyramid"] {
                let schedule = schedule(&format!("{}/{variant}", family.name));
                let full = family.run(&schedule);
                let half = vlm.run_tensors(family.inputs(), &schedule, 0, false);
                let half = half.expect("the golden inputs are good");
                let (a, b) = (values(full.logits), values(half.logits));
                let spread = (a.iter().map(|x| x * x).sum::<f32>() / a.len() as f32).sqrt();
                let worst = a
                    .iter()
                    .zip(&b)
                    .map(|(a, b)| (a - b).abs())
                    .fold(0.0, f32::max);
                println!(
                    "HALF {dtype:?} {} {variant} worst {worst} of {spread}",
                    family.name
                );
                for (f, h) in full.trace.decisions.iter().zip(&half.trace.decisions) {
                    let same = f.selected.iter().filter(|t| h.selected.contains(t)).count();
                    println!("HALF   layer {} {same} of {}", f.layer, f.selected.len());
                }
            }
        }
    }
}
