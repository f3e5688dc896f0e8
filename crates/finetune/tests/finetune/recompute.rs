//! Layers that are computed again for the gradients: what is drawn in them is drawn twice alike.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use burn_flex::Flex;
use reroute_finetune::Preparation;
use reroute_zoo::{AdapterConfig, Lesson, Vlm};

use super::{Ad, alone, example, open};

/// By how much a step along a gradient changes the loss.
const CHANGE: f32 = 0.003;

/// Gradients of what maps up in adapters, by path.
struct Ups<'a> {
    gradients: &'a GradientsParams,
    path: Vec<String>,
    found: Vec<(String, Vec<f32>)>,
}

impl ModuleVisitor<Ad> for Ups<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Ad, D>>) {
        let path = self.path.join(".");
        let gradient = self.gradients.get::<Flex, D>(param.id);
        if let Some(gradient) = gradient.filter(|_| path.ends_with(".up")) {
            self.found
                .push((path, gradient.into_data().iter().collect()));
        }
    }
}

/// Adds numbers to the parameter of a path.
struct Nudge<'a> {
    parameter: &'a str,
    by: Vec<f32>,
    path: Vec<String>,
}

impl<B: Backend> ModuleMapper<B> for Nudge<'_> {
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
            let by = TensorData::new(self.by.clone(), value.shape());
            value.clone() + Tensor::from_data(by, &value.device())
        })
    }
}

/// Were it drawn otherwise on the way back, a step along a gradient would do something else.
#[test]
fn dropout_is_drawn_twice_alike() {
    let _alone = alone();
    let vlm = open();
    let adapter = AdapterConfig {
        dropout: 0.4,
        ..AdapterConfig::new(
            [
                "model.language_model.*.q_proj",
                "model.language_model.*.down_proj",
            ]
            .map(String::from)
            .to_vec(),
            3,
        )
    };
    let vlm = vlm.with_model(vlm.model().adapt(&adapter).expect("an adapter"));
    let preparation = Preparation::new(vlm.tutor());
    let lessons = [example(1, "the ring"), example(2, "the large cyan square")];
    let lessons = lessons.map(|example| preparation.lesson(&example).expect("a lesson"));
    let lessons: Vec<&Lesson> = lessons.iter().collect();
    let learn = |vlm: &Vlm<Ad>| {
        let mut sum = GradientsAccumulator::new();
        let take = |gradients| sum.accumulate(vlm.model(), gradients);
        let loss = vlm.learn_recomputing(&lessons, None, (0.1, 7), take);
        (loss.expect("a loss").into_scalar(), sum.grads())
    };
    let (_, gradients) = learn(&vlm);
    let mut ups = Ups {
        gradients: &gradients,
        path: Vec::new(),
        found: Vec::new(),
    };
    vlm.model().visit(&mut ups);
    assert_eq!(ups.found.len(), 2 * vlm.config().decoder().num_layers);
    for (path, gradient) in ups.found {
        let square: f32 = gradient.iter().map(|g| g * g).sum();
        let moved = |steps: f32| {
            let mut nudge = Nudge {
                parameter: &path,
                by: gradient
                    .iter()
                    .map(|g| steps * CHANGE / square * g)
                    .collect(),
                path: Vec::new(),
            };
            learn(&vlm.with_model(vlm.model().clone().map(&mut nudge))).0
        };
        let change = moved(0.5) - moved(-0.5);
        assert!((change - CHANGE).abs() < 0.2 * CHANGE, "{path}: {change}");
    }
}
