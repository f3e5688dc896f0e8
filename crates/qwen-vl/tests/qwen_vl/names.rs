//! From names in checkpoints to parameters.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use burn::tensor::DType;
use burn_flex::Flex;
use qwen_vl::{NAMES, QwenVl};
use reroute_checkpoint::{Folder, LoadOptions, Shards, load_into};
use reroute_family::{FamilyConfig, FamilyModel};
use safetensors::SafeTensors;

use crate::fixture::{FAMILIES, config, path, read};

fn names(family: &str) -> Vec<String> {
    let bytes = read(&format!("{family}/ckpt/model.safetensors"));
    let names = SafeTensors::deserialize(&bytes).unwrap();
    names.names().into_iter().map(String::from).collect()
}

/// The other spelling of a name.
fn respelled(name: &str) -> String {
    let spellings = [
        ("visual.", "model.visual."),
        ("model.", "model.language_model."),
    ];
    for (old, new) in spellings {
        if let Some(rest) = name.strip_prefix(new) {
            return format!("{old}{rest}");
        }
    }
    for (old, new) in spellings {
        if let Some(rest) = name.strip_prefix(old) {
            return format!("{new}{rest}");
        }
    }
    name.into()
}

#[test]
fn old_and_new_spelling_mean_the_same_parameter() {
    for family in FAMILIES {
        let names = names(family);
        let paths: BTreeSet<String> = names
            .iter()
            .map(|name| {
                let path = NAMES.module_path(name).unwrap_or_else(|| panic!("{name}"));
                let other = respelled(name);
                assert_eq!(
                    NAMES.module_path(&other).as_ref(),
                    Some(&path),
                    "{name}, {other}"
                );
                path
            })
            .collect();
        assert_eq!(paths.len(), names.len(), "{family}");
    }
}

/// Whatever a checkpoint of the hub is read from is what it is written to.
#[test]
fn every_parameter_is_written_as_the_hub_has_it() {
    for family in FAMILIES {
        let config = config(family);
        for name in names(family) {
            let path = NAMES.module_path(&name).unwrap();
            let written = config.file_name(&path);
            assert_eq!(written, Some(name), "{family}");
            let any = NAMES.file_name(&path).unwrap();
            assert_eq!(NAMES.module_path(&any), Some(path), "{any}");
        }
        assert_eq!(config.file_name("projector.weight"), None);
    }
}

#[test]
fn every_parameter_has_its_tensor() {
    for family in FAMILIES {
        let folder = Folder::open(path(family).join("ckpt")).unwrap();
        let shards = Shards::open(&folder).unwrap();
        let model = QwenVl::<Flex>::new(&config(family), &Default::default()).unwrap();
        let options = LoadOptions::new(DType::F32);
        let loaded = load_into(model, &shards, &NAMES, &options, &mut |_| {
            ControlFlow::Continue(())
        });
        assert!(loaded.is_ok(), "{family}: {}", loaded.unwrap_err());
    }
}

#[test]
fn the_head_of_a_tied_checkpoint_is_known() {
    assert_eq!(
        NAMES.module_path("lm_head.weight").as_deref(),
        Some(config("qwen2vl").tied_head())
    );
}
