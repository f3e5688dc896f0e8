//! Every method of the registry on every family: what the framework promises, whatever the rule.

use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};

use burn::tensor::backend::Backend as AnyBackend;
use burn::tensor::{Int, Tensor};
use reducers::encoder::{EncoderReducer, EncoderShape, Reduction, Seen, Tap};
use reducers::presets::{self, Preset};
use reducers::{
    Action, DecisionView, Keep, KvType, Plan, ReducerError, Schedule, Score, Scorer, Stage,
};
use reroute::GenerationOptions;
use reroute_cli::backend::Backend;
use reroute_zoo::{Answer, Conversation, EncoderStep, Question, Routing, Vlm};
use vision_encoder::RgbImage;

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
        let num_layers = vlm.config().decoder().num_layers;
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
                .visual_tokens_per_layer(num_layers, answer.visual_tokens)
                .collect::<Vec<usize>>();
            let text = answer.prompt_rows - answer.visual_tokens;
            let rows: Vec<usize> = answer
                .trace
                .rows
                .iter()
                .map(|rows| rows[0] - text)
                .collect();
            assert_eq!(rows, per_layer, "{what}");
            assert_eq!(answer.kv_rows, answer.trace.rows.concat(), "{what}");
            let kv = vlm.kv_type();
            let shape = vlm.config().decoder().shape();
            let cost = reducers::Cost::of(&shape, &plan.schedule, answer.visual_tokens, text, kv);
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
        let dense = Plan::from(Schedule::dense()).cost(&shape, 576, 64, KvType::F16);
        let dense = dense.published_flops();
        for (base_name, twin_name) in twins {
            for budget in [192, 128, 64] {
                let cost = |name: &str| {
                    let preset = presets::find(&format!("{name}@{budget}")).unwrap();
                    let plan = preset.plan(shape.num_layers.into(), &encoder).unwrap();
                    plan.cost(&shape, 576, 64, KvType::F16)
                };
                let (base, twin) = (cost(base_name), cost(twin_name));
                assert_eq!(base.kv_bytes, twin.kv_bytes);
                assert_eq!(base.layer_flops, twin.layer_flops);
                let scorer = twin.total_scorer_flops() - base.total_scorer_flops();
                let share = scorer / base.published_flops();
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

/// The table is printed from the registry (`reroute presets --support`).
#[test]
fn the_support_table_of_the_documentation_is_the_registry() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/methods.md");
    let page = std::fs::read_to_string(path).expect("docs/methods.md");
    let table = reroute_cli::presets::support_table();
    assert!(
        page.contains(&table),
        "print it anew: reroute presets --support"
    );
}

/// A plan survives its JSON form; what is wrong with one is said.
#[test]
fn plans_are_data() {
    for preset in presets::presets() {
        for (_, vlm) in FAMILIES.iter() {
            let Some(plan) = plan(vlm, &preset) else {
                continue;
            };
            let text = plan.to_json().to_string();
            assert_eq!(Plan::from_json(&text).unwrap(), plan, "{text}");
        }
    }
    let stages = r#""action": "remove", "stages": []"#;
    for (encoder, expected) in [
        (r#"{"method": "nuwa"}"#, "JSON"),
        (r#"{"method": {"nuwa": {}}}"#, "exactly one of"),
        (
            r#"{"method": {"nuwa": {}}, "keep_ratio": 0}"#,
            "exactly one of",
        ),
        (
            r#"{"method": {"nuwa": {"typo": 1}}, "keep_ratio": 0.5}"#,
            "typo",
        ),
        (r#"{"method": {"magic": {}}, "keep_ratio": 0.5}"#, "magic"),
    ] {
        let error = Plan::from_json(&format!(r#"{{"encoder": {encoder}, {stages}}}"#));
        let mut error: &dyn std::error::Error = &error.unwrap_err();
        let mut said = error.to_string();
        while let Some(source) = error.source() {
            said.push_str(&format!(": {source}"));
            error = source;
        }
        assert!(said.contains(expected), "{said}");
    }
}

/// Whatever ranks after a decision that kept nothing: there is nothing to rank, and the model answers.
#[test]
fn every_rule_may_follow_a_decision_that_kept_nothing() {
    let rules = [
        r#"{"attention": {}}"#,
        r#"{"attention": {"keys": "candidates"}}"#,
        r#"{"attention": {"query": "raters"}}"#,
        r#"{"attention": {"query": {"last-mean": 3}}}"#,
        r#"{"duplication": {}}"#,
        r#"{"duplication": {"visual_pivots": 0}}"#,
        r#"{"random": {}}"#,
    ];
    for (family, vlm) in FAMILIES.iter() {
        for rule in rules {
            for action in ["remove", "reroute"] {
                let rule = rule.replace(
                    "\"duplication\": {",
                    "\"duplication\": {\"layer\": \"this\", ",
                );
                let rule = rule.replace(", }", "}");
                let text = format!(
                    r#"{{"action": "{action}", "stages": [
                        {{"layer": 1, "keep_ratio": 0.001, "rounding": "truncate"}},
                        {{"layer": 2, "keep_ratio": 0.5, "score": {rule}}}]}}"#
                );
                let plan = Plan::from_json(&text).unwrap();
                let answer = ask(vlm, &questions()[..1], &plan).remove(0);
                let kept: Vec<usize> = answer
                    .trace
                    .decisions
                    .iter()
                    .map(|d| d.selected.len())
                    .collect();
                let expected = plan.schedule.keep_counts(answer.visual_tokens);
                assert_eq!(kept, expected, "{rule}, {action} on {family}");
                assert_eq!(expected[0], 0);
            }
        }
    }
}

/// What the positions of a plan say: those of the full picture, or none left out.
#[test]
fn tokens_keep_the_positions_of_the_picture_unless_told_otherwise() {
    let vlm = &FAMILIES[0].1;
    let plan = |positions: &str| {
        let text = format!(
            r#"{{"encoder": {{"method": {{"uniform-grid": {{}}}}, "keep_count": 16,
                "positions": "{positions}"}}, "action": "remove", "stages": []}}"#
        );
        Plan::from_json(&text).unwrap()
    };
    let [gap, renumber] = ["gap", "renumber"]
        .map(|positions| ask(vlm, &questions()[..1], &plan(positions)).remove(0));
    assert_eq!(gap.visual_tokens, 16);
    assert_eq!(gap.cells, renumber.cells);
    let logits = |answer: &Answer| answer.prompt_rows;
    assert_eq!(logits(&gap), logits(&renumber));
    // Positions with several axes have no numbers to give away.
    let qwen = &FAMILIES[1].1;
    let options = GenerationOptions::default();
    let refused = qwen.ask(&questions()[0], plan("renumber"), &options, |_| {});
    assert!(refused.unwrap_err().to_string().contains("several axes"));
}

