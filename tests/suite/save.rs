//! Saved models: every family comes back, and what cannot be saved leaves what is there.

mod interrupted;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use reroute_checkpoint::{Dtype, Folder, Layout, Shards};
use reroute_cli::backend::{Backend, Device};
use reroute_zoo::{
    Model, ModelConfig, OpenOptions, SaveError, SaveOptions, Vlm, ZooError, embedded,
};
use serde_json::Value;

use crate::golden::fixture;
use crate::program::{BUILT_IN, Scratch, report};
use crate::support::{weights, zeroed};

const FAMILIES: [&str; 4] = ["llava", "qwen2vl", "qwen25vl", "qwen3vl"];

/// Every type that is written, and what it is called in files and configurations.
const TYPES: [(DType, Dtype, &str); 3] = [
    (DType::F32, Dtype::F32, "float32"),
    (DType::F16, Dtype::F16, "float16"),
    (DType::BF16, Dtype::BF16, "bfloat16"),
];

/// If it is set, saved folders are kept below it, for `tests/fixtures/check_saved.py`.
const KEEP: &str = "REROUTE_KEEP_SAVED";

/// Checkpoints of every family, with every tower and decoder, by their paths below `tests/fixtures`, and
/// the built-in one.
fn sources() -> Vec<(String, Folder)> {
    let variants = entries(fixture("llava_variants")).into_iter();
    let variants = variants.map(|name| format!("llava_variants/{name}"));
    let families = FAMILIES.map(|family| format!("{family}/ckpt"));
    let nuwa = ["llava", "qwen"].map(|family| format!("nuwa/{family}/ckpt"));
    let names = families.into_iter().chain(nuwa).chain(variants);
    let folders = names.filter(|name| fixture(name).is_dir());
    let opened = |name: String| (name.clone(), Folder::open(fixture(&name)).unwrap());
    let built_in = ("built_in".to_owned(), embedded::checkpoint());
    folders.map(opened).chain([built_in]).collect()
}

fn open(folder: &Folder, dtype: DType) -> Model<Backend> {
    let config = ModelConfig::open(folder).unwrap();
    Model::open(&config, folder, dtype, &Device::default(), &mut |_| {
        std::ops::ControlFlow::Continue(())
    })
    .unwrap()
}

fn as_type(dtype: DType) -> SaveOptions {
    SaveOptions {
        dtype: Some(dtype),
        ..SaveOptions::default()
    }
}

