//! Routing can be trained through: selections are constants, everything that was selected is not.

use std::collections::BTreeSet;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;
use burn_autodiff::Autodiff;
use proptest::prelude::*;
use reducers::{Action, Schedule, Stage};
use reroute::Decoder;

use crate::reference::Reference;
use crate::support::{
    Backend, Case, Device, Random, Sample, VOCAB, alone, any_action, case, cases, columns, layout,
    model, pack, values,
};

type Ad = Autodiff<Backend>;

/// Gradients of `weights · logits` of a routed prefill.
struct Traced {
    decoder: Decoder<Ad>,
    gradients: <Ad as AutodiffBackend>::Gradients,
    /// Of the embeddings, `[rows][hidden_size]`.
    rows: Vec<Vec<f32>>,
    /// Of the DeepStack features, `[layers][visual rows][hidden_size]`.
    deepstack: Vec<Vec<Vec<f32>>>,
    selected: Vec<Vec<usize>>,
}

impl Traced {
    fn new(case: &Case, weights: &[f32]) -> Self {
        let _alone = alone();
        let decoder = case.decoder::<Ad>();
        let sample = case.sample();
        let mut prompt = pack::<Ad>(std::slice::from_ref(&sample));
        let leaf = prompt.embeddings.clone().require_grad();
        // The table takes part in the text rows, with a value of zero.
        let device = Device::default();
        let ids: Vec<u32> = (0..sample.layout.rows)
            .map(|row| (row % VOCAB) as u32)
            .collect();
        let text: Vec<f32> = (0..sample.layout.rows)
            .map(|row| f32::from(u8::from(sample.text().contains(&row))))
            .collect();
        let text = Tensor::<Ad, 1>::from_data(&text[..], &device).unsqueeze_dim(0);
        let table = decoder.embed(&ids).unwrap() * text;
        prompt.embeddings = leaf.clone() + (table.clone() - table.detach());
        let deepstack = prompt.deepstack.into_iter().map(Tensor::require_grad);
        prompt.deepstack = deepstack.collect();
        let routed = decoder
            .prefill(&prompt, &case.schedule, Default::default())
            .unwrap();
        let weights = Tensor::<Ad, 1>::from_data(weights, &device).unsqueeze_dim(0);
        let gradients = (routed.logits * weights).sum().backward();
        let of = |leaf: &Tensor<Ad, 2>| columns(&leaf.grad(&gradients).expect("it takes part"));
        Self {
            rows: of(&leaf),
            deepstack: prompt.deepstack.iter().map(of).collect(),
            selected: routed
                .trace
                .decisions
                .iter()
                .map(|d| d.selected.clone())
                .collect(),
            decoder,
            gradients,
        }
    }
}

/// What is at stake in a row.
fn magnitude(row: &[f32]) -> f32 {
    assert!(row.iter().all(|x| x.is_finite()), "{row:?}");
    row.iter().fold(0.0, |largest, x| x.abs().max(largest))
}