/// A conversation reduces every picture once, and goes on as a single prompt would.
#[test]
fn conversations_go_on_with_what_a_reduction_left() {
    for (family, vlm) in FAMILIES.iter() {
        for name in [
            "reroute-visionzip@192",
            "reroute-average-pooling@192",
            "reroute-nuwa@192",
        ] {
            let preset = presets::find(name).unwrap();
            let Some(plan) = plan(vlm, &preset) else {
                continue;
            };
            let options = GenerationOptions {
                max_new_tokens: 3,
                ..GenerationOptions::default()
            };
            let mut conversation = Conversation::new(vlm, plan.clone(), options.clone());
            let [first, second] = questions();
            let one = conversation.ask(&first, |_| {}).unwrap();
            let alone = vlm.ask(&first, &plan, &options, |_| {}).unwrap();
            assert_eq!(one.tokens, alone.tokens, "{name} on {family}");
            let two = conversation.ask(&second, |_| {}).unwrap();
            let both = two.views.len();
            assert_eq!(both, 2, "{name} on {family}");
            let of_view = |view| two.cells.iter().filter(|cell| cell.0 == view).count();
            assert_eq!(of_view(0), one.visual_tokens, "{name} on {family}");
            let per_layer = plan.schedule.keep_counts(two.visual_tokens);
            let selected = two.trace.decisions.iter().map(|d| d.selected.len());
            assert!(selected.eq(per_layer), "{name} on {family}");
        }
    }
}

/// Rules of one's own stand where a plan's stand.
#[test]
fn a_method_of_ones_own_is_checked_like_any_other() {
    struct Corner;
    impl<B: AnyBackend> EncoderReducer<B> for Corner {
        fn needs(&self, _: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
            Ok(Vec::new())
        }
        fn reduce(&self, _: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
            Ok(Reduction::selection((0..keep).collect()))
        }
    }
    struct Twice;
    impl<B: AnyBackend> EncoderReducer<B> for Twice {
        fn needs(&self, _: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
            Ok(Vec::new())
        }
        fn reduce(&self, _: &Seen<B>, _: usize) -> Result<Reduction<B>, ReducerError> {
            Ok(Reduction::selection(vec![1, 1]))
        }
    }
    struct LastFirst;
    impl<B: AnyBackend> Scorer<B> for LastFirst {
        fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
            let device = view.hidden_states().device();
            Ok(Tensor::<B, 1, Int>::arange(0..view.rows() as i64, &device).float())
        }
    }
    let schedule = Schedule::new(Action::Reroute, false, vec![Stage::count(1, 3)]).unwrap();
    let routing = |reducer: Arc<dyn EncoderReducer<Backend>>| Routing {
        encoder: Some(EncoderStep {
            reducer,
            keep: Keep::Count(8),
            rest: Default::default(),
            positions: Default::default(),
        }),
        scorer: Some(Arc::new(LastFirst)),
        ..Routing::from(&schedule)
    };
    let (vlm, options) = (&FAMILIES[2].1, GenerationOptions::default());
    let answer = vlm
        .ask(&questions()[0], routing(Arc::new(Corner)), &options, |_| {})
        .unwrap();
    let cells: Vec<usize> = answer.cells.iter().filter_map(|cell| cell.1).collect();
    assert_eq!(cells, (0..8).collect::<Vec<_>>());
    assert_eq!(answer.trace.decisions[0].selected, [5, 6, 7]);
    let refused = vlm.ask(&questions()[0], routing(Arc::new(Twice)), &options, |_| {});
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("two tokens at place 1")
    );
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
