//! `reroute eval` as users run it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::program::{Scratch, refuses, reroute, scene};

fn fixtures() -> String {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/eval/tests/fixtures");
    fixtures.to_string()
}

fn below(scratch: &Scratch, name: &str) -> String {
    format!("{}/{name}", scratch.path())
}

#[test]
fn routings_are_measured_and_shards_joined() {
    let scratch = Scratch::new();
    let data = fixtures();
    let base = [
        "eval",
        "--task",
        "refcoco",
        "--data",
        &data,
        "--limit",
        "6",
        "--max-new-tokens",
        "8",
        "--resamples",
        "200",
    ];
    let routing = ["--routing", "pdrop@192", "reroute-pdrop@192"];
    let whole = below(&scratch, "whole");
    let printed = reroute(&[&base[..], &routing, &["--out", &whole, "--batch", "1"]].concat());
    let printed = printed.expect("a run");
    for words in [
        "refcoco val: 6 samples on 3 pictures",
        "accuracy at IoU 0.5",
        "\ndense",
        "\nreroute-pdrop@192",
    ] {
        assert!(printed.contains(words), "{printed}");
    }
    for name in [
        "records-dense.jsonl",
        "records-pdrop@192.jsonl",
        "results.json",
        "accuracy.svg",
    ] {
        assert!(Path::new(&whole).join(name).is_file(), "{name}");
    }
    let parts = below(&scratch, "parts");
    for shard in ["1/2", "2/2"] {
        let flags = [
            &base[..],
            &routing,
            &["--out", &parts, "--batch", "1", "--shard", shard],
        ];
        reroute(&flags.concat()).expect("a part");
    }
    for name in ["results-shard-1-of-2.csv", "accuracy-shard-2-of-2.svg"] {
        assert!(Path::new(&parts).join(name).is_file(), "{name}");
    }
    let joined = below(&scratch, "joined");
    let merged = [
        "eval",
        "merge",
        &parts,
        "--out",
        &joined,
        "--resamples",
        "200",
        "--json",
    ];
    let report: Value = serde_json::from_str(&reroute(&merged).expect("the whole")).expect("JSON");
    let expected = fs::read(Path::new(&whole).join("results.json")).expect("results");
    let expected: Value = serde_json::from_slice(&expected).expect("JSON");
    assert_eq!(report, expected);
    assert_eq!(report["results"][0]["routing"], json!("dense"));
}

#[test]
fn several_tasks_have_a_folder_each() {
    let scratch = Scratch::new();
    let (data, out) = (fixtures(), below(&scratch, "out"));
    let flags = [
        "eval",
        "--task",
        "pope",
        "--task",
        "textvqa",
        "--data",
        &data,
        "--limit",
        "2",
        "--out",
        &out,
        "--max-new-tokens",
        "4",
    ];
    let printed = reroute(&flags).expect("two runs");
    assert!(
        printed.contains("pope test: 2") && printed.contains("textvqa validation: 2"),
        "{printed}"
    );
    let csv = fs::read_to_string(Path::new(&out).join("results.csv")).expect("a table");
    assert!(csv.contains("\npope,test,dense,") && csv.contains("\ntextvqa,validation,dense,"));
    assert_eq!(csv.matches("average_tokens").count(), 1);
    assert!(
        Path::new(&out)
            .join("pope-test/records-dense.jsonl")
            .is_file()
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    let scratch = Scratch::new();
    let (data, out) = (fixtures(), below(&scratch, "out"));
    let with = |flags: &[&str], words: &[&str]| {
        let base = ["eval", "--data", &data, "--out", &out];
        refuses(&[&base[..], flags].concat(), words);
        assert!(!Path::new(&out).exists());
    };
    with(&["--task", "coco"], &["--task", "refcoco+"]);
    with(
        &["--task", "refcoco", "--split", "testA"],
        &["testA", "hf download"],
    );
    with(&["--task", "refcoco", "--no-dense"], &["--no-dense"]);
    with(&["--task", "refcoco", "--routing", "no"], &["--routing no"]);
    with(
        &["--task", "refcoco", "--routing", "dense", "dense"],
        &["dense", "twice"],
    );
    with(
        &["--task", "refcoco", "--shard", "3/2"],
        &["--shard", "3/8"],
    );
    with(
        &["--task", "refcoco", "--batch", "0"],
        &["--batch", "1 or more"],
    );
    refuses(&["eval", "--task", "pope"], &["--data"]);
    refuses(
        &["eval", "merge", &scene("063"), "--out", &out],
        &["063.png"],
    );
    refuses(
        &["eval", "merge", &data, "--out", &out],
        &["no records of shards"],
    );
}