proptest! {
    #![proptest_config(cases(24))]

    /// With a decision at layer 0, a visual row takes part exactly if some decision selected it:
    /// rows deferred first and returned later do, and get gradients; rows never selected, or removed,
    /// do not, and get none at all. DeepStack features take part exactly if the row is active in a
    /// later layer, wherever it was when it got them. Every parameter of the decoder gets gradients.
    #[test]
    fn gradients_reach_everything_that_was_selected(
        config in model(),
        layout in layout(),
        mut ratios in prop::collection::vec(0.1..0.6f64, 3),
        action in any_action(),
        seed in any::<u64>(),
    ) {
        if action == Action::Remove {
            ratios.sort_by(|a, b| b.total_cmp(a));
        }
        let layers = [0, 1, config.num_layers - 1];
        let stage = |(layer, ratio)| Stage::ratio(layer, ratio);
        let stages = layers.into_iter().zip(ratios).map(stage).collect();
        let schedule = Schedule::new(action, false, stages).unwrap();
        let depth = config.num_layers;
        let case = Case { config, layouts: vec![layout], schedule, deepstack: 2, seed };
        let sample = case.sample();
        let traced = Traced::new(&case, &Random::new(seed).vector(VOCAB));

        let chosen: BTreeSet<usize> = traced.selected.iter().flatten().copied().collect();
        for (token, &row) in sample.layout.visual.iter().enumerate() {
            let reached = magnitude(&traced.rows[row]) > 0.0;
            assert_eq!(reached, chosen.contains(&token), "visual token {token}");
        }
        let ends = layers.into_iter().skip(1).chain([depth]);
        for (layer, features) in traced.deepstack.iter().enumerate() {
            let later = traced.selected.iter().zip(ends.clone()).filter(|(_, end)| *end > layer + 1);
            let chosen: BTreeSet<usize> = later.flat_map(|(s, _)| s.iter().copied()).collect();
            for (token, gradient) in features.iter().enumerate() {
                let reached = magnitude(gradient) > 0.0;
                assert_eq!(reached, chosen.contains(&token), "layer {layer}, visual token {token}");
            }
        }
        assert!(sample.text().iter().all(|&row| magnitude(&traced.rows[row]) > 0.0));

        struct Unreached<'a>(&'a Traced, Vec<String>, Vec<String>);
        impl ModuleVisitor<Ad> for Unreached<'_> {
            fn enter_module(&mut self, name: &str, _: &str) {
                self.1.push(name.into());
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.1.pop();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Ad, D>>) {
                let gradient = param.val().grad(&self.0.gradients).map(values);
                if gradient.is_none_or(|gradient| magnitude(&gradient) == 0.0) {
                    self.2.push(self.1.join("."));
                }
            }
        }
        let mut unreached = Unreached(&traced, Vec::new(), Vec::new());
        traced.decoder.visit(&mut unreached);
        assert!(unreached.2.is_empty(), "no gradient for {:?}", unreached.2);
    }

    /// The derivative of the logits along a random direction of all embeddings, against a finite
    /// difference of the slow reference in f64.
    #[test]
    fn gradients_equal_finite_differences(case in case(Just(Action::Reroute))) {
        let mut random = Random::new(case.seed);
        let weights = random.vector(VOCAB);
        let sample = case.sample();
        let direction: Vec<Vec<f32>> =
            sample.embeddings.iter().map(|row| random.vector(row.len())).collect();
        let reference = Reference::of(&case.decoder::<Backend>());

        // Half a step either way in f32, the steps as they were really taken.
        let step = |sign: f32| -> Sample {
            let mut moved = sample.clone();
            for (row, along) in moved.embeddings.iter_mut().zip(&direction) {
                row.iter_mut().zip(along).for_each(|(x, d)| *x += sign * 2e-4 * d);
            }
            moved
        };
        let (forth, back) = (step(1.0), step(-1.0));
        let [up, down] = [&forth, &back].map(|moved| reference.prefill(moved, &case.schedule));
        let here = reference.prefill(&sample, &case.schedule);
        let picks = |outcome: &crate::reference::Outcome| -> Vec<Vec<usize>> {
            outcome.decisions.iter().map(|d| d.selected.clone()).collect()
        };
        prop_assume!(here.decisions.iter().all(|d| d.margin > 1e-6));
        prop_assume!(picks(&up) == picks(&here) && picks(&down) == picks(&here));
        let change: f64 = up.logits.iter().zip(&down.logits).zip(&weights)
            .map(|((up, down), w)| (up - down) * f64::from(*w)).sum();

        let traced = Traced::new(&case, &weights);
        assert_eq!(traced.selected, picks(&here));
        let (mut predicted, mut scale) = (0.0, 0.0f64);
        for (row, gradient) in traced.rows.iter().enumerate() {
            for (i, &g) in gradient.iter().enumerate() {
                let moved = f64::from(forth.embeddings[row][i]) - f64::from(back.embeddings[row][i]);
                predicted += f64::from(g) * moved;
                scale += (f64::from(g) * moved).powi(2);
            }
        }
        let difference = (predicted - change).abs() / scale.sqrt();
        assert!(difference < 1e-3, "predicted {predicted}, measured {change}: {difference}");
    }
}

/// Where e^(−x) would overflow, the gradient is next to nothing and not NaN.
#[test]
fn gradients_of_activations_are_finite_far_from_zero() {
    let device = Device::default();
    for activation in [
        reroute_layers::silu::<Ad, 1>,
        reroute_layers::quick_gelu::<Ad, 1>,
    ] {
        let x = Tensor::<Ad, 1>::from_data([-1e4, -100.0, -88.0, 0.0, 100.0], &device);
        let x = x.require_grad();
        let gradients = activation(x.clone()).sum().backward();
        let gradient: Vec<f32> = values(x.grad(&gradients).expect("x is tracked"));
        assert!(gradient.iter().all(|g| g.is_finite()), "{gradient:?}");
        assert!(
            gradient[0].abs() < 1e-30 && (gradient[4] - 1.0).abs() < 1e-6,
            "{gradient:?}"
        );
    }
}
