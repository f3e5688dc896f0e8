//! The reference outputs of `tests/fixtures/llava`, made by the official implementation: same
//! numbers, same selections, same tokens.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use burn::tensor::{DType, Tensor, TensorData};
use reducers::{Action, Schedule};
use reroute_cli::backend::{Backend, Device};
use safetensors::SafeTensors;
use vision_encoder::{DecodeLimits, RgbImage, decode, to_tensor};
use zoo::{Folder, OpenOptions, Question, TensorInputs, TensorOutputs, Vlm};

/// f32 against f64 alone moves these logits by 3e-5 (standard deviation 3).
const HIDDEN: f32 = 2e-4;
const ROUTED_LOGITS: f32 = 5e-4;
const SCORES: f32 = 1e-5;

static VLM: LazyLock<Vlm<Backend>> = LazyLock::new(|| {
    let folder = Folder::open(fixtures().join("ckpt")).expect("the fixture is complete");
    let options = OpenOptions::default();
    Vlm::open(&folder, &options, &Device::default()).expect("the fixture loads")
});

static GOLDEN: LazyLock<Reference> = LazyLock::new(|| Reference::open("golden"));

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llava")
}

/// A file of reference tensors.
struct Reference(Vec<u8>);

impl Reference {
    fn open(name: &str) -> Self {
        let path = fixtures().join(name).with_extension("safetensors");
        Self(std::fs::read(path).expect("the fixture is complete"))
    }

    fn bytes(&self, name: &str) -> (Vec<usize>, Vec<u8>) {
        let tensors = SafeTensors::deserialize(&self.0).expect("the fixture is a safetensors file");
        let view = tensors
            .tensor(name)
            .unwrap_or_else(|_| panic!("{name} is in the fixture"));
        (view.shape().to_vec(), view.data().to_vec())
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name).1;
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        bytes.chunks_exact(4).map(value).collect()
    }

    fn integers(&self, name: &str) -> Vec<usize> {
        let bytes = self.bytes(name).1;
        let value = |b: &[u8]| i64::from_le_bytes(std::array::from_fn(|i| b[i])) as usize;
        bytes.chunks_exact(8).map(value).collect()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.integers(name)
            .into_iter()
            .map(|id| id as u32)
            .collect()
    }
}

/// Values of a feature-major tensor, row by row.
fn rows(tensor: &Tensor<Backend, 2>) -> Vec<f32> {
    values(tensor.clone().transpose())
}

fn values<const D: usize>(tensor: Tensor<Backend, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().into_vec().expect("f32")
}

/// Names the worst element, so that a failure says where to look.
fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    let errors = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let worst = errors.enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((at, error)) = worst {
        let (a, b) = (found[at], expected[at]);
        assert!(
            error <= tolerance,
            "{what}: {a} instead of {b} at {at}, off by {error:e}"
        );
    }
}

/// The goldens' inputs; one sample.
fn run(schedule: &Schedule) -> TensorOutputs<Backend> {
    let (shape, _) = GOLDEN.bytes("in.pixel_values");
    let pixels = TensorData::new(GOLDEN.floats("in.pixel_values"), shape);
    let inputs = TensorInputs {
        samples: vec![GOLDEN.ids("in.input_ids")],
        pixel_values: Some(Tensor::from_data(pixels, (VLM.device(), DType::F32))),
    };
    VLM.run_tensors(inputs, schedule, 16, true)
        .expect("the golden inputs are good")
}

#[test]
fn preprocessing_and_prompt_give_the_reference_inputs() {
    let image = input_image();
    let pixels = VLM.preprocessor().preprocess(&image).expect("a good image");
    assert_close(
        "pixel_values",
        &pixels.data,
        &GOLDEN.floats("in.pixel_values"),
        1e-6,
    );
    let tensor: Tensor<Backend, 4> = to_tensor(&[pixels], VLM.device()).expect("one image");
    assert_eq!(tensor.dims()[1..], [3, 112, 112]);

    let question = Question {
        images: vec![image],
        text: "Describe this image in detail.".into(),
    };
    let ids = VLM.encode(&question).expect("a good question");
    assert_eq!(ids, GOLDEN.ids("in.input_ids"));
}

fn input_image() -> RgbImage {
    let file = std::fs::read(fixtures().join("input.png")).expect("the fixture is complete");
    decode(&file, &DecodeLimits::default()).expect("a good PNG")
}

