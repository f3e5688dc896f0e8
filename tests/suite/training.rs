//! From pixels to weights and back: gradients of every part through a routed prefill, and steps that
//! learn from them. Compiles on every backend.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamConfig, GradientsAccumulator, GradientsParams, Optimizer};
use burn::tensor::activation::log_softmax;
use burn::tensor::backend::{AutodiffBackend, Backend as AnyBackend};
use burn::tensor::{DType, Int, Tensor};
use burn_autodiff::Autodiff;
use reducers::{Action, Schedule, Stage};
use reroute::{GenerationOptions, Prefill, Prompt};
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::{Lesson, PixelTensors, Question, Sample, Trained, Visual, Vlm};

use crate::golden::{open_as, picture};
use crate::support::{alone, values};

pub type Ad = Autodiff<Backend>;

/// Qwen3-VL for its DeepStack features, which take a way of their own into the decoder.
pub const FAMILIES: [&str; 2] = ["llava", "qwen3vl"];

/// Tokens that the models do not say by themselves.
const ANSWER: [u32; 3] = [17, 5, 90];

pub fn question() -> Question {
    let image = picture("llava/input.png");
    Question::about(vec![image], "Describe this image in detail.")
}

/// Three decisions: tokens are deferred, come back, and are deferred again.
pub fn schedule(action: Action, layers: [usize; 3]) -> Schedule {
    let stages = layers.into_iter().zip([0.5, 0.4, 0.3]);
    let stages = stages.map(|(layer, ratio)| Stage::ratio(layer, ratio));
    Schedule::new(action, false, stages.collect()).expect("a good schedule")
}

/// Cross-entropy of the answer.
pub fn loss<B: AnyBackend<Device = Device>>(vlm: &Vlm<B>, schedule: &Schedule) -> Tensor<B, 1> {
    let known = &ANSWER[..ANSWER.len() - 1];
    let logits = vlm.logits(&question(), known, schedule);
    let logits = log_softmax(logits.expect("a good question"), 1);
    let expected = Tensor::<B, 1, Int>::from_data(ANSWER.map(i64::from), vlm.device());
    -logits.gather(1, expected.unsqueeze_dim(1)).mean()
}

/// Gradients of all parameters by path; `None` for those that take no part.
pub fn gradients(
    vlm: &Vlm<Ad>,
    gradients: &<Ad as AutodiffBackend>::Gradients,
) -> BTreeMap<String, Option<Vec<f32>>> {
    struct Collect<'a> {
        gradients: &'a <Ad as AutodiffBackend>::Gradients,
        path: Vec<String>,
        found: BTreeMap<String, Option<Vec<f32>>>,
    }
    impl ModuleVisitor<Ad> for Collect<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Ad, D>>) {
            let gradient = param.val().grad(self.gradients).map(values);
            self.found.insert(self.path.join("."), gradient);
        }
    }
    let mut collect = Collect {
        gradients,
        path: Vec::new(),
        found: BTreeMap::new(),
    };
    vlm.model().visit(&mut collect);
    collect.found
}

/// Adds numbers to the parameter of this path.
struct Nudge<'a> {
    parameter: &'a str,
    by: Vec<f32>,
    path: Vec<String>,
}

impl<B: AnyBackend> ModuleMapper<B> for Nudge<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if self.path.join(".") != self.parameter {
            return param;
        }
        param.map(|value| {
            let device = (&value.device(), DType::F32);
            let by = Tensor::<B, 1>::from_data(&self.by[..], device);
            value.clone() + by.reshape(value.shape())
        })
    }
}

/// By how much a step along a gradient changes the loss.
const CHANGE: f32 = 0.03;

