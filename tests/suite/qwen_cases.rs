//! Prompts of the Qwen family beyond one image and one question, against what transformers makes of
//! them (`tests/fixtures/make_qwen_cases.py`): from pictures and messages to tokens.

use std::collections::HashMap;
use std::sync::LazyLock;

use reducers::Schedule;
use reroute_cli::backend::Backend;
use reroute_zoo::messages::{Content, Message, Role};
use reroute_zoo::{Pictures, PixelTensors, TensorInputs, TensorOutputs, Video, View, Visual, Vlm};
use serde_json::Value;

use crate::golden::{
    Reference, assert_close, assert_positions, assert_routed, fixture, open, picture, rows, values,
};

const FAMILIES: [&str; 3] = ["qwen2vl", "qwen25vl", "qwen3vl"];
const STEPS: usize = 8;

/// What f32 leaves open in hidden states and logits; the reference is computed in f64.
const EXACT: f32 = 2e-4;

static MODELS: LazyLock<HashMap<&str, Vlm<Backend>>> =
    LazyLock::new(|| FAMILIES.map(|family| (family, open(family))).into());

/// One case of one family.
struct Case {
    name: String,
    vlm: &'static Vlm<Backend>,
    reference: Reference,
    json: Value,
}

impl Case {
    fn open(family: &str, case: &str) -> Self {
        let name = format!("qwen_cases/{family}/{case}");
        let json = std::fs::read(fixture(&name).with_extension("json"));
        Self {
            vlm: &MODELS[family],
            reference: Reference::open(&name),
            json: serde_json::from_slice(&json.expect("the fixture is complete")).expect("JSON"),
            name,
        }
    }

