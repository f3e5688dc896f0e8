//! Keys and values in fewer bits: every family, sessions, conversations, and the program.

use std::ops::ControlFlow;

use burn::tensor::Tensor;
use burn_autodiff::Autodiff;
use reducers::Schedule;
use reroute::{GenerationOptions, KvError, RerouteError};
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::embedded;
use reroute_zoo::messages::{Content, Message, Role};
use reroute_zoo::{
    Conversation, Folder, KvType, OpenOptions, PixelTensors, Question, TensorInputs, Vlm, ZooError,
};
use serde_json::json;

use crate::doctor::doctor;
use crate::golden::{fixture, picture};
use crate::program::{BUILT_IN, Scratch, read_image, refuses, report, reroute, scene, schedule};
use crate::support::alone;

const FAMILIES: [&str; 4] = ["llava", "qwen2vl", "qwen25vl", "qwen3vl"];

fn open(folder: &Folder, kv: KvType) -> Vlm<Backend> {
    let options = OpenOptions {
        kv: Some(kv),
        ..OpenOptions::default()
    };
    Vlm::open(folder, &options, &Device::default()).expect("a good checkpoint")
}

/// The most that logits are off by, of the largest: of random weights nothing averages out.
fn bound(kv: KvType) -> f32 {
    match kv {
        KvType::F32 => 0.0,
        KvType::F16 => 0.005,
        KvType::BF16 => 0.05,
        _ => 0.1,
    }
}

/// Most of what is selected stays; where all of it does, so do logits and likeliest tokens, nearly.
fn assert_small(what: &str, error: &KvError) {
    let [all, both] = [error.selected, error.selected_in_both];
    assert!(10 * both >= 9 * all, "{what}: {error:?}");
    assert!(error.same + 1 >= error.tokens, "{what}: {error:?}");
    let is_exact = error.kv == KvType::F32;
    assert_eq!(error.largest == 0.0, is_exact, "{what}: {error:?}");
    if both == all {
        assert!(error.largest <= bound(error.kv), "{what}: {error:?}");
    }
}

#[test]
fn every_family_answers_in_every_type() {
    for name in FAMILIES {
        let folder = Folder::open(fixture(&format!("{name}/ckpt"))).expect("a fixture");
        let question = Question::about(vec![picture("llava/input.png")], "Describe it.");
        for kv in KvType::ALL {
            let vlm = open(&folder, kv);
            assert_eq!(vlm.kv_type(), kv);
            let depth = vlm.config().decoder().num_layers;
            let routed = reducers::presets::find("reroute-pdrop@128").expect("a preset");
            let routed = routed.schedule_at(vec![0, 1], depth).expect("two layers");
            for schedule in [Schedule::dense(), routed] {
                let error = vlm.kv_error(&question, &[5, 6, 7, 8], &schedule);
                let error = error.expect("a good question");
                assert_eq!((error.kv, error.against), (kv, KvType::F32));
                assert_eq!(error.tokens, 5);
                assert_small(&format!("{name} {kv}"), &error);
            }
        }
    }
}

