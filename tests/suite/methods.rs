//! Every method of the registry on every family: what the framework promises, whatever the rule.

use std::ops::ControlFlow;
use std::sync::LazyLock;

use reducers::presets::{self, Preset};
use reducers::{Action, Keep, Plan, Schedule, Score, Stage};
use reroute::GenerationOptions;
use reroute_cli::backend::Backend;
use vision_encoder::RgbImage;
use zoo::{Answer, Question, Vlm};

use crate::golden::{open, picture};
use crate::support::gap;

/// One of each kind: a class token, windows, DeepStack.
static FAMILIES: LazyLock<Vec<(&str, Vlm<Backend>)>> = LazyLock::new(|| {
    let families = ["llava", "qwen25vl", "qwen3vl"];
    families.map(|family| (family, open(family))).into()
});

fn plan(vlm: &Vlm<Backend>, preset: &Preset) -> Option<Plan> {
    let config = vlm.config();
    preset
        .plan(config.decoder().num_layers, &config.encoder())
        .ok()
}

/// Two photos of different shapes.
fn photos() -> [RgbImage; 2] {
    let photo = picture("llava/input.png");
    let (width, height) = (photo.width(), photo.height() / 2);
    let upper = photo.data()[..width * height * 3].to_vec();
    [
        photo,
        RgbImage::new(width, height, upper).expect("half a picture"),
    ]
}

fn questions() -> [Question; 2] {
    let [first, second] = photos();
    [
        Question::about(vec![first], "where is the dog"),
        Question::about(vec![second], "and what is this"),
    ]
}

fn ask(vlm: &Vlm<Backend>, questions: &[Question], plan: &Plan) -> Vec<Answer> {
    let options = GenerationOptions {
        max_new_tokens: 2,
        logits: true,
        ..GenerationOptions::default()
    };
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let answers = vlm.ask_batch(questions, plan, &options, go_on);
    answers.unwrap_or_else(|error| panic!("{plan:?}: {error}"))
}

/// Methods that keep fewer than asked for, by their own rule: padded regions (Nüwa behind Qwen).
fn may_keep_fewer(preset: &Preset) -> bool {
    preset.name.contains("nuwa")
}

#[test]
fn every_method_keeps_what_its_label_says() {
    for (family, vlm) in FAMILIES.iter() {
        let num_layers = vlm.decoder_config().num_layers;
        let mut planned = 0;
        for preset in presets::presets() {
            let Some(plan) = plan(vlm, &preset) else {
                continue;
            };
            planned += 1;
            let what = format!("{} on {family}", preset.name);
            let answer = ask(vlm, &questions()[..1], &plan).remove(0);
            let seen = answer.views[0].token_count();
            let entering = plan.entering(seen);
            assert!(answer.visual_tokens <= entering, "{what}");
            assert!(
                answer.visual_tokens == entering || may_keep_fewer(&preset),
                "{what}: {} of {entering}",
                answer.visual_tokens
            );

            // Places are those of the picture, ascending, each once.
            assert_eq!(answer.cells.len(), answer.visual_tokens, "{what}");
            let places: Vec<usize> = answer.cells.iter().filter_map(|cell| cell.1).collect();
            assert!(places.is_sorted_by(|a, b| a < b), "{what}: {places:?}");
            assert!(places.iter().all(|&place| place < seen), "{what}");
            assert!(answer.visual_tokens - places.len() <= 1, "{what}");

            let counts = plan.schedule.keep_counts(answer.visual_tokens);
            assert_eq!(answer.trace.decisions.len(), counts.len(), "{what}");
            for (decision, count) in answer.trace.decisions.iter().zip(&counts) {
                assert_eq!(decision.selected.len(), *count, "{what}");
                assert!(decision.selected.is_sorted_by(|a, b| a < b), "{what}");
                assert!(
                    decision
                        .selected
                        .iter()
                        .all(|&token| token < answer.visual_tokens)
                );
            }
            let per_layer = plan
                .schedule
                .visual_tokens_per_layer(num_layers, answer.visual_tokens);
            let text = answer.prompt_rows - answer.visual_tokens;
            let rows: Vec<usize> = answer
                .trace
                .rows
                .iter()
                .map(|rows| rows[0] - text)
                .collect();
            assert_eq!(rows, per_layer, "{what}");
            assert_eq!(answer.kv_rows, answer.trace.rows.concat(), "{what}");
            let (text, bytes) = (text, vlm.dtype().size());
            let shape = vlm.decoder_config().shape();
            let cost =
                reducers::Cost::of(&shape, &plan.schedule, answer.visual_tokens, text, bytes);
            assert_eq!(answer.kv_bytes, cost.kv_bytes, "{what}");
        }
        assert!(planned > 60, "{family}: {planned} presets");
    }
}