    fn run(&self, inputs: TensorInputs<Backend>, schedule: &Schedule) -> TensorOutputs<Backend> {
        let out = self.vlm.run_tensors(inputs, schedule, STEPS, true);
        out.unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// What the model makes of the case's tensors.
    fn assert_dense(&self, inputs: TensorInputs<Backend>) {
        let out = self.run(inputs, &Schedule::dense());
        let close = |name: &str, found: &[f32]| {
            let what = format!("{} {name}", self.name);
            assert_close(&what, found, &self.reference.floats(name), EXACT);
        };
        assert_positions(&self.name, &out, &self.reference);
        for (name, seen) in [
            ("image_embeds", &out.tokens.images),
            ("video_embeds", &out.tokens.videos),
        ] {
            // Left out where only the time between frames differs from another case.
            if let Some(seen) = seen.as_ref().filter(|_| self.reference.has(name)) {
                close(name, &rows(&seen.tokens));
            }
        }
        close("logits", &values(out.logits));
        let tokens: Vec<u32> = out
            .generations
            .iter()
            .flat_map(|g| g.tokens.clone())
            .collect();
        assert_eq!(tokens, self.reference.ids("decode.ids"), "{}", self.name);
        let decoded: Vec<f32> = out
            .generations
            .iter()
            .flat_map(|g| g.logits.concat())
            .collect();
        close("decode.logits", &decoded);
    }

    /// Pictures and messages through tokenizer, template and preprocessing.
    fn prepare(&self) -> TensorInputs<Backend> {
        let (mut samples, mut pixels, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
        for conversation in self.json["conversations"].as_array().expect("a list") {
            let messages = conversation.as_array().expect("a list").iter();
            let mut views = Vec::new();
            let messages: Vec<Message> = messages
                .map(|message| self.message(message, &mut views, &mut pixels))
                .collect();
            let times = views.iter().filter_map(|view| view.time.as_ref());
            seconds.extend(times.map(|time| time.seconds_per_step as f32));
            samples.push(
                self.vlm
                    .encode_messages(&messages, &views)
                    .expect("a good prompt"),
            );
        }
        TensorInputs {
            samples,
            pixels: PixelTensors::of(pixels, self.vlm.device()).expect("good pixels"),
            second_per_grid_ts: seconds,
        }
    }

    fn message(
        &self,
        message: &Value,
        views: &mut Vec<View>,
        pixels: &mut Vec<reroute_zoo::Prepared>,
    ) -> Message {
        let mut content = Vec::new();
        let mut see = |visual: Visual| {
            let (view, prepared) = self
                .vlm
                .preprocessor()
                .prepare(&visual)
                .expect("a good visual");
            let part = match &view.time {
                None => Content::Image,
                Some(time) => Content::Video {
                    seconds: time.seconds.clone(),
                },
            };
            views.push(view);
            pixels.push(prepared);
            part
        };
        let read = |name: &Value| {
            picture(&format!(
                "qwen_cases/pictures/{}",
                name.as_str().expect("a name")
            ))
        };
        for part in message["content"].as_array().into_iter().flatten() {
            content.push(match part["type"].as_str() {
                Some("image") => see(Visual::Image(read(&part["image"]))),
                Some("video") => {
                    let frames = part["video"].as_array().expect("a list").iter();
                    see(Visual::Video(Video {
                        frames: frames.map(read).collect(),
                        fps: part["fps"].as_f64().expect("a number"),
                    }))
                }
                _ => Content::Text(part["text"].as_str().expect("a text").into()),
            });
        }
        if let Some(text) = message["content"].as_str() {
            content.push(Content::Text(text.into()));
        }
        let role = match message["role"].as_str() {
            Some("system") => Role::System,
            Some("user") => Role::User,
            _ => Role::Assistant,
        };
        Message { role, content }
    }
}

/// The same inputs, but for rounding, as the library's own.
fn assert_same_inputs(name: &str, found: &TensorInputs<Backend>, expected: &TensorInputs<Backend>) {
    assert_eq!(found.samples, expected.samples, "{name}: ids");
    if !expected.second_per_grid_ts.is_empty() {
        assert_eq!(
            found.second_per_grid_ts, expected.second_per_grid_ts,
            "{name}"
        );
    }
    let parts = |inputs: &TensorInputs<Backend>| {
        let PixelTensors { images, videos } = inputs.pixels.clone();
        [images, videos].map(|pictures| {
            pictures.map(|pictures| match pictures {
                Pictures::Patches(patches, grids) => (patches, grids),
                Pictures::Fixed(_) => panic!("{name}: images of one size"),
            })
        })
    };
    for (found, expected) in parts(found).into_iter().zip(parts(expected)) {
        match (found, expected) {
            (Some((found, grids)), Some((expected, expected_grids))) => {
                assert_eq!(grids, expected_grids, "{name}");
                assert_close(name, &rows(&found), &rows(&expected), 1e-6);
            }
            (found, expected) => assert_eq!(found.is_some(), expected.is_some(), "{name}"),
        }
    }
}

fn case_equals_the_library(case: &str, families: &[&str]) {
    for family in families {
        let case = Case::open(family, case);
        let expected = case.reference.inputs();
        let prepared = case.prepare();
        assert_same_inputs(&case.name, &prepared, &expected);
        case.assert_dense(expected);
        case.assert_dense(prepared);
    }
}

#[test]
fn two_images_of_different_size() {
    case_equals_the_library("two_images", &FAMILIES);
}

#[test]
fn an_image_then_a_video() {
    case_equals_the_library("image_video", &FAMILIES);
}

#[test]
fn text_only() {
    for family in FAMILIES {
        let case = Case::open(family, "text_only");
        let expected = case.reference.inputs();
        assert_same_inputs(&case.name, &case.prepare(), &expected);
        let out = case.run(expected, &Schedule::dense());
        let logits = values(out.logits);
        assert_close(&case.name, &logits, &case.reference.floats("logits"), EXACT);
        assert_eq!(out.generations[0].tokens, case.reference.ids("decode.ids"));
    }
}

#[test]
fn an_image_between_two_text_turns() {
    case_equals_the_library("turns", &FAMILIES);
}

#[test]
fn a_batch_of_different_images_and_texts() {
    case_equals_the_library("batch", &FAMILIES);
}

#[test]
fn windows_that_the_grid_does_not_fill() {
    case_equals_the_library("windows", &["qwen25vl"]);
}

/// The seconds between frames stretch the temporal axis, rounded down.
#[test]
fn seconds_between_frames() {
    for pace in ["image_video_half", "image_video_fraction"] {
        let paced = Case::open("qwen25vl", pace);
        let inputs = Case::open("qwen25vl", "image_video").reference.inputs();
        let seconds = paced.reference.floats("in.second_per_grid_ts");
        assert_ne!(seconds, inputs.second_per_grid_ts);
        let inputs = TensorInputs {
            second_per_grid_ts: seconds,
            ..inputs
        };
        let out = paced.run(inputs, &Schedule::dense());
        let found: Vec<i64> = out.prompt.positions.to_data().iter::<i64>().collect();
        assert_eq!(
            found,
            paced.reference.integers("rope.position_ids"),
            "{pace}"
        );
        let logits = values(out.logits);
        assert_close(pace, &logits, &paced.reference.floats("logits"), EXACT);
        assert_eq!(out.generations[0].tokens, paced.reference.ids("decode.ids"));
    }
}

/// One pool over all images and videos; in Qwen3-VL the stages lie among the layers that receive
/// DeepStack features.
#[test]
fn routed_prompts_of_several_visuals() {
    for family in FAMILIES {
        for inputs in ["two_images", "image_video"] {
            for action in ["reroute", "remove"] {
                let case = Case::open(family, &format!("{inputs}_{action}"));
                let routing = case.json["routing"].to_string();
                let schedule = Schedule::from_json(&routing).expect("a schedule");
                let inputs = Case::open(family, inputs).reference.inputs();
                let out = case.run(inputs, &schedule);
                assert_eq!(out.trace.decisions.len(), 3);
                assert_routed(&case.name, &out, &case.reference);
                let lengths = serde_json::to_value(&out.kv_lengths[0]).expect("numbers");
                assert_eq!(lengths, case.json["kv_lengths"], "{}", case.name);
            }
        }
    }
}
