//! `reroute chat` and the conversations behind it: what later turns see, and what they compute.

use clap::Parser;
use reducers::{Action, presets};
use reroute::{Decision, GenerationOptions};
use reroute_cli::args::{Args, Command};
use reroute_cli::chat::run_on;
use reroute_zoo::messages::{Content, Message, Role};
use reroute_zoo::{Conversation, PixelTensors, Question, TensorInputs};
use serde_json::Value;

use crate::golden::{fixture, open, picture};
use crate::program::{BUILT_IN, Scratch, layers, read_image, report, scene, schedule};

/// Types these lines into `reroute chat`, which is told whether a person does.
fn chat(flags: &[&str], lines: &[u8], is_person: bool) -> Result<String, String> {
    let flags = ["reroute", "chat"].iter().chain(flags);
    let args = Args::try_parse_from(flags).expect("good flags");
    let Command::Chat(args) = args.command else {
        panic!("chat");
    };
    let mut out = Vec::new();
    let result = run_on(&args, &mut &lines[..], is_person, &mut out);
    let out = String::from_utf8(out).expect("UTF-8");
    result.map(|()| out).map_err(|error| format!("{error:#}"))
}

/// One report per answer.
fn reports(flags: &[&str], lines: &str) -> Vec<Value> {
    let printed = chat(&[flags, &["--json"]].concat(), lines.as_bytes(), false).unwrap();
    let line = |line: &str| serde_json::from_str(line).expect("JSON");
    printed.lines().map(line).collect()
}

fn numbers(report: &Value, name: &str) -> Vec<usize> {
    serde_json::from_value(report[name].clone()).expect("numbers")
}

/// A question about the built-in scene, then another.
fn two_turns(routing: &str) -> [Value; 2] {
    let image = scene("063");
    let flags = [
        "--image",
        &image,
        "--routing",
        routing,
        "--max-new-tokens",
        "6",
    ];
    let lines = "find the large cyan square\nfind the cross\n";
    reports(&flags, lines).try_into().expect("two answers")
}

#[test]
fn the_first_turn_is_an_ordinary_question() {
    let [first, _] = two_turns("reroute-pdrop@192");
    let image = scene("063");
    let asked = report(&[
        "ask",
        "--image",
        &image,
        "--prompt",
        "find the large cyan square",
        "--routing",
        "reroute-pdrop@192",
        "--max-new-tokens",
        "6",
    ]);
    for name in [
        "answer",
        "tokens",
        "rows_per_layer",
        "decisions",
        "kv_bytes",
    ] {
        assert_eq!(first[name], asked[name], "{name}");
    }
}

/// Under reroute all tokens stand again, and layers from the first decision on hold what a prompt of
/// the whole conversation would hold; layers below compute new rows only.
#[test]
fn a_rerouted_turn_chooses_among_all_visual_tokens_again() {
    let [first, second] = two_turns("reroute-pdrop@192");
    let schedule = schedule("reroute-pdrop@192");
    let counts: Vec<usize> = schedule.visual_tokens_per_layer(layers(), 64).collect();
    let prompt = second["prompt_rows"].as_u64().unwrap() as usize;
    let known = first["prompt_rows"].as_u64().unwrap() as usize;
    assert_eq!(second["visual_tokens"], 64);
    let decisions = second["decisions"].as_array().unwrap();
    assert_eq!(decisions.len(), schedule.stages().len());
    assert!(
        decisions
            .iter()
            .all(|decision| decision["candidates"] == 64)
    );

    let expected: Vec<usize> = counts.iter().map(|visual| prompt - 64 + visual).collect();
    assert_eq!(numbers(&second, "kv_rows_per_layer"), expected);
    let (computed, decides) = (
        numbers(&second, "rows_per_layer"),
        schedule.stages()[0].layer,
    );
    assert!(decides > 0);
    for (layer, &rows) in computed.iter().enumerate() {
        match layer < decides {
            true => assert!(rows <= prompt - known, "layer {layer} computed {rows} rows"),
            false => assert!(rows > prompt - known && rows <= expected[layer]),
        }
    }
}

/// Under remove nothing is decided again, and every layer sees what it had kept.
#[test]
fn a_turn_after_removal_sees_what_was_kept() {
    let [first, second] = two_turns("pdrop@192");
    let prompt = second["prompt_rows"].as_u64().unwrap() as usize;
    let known = first["prompt_rows"].as_u64().unwrap() as usize;
    assert!(!first["decisions"].as_array().unwrap().is_empty());
    assert!(second["decisions"].as_array().unwrap().is_empty());
    let before = numbers(&first, "kv_rows_per_layer");
    let after = numbers(&second, "kv_rows_per_layer");
    for (layer, (before, after)) in before.iter().zip(&after).enumerate() {
        assert_eq!(after - before, prompt - known, "layer {layer}");
    }
    let computed = numbers(&second, "rows_per_layer");
    assert!(
        computed
            .iter()
            .all(|&rows| rows == computed[0] && rows <= prompt - known)
    );
}