#[test]
fn a_batch_is_its_samples_under_every_method() {
    for (family, vlm) in FAMILIES.iter() {
        for preset in presets::presets().filter(|preset| preset.budget == Some(192)) {
            let Some(plan) = plan(vlm, &preset) else {
                continue;
            };
            let what = format!("{} on {family}", preset.name);
            let questions = questions();
            let together = ask(vlm, &questions, &plan);
            for (question, together) in questions.iter().zip(&together) {
                let alone = ask(vlm, std::slice::from_ref(question), &plan).remove(0);
                assert_eq!(alone.cells, together.cells, "{what}");
                assert_eq!(alone.kv_rows, together.kv_rows, "{what}");
                assert_eq!(alone.tokens, together.tokens, "{what}");
                let decisions = alone.trace.decisions.iter().zip(&together.trace.decisions);
                for (alone, together) in decisions {
                    assert_eq!(alone.selected, together.selected, "{what}");
                    assert!(gap(&alone.scores, &together.scores) < 1e-5, "{what}");
                }
            }
        }
    }
}

/// A method that keeps everything leaves the plain model; adaptive and pooling rules too.
#[test]
fn keeping_all_is_the_plain_model_under_every_method() {
    for (family, vlm) in FAMILIES.iter() {
        let dense = ask(vlm, &questions()[..1], &Schedule::dense().into()).remove(0);
        for preset in presets::presets().filter(|preset| preset.budget == Some(192)) {
            let Some(mut plan) = plan(vlm, &preset) else {
                continue;
            };
            let what = format!("{} on {family}", preset.name);
            // What Nüwa keeps it also mixes.
            let mixes = may_keep_fewer(&preset);
            if let Some(encoder) = &mut plan.encoder {
                encoder.keep = Keep::Ratio(1.0);
            }
            let keep_all = |stage: &Stage| Stage {
                keep: Keep::Ratio(1.0),
                ..*stage
            };
            let (action, monotonic) = (plan.schedule.action(), plan.schedule.monotonic());
            let stages = plan.schedule.stages().iter().map(keep_all).collect();
            plan.schedule = Schedule::new(action, monotonic, stages).unwrap();
            let answer = ask(vlm, &questions()[..1], &plan).remove(0);
            assert_eq!(answer.kv_rows, dense.kv_rows, "{what}");
            if !mixes {
                assert_eq!(answer.tokens, dense.tokens, "{what}");
            }
        }
    }
}

#[test]
fn one_decision_rerouted_is_removal_under_every_method() {
    for (family, vlm) in FAMILIES.iter() {
        for preset in presets::presets().filter(|preset| preset.budget == Some(128)) {
            let Some(plan) = plan(vlm, &preset) else {
                continue;
            };
            let stages = plan.schedule.stages().iter().take(1).copied();
            let stages: Vec<Stage> = stages.collect();
            if stages.is_empty() || stages[0].score == Score::Encoder {
                continue;
            }
            let [remove, reroute] = [Action::Remove, Action::Reroute].map(|action| {
                let schedule = Schedule::new(action, false, stages.clone()).unwrap();
                let plan = Plan {
                    schedule,
                    ..plan.clone()
                };
                ask(vlm, &questions()[..1], &plan).remove(0)
            });
            let what = format!("{} on {family}", preset.name);
            assert_eq!(remove.trace, reroute.trace, "{what}");
            assert_eq!(remove.tokens, reroute.tokens, "{what}");
            assert_eq!(remove.kv_bytes, reroute.kv_bytes, "{what}");
        }
    }
}

