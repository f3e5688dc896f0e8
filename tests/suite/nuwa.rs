//! Nüwa's two stages against the official code: what stage 1 keeps and makes of it, what stage 2
//! selects, logits and generated tokens, for both families, even and odd grids, every budget.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use burn::tensor::{DType, Tensor, TensorData};
use reducers::encoder::{EncoderMethod, EncoderShape, Nuwa, Seen, Tap, Tower, reduce};
use reducers::{Plan, Schedule, presets};
use reroute::{Prefill, PrefillOptions, Prompt};
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::{EncoderStep, Folder, Model, ModelConfig, Routing, VisualTokens};

use crate::golden::{
    HIDDEN, ROUTED_LOGITS, Reference, SCORES, assert_close, fixture, rows, values,
};
use crate::reference::Reference as SlowReference;
use crate::support::{Sample, columns, distance};

fn open(family: &str) -> Model<Backend> {
    let folder = Folder::open(fixture("nuwa").join(family).join("ckpt")).expect("a fixture");
    let config = ModelConfig::open(&folder).expect("a good config");
    let device = Device::default();
    Model::open(&config, &folder, DType::F32, &device, &mut |_| {
        ControlFlow::Continue(())
    })
    .expect("the fixture loads")
}

/// Runs a plan on the inputs of a fixture.
fn run(
    model: &Model<Backend>,
    inputs: &Reference,
    plan: &Plan,
) -> (VisualTokens<Backend>, Prompt<Backend>, Prefill<Backend>) {
    let routing: Routing<Backend> = plan.into();
    let step: EncoderStep<Backend> = routing.encoder.expect("Nüwa begins before the decoder");
    let inputs = inputs.inputs();
    let images = inputs.pixels.images.as_ref();
    let sample = reroute_zoo::Sample {
        ids: inputs.samples[0].clone(),
        image_grids: images.map_or(Vec::new(), |images| images.grids().to_vec()),
        ..Default::default()
    };
    let tokens = model.see_reduced(inputs.pixels, Some(&step), Default::default());
    let tokens = tokens.expect("a good picture");
    let prompt = model.prompt(&[sample], &tokens);
    let prompt = prompt.expect("as many slots as tokens");
    let options = PrefillOptions::default();
    let prefill = model.decoder().prefill(&prompt, &routing.schedule, options);
    (tokens, prompt, prefill.expect("a good prompt"))
}

/// The released plan of a budget with stage 2 at its released layer, whatever the depth.
fn released(name: &str, config: &EncoderShape, layer: usize) -> Plan {
    let plan = presets::find(name).unwrap().plan(32, config).unwrap();
    let mut stages = plan.schedule.stages().to_vec();
    stages[0].layer = layer;
    let (action, monotonic) = (plan.schedule.action(), plan.schedule.monotonic());
    Plan {
        schedule: Schedule::new(action, monotonic, stages).unwrap(),
        ..plan
    }
}

fn places(tokens: &VisualTokens<Backend>) -> Vec<usize> {
    let reduction = tokens.kept.as_ref().expect("something was reduced");
    reduction.images[0]
        .places
        .iter()
        .map(|place| place.expect("a place"))
        .collect()
}

#[test]
fn both_stages_on_llava_equal_the_official_code() {
    let model = open("llava");
    let inputs = Reference::open("nuwa/llava_inputs");
    for (budget, entering, selected) in [(64, 112, 16), (128, 224, 32), (192, 336, 48)] {
        let reference = Reference::open(&format!("nuwa/llava_{budget}"));
        let plan = released(&format!("nuwa@{budget}"), &model.config().encoder(), 16);
        assert_eq!(plan.entering(576), entering);
        assert_eq!(plan.schedule.keep_counts(entering), [selected]);
        assert_eq!(plan.average_tokens(32, 576), budget as f64);

        let (tokens, prompt, mut prefill) = run(&model, &inputs, &plan);
        assert_eq!(places(&tokens), reference.indices("stage1.indices"));
        let features = rows(tokens.features.as_ref().expect("LLaVA shows them"));
        assert_close(
            "stage 1",
            &features,
            &reference.floats("stage1.tokens"),
            HIDDEN,
        );
        let positions = prompt.positions.clone().into_data().convert::<i64>();
        assert_eq!(
            positions.to_vec::<i64>().unwrap(),
            reference.integers("position_ids")
        );

        let decision = &prefill.trace.decisions[0];
        assert_close(
            "scores",
            &decision.scores,
            &reference.floats("stage2.scores"),
            SCORES,
        );
        assert_eq!(decision.selected, reference.indices("stage2.kept"));
        let logits = reference.floats("logits");
        assert_close("logits", &values(prefill.logits), &logits, ROUTED_LOGITS);

        // Generated tokens: the reference's own, so that one difference is not counted twice.
        let expected = reference.floats("decode.logits");
        let ids = reference.ids("decode.ids");
        let vocab = logits.len();
        for (step, &id) in ids[..ids.len() - 1].iter().enumerate() {
            let position = prefill.cache.next_position(0);
            assert_eq!(position, reference.integers("decode.position_ids")[step]);
            let logits = model
                .decoder()
                .decode(&[(0, id)], &mut prefill.cache)
                .unwrap();
            let expected = &expected[(step + 1) * vocab..(step + 2) * vocab];
            assert_close("decoded logits", &values(logits), expected, ROUTED_LOGITS);
        }
    }
}