/// What a folder holds: names of all entries, sorted.
fn entries(path: impl AsRef<Path>) -> Vec<String> {
    let entries = path.as_ref().read_dir().unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The names of a family, the shapes and numbers of the source, in the type asked for; what the loader makes
/// of both is the same.
#[test]
fn every_model_comes_back_bit_for_bit() {
    for (name, source) in sources() {
        let config = ModelConfig::open(&source).unwrap();
        let stored = Shards::open(&source).unwrap();
        let model = open(&source, DType::F32);
        let scratch = Scratch::new();
        for (dtype, file_dtype, title) in TYPES {
            let saved = model.save(scratch.at("saved"), &source, &as_type(dtype));
            let saved = saved.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(saved.files, ["model.safetensors"]);
            if let Some(keep) = env::var_os(KEEP) {
                let options = SaveOptions {
                    max_shard_bytes: 1_000_000,
                    ..as_type(dtype)
                };
                let to = Path::new(&keep).join(&name).join(title);
                model.save(to, &source, &options).unwrap();
            }
            let folder = Folder::open(scratch.at("saved")).unwrap();
            let written = Shards::open(&folder).unwrap();
            let mut expected = BTreeMap::new();
            for stored_name in stored.names() {
                let path = config.names().module_path(stored_name).unwrap();
                let file_name = config.file_name(&path);
                expected.insert(file_name.unwrap(), stored_name);
            }
            if config.decoder().tie_word_embeddings {
                expected.retain(|_, name| !name.contains("lm_head"));
            }
            assert!(
                written.names().eq(expected.keys().map(String::as_str)),
                "{name}"
            );
            for (file_name, stored_name) in &expected {
                let info = written.info(file_name).unwrap();
                assert_eq!(info.dtype, file_dtype, "{name}: {file_name}");
                // Shapes, too.
                let read = |shards: &Shards, name| shards.read(name, dtype, Layout::AsStored);
                let (found, wanted) = (read(&written, file_name), read(&stored, stored_name));
                assert!(found.unwrap() == wanted.unwrap(), "{name}: {file_name}");
            }
            let again = open(&folder, dtype);
            assert!(weights(&again) == weights(&open(&source, dtype)), "{name}");
            let config = fs::read_to_string(scratch.at("saved/config.json")).unwrap();
            let of_other_types = TYPES.iter().filter(|(_, _, other)| *other != title);
            for (_, _, other) in of_other_types {
                assert!(
                    !config.contains(&format!("\"{other}\"")),
                    "{name}: {config}"
                );
            }
        }
    }
}

/// A file that is written from what was read has the same bytes, if it had this form.
#[test]
fn names_are_those_of_the_generation() {
    for family in FAMILIES {
        let source = Folder::open(fixture(family).join("ckpt")).unwrap();
        let scratch = Scratch::new();
        let model = open(&source, DType::F32);
        model
            .save(scratch.at("saved"), &source, &SaveOptions::default())
            .unwrap();
        let folder = Folder::open(scratch.at("saved")).unwrap();
        let fingerprint = |folder| Shards::open(folder).unwrap().fingerprint().unwrap();
        assert_eq!(fingerprint(&folder), fingerprint(&source), "{family}");
        // Beside the weights, everything is what it was.
        for name in entries(fixture(family).join("ckpt")) {
            let read = |path: PathBuf| fs::read(path.join(&name)).unwrap();
            let (from, to) = (fixture(family).join("ckpt"), scratch.at("saved").into());
            match name.as_str() {
                "model.safetensors" => {}
                "config.json" => {
                    let parsed = |json: Vec<u8>| serde_json::from_slice::<Value>(&json).unwrap();
                    assert_eq!(parsed(read(to)), parsed(read(from)), "{family}");
                }
                _ => assert!(read(to) == read(from), "{family}: {name}"),
            }
        }
        assert_eq!(
            entries(scratch.at("saved")),
            entries(fixture(family).join("ckpt"))
        );
    }
}

#[test]
fn a_saved_model_answers_as_before_from_one_file_or_several() {
    let picture = fixture("qwen_cases/pictures/small.png")
        .display()
        .to_string();
    let answer = |model: &str| {
        let question = ["--image", &picture, "--prompt", "What is this?"];
        let flags = ["ask", "--model", model, "--max-new-tokens", "3"];
        report(&[&flags[..], &question].concat())
    };
    for family in FAMILIES {
        let path = fixture(family).join("ckpt");
        let source = Folder::open(&path).unwrap();
        let model = open(&source, DType::F32);
        let scratch = Scratch::new();
        let expected = answer(path.to_str().unwrap());
        for max_shard_bytes in [u64::MAX, 500_000, 1] {
            let options = SaveOptions {
                max_shard_bytes,
                ..SaveOptions::default()
            };
            let saved = model.save(scratch.at("saved"), &source, &options).unwrap();
            assert_eq!(saved.files.len() > 1, max_shard_bytes < u64::MAX);
            assert_eq!(answer(&scratch.at("saved")), expected, "{family}");
            let index = scratch.at("saved/model.safetensors.index.json");
            // Shards of the save before are gone.
            let weights = entries(scratch.at("saved"));
            let weights = weights.iter().filter(|name| name.ends_with(".safetensors"));
            assert!(weights.eq(&saved.files), "{family}");
            if saved.files.len() > 1 {
                let index: Value = serde_json::from_slice(&fs::read(index).unwrap()).unwrap();
                let weight_map = index["weight_map"].as_object().unwrap();
                let shards = Shards::open(&Folder::open(scratch.at("saved")).unwrap()).unwrap();
                assert_eq!(weight_map.len(), shards.names().count());
                assert_eq!(index["metadata"]["total_size"], shards.total_bytes());
            } else {
                assert!(!Path::new(&index).exists());
            }
        }
    }
}

/// Also where it came from, and where it was mapped from.
#[test]
fn a_model_is_saved_over_its_source() {
    let scratch = Scratch::built_in();
    let source = scratch.folder();
    let vlm: Vlm<Backend> =
        Vlm::open(&source, &OpenOptions::default(), &Device::default()).unwrap();
    let before = entries(scratch.path());
    let changed = zeroed(vlm.model().clone());
    changed
        .save(scratch.path(), &source, &SaveOptions::default())
        .unwrap();
    assert_eq!(entries(scratch.path()), before);
    let zeros = weights(&open(&scratch.folder(), DType::F32));
    assert!(zeros.values().flatten().flatten().all(|&x| x == 0.0));
    // What was read is still there.
    assert!(weights(vlm.model()) == weights(BUILT_IN.model()));

    vlm.model()
        .save(scratch.path(), &source, &as_type(DType::F16))
        .unwrap();
    let job = reroute_convert::Job::new(scratch.path(), scratch.at("model.bpk"));
    reroute_convert::Plan::new(&job)
        .unwrap()
        .write(&mut |_| ())
        .unwrap();
    let mapped = open(&scratch.folder(), DType::F16);
    mapped
        .save(scratch.path(), &source, &SaveOptions::default())
        .unwrap();
    assert_eq!(entries(scratch.path()), before);
    let again = open(&scratch.folder(), DType::F16);
    assert!(weights(&again) == weights(&mapped));
    assert!(weights(&again) == weights(&open(&embedded::checkpoint(), DType::F16)));
}

/// Who may read a checkpoint is not changed by saving over it.
#[cfg(unix)]
#[test]
fn a_private_checkpoint_stays_private() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let (model, like) = (BUILT_IN.model(), embedded::checkpoint());
    let to = scratch.at("private");
    model.save(&to, &like, &SaveOptions::default()).unwrap();
    fs::set_permissions(&to, fs::Permissions::from_mode(0o700)).unwrap();
    model.save(&to, &like, &SaveOptions::default()).unwrap();
    assert_eq!(
        fs::metadata(&to).unwrap().permissions().mode() & 0o777,
        0o700
    );
}