pub fn length(vector: &[f32]) -> f32 {
    vector.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// By how much the change of the loss differs from what the gradient of a parameter says of a step along
/// it, as a share; also the model as it was.
pub fn off_by(
    mut vlm: Vlm<Backend>,
    schedule: &Schedule,
    parameter: &str,
    gradient: &[f32],
) -> (Vlm<Backend>, f32) {
    let step = |steps: f32| {
        let scale = steps * CHANGE / length(gradient).powi(2);
        Nudge {
            parameter,
            by: gradient.iter().map(|g| scale * g).collect(),
            path: Vec::new(),
        }
    };
    vlm = vlm.map_model(|model| model.map(&mut step(0.5)));
    let up = loss(&vlm, schedule).into_scalar();
    vlm = vlm.map_model(|model| model.map(&mut step(-1.0)));
    let down = loss(&vlm, schedule).into_scalar();
    vlm = vlm.map_model(|model| model.map(&mut step(0.5)));
    (vlm, (up - down - CHANGE).abs() / CHANGE)
}

/// A step along the gradient of a weight changes the loss as the gradient says. Every weight takes
/// part: the tower's, through tokens that were deferred and came back, too.
#[test]
fn gradients_of_the_whole_path_equal_finite_differences() {
    let _alone = alone();
    let parameters = [
        [
            "vision_tower.embeddings.patch_embedding.weight",
            "vision_tower.encoder.layers.1.self_attn.q_proj.weight",
            "multi_modal_projector.linear_1.weight",
            "language_model.embed_tokens.weight.0",
            "language_model.layers.0.self_attn.k_proj.weight",
            "language_model.layers.6.mlp.down_proj.weight",
        ],
        [
            "visual.patch_embed.weight",
            "visual.blocks.3.attn.qkv.weight",
            "visual.merger.fc2.weight",
            "visual.deepstack_merger_list.1.fc1.weight",
            "language_model.layers.0.self_attn.k_proj.weight",
            "language_model.layers.6.mlp.down_proj.weight",
        ],
    ];
    for (family, parameters) in FAMILIES.into_iter().zip(parameters) {
        let schedule = schedule(Action::Reroute, [1, 3, 6]);
        let vlm = open_as::<Ad>(family, DType::F32);
        let gradients = gradients(&vlm, &loss(&vlm, &schedule).backward());
        assert_reached(&gradients, |_| true);
        assert_numeric(vlm, &schedule, &gradients, &parameters, 2e-3);
    }
}

/// Gradients reach those parameters that are trained and take part, and no others.
pub fn assert_reached(
    gradients: &BTreeMap<String, Option<Vec<f32>>>,
    is_trained: impl Fn(&str) -> bool,
) {
    for (path, gradient) in gradients {
        // LLaVA's visual tokens are the features before the tower's last layer.
        let takes_part = !path.contains("vision_tower.encoder.layers.3.");
        let reached = gradient.as_ref().is_some_and(|g| length(g) > 0.0);
        assert_eq!(reached, takes_part && is_trained(path), "{path}");
    }
}

/// The gradients of parameters, by the ends of their paths, are those of finite differences.
pub fn assert_numeric(
    vlm: Vlm<Ad>,
    schedule: &Schedule,
    gradients: &BTreeMap<String, Option<Vec<f32>>>,
    parameters: &[&str],
    tolerance: f32,
) {
    let mut vlm = vlm.map_model(|model| model.valid());
    for parameter in parameters {
        let name = gradients.keys().find(|path| path.ends_with(parameter));
        let name = name.expect("there is such a parameter");
        let gradient = gradients[name].as_ref().expect("it is reached");
        let (next, error) = off_by(vlm, schedule, name, gradient);
        vlm = next;
        assert!(error < tolerance, "{name}: off by {error}");
    }
}

/// The prompt of the question, about a picture that the tower has seen.
fn prompt(vlm: &Vlm<Ad>) -> Prompt<Ad> {
    let model = vlm.model();
    let image = Visual::Image(picture("llava/input.png"));
    let (view, prepared) = vlm.preprocessor().prepare(&image).expect("a good picture");
    let pixels = PixelTensors::of(vec![prepared], vlm.device()).expect("one picture");
    let tokens = model.see(pixels).expect("pixels of the family");
    let sample = Sample {
        ids: vlm.encode(&question()).expect("a good question"),
        image_grids: vec![view.grid],
        ..Default::default()
    };
    let prompt = model.prompt(&[sample], &tokens);
    prompt.expect("the picture fills the slots")
}

fn prefill(vlm: &Vlm<Ad>, prompt: &Prompt<Ad>, schedule: &Schedule) -> Prefill<Ad> {
    let decoder = vlm.model().decoder();
    let prefill = decoder.prefill(prompt, schedule, Default::default());
    prefill.expect("a good prompt")
}

/// The prompt with the same numbers, but only these visual tokens still known to come from the tower.
fn through(prompt: &Prompt<Ad>, tokens: &[usize]) -> Prompt<Ad> {
    let sample = &prompt.samples[0];
    let only = |all: &Tensor<Ad, 2>, columns: &[usize]| {
        let mut mask = vec![0.0f32; all.dims()[1]];
        columns.iter().for_each(|&column| mask[column] = 1.0);
        let mask = Tensor::<Ad, 1>::from_data(&mask[..], &all.device()).unsqueeze_dim(0);
        let constant = all.clone().detach();
        constant.clone() + (all.clone() - constant) * mask
    };
    let rows: Vec<usize> = tokens.iter().map(|&token| sample.visual[token]).collect();
    let deepstack = prompt.deepstack.iter().map(|all| only(all, tokens));
    Prompt {
        embeddings: only(&prompt.embeddings, &rows),
        deepstack: deepstack.collect(),
        ..prompt.clone()
    }
}

/// Whether a weight of the vision tower gets a gradient if only these visual tokens come from it.
fn reaches_the_tower(vlm: &Vlm<Ad>, schedule: &Schedule, tokens: &[usize]) -> bool {
    assert!(!tokens.is_empty(), "nothing is tested");
    let logits = prefill(vlm, &through(&prompt(vlm), tokens), schedule).logits;
    let loss = log_softmax(logits, 1).narrow(1, 0, 1).sum();
    let gradients = gradients(vlm, &loss.backward());
    let mut tower = gradients.iter().filter(|(path, _)| path.contains(".vis"));
    tower.any(|(_, gradient)| gradient.as_ref().is_some_and(|g| length(g) > 0.0))
}

/// With a first decision at layer 0, a token that waits is seen by nothing: the tower learns through
/// those that came back, and not at all through those that never did or that were removed.
#[test]
fn the_tower_learns_through_what_was_selected_and_nothing_else() {
    let _alone = alone();
    for family in FAMILIES {
        let vlm = open_as::<Ad>(family, DType::F32);
        for action in [Action::Reroute, Action::Remove] {
            let what = format!("{family}, {action:?}");
            let schedule = schedule(action, [0, 2, 5]);
            let prompt = prompt(&vlm);
            let trace = prefill(&vlm, &prompt, &schedule).trace;
            let selected = trace.decisions.iter().flat_map(|d| d.selected.iter());
            let chosen: BTreeSet<usize> = selected.copied().collect();
            let all = 0..prompt.samples[0].visual.len();
            let never: Vec<usize> = all.filter(|token| !chosen.contains(token)).collect();
            assert!(!reaches_the_tower(&vlm, &schedule, &never), "{what}");

            let first = &trace.decisions[0].selected;
            assert!(reaches_the_tower(&vlm, &schedule, first), "{what}");
            if action == Action::Reroute {
                let waited = |token: &usize| !first.contains(token);
                let returned: Vec<usize> = chosen.into_iter().filter(waited).collect();
                assert!(reaches_the_tower(&vlm, &schedule, &returned), "{what}");
            }
        }
    }
}

/// Training through a routed prefill until the model gives the answer, on the plain backend.
#[test]
fn a_model_learns_an_answer_under_routing() {
    let _alone = alone();
    for family in FAMILIES {
        let schedule = schedule(Action::Reroute, [1, 3, 6]);
        let mut vlm = open_as::<Ad>(family, DType::F32);
        let mut optimizer = AdamConfig::new().init();
        for _ in 0..10 {
            let loss = loss(&vlm, &schedule);
            let gradients = GradientsParams::from_grads(loss.backward(), vlm.model());
            vlm = vlm.map_model(|model| optimizer.step(1e-3, model, gradients));
        }
        let vlm = vlm.map_model(|model| model.valid());
        let options = GenerationOptions {
            max_new_tokens: ANSWER.len(),
            ..Default::default()
        };
        let answer = vlm.ask(&question(), &schedule, &options, |_| {});
        assert_eq!(answer.expect("a good question").tokens, ANSWER, "{family}");
    }
}

/// Layers that keep nothing but their inputs give every weight the gradient that it has otherwise: of the tower, by way of the
/// visual tokens and of DeepStack features, and of a tied head.
#[test]
fn recomputed_gradients_are_the_same() {
    let _alone = alone();
    for family in FAMILIES {
        let vlm: Vlm<Ad> = open_as(family, DType::F32);
        let whole = vlm.model().clone().train(&[Trained::All]).expect("all");
        let vlm = vlm.with_model(whole);
        let tutor = vlm.tutor();
        let lessons = [&ANSWER[..], &ANSWER[1..]]
            .map(|answer| tutor.question(&question(), answer).expect("a lesson"));
        let lessons: Vec<&Lesson> = lessons.iter().collect();
        let share = 1.0 / 5.0;
        let mut sum = GradientsAccumulator::new();
        let take = |gradients| sum.accumulate(vlm.model(), gradients);
        let loss = vlm.learn_recomputing(&lessons, None, (share, 7), take);
        let loss = loss.expect("a loss").into_scalar();
        let said = vlm
            .answer_logits(&lessons, None, Schedule::dense())
            .expect("said");
        let expected = said.losses().sum().mul_scalar(share);
        let of_loss = expected.clone().inner().into_scalar();
        assert!(
            (loss - of_loss).abs() < 1e-6 * of_loss,
            "{family}: {loss}, {of_loss}"
        );
        let expected = GradientsParams::from_grads(expected.backward(), vlm.model());
        compare(family, &vlm, &sum.grads(), &expected, 2e-5);
    }
}

/// Whether every parameter has the same gradient in both, to a share of its length.
fn compare(
    family: &str,
    vlm: &Vlm<Ad>,
    found: &GradientsParams,
    expected: &GradientsParams,
    most: f32,
) {
    struct Compare<'a> {
        both: [&'a GradientsParams; 2],
        most: f32,
        path: Vec<String>,
        compared: usize,
    }
    impl ModuleVisitor<Ad> for Compare<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Ad, D>>) {
            let of =
                |gradients: &GradientsParams| gradients.get::<Backend, D>(param.id).map(values);
            match self.both.map(of) {
                [Some(found), Some(expected)] => {
                    let off: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
                    let (off, size) = (length(&off), length(&expected));
                    assert!(
                        off <= self.most * size,
                        "{}: {off} of {size}",
                        self.path.join(".")
                    );
                    self.compared += 1;
                }
                [found, expected] => {
                    let is_nothing = |gradient: Option<Vec<f32>>| {
                        gradient.is_none_or(|gradient| gradient.iter().all(|&x| x == 0.0))
                    };
                    let path = self.path.join(".");
                    assert!(is_nothing(found) && is_nothing(expected), "{path}");
                }
            }
        }
    }
    let mut compare = Compare {
        both: [found, expected],
        most,
        path: Vec::new(),
        compared: 0,
    };
    vlm.model().visit(&mut compare);
    assert!(
        compare.compared > 3,
        "{family}: {} gradients",
        compare.compared
    );
}