/// FastV, PDrop and Nüwa beside their recoverable twins, at the sizes that the budgets were made
/// for: the same rows in every layer, so the same cache; operations differ by the scorer alone, at
/// most 1 % of the plain model's.
#[test]
fn recoverable_twins_cost_what_they_replace() {
    let twins = [
        ("fastv", "reroute-fastv"),
        ("pdrop", "reroute-pdrop-twin"),
        ("nuwa", "reroute-nuwa"),
    ];
    let llava = FAMILIES[0].1.config().encoder();
    let qwen = FAMILIES[1].1.config().encoder();
    let shapes = [(LLAVA_7B, llava), (QWEN_7B, qwen)];
    for (shape, encoder) in shapes {
        let dense = Plan::from(Schedule::dense()).cost(&shape, 576, 64, 2);
        let dense = dense.total_flops();
        for (base_name, twin_name) in twins {
            for budget in [192, 128, 64] {
                let cost = |name: &str| {
                    let preset = presets::find(&format!("{name}@{budget}")).unwrap();
                    let plan = preset.plan(shape.num_layers, &encoder).unwrap();
                    plan.cost(&shape, 576, 64, 2)
                };
                let (base, twin) = (cost(base_name), cost(twin_name));
                assert_eq!(base.kv_bytes, twin.kv_bytes);
                assert_eq!(base.layer_flops, twin.layer_flops);
                let scorer = twin.total_scorer_flops() - base.total_scorer_flops();
                let share = scorer / base.total_flops();
                let name = format!("{twin_name}@{budget}, {} layers", shape.num_layers);
                assert!((0.0..=0.01).contains(&(scorer / dense)), "{name}");
                // With few key heads that is little beside the routed prefill too. With as many as
                // query heads (LLaVA-1.5), keys of deferred rows weigh more the smaller it gets.
                let bound = if shape == QWEN_7B { 0.0036 } else { 0.0336 };
                assert!(share <= bound, "{name}: {share}");
            }
        }
    }
}

/// The same, measured: bytes that the caches hold.
#[test]
fn recoverable_twins_hold_what_they_replace() {
    for (family, vlm) in FAMILIES.iter() {
        for (base, twin) in [
            ("fastv", "reroute-fastv"),
            ("pdrop", "reroute-pdrop-twin"),
            ("nuwa", "reroute-nuwa"),
        ] {
            for budget in [192, 128, 64] {
                let held = |name: &str| {
                    let preset = presets::find(&format!("{name}@{budget}")).unwrap();
                    let plan = plan(vlm, &preset)?;
                    Some(ask(vlm, &questions()[..1], &plan).remove(0).kv_bytes)
                };
                if let (Some(base_bytes), Some(twin_bytes)) = (held(base), held(twin)) {
                    assert_eq!(base_bytes, twin_bytes, "{twin}@{budget} on {family}");
                }
            }
        }
    }
}

const LLAVA_7B: reducers::DecoderShape = reducers::DecoderShape {
    num_layers: 32,
    hidden_size: 4096,
    num_attention_heads: 32,
    num_key_value_heads: 32,
    head_dim: 128,
    intermediate_size: 11008,
};

const QWEN_7B: reducers::DecoderShape = reducers::DecoderShape {
    num_layers: 28,
    hidden_size: 3584,
    num_attention_heads: 28,
    num_key_value_heads: 4,
    head_dim: 128,
    intermediate_size: 18944,
};
