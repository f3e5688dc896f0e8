//! What an adapter has beside low-rank changes: modules as a whole, and lengths of rows.

use std::fs;

use reroute_zoo::{AdapterError, Folder, ZooError};
use safetensors::tensor::{SafeTensors, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::golden::{fixture, open};

const TENSORS: &str = "adapter_model.safetensors";
const SETTINGS: &str = "adapter_config.json";

/// What is refused of the adapter of a family, of which only some tensors are left, with a setting changed.
fn refused(
    family: &str,
    keep: impl Fn(&str) -> bool,
    (setting, value): (&str, Value),
) -> AdapterError {
    let from = fixture(&format!("adapters/{family}"));
    let folder = TempDir::new().expect("a folder");
    let file = fs::read(from.join(TENSORS)).expect("the fixture is complete");
    let tensors = SafeTensors::deserialize(&file).expect("safetensors");
    let kept = tensors.tensors().into_iter().filter(|(name, _)| keep(name));
    let file = serialize(kept, None).expect("a file");
    fs::write(folder.path().join(TENSORS), file).expect("a file");
    let settings = fs::read(from.join(SETTINGS)).expect("the fixture is complete");
    let mut settings: Value = serde_json::from_slice(&settings).expect("JSON");
    settings[setting] = value;
    fs::write(folder.path().join(SETTINGS), settings.to_string()).expect("a file");
    let folder = Folder::open(folder.path()).expect("a folder");
    match open(family).model().load_adapter(&folder) {
        Err(ZooError::Adapter(error)) => error,
        other => panic!("{family} {setting}: {:?}", other.err()),
    }
}

/// A module is there as a whole or not at all, and an adapter with lengths has them for every map.
#[test]
fn nothing_is_there_in_part() {
    let same = ("lora_dropout", json!(0.0));
    let merger = |part: &str| format!("base_model.model.model.visual.merger.{part}");
    let all = |_: &str| true;
    let missing = |error: AdapterError, expected: &[&str]| {
        let AdapterError::Mismatch(found) = &error else {
            panic!("{error}");
        };
        assert_eq!(found.mismatch.missing, expected, "{error}");
    };
    let bias = merger("linear_fc1.bias");
    let error = refused("qwen3vl", |name| name != bias, same.clone());
    missing(error, &["visual.merger.fc1.bias"]);
    let rest = |name: &str| !name.contains(".merger.") || name == bias;
    let error = refused("qwen3vl", rest, same.clone());
    let parts = [
        "fc1.weight",
        "fc2.bias",
        "fc2.weight",
        "norm.bias",
        "norm.weight",
    ];
    let parts = parts.map(|part| format!("visual.merger.{part}"));
    missing(error, &parts.each_ref().map(String::as_str));
    let error = refused("qwen3vl", |name| !name.contains(".merger."), same.clone());
    missing(error, &["merger"]);
    let error = refused(
        "qwen3vl",
        all,
        ("modules_to_save", json!(["merger", "lm_head"])),
    );
    missing(error, &["lm_head"]);
    // Tensors of a module that the settings do not name.
    let error = refused("qwen3vl", all, ("modules_to_save", json!(null)));
    let AdapterError::Mismatch(found) = &error else {
        panic!("{error}");
    };
    assert_eq!(found.mismatch.unknown.len(), 6, "{error}");

    let map = "base_model.model.model.language_model.layers.1.mlp.up_proj";
    let lengths = format!("{map}.lora_magnitude_vector");
    let error = refused("qwen2vl", |name| name != lengths, same.clone());
    missing(error, &[&lengths]);
    let error = refused("qwen2vl", all, ("use_dora", json!(false)));
    let AdapterError::Mismatch(found) = &error else {
        panic!("{error}");
    };
    assert_eq!(found.mismatch.unknown.len(), 56, "{error}");
}

/// What does not add up is not added: two lengths of a row, two forms of a module.
#[test]
fn what_two_adapters_bring_must_add_up() {
    for family in ["qwen2vl", "qwen3vl"] {
        let adapter = Folder::open(fixture(&format!("adapters/{family}"))).expect("a folder");
        let error = open(family)
            .model()
            .load_adapters(&[adapter.clone(), adapter]);
        assert!(
            matches!(error, Err(ZooError::Adapter(AdapterError::Several { .. }))),
            "{family}: {:?}",
            error.err()
        );
    }
}

/// Lengths are put into the model: an adapter that had some is not one that could be saved.
#[test]
fn an_adapter_with_lengths_is_merged_and_not_saved() {
    let adapter = Folder::open(fixture("adapters/qwen2vl")).expect("a folder");
    let model = open("qwen2vl")
        .model()
        .load_adapter(&adapter)
        .expect("it fits");
    let folder = TempDir::new().expect("a folder");
    let error = model.save_adapter(folder.path().join("new"));
    assert!(matches!(
        error,
        Err(ZooError::Adapter(AdapterError::PutIn { .. }))
    ));
    assert!(!folder.path().join("new").exists());
    assert_eq!(model.merge_adapters().adapter_parameters(), 0);
}