#[test]
fn both_stages_on_qwen_equal_the_official_code() {
    let model = open("qwen");
    for grid in ["even", "odd"] {
        let inputs = Reference::open(&format!("nuwa/qwen_{grid}_inputs"));
        for (percent, budget) in [(25, 144), (50, 288), (75, 432)] {
            let what = format!("{grid} grid, {percent} %");
            let reference = Reference::open(&format!("nuwa/qwen_{grid}_{percent}"));
            let mut plan = released(&format!("nuwa@{budget}"), &model.config().encoder(), 15);
            let nuwa = Nuwa {
                similarity_in_window_order: true,
                ..Nuwa::default()
            };
            plan.encoder.as_mut().unwrap().method = EncoderMethod::Nuwa(nuwa);

            let (tokens, prompt, prefill) = run(&model, &inputs, &plan);
            let ids = &inputs.samples()[0];
            let first = ids.iter().position(|&id| id == 349).expect("image slots");
            let kept = reference.indices("stage1.sequence_mask");
            let slots = (first..ids.len()).filter(|&row| ids[row] == 349 && kept[row] != 0);
            let expected: Vec<usize> = slots.map(|row| row - first).collect();
            assert_eq!(places(&tokens), expected, "{what}");
            let embeddings = reference.floats("stage1.inputs_embeds");
            assert_close(&what, &rows(&prompt.embeddings), &embeddings, HIDDEN);
            let positions = prompt.positions.clone().into_data().convert::<i64>();
            let positions = positions.to_vec::<i64>().unwrap();
            assert_eq!(
                positions,
                reference.integers("stage1.position_ids"),
                "{what}"
            );

            // The release builds its mask from the positions of the full prompt, so that after stage
            // 1 a row sees later rows: stage 2 is compared with the slow reference instead.
            let sample = host_sample(&prompt);
            let slow = SlowReference::of(model.decoder()).prefill(&sample, &plan.schedule);
            let count = plan.schedule.keep_counts(prompt.samples[0].visual.len())[0];
            assert_eq!(slow.decisions[0].selected.len(), count, "{what}");
            assert_eq!(reference.indices("stage2.kept_count"), [count], "{what}");
            let decision = &prefill.trace.decisions[0];
            assert!(
                distance(&decision.scores, &slow.decisions[0].scores) < 1e-5,
                "{what}"
            );
            assert_eq!(decision.selected, slow.decisions[0].selected, "{what}");
            assert!(
                distance(&values(prefill.logits), &slow.logits) < 1e-4,
                "{what}"
            );
        }
    }
}

/// A prompt of one sample, on the host.
fn host_sample(prompt: &Prompt<Backend>) -> Sample {
    let positions = prompt.positions.clone().transpose();
    let axes = positions.dims()[1];
    let positions = positions.into_data().convert::<i64>();
    let positions = positions.to_vec::<i64>().expect("integers");
    Sample {
        layout: prompt.samples[0].clone(),
        embeddings: columns(&prompt.embeddings),
        positions: positions.chunks(axes).map(<[i64]>::to_vec).collect(),
        deepstack: Vec::new(),
    }
}

/// The function itself, on tensors without a model.
#[test]
fn stage_1_alone_equals_the_official_code() {
    let reference = Reference::open("nuwa/stage1");
    // Rows, columns, kept, squared distance as a share of the largest, quantile of pillars.
    let cases = [
        (8, 8, 10, 31.0 / 98.0, None),
        (8, 8, 24, 31.0 / 98.0, None),
        (24, 24, 112, 280.0 / 1058.0, None),
        (24, 24, 224, 280.0 / 1058.0, None),
        (24, 24, 336, 280.0 / 1058.0, None),
        (12, 10, 60, 36.0 / 202.0, Some(0.1)),
    ];
    for (index, (height, width, keep, near, quantile)) in cases.into_iter().enumerate() {
        let name = |part: &str| format!("case{index}.{part}");
        let columns = |part: &str| {
            let shape = reference.shape(&name(part));
            let data = TensorData::new(reference.floats(&name(part)), [shape[1], shape[2]]);
            Tensor::<Backend, 2>::from_data(data, (&Device::default(), DType::F32)).transpose()
        };
        let salience = reference.floats(&name("cls"));
        let salience = TensorData::new(salience, [1, height * width]);
        let salience = Tensor::from_data(salience, (&Device::default(), DType::F32));
        let encoder = EncoderShape {
            num_layers: 24,
            feature_layer: 23,
            num_heads: 1,
            class_token: true,
            position_axes: 1,
            tower: Tower::Clip,
        };
        let taps = [
            (Tap::ClassAttention { layer: 22 }, salience),
            (
                Tap::MeanHidden {
                    first: 16,
                    last: 24,
                },
                columns("sim"),
            ),
        ];
        let seen = Seen {
            grid: [height, width],
            taps: BTreeMap::from(taps),
            encoder,
        };
        let nuwa = Nuwa {
            near: Some(near),
            quantile,
            ..Nuwa::default()
        };
        let reduced = reduce::<Backend>(&nuwa, &seen, keep).unwrap();
        let found: Vec<usize> = reduced.places.iter().map(|place| place.unwrap()).collect();
        assert_eq!(found, reference.indices(&name("indices")));
        let merged = reduced.apply(columns("agg"), None).unwrap();
        assert_close(
            "tokens",
            &rows(&merged),
            &reference.floats(&name("tokens")),
            1e-4,
        );
    }
}
