//! The reference outputs in `tests/fixtures`, made by the official implementations: same numbers,
//! same selections, same tokens, for every family.

use std::sync::{Arc, LazyLock};

use burn::tensor::{DType, Tensor};
use reducers::{DecisionView, ReducerError, Schedule, Scorer};
use reroute::RoutingTrace;
use reroute_cli::backend::{self, Backend, Device};
use reroute_zoo::{
    Pictures, PixelTensors, Question, Routing, TensorInputs, TensorOutputs, Visual, Vlm,
};

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
        match family.inputs().pixels.images.expect("an image") {
            Pictures::Fixed(pixels) => {
                let expected = golden.floats("in.pixel_values");
                assert_close(name, &values(pixels), &expected, 1e-6);
            }
            // The pixels are compared in the tests of `vision-encoder`.
            Pictures::Patches(_, grids) => {
                assert_eq!(grids, golden.grids("in.image_grid_thw"));
            }
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
            pixels: PixelTensors::default(),
            second_per_grid_ts: Vec::new(),
        };
        let out = vlm.run_tensors(inputs, Schedule::dense(), 0, false);
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

/// Selects what another run selected.
struct Replay<'a>(&'a RoutingTrace);

impl Scorer<Backend> for Replay<'_> {
    fn score(
        &self,
        standing: &dyn DecisionView<Backend>,
    ) -> Result<Tensor<Backend, 1>, ReducerError> {
        let mut decisions = self.0.decisions.iter();
        let decision = decisions.find(|decision| decision.layer == standing.layer());
        let mut scores = vec![0.0f32; standing.rows()];
        for token in &decision.expect("it decided here, too").selected {
            scores[standing.candidates()[*token]] = 1.0;
        }
        let device = (&Device::default(), DType::F32);
        Ok(Tensor::from_data(scores.as_slice(), device))
    }
}

/// In every other type that the backend has, scores and logits differ from those in f32 by a few
/// dozen roundings. A score that is as good as equal to another may select another token, after
/// which nothing compares: the run in f32 selects the same.
#[test]
fn half_precision_is_near_single_precision() {
    let types = backend::dtypes(&Device::default());
    for dtype in types.into_iter().filter(|dtype| *dtype != DType::F32) {
        let rounding = match dtype {
            DType::F16 => 0.5f32.powi(11),
            _ => 0.5f32.powi(8),
        };
        for family in FAMILIES.iter() {
            let path = format!("{}/reroute_reroute_pyramid", family.name);
            let (vlm, schedule) = (open_as(family.name, dtype), schedule(&path));
            let run = |vlm: &Vlm<Backend>, routing| {
                let out = vlm.run_tensors(family.inputs(), routing, 0, false);
                out.expect("the golden inputs are good")
            };
            let half = run(&vlm, Routing::from(&schedule));
            let replay = Replay(&half.trace);
            let replayed = Routing {
                scorer: Some(Arc::new(replay)),
                ..Routing::from(&schedule)
            };
            let full = run(&family.vlm, replayed);
            let selected = |out: &TensorOutputs<Backend>| -> Vec<Vec<usize>> {
                let decisions = out.trace.decisions.iter();
                decisions
                    .map(|decision| decision.selected.clone())
                    .collect()
            };
            assert_eq!(selected(&half), selected(&full), "{path}");

            let error = relative(&values(half.logits.clone()), &values(full.logits)) / rounding;
            assert!(error < 64.0, "{path}, {dtype:?}: logits, {error} roundings");
            let scores = |out: &TensorOutputs<Backend>| out.trace.decisions[0].scores.clone();
            let full = run(&family.vlm, Routing::from(&schedule));
            let error = relative(&scores(&half), &scores(&full)) / rounding;
            assert!(error < 64.0, "{path}, {dtype:?}: scores, {error} roundings");
        }
    }
}

/// The length of the difference over the length of what was expected.
fn relative(found: &[f32], expected: &[f32]) -> f32 {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
    let difference = squares(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    (difference / squares(&mut expected.iter().copied())).sqrt()
}
