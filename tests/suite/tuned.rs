//! Twenty steps of training, step by step those of PyTorch and PEFT: `tests/fixtures/make_tuned.py`.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::DType;
use burn_autodiff::Autodiff;
use reroute_cli::backend::Backend;
use reroute_finetune::{OptimizerSettings, Pass, Trainer};
use reroute_zoo::{Folder, Lesson, Plan, Question, SaveOptions, Schedule, Trained, Vlm};
use safetensors::SafeTensors;
use serde::Deserialize;

use crate::golden::{fixture, open_as, picture};
use crate::support::alone;

type Ad = Autodiff<Backend>;

#[derive(Deserialize)]
struct Reference {
    examples: Vec<Example>,
    settings: Settings,
    steps: Vec<Step>,
    float64: Float64,
    #[serde(default)]
    norms: BTreeMap<String, [f64; 3]>,
}

#[derive(Deserialize)]
struct Example {
    image: String,
    question: String,
    prompt_ids: Vec<u32>,
    answer: Vec<u32>,
}

#[derive(Deserialize)]
struct Settings {
    warmup: usize,
    lr: f64,
    betas: [f32; 2],
    eps: f32,
    weight_decay: f32,
    accumulation: usize,
    clip: f64,
}

#[derive(Deserialize)]
struct Step {
    loss: f64,
    norm: f64,
    lr: f64,
}

/// How far f32 is from f64 in the reference itself.
#[derive(Deserialize)]
struct Float64 {
    loss: Vec<f64>,
    norm: Vec<f64>,
    tensors: f64,
    noise: BTreeMap<String, f64>,
}

/// Times that distance, to which another order of sums may lead.
const TIMES: f64 = 6.0;

fn reference(path: &str) -> Reference {
    let text = std::fs::read(fixture(&format!("{path}/steps.json"))).expect("the fixture");
    serde_json::from_slice(&text).expect("the fixture is complete")
}

/// How the examples of a step come.
#[derive(Clone, Copy)]
enum Packing {
    /// Each in a pass of its own, as in the reference.
    Alone,
    /// Side by side in one.
    Together,
    /// The same, and what layers have computed is computed again for the gradients.
    Recomputed,
}

/// Takes all steps, each compared with the reference.
fn train(mut vlm: Vlm<Ad>, reference: &Reference, packing: Packing, what: &str) -> Vlm<Ad> {
    let tutor = vlm.tutor();
    let lesson = |example: &Example| {
        let question = Question::about(vec![picture(&example.image)], &example.question);
        let ids = vlm.encode(&question).expect("a good question");
        assert_eq!(ids, example.prompt_ids, "{what}");
        tutor
            .question(&question, &example.answer)
            .expect("a good question")
    };
    let lessons: Vec<Lesson> = reference.examples.iter().map(lesson).collect();
    let settings = &reference.settings;
    let optimizer = OptimizerSettings {
        learning_rate: settings.lr,
        warmup: settings.warmup,
        betas: settings.betas,
        epsilon: settings.eps,
        weight_decay: settings.weight_decay,
        clip: settings.clip,
        ..OptimizerSettings::default()
    };
    let trainer = Trainer::new(&optimizer, reference.steps.len());
    let mut trainer = trainer.recomputing(matches!(packing, Packing::Recomputed));
    let plan = Plan::from(Schedule::dense());
    for (index, expected) in reference.steps.iter().enumerate() {
        let of_step = { 0..settings.accumulation }
            .map(|at| &lessons[(index * settings.accumulation + at) % lessons.len()]);
        let of_step: Vec<&Lesson> = of_step.collect();
        let size = match packing {
            Packing::Alone => 1,
            Packing::Together | Packing::Recomputed => of_step.len(),
        };
        let passes = of_step.chunks(size).map(|lessons| Pass {
            lessons: lessons.to_vec(),
            visuals: None,
        });
        let passes: Vec<Pass<Ad>> = passes.collect();
        let (next, found) = trainer.step(vlm, &passes, &plan).expect("a step");
        vlm = next;
        let off = |found: f64, expected: f64| (found - expected).abs() / expected;
        let (loss, norm) = (
            off(found.loss, expected.loss),
            off(found.norm, expected.norm),
        );
        // What has come apart does not come together again.
        let apart = |by: &[f64]| TIMES * by[..=index].iter().copied().fold(0.0, f64::max);
        let noise = &reference.float64;
        let most = f64::max(1e-4, apart(&noise.loss));
        assert!(
            loss <= most,
            "{what} step {index}: loss off by {loss:e} of {most:e}"
        );
        let most = f64::max(1e-3, apart(&noise.norm));
        assert!(
            norm <= most,
            "{what} step {index}: norm off by {norm:e} of {most:e}"
        );
        assert!(
            (found.rate - expected.lr).abs() <= 1e-9 * settings.lr,
            "{what} {index}"
        );
    }
    vlm
}

fn tensors(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensor = |name: &str| {
        let tensor = file.tensor(name).expect("it is listed");
        let data = tensor.data();
        let numbers: Vec<f64> = match tensor.dtype() {
            safetensors::Dtype::F16 => {
                let halves = data.as_chunks().0.iter();
                halves
                    .map(|&half| half::f16::from_le_bytes(half).into())
                    .collect()
            }
            _ => {
                let singles = data.as_chunks().0.iter();
                singles
                    .map(|&single| f32::from_le_bytes(single).into())
                    .collect()
            }
        };
        (name.to_owned(), numbers)
    };
    file.names().into_iter().map(tensor).collect()
}