/// What the first question deferred is there for the second one, unless it was removed.
#[test]
fn rerouting_brings_back_what_the_first_question_deferred_and_removal_cannot() {
    let image = read_image(&scene("063"));
    for preset in ["reroute-pdrop@64", "pdrop@64"] {
        let routed = schedule(preset);
        let options = BUILT_IN.generation_defaults();
        let mut conversation = Conversation::new(&BUILT_IN, routed.clone(), options);
        let first = Question::about(vec![image.clone()], "find the large cyan square");
        let first = conversation.ask(&first, |_| {}).unwrap();
        let second = Question::about(Vec::new(), "find the cross");
        let second = conversation.ask(&second, |_| {}).unwrap();
        let last = &first.trace.decisions.last().expect("it decides").selected;
        let chosen = second.trace.decisions.iter().flat_map(|d| &d.selected);
        let came_back = chosen.filter(|token| !last.contains(token)).count();
        match routed.action() {
            Action::Reroute => assert!(came_back > 0, "nothing came back"),
            Action::Remove => assert_eq!(came_back, 0),
        }
    }
}

#[test]
fn a_dense_turn_computes_new_rows_only() {
    let [first, second] = two_turns("dense");
    let new = second["prompt_rows"].as_u64().unwrap() - first["prompt_rows"].as_u64().unwrap();
    let computed = numbers(&second, "rows_per_layer");
    assert!(computed.iter().all(|&rows| rows as u64 <= new));
}