/// On the trained model: together and alone, in a conversation and afresh.
#[test]
fn sessions_and_conversations_answer_alike() {
    let ask = |text: &str| Question::about(vec![read_image(&scene("063"))], text);
    let questions = ["the red circle", "the cross", "the blue square"].map(ask);
    let routed = schedule("reroute-pdrop@192");
    for kv in KvType::ALL {
        let vlm = open(&embedded::checkpoint(), kv);
        let options = vlm.generation_defaults();
        let together = vlm
            .ask_batch(&questions, &routed, &options, &mut |_, _| {
                ControlFlow::Continue(())
            })
            .expect("good questions");
        for (question, together) in questions.iter().zip(&together) {
            let alone = vlm.ask(question, &routed, &options, |_| {});
            let alone = alone.expect("a good question");
            assert_eq!(alone.tokens, together.tokens, "{kv}");
            assert_eq!(alone.kv_bytes, together.kv_bytes, "{kv}");
            let error = vlm.kv_error(question, &alone.tokens, &routed);
            let error = error.expect("a good question");
            assert_small("the built-in model", &error);
        }
        let mut conversation = Conversation::new(&vlm, routed.clone(), options.clone());
        let said = conversation
            .ask(&questions[0], |_| {})
            .expect("a first turn");
        let next = Question::about(Vec::new(), questions[1].text.clone());
        let continued = conversation.ask(&next, |_| {}).expect("a second turn");
        let image = &questions[0].visuals[0];
        let (view, pixels) = vlm.preprocessor().prepare(image).expect("a good image");
        let asked = vec![Content::Image, Content::Text(questions[0].text.clone())];
        let messages = [
            Message {
                role: Role::User,
                content: asked,
            },
            Message::text(Role::Assistant, said.text),
            Message::text(Role::User, next.text),
        ];
        let ids = vlm.encode_messages(&messages, &[view]);
        let inputs = TensorInputs {
            samples: vec![ids.expect("a good conversation")],
            pixels: PixelTensors::of(vec![pixels], vlm.device()).expect("one image"),
            second_per_grid_ts: Vec::new(),
        };
        let count = continued.tokens.len();
        let fresh = vlm.run_tensors(inputs, &routed, count, false);
        let fresh = fresh.expect("it runs");
        assert_eq!(continued.tokens, fresh.generations[0].tokens, "{kv}");
        assert_eq!(continued.kv_rows, fresh.kv_lengths[0], "{kv}");
        let decisions = continued.trace.decisions.iter().zip(&fresh.trace.decisions);
        for (continued, fresh) in decisions {
            assert_eq!(continued.selected, fresh.selected, "{kv}");
        }
    }
}

/// Gradients pass through floats as through the type of the weights; through bytes they do not, and that is said.
#[test]
fn gradients_pass_through_floats_alone() {
    type Ad = Autodiff<Backend>;
    let folder = embedded::checkpoint();
    let open = |kv| {
        let options = OpenOptions {
            kv: Some(kv),
            ..OpenOptions::default()
        };
        Vlm::<Ad>::open(&folder, &options, &Device::default())
    };
    let refused = |error: ZooError| {
        let kv = matches!(
            error,
            ZooError::Reroute(RerouteError::KvType {
                kv: KvType::Int8,
                ..
            })
        );
        assert!(kv, "{error}");
    };
    refused(open(KvType::Int8).map(drop).expect_err("no gradients"));
    let question = Question::about(vec![read_image(&scene("063"))], "the cross");
    // A model that has become one to train.
    let trained =
        self::open(&folder, KvType::Int8).map_model(burn::module::AutodiffModule::<Ad>::from_inner);
    let logits = trained.logits(&question, &[5, 6], Schedule::dense());
    refused(logits.map(drop).expect_err("no gradients"));
    let _alone = alone();
    let gradient = |kv| {
        let vlm = open(kv).expect("floats");
        let logits = vlm.logits(&question, &[5, 6], schedule("reroute-pdrop@192"));
        let loss = logits.expect("a good question").powi_scalar(2).sum();
        let gradients = loss.backward();
        let weight = &vlm.model().decoder().layers()[0].self_attn.k_proj.weight;
        let reroute_layers::Weight::Float(weight) = weight else {
            panic!("it is floats");
        };
        let gradient: Tensor<Backend, 2> = weight.val().grad(&gradients).expect("a gradient");
        let gradient: Vec<f32> = gradient.into_data().iter().collect();
        gradient
    };
    let expected = gradient(KvType::F32);
    let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    for (kv, bound) in [(KvType::F16, 0.01), (KvType::BF16, 0.05)] {
        let differences = gradient(kv)
            .into_iter()
            .zip(&expected)
            .map(|(a, b)| (a - b).abs());
        let share = differences.fold(0f32, f32::max) / most;
        assert!(share > 0.0 && share < bound, "{kv}: {share}");
    }
}

