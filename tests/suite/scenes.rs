//! The trained tiny model on its 200 scenes: the answers of the official implementation, under
//! every routing of `tests/fixtures/scenes/reference.json`.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use burn::tensor::Tensor;
use reducers::{Schedule, ScoreMemory};
use reroute::{GenerationOptions, PrefillOptions, generate};
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::embedded;
use reroute_zoo::grounding::{iou, parse_box};
use reroute_zoo::{Folder, OpenOptions, PixelTensors, Question, Sample, VisualTokens, Vlm};
use serde::Deserialize;
use vision_encoder::VisionOutput;
use vision_encoder::{DecodeLimits, decode};

use crate::program::BUILT_IN;

/// Ties in f32 may flip a scene or two of the 200.
const MAY_DIFFER: usize = 2;

/// The reference stopped here: four numbers and the end.
const ANSWER_TOKENS: usize = 5;

#[derive(Deserialize)]
struct SceneFile {
    image: String,
    expression: String,
    r#box: [f64; 4],
}

#[derive(Deserialize)]
struct Expected {
    accuracy: f64,
    routing: Option<Schedule>,
    answers: Vec<Vec<u32>>,
}

/// A scene, ready for the decoder.
struct Scene {
    ids: Vec<u32>,
    /// `[hidden_size, visual tokens]`
    visual: Tensor<Backend, 2>,
    truth: [f64; 4],
}

static VLM: LazyLock<Vlm<Backend>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llava");
    let folder = Folder::open(folder).expect("the fixture");
    Vlm::open(&folder, &OpenOptions::default(), &Device::default()).expect("a good checkpoint")
});

static SCENES: LazyLock<Vec<Scene>> = LazyLock::new(|| {
    let lines = std::fs::read_to_string(fixtures().join("scenes.jsonl")).expect("the fixture");
    lines.lines().map(scene).collect()
});

static EXPECTED: LazyLock<BTreeMap<String, Expected>> = LazyLock::new(|| {
    let json = std::fs::read(fixtures().join("reference.json")).expect("the fixture");
    serde_json::from_slice(&json).expect("the fixture is valid")
});

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/scenes")
}

fn scene(line: &str) -> Scene {
    let file: SceneFile = serde_json::from_str(line).expect("the fixture is valid");
    let bytes = std::fs::read(fixtures().join(&file.image)).expect("the fixture is complete");
    let image = decode(&bytes, &DecodeLimits::default()).expect("a good image");
    let question = Question::about(vec![image], VLM.grounding().question(&file.expression));
    let (_, prepared) = VLM
        .preprocessor()
        .prepare(&question.visuals[0])
        .expect("a good image");
    let pixels = PixelTensors::of(vec![prepared], VLM.device()).expect("one image");
    let seen = VLM.model().see(pixels).expect("the right size");
    Scene {
        ids: VLM.encode(&question).expect("a good question"),
        visual: seen.images.expect("an image").tokens,
        truth: file.r#box,
    }
}

/// Answers scenes in one batch.
fn answers(scenes: &[Scene], schedule: &Schedule, options: &GenerationOptions) -> Vec<Vec<u32>> {
    let ids: Vec<Vec<u32>> = scenes.iter().map(|scene| scene.ids.clone()).collect();
    let visual = scenes.iter().map(|scene| scene.visual.clone()).collect();
    let images = VisionOutput {
        tokens: Tensor::cat(visual, 1),
        deepstack: Vec::new(),
    };
    let tokens = VisualTokens {
        images: Some(images),
        ..Default::default()
    };
    let samples: Vec<Sample> = ids.iter().cloned().map(Sample::from).collect();
    let prompt = VLM.model().prompt(&samples, &tokens);
    let prompt = prompt.expect("as many slots as visual tokens");
    let decoder = VLM.model().decoder();
    let prefill = decoder.prefill(&prompt, schedule, PrefillOptions::default());
    let prefill = prefill.expect("a good prompt");
    let mut cache = prefill.cache;
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let generations = generate(decoder, prefill.logits, &mut cache, &ids, options, go_on);
    let generations = generations.expect("finite logits");
    generations
        .into_iter()
        .map(|generation| generation.expect("finite logits").tokens)
        .collect()
}