#[test]
fn images_join_a_conversation_and_reset_forgets_them() {
    let (one, two) = (scene("063"), scene("031"));
    let lines =
        format!("find the cross\n/image {two}\nfind it there\n\n/reset\nhello\n/quit\nnever\n");
    let reports = reports(&["--image", &one, "--max-new-tokens", "2"], &lines);
    let visual: Vec<u64> = reports
        .iter()
        .map(|r| r["visual_tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(visual, [64, 128, 0]);
    assert_eq!(reports[1]["visuals"].as_array().unwrap().len(), 2);
}

#[test]
fn a_person_may_try_again_and_a_script_may_not() {
    let lines = b"/image nowhere.png\n/dance\nhello\n";
    let flags = ["--max-new-tokens", "1"];
    let error = chat(&flags, lines, false).unwrap_err();
    assert!(error.contains("nowhere.png"), "{error}");
    let printed = chat(&flags, lines, true).unwrap();
    assert_eq!(printed.lines().count(), 1, "{printed}");
    let error = chat(&flags, b"/dance\n", false).unwrap_err();
    assert!(error.contains("/help"), "{error}");
    for (bad, expected) in [
        (&b"\xff\n"[..], "UTF-8"),
        (&[b'a'; (1 << 20) + 1][..], "longer than"),
    ] {
        let error = chat(&flags, bad, false).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

/// Editors of some systems put a mark in front of text.
#[test]
fn a_byte_order_mark_and_quotation_marks_are_no_part_of_a_line() {
    let folder = Scratch::new();
    folder.write("a b.png", std::fs::read(scene("063")).unwrap());
    let path = folder.at("a b.png");
    for quoted in [format!("\"{path}\""), format!("'{path}'"), path] {
        let lines = format!("\u{FEFF}/image {quoted}\r\nfind the cross\r\n");
        let reports = reports(&["--max-new-tokens", "1"], &lines);
        assert_eq!(reports.len(), 1, "{quoted}");
        assert_eq!(reports[0]["visual_tokens"], 64, "{quoted}");
    }
    // Only at the start.
    let lines = "/reset\n\u{FEFF}/image x.png\n";
    let reports = reports(&["--max-new-tokens", "1"], lines);
    assert_eq!(reports[0]["visual_tokens"], 0);
}

#[test]
fn a_full_conversation_points_to_the_way_out() {
    let lines = format!("{}\n", "find the red cross ".repeat(200));
    let error = chat(&["--max-new-tokens", "1"], lines.as_bytes(), false).unwrap_err();
    assert!(error.contains("/reset"), "{error}");
    assert!(error.contains("max_position_embeddings"), "{error}");
}

/// A question that cannot be answered is not part of the conversation.
#[test]
fn a_failed_question_leaves_the_conversation_as_it_was() {
    let options = GenerationOptions {
        max_new_tokens: 4,
        ..BUILT_IN.generation_defaults()
    };
    let image = read_image(&scene("063"));
    let first = Question::about(vec![image], "find the cross");
    let second = Question::about(Vec::new(), "find the square");
    let too_long = Question::about(Vec::new(), "find the red cross ".repeat(200));
    let answers = |with_failure: bool| {
        let schedule = schedule("reroute-fastv@192");
        let mut conversation = Conversation::new(&BUILT_IN, schedule, options.clone());
        conversation.ask(&first, |_| {}).unwrap();
        if with_failure {
            let error = conversation.ask(&too_long, |_| {}).unwrap_err();
            assert!(
                error.to_string().contains("max_position_embeddings"),
                "{error}"
            );
        }
        conversation.ask(&second, |_| {}).unwrap().tokens
    };
    assert_eq!(answers(true), answers(false));
}

/// A conversation with the Qwen family: an image first, a video later.
#[test]
fn qwen_converses_about_images_and_videos() {
    let frames = Scratch::new();
    let path = |name: &str| fixture("qwen_cases/pictures").join(name);
    for frame in 0..4 {
        let name = format!("clip{frame}.png");
        frames.write(&name, std::fs::read(path(&name)).unwrap());
    }
    let image = path("small.png").display().to_string();
    for family in ["qwen2vl", "qwen25vl", "qwen3vl"] {
        let model = fixture(family).join("ckpt").display().to_string();
        for routing in ["dense", "reroute-pdrop@192", "pdrop@192"] {
            let lines = format!(
                "What is this?\n/video {}\nAnd this?\nSure?\n",
                frames.path()
            );
            let flags = [
                "--model",
                &model,
                "--image",
                &image,
                "--routing",
                routing,
                "--max-new-tokens",
                "3",
            ];
            let reports = reports(&flags, &lines);
            let visual: Vec<&Value> = reports.iter().map(|r| &r["visual_tokens"]).collect();
            // 4 × 6 patches, then 2 × 6 × 4 more, four patches a token.
            assert_eq!(visual, [6, 18, 18], "{family} {routing}");
            let kinds: Vec<&Value> = reports[2]["visuals"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| &v["kind"])
                .collect();
            assert_eq!(kinds, ["image", "video"]);
            let candidates: Vec<u64> = reports
                .iter()
                .map(|r| r["decisions"][0]["candidates"].as_u64().unwrap_or(0))
                .collect();
            let expected = match routing {
                "dense" => [0, 0, 0],
                // The whole pool, every time.
                "reroute-pdrop@192" => [6, 18, 18],
                // What is new, once.
                _ => [6, 12, 0],
            };
            assert_eq!(candidates, expected, "{family} {routing}");
        }
    }
}

/// A turn under reroute is what the whole conversation, as one prompt, would be.
#[test]
fn a_rerouted_qwen_turn_equals_one_prompt_of_the_whole_conversation() {
    for family in ["qwen2vl", "qwen25vl", "qwen3vl"] {
        let vlm = open(family);
        let layers = vlm.config().decoder().num_layers;
        let schedule = presets::find("reroute-pdrop@192")
            .unwrap()
            .schedule(layers)
            .unwrap();
        let options = GenerationOptions {
            max_new_tokens: 3,
            ..vlm.generation_defaults()
        };
        let mut conversation = Conversation::new(&vlm, schedule.clone(), options.clone());
        let image = picture("llava/input.png");
        let first = Question::about(vec![image], "Describe this image in detail.");
        let said = conversation.ask(&first, |_| {}).unwrap().text;
        let second = Question::about(Vec::new(), "What is it?");
        let continued = conversation.ask(&second, |_| {}).unwrap();

        let (view, pixels) = vlm.preprocessor().prepare(&first.visuals[0]).unwrap();
        let messages = [
            Message {
                role: Role::User,
                content: vec![Content::Image, Content::Text(first.text)],
            },
            Message::text(Role::Assistant, said),
            Message::text(Role::User, second.text),
        ];
        let inputs = TensorInputs {
            samples: vec![vlm.encode_messages(&messages, &[view]).unwrap()],
            pixels: PixelTensors::of(vec![pixels], vlm.device()).unwrap(),
            second_per_grid_ts: Vec::new(),
        };
        let fresh = vlm.run_tensors(inputs, &schedule, 3, false).unwrap();
        assert_eq!(continued.tokens, fresh.generations[0].tokens, "{family}");
        assert_eq!(continued.kv_rows, fresh.kv_lengths[0], "{family}");
        let selections = |decisions: &[Decision]| -> Vec<Vec<usize>> {
            decisions.iter().map(|d| d.selected.clone()).collect()
        };
        let (continued, fresh) = (&continued.trace.decisions, &fresh.trace.decisions);
        assert_eq!(selections(continued), selections(fresh), "{family}");
    }
}