#[test]
fn dense_model_equals_the_reference() {
    let out = run(&Schedule::dense());
    let vision = out.vision_features.as_ref().expect("there is an image");
    let visual = out.image_embeds.as_ref().expect("there is an image");
    assert_close(
        "vision_features",
        &rows(vision),
        &GOLDEN.floats("vision_features"),
        HIDDEN,
    );
    assert_close(
        "image_embeds",
        &rows(visual),
        &GOLDEN.floats("image_embeds"),
        HIDDEN,
    );
    let embeds = &rows(&out.inputs_embeds);
    assert_close(
        "inputs_embeds",
        embeds,
        &GOLDEN.floats("inputs_embeds"),
        HIDDEN,
    );
    for (layer, hidden) in out.hidden_states.iter().enumerate() {
        let name = format!("hidden.{layer}");
        assert_close(&name, &rows(&hidden.values), &GOLDEN.floats(&name), HIDDEN);
    }
    let logits = values(out.logits);
    let expected = GOLDEN.floats("logits");
    assert_close(
        "logits",
        &logits,
        &expected[expected.len() - logits.len()..],
        HIDDEN,
    );
    assert!(out.trace.decisions.is_empty());
    assert_eq!(out.kv_lengths, [GOLDEN.integers("kv_lengths")]);
    assert_eq!(out.generations[0].tokens, GOLDEN.ids("decode.ids"));
    let decoded = out.generations[0].logits.concat();
    assert_close(
        "decode.logits",
        &decoded,
        &GOLDEN.floats("decode.logits"),
        HIDDEN,
    );
}

#[test]
fn text_only_prompt_equals_the_reference() {
    let inputs = TensorInputs {
        samples: vec![GOLDEN.ids("text_only.input_ids")],
        pixel_values: None,
    };
    let out = VLM
        .run_tensors(inputs, &Schedule::dense(), 0, false)
        .expect("a good prompt");
    let (logits, expected) = (values(out.logits), GOLDEN.floats("text_only.logits"));
    assert_close(
        "logits",
        &logits,
        &expected[expected.len() - logits.len()..],
        HIDDEN,
    );
}

#[test]
fn fastv_equals_the_reference() {
    routed_equals_the_reference("reroute_fastv", Action::Remove);
}

#[test]
fn pdrop_equals_the_reference() {
    routed_equals_the_reference("reroute_pdrop", Action::Remove);
}

#[test]
fn reroute_flat_equals_the_reference() {
    routed_equals_the_reference("reroute_reroute_flat", Action::Reroute);
}

#[test]
fn reroute_pyramid_equals_the_reference() {
    routed_equals_the_reference("reroute_reroute_pyramid", Action::Reroute);
}

fn routed_equals_the_reference(name: &str, action: Action) {
    let reference = Reference::open(name);
    let json = std::fs::read_to_string(fixtures().join(name).with_extension("json"));
    let schedule = Schedule::from_json(&json.expect("the fixture is complete")).expect("valid");
    assert_eq!(schedule.action(), action);

    let out = run(&schedule);
    assert_eq!(out.trace.decisions.len(), schedule.stages().len());
    for decision in &out.trace.decisions {
        let at = |what: &str| format!("routing.{}.{what}", decision.layer);
        let scores = reference.floats(&at("scores"));
        assert_close(&at("scores"), &decision.scores, &scores, SCORES);
        // The reference numbers the candidates, which under removal are the survivors.
        let selected = reference.integers(&at("selected"));
        let selected: Vec<usize> = selected.iter().map(|&i| decision.candidates[i]).collect();
        assert_eq!(decision.selected, selected, "{}", at("selected"));
    }
    for (layer, hidden) in out.hidden_states.iter().enumerate() {
        let name = format!("hidden.{layer}");
        assert_close(
            &name,
            &rows(&hidden.values),
            &reference.floats(&name),
            HIDDEN,
        );
    }
    assert_close(
        "logits",
        &values(out.logits),
        &reference.floats("logits"),
        ROUTED_LOGITS,
    );
    assert_eq!(out.kv_lengths, [reference.integers("kv_lengths")]);
    assert_eq!(out.generations[0].tokens, reference.ids("decode.ids"));
    let decoded = out.generations[0].logits.concat();
    assert_close(
        "decode.logits",
        &decoded,
        &reference.floats("decode.logits"),
        ROUTED_LOGITS,
    );
}