fn answers_equal_the_reference(routing: &str) {
    let expected = &EXPECTED[routing];
    let dense = Schedule::dense();
    let schedule = expected.routing.as_ref().unwrap_or(&dense);
    let options = GenerationOptions {
        max_new_tokens: ANSWER_TOKENS,
        ..VLM.generation_defaults()
    };
    assert_eq!(SCENES.len(), expected.answers.len());
    let (mut different, mut hits) = (Vec::new(), 0);
    // Odd-sized batches: every scene of a batch is routed by its own scores.
    for (start, batch) in SCENES
        .chunks(7)
        .enumerate()
        .map(|(at, batch)| (at * 7, batch))
    {
        for (at, answer) in answers(batch, schedule, &options).into_iter().enumerate() {
            if answer != expected.answers[start + at] {
                different.push((start + at, answer.clone(), &expected.answers[start + at]));
            }
            let text = VLM.tokenizer().decode(&answer).expect("known tokens");
            let found = parse_box(&text);
            hits += usize::from(found.is_some_and(|found| iou(&found, &batch[at].truth) >= 0.5));
        }
    }
    assert!(different.len() <= MAY_DIFFER, "{routing}: {different:?}");
    let accuracy = hits as f64 / SCENES.len() as f64;
    let allowed = MAY_DIFFER as f64 / SCENES.len() as f64 + 1e-9;
    assert!(
        (accuracy - expected.accuracy).abs() <= allowed,
        "{routing}: accuracy {accuracy}"
    );
}

macro_rules! routings {
    ($($test:ident: $routing:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            answers_equal_the_reference($routing);
        })*

        #[test]
        fn every_routing_of_the_reference_is_tested() {
            let tested = [$($routing),*];
            assert!(EXPECTED.keys().all(|routing| tested.contains(&routing.as_str())));
        }
    };
}

routings! {
    dense: "dense",
    fastv_050: "fastv@0.50",
    reroute_fastv_050: "reroute-fastv@0.50",
    pdrop_050: "pdrop@0.50",
    reroute_pdrop_050: "reroute-pdrop@0.50",
    fastv_033: "fastv@0.33",
    reroute_fastv_033: "reroute-fastv@0.33",
    pdrop_033: "pdrop@0.33",
    reroute_pdrop_033: "reroute-pdrop@0.33",
    fastv_022: "fastv@0.22",
    reroute_fastv_022: "reroute-fastv@0.22",
    pdrop_022: "pdrop@0.22",
    reroute_pdrop_022: "reroute-pdrop@0.22",
}

#[test]
fn the_built_in_scene_is_found() {
    let image = decode(embedded::SCENE.image, &DecodeLimits::default()).expect("it is built in");
    let options = BUILT_IN.generation_defaults();
    let schedule = Schedule::dense();
    let found = BUILT_IN.ground(&image, embedded::SCENE.expression, &schedule, &options);
    let found = found.expect("it answers with a box");
    let scenes =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/zoo/assets/scenes/scenes.json");
    let scenes = std::fs::read(scenes).expect("the assets are complete");
    let scenes: Vec<SceneFile> = serde_json::from_slice(&scenes).expect("valid");
    let truth = scenes
        .iter()
        .find(|scene| scene.expression == embedded::SCENE.expression);
    let truth = truth
        .expect("the built-in scene is one of the assets")
        .r#box;
    let found = found.first_box().expect("it is a box").normalized;
    let found = found.as_box().expect("it is a box");
    assert!(iou(&found, &truth) >= 0.5, "{found:?} instead of {truth:?}");
}

/// Shares of scenes in which the object is found, in percent, without a memory of scores and with.
fn found_with(routing: &str, memory: ScoreMemory) -> f64 {
    let schedule = EXPECTED[routing].routing.clone().expect("a routing");
    let schedule = schedule.with_memory(memory).expect("a good memory");
    let options = GenerationOptions {
        max_new_tokens: ANSWER_TOKENS,
        ..VLM.generation_defaults()
    };
    let mut hits = 0;
    for batch in SCENES.chunks(7) {
        let answers = answers(batch, &schedule, &options);
        hits += { answers.into_iter().zip(batch) }
            .filter(|(answer, scene)| {
                let text = VLM.tokenizer().decode(answer).expect("known tokens");
                parse_box(&text).is_some_and(|found| iou(&found, &scene.truth) >= 0.5)
            })
            .count();
    }
    100.0 * hits as f64 / SCENES.len() as f64
}

/// A decision that ranks by its own scores alone swaps out what the last row has read already.
#[test]
fn memory_keeps_what_was_read() {
    for routing in ["reroute-fastv@0.33", "reroute-pdrop@0.33"] {
        let [without, with] =
            [ScoreMemory::Off, ScoreMemory::Sum].map(|memory| found_with(routing, memory));
        assert!(
            with >= without + 8.0,
            "{routing}: {without} %, with memory {with} %"
        );
    }
}