/// Nothing but a checkpoint whose files all have a successor is replaced.
#[test]
fn what_is_no_such_checkpoint_stays() {
    let model = BUILT_IN.model();
    let like = embedded::checkpoint();
    let options = SaveOptions::default();
    let scratch = Scratch::new();
    let refuse = |to: &str, expected: &str| {
        let error = model.save(to, &like, &options).unwrap_err();
        let is_typed = matches!(
            &error,
            ZooError::Save(SaveError::Target { .. } | SaveError::Occupied { .. })
        );
        assert!(is_typed && error.to_string().contains(expected), "{error}");
    };
    let file = scratch.write("file", "precious");
    refuse(&file, "is a file");
    fs::create_dir(scratch.at("folder")).unwrap();
    scratch.write("folder/notes.txt", "precious");
    refuse(&scratch.at("folder"), "no config.json");
    // Of another program's making.
    fs::create_dir(scratch.at("program")).unwrap();
    scratch.write("program/config.json", "{\"my\": \"settings\"}");
    refuse(&scratch.at("program"), "no weights");
    scratch.remove("program/config.json");
    fs::remove_dir(scratch.at("program")).unwrap();
    for (name, content) in [("config.json", "{}"), ("model.safetensors", "")] {
        scratch.write(&format!("folder/{name}"), content);
    }
    refuse(&scratch.at("folder"), "\"notes.txt\"");
    scratch.remove("folder/notes.txt");
    fs::create_dir(scratch.at("folder/.git")).unwrap();
    refuse(&scratch.at("folder"), "\".git\"");
    refuse(&scratch.at("folder/.."), "name");
    refuse(".", "name");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(scratch.at("folder"), scratch.at("link")).unwrap();
        refuse(&scratch.at("link"), "is a link");
        refuse(&scratch.at("link/"), "is a link");
        scratch.remove("link");
    }
    assert_eq!(scratch.entries(), ["file", "folder"]);
    assert_eq!(
        entries(scratch.at("folder")),
        [".git", "config.json", "model.safetensors"]
    );
    assert_eq!(scratch.read("file"), b"precious");
    fs::remove_dir(scratch.at("folder/.git")).unwrap();
    fs::create_dir(scratch.at("empty")).unwrap();
    for to in ["folder", "empty", "new/below/another"] {
        model.save(scratch.at(to), &like, &options).unwrap();
        open(&Folder::open(scratch.at(to)).unwrap(), DType::F32);
    }
    assert_eq!(scratch.entries(), ["empty", "file", "folder", "new"]);
}

/// A folder that describes another model is no pattern for this one, and is told by names.
#[test]
fn a_model_is_saved_like_a_folder_of_its_own() {
    let scratch = Scratch::new();
    let options = SaveOptions::default();
    let save = |like: &str| {
        let like = Folder::open(fixture(like)).unwrap();
        BUILT_IN.model().save(scratch.at("to"), &like, &options)
    };
    let error = save("qwen2vl/ckpt").unwrap_err();
    assert!(matches!(&error, ZooError::OtherFamily { .. }), "{error}");
    let error = save("llava_variants/dinov2").unwrap_err();
    let ZooError::Save(SaveError::OtherModel { mismatch, .. }) = &error else {
        panic!("{error}");
    };
    assert!(!mismatch.missing.is_empty() && !mismatch.misshapen.is_empty());
    assert!(error.to_string().contains("dinov2"), "{error}");
    let error = save("scenes").unwrap_err();
    assert!(matches!(&error, ZooError::Checkpoint(_)), "{error}");
    assert_eq!(scratch.entries(), [""; 0]);
}
