//! `reroute tune` as users run it.

use std::path::Path;

use serde_json::{Value, json};

use crate::golden::fixture;
use crate::program::{Scratch, refuses, reroute, scene};

/// Examples of the built-in scenes in several forms, and their folder.
fn data(scratch: &Scratch, lines: &[Value]) -> String {
    let path = below(scratch, "train.jsonl");
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(&path, lines.join("\n")).expect("can be written");
    path
}

fn below(scratch: &Scratch, name: &str) -> String {
    format!("{}/{name}", scratch.path())
}

fn examples() -> Vec<Value> {
    let image = scene("063");
    vec![
        json!({"image": image, "expression": "that thing", "box": [20, 30, 50, 60]}),
        json!({"image": image, "conversations": [
            {"from": "human", "value": "<image>\nwhere is the teal block"},
            {"from": "gpt", "value": "[0.25, 0.25, 0.50, 0.50]"},
        ]}),
        json!({"images": [image], "messages": [
            {"role": "user", "content": "<image>find <ref-object>"},
            {"role": "assistant", "content": "<bbox>"},
        ], "objects": {"ref": ["a square"], "bbox": [[10, 10, 60, 60]]}}),
    ]
}

fn losses(folder: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(Path::new(folder).join("log.jsonl")).expect("a log");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let steps = lines.filter(|line| line["kind"] == "step");
    steps
        .map(|line| line["loss"].as_f64().expect("a number"))
        .collect()
}

#[test]
fn an_adapter_is_trained_and_used() {
    let scratch = Scratch::new();
    let (data, to) = (data(&scratch, &examples()), below(&scratch, "run"));
    let flags = [
        "tune",
        "--data",
        &data,
        "--to",
        &to,
        "--target",
        "all-linear",
        "--rank",
        "4",
        "--routing",
        "dense,reroute-pdrop@192",
        "--steps",
        "6",
        "--accumulate",
        "1",
        "--batch",
        "3",
        "--learning-rate",
        "0.005",
        "--warmup",
        "0",
        "--save-every",
        "3",
    ];
    let printed = reroute(&flags).expect("a run");
    assert_eq!(printed.trim(), below(&scratch, "run/adapter"));
    let found = losses(&to);
    assert_eq!(found.len(), 6);
    assert!(found[5] < found[0], "{found:?}");
    refuses(&flags, &["has a run in it", "--resume"]);
    let again: Vec<&str> = flags.iter().copied().chain(["--resume"]).collect();
    reroute(&again).expect("nothing is left to do");
    assert_eq!(losses(&to), found);
    let mut other = again.clone();

    assert_eq!(again[5..7], ["--target", "all-linear"]);
    other[6] = "q_proj";
    refuses(&other, &["begun with another adapter"]);
    // It is one that other commands take, and that can be merged.
    let adapter = below(&scratch, "run/adapter");
    let image = scene("063");
    let asked = [
        "ask",
        "--adapter",
        &adapter,
        "--image",
        &image,
        "--prompt",
        "find that thing",
    ];
    assert!(reroute(&asked).expect("an answer").contains('['));
}

#[test]
fn a_projector_becomes_a_model() {
    for (model, what) in [
        ("llava", "projector"),
        ("qwen2vl", "merger"),
        ("qwen3vl", "lm_head"),
    ] {
        let scratch = Scratch::new();
        let (data, to) = (data(&scratch, &examples()), below(&scratch, "run"));
        let checkpoint = fixture(&format!("{model}/ckpt")).display().to_string();
        let what = match model {
            // Its head is the table of embeddings.
            "qwen3vl" => "embed_tokens",
            _ => what,
        };
        let flags = [
            "tune",
            "--model",
            &checkpoint,
            "--dtype",
            "f32",
            "--data",
            &data,
            "--to",
            &to,
            "--train",
            what,
            "--steps",
            "2",
            "--hold-out",
            "1",
            "--accumulate",
            "1",
        ];
        let printed = reroute(&flags).unwrap_or_else(|error| panic!("{model}: {error}"));
        let made = printed.trim();
        let image = scene("063");
        let asked = [
            "ask",
            "--model",
            made,
            "--image",
            &image,
            "--prompt",
            "what",
            "--max-new-tokens",
            "2",
        ];
        reroute(&asked).unwrap_or_else(|error| panic!("{model}: {error}"));
    }
}

#[test]
fn what_cannot_be_trained_is_refused_with_a_remedy() {
    let scratch = Scratch::new();
    let good = data(&scratch, &examples());
    let to = below(&scratch, "run");
    let with = |more: &[&str]| -> Vec<String> {
        let flags = ["tune", "--data", &good, "--to", &to].into_iter();
        let flags = flags.chain(more.iter().copied());
        flags.map(str::to_owned).collect()
    };
    refuses(
        &with(&["--train", "nothing_of_this"]),
        &["means no parameter"],
    );
    refuses(
        &with(&["--train", "projector", "--dtype", "bf16"]),
        &["bf16", "f32"],
    );
    refuses(&with(&["--routing", "fastv@7"]), &["fastv@7"]);
    refuses(&with(&["--learning-rate", "NaN"]), &["learning_rate"]);
    refuses(&with(&["--warmup", "3"]), &["--warmup"]);
    refuses(&with(&["--hold-out", "3"]), &["leaves none"]);
    refuses(&with(&["--target", "q_prj"]), &["q_prj"]);
    let mut lines = examples();
    lines.push(json!({"image": "missing.png", "expression": "x", "box": [1, 2, 3, 4]}));
    lines.push(json!({"image": scene("063"), "expression": "x", "box": [1, 2, 3000, 4000]}));
    let bad = below(&scratch, "bad.jsonl");
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(&bad, text.join("\n")).expect("can be written");
    let bad = ["tune", "--data", &bad, "--to", &to, "--accumulate", "5"];
    refuses(&bad, &["line 4", "missing.png"]);
    let skipping: Vec<&str> = bad.iter().copied().chain(["--on-bad", "skip"]).collect();
    reroute(&skipping).expect("three are left");
    let text = std::fs::read_to_string(Path::new(&to).join("log.jsonl")).expect("a log");
    assert!(text.contains("\"examples\":3"), "{text}");
}