#[test]
fn the_program_keeps_keys_and_values_in_every_type() {
    let folder = Scratch::new();
    let explain = |kv: &str| {
        let pictures = folder.at("pictures");
        report(&["explain", "--dtype", "f32", "--kv", kv, "--out", &pictures])
    };
    let own = explain("auto");
    assert_eq!(
        (&own["kv"], &own["kv_error"]),
        (&json!("f32"), &json!(null))
    );
    let bytes = own["kv_bytes"].as_u64().expect("bytes");
    let (known, _) = doctor(&["--dtype", "f32"]);
    for kv in KvType::ALL {
        let told = explain(&kv.to_string());
        assert_eq!(told["kv"], kv.to_string());
        assert_eq!(told["answer"], own["answer"], "{kv}");
        let head_dim = BUILT_IN.config().decoder().head_dim;
        let heads = bytes / KvType::F32.head_bytes(head_dim) as u64;
        assert_eq!(
            told["kv_bytes"],
            heads * kv.head_bytes(head_dim) as u64,
            "{kv}"
        );
        for layer in told["layers"].as_array().expect("layers") {
            assert_eq!(
                layer["kv_bytes"]["predicted"],
                layer["kv_bytes"]["measured"]
            );
        }
        // What doctor needs of the memory, and what it says of every type, are the same.
        let (needs, well) = doctor(&["--dtype", "f32", "--kv", &kv.to_string()]);
        assert!(well, "{needs}");
        assert_eq!(
            needs["needs"][0]["kv_bytes"],
            known["kv_bytes"][kv.to_string()]
        );
        let presets = report(&["presets", "--kv", &kv.to_string()]);
        assert_eq!(presets["kv"], kv.to_string());
        if kv == KvType::F32 {
            continue;
        }
        assert_eq!(told["kv_error"]["kv"], kv.to_string());
        assert_eq!(told["kv_error"]["same"], told["kv_error"]["tokens"]);
        let line = [
            "explain",
            "--dtype",
            "f32",
            "--kv",
            &kv.to_string(),
            "--out",
            &folder.at("pictures"),
        ];
        let printed = reroute(&line).expect("an answer");
        let words = format!("keys and values in {kv}, beside f32: logits differ by ");
        assert!(printed.contains(&words), "{printed}");
    }
    assert_eq!(report(&["presets", "--kv", "auto"])["kv"], "f16");
    assert_eq!(report(&["presets", "--dtype", "bf16"])["kv"], "bf16");
    for command in [
        "ask", "chat", "ground", "explain", "compare", "doctor", "presets",
    ] {
        refuses(
            &[command, "--kv", "int3"],
            &["int3", "auto", "f32", "f16", "bf16", "int8"],
        );
    }
}

/// What a session reckons with is what its answers take: more of them fit where keys and values are narrower.
#[test]
fn memory_is_reckoned_in_the_type() {
    let needs = |kv: KvType| {
        let vlm = open(&embedded::checkpoint(), kv);
        let question = Question::about(vec![read_image(&scene("063"))], "the cross");
        let options = GenerationOptions {
            max_new_tokens: 1,
            ..vlm.generation_defaults()
        };
        let answer = vlm.ask(&question, Schedule::dense(), &options, |_| {});
        let shape = vlm.config().decoder().shape();
        let answer = answer.expect("a good question");
        let text = answer.prompt_rows - answer.visual_tokens;
        let cost = reducers::Cost::of(&shape, &Schedule::dense(), answer.visual_tokens, text, kv);
        assert_eq!(answer.kv_bytes, cost.kv_bytes);
        cost.total_kv_bytes()
    };
    let [f32, f16, bf16, int8] = KvType::ALL.map(needs);
    assert!(f32 == 2 * f16 && f16 == bf16 && bf16 > int8);
}