fn length(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.map(|x| x * x).sum::<f64>().sqrt()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    length(a.iter().zip(b).map(|(a, b)| a - b))
}

/// How far what was learnt is from what the reference learnt, as a share of it.
fn assert_learnt(name: &str, found: &[f64], expected: &[f64], start: &[f64], most: f64) {
    let off = distance(found, expected) / distance(expected, start);
    assert!(
        off <= most,
        "{name} is off by {off:e} of its change, {most:e} allowed"
    );
}

fn low_rank(family: &str, packing: Packing) {
    let path = format!("tuned/{family}/low_rank");
    let reference = reference(&path);
    let vlm: Vlm<Ad> = open_as(family, DType::F32);
    let start = Folder::open(fixture(&format!("{path}/start"))).expect("an adapter");
    let model = vlm.model().load_adapter(&start).expect("fits");
    let model = model.train(&[Trained::Adapter]).expect("its factors");
    let vlm = train(vlm.map_model(|_| model), &reference, packing, &path);
    let folder = tempfile::tempdir().expect("a folder");
    let to = folder.path().join("adapter");
    vlm.model().save_adapter(&to).expect("an adapter");
    let found = tensors(&to.join("adapter_model.safetensors"));
    let file = |name: &str| tensors(&fixture(&format!("{path}/{name}.safetensors")));
    let (expected, start) = (file("tuned"), file("start/adapter_model"));
    assert!(found.keys().eq(expected.keys()), "{path}");
    let most = f64::max(1e-3, TIMES * reference.float64.tensors);
    for (name, expected) in &expected {
        assert_learnt(name, &found[name], expected, &start[name], most);
    }
}

fn full(family: &str, packing: Packing) {
    let path = format!("tuned/{family}/full");
    let reference = reference(&path);
    let vlm: Vlm<Ad> = open_as(family, DType::F32);
    let like = Folder::open(fixture(&format!("{family}/ckpt"))).expect("a checkpoint");
    let model = vlm
        .model()
        .clone()
        .train(&[Trained::All])
        .expect("everything");
    let vlm = train(vlm.map_model(|_| model), &reference, packing, &path);
    let folder = tempfile::tempdir().expect("a folder");
    let to = folder.path().join("model");
    let options = SaveOptions {
        dtype: Some(DType::F32),
        ..SaveOptions::default()
    };
    vlm.model().save(&to, &like, &options).expect("a model");
    let found = tensors(&to.join("model.safetensors"));
    let start = tensors(&fixture(&format!("{family}/ckpt/model.safetensors")));
    let most = f64::max(2e-3, TIMES * reference.float64.tensors);
    for (name, expected) in tensors(&fixture(&format!("{path}/tuned.safetensors"))) {
        assert_learnt(&name, &found[&name], &expected, &start[&name], most);
    }
    let mut compared = 0;
    for (name, [_, size, change]) in &reference.norms {
        let Some(found) = found.get(name) else {
            panic!("{name} is not written");
        };
        // What has no gradient but that of rounding is noise.
        if reference.float64.noise.contains_key(name) {
            continue;
        }
        let found_change = distance(found, &start[name]);
        let found_size = length(found.iter().copied());
        assert!(
            (found_size - size).abs() <= 1e-5 * size + most * change,
            "{name}"
        );
        let off = (found_change - change).abs() / change;
        assert!(off <= most, "{name}: its change is off by {off:e}");
        compared += 1;
    }
    assert!(compared > 40, "{compared} tensors");
    // What takes no part is as it was.
    for (name, start) in start
        .iter()
        .filter(|(name, _)| !reference.norms.contains_key(*name))
    {
        if let Some(found) = found.get(name) {
            assert_eq!(found, start, "{name}");
        }
    }
}

#[test]
fn adapters_learn_as_in_peft() {
    let _alone = alone();
    for family in ["llava", "qwen2vl", "qwen25vl", "qwen3vl"] {
        low_rank(family, Packing::Alone);
    }
}

#[test]
fn whole_models_learn_as_in_pytorch() {
    let _alone = alone();
    for family in ["llava", "qwen2vl", "qwen25vl", "qwen3vl"] {
        full(family, Packing::Alone);
    }
}

/// Examples that are rows of one pass are learnt like those that have passes of their own.
#[test]
fn packed_examples_learn_as_in_pytorch() {
    let _alone = alone();
    for family in ["llava", "qwen2vl", "qwen25vl", "qwen3vl"] {
        low_rank(family, Packing::Together);
    }
    // Whole models of the others come apart in a few steps, whatever is changed.
    full("llava", Packing::Together);
}

/// So are they where layers keep nothing but their inputs.
#[test]
fn recomputed_layers_learn_as_in_pytorch() {
    let _alone = alone();
    for family in ["llava", "qwen2vl", "qwen25vl", "qwen3vl"] {
        low_rank(family, Packing::Recomputed);
    }
    full("llava", Packing::Recomputed);
}
