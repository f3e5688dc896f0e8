//! Saves that failed or were killed, and what others are saving meanwhile.

use std::env;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::Backend as AnyBackend;
use burn::tensor::{DType, Tensor};
use reroute_checkpoint::Folder;
use reroute_zoo::{Model, SaveError, SaveOptions, ZooError, embedded};

use super::{Backend, as_type, entries, open};
use crate::program::{BUILT_IN, Scratch};
use crate::support::{weights, zeroed};

/// The model with values in its last parameter that f16 does not have.
fn large(model: Model<Backend>) -> Model<Backend> {
    struct Last(usize);
    impl<B: AnyBackend> ModuleMapper<B> for Last {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            self.0 -= 1;
            match self.0 {
                0 => param.map(|value| value.ones_like() * 1e6),
                _ => param,
            }
        }
    }
    let tensors = weights(&model).len();
    model.map(&mut Last(tensors))
}

/// The last tensor of all is refused: all before are in the files by then.
#[test]
fn a_failure_in_the_middle_leaves_the_old_checkpoint() {
    let scratch = Scratch::built_in();
    let like = embedded::checkpoint();
    let before = entries(scratch.path());
    let model = large(BUILT_IN.model().clone());
    let options = SaveOptions {
        max_shard_bytes: 100_000,
        ..as_type(DType::F16)
    };
    let parent = Path::new(&scratch.path()).parent().unwrap().to_path_buf();
    let name = Path::new(&scratch.path()).file_name().unwrap().to_owned();
    let beside = || {
        let names = entries(&parent).into_iter();
        let is_ours = |found: &String| found.contains(name.to_str().unwrap());
        names.filter(is_ours).count()
    };
    let error = model.save(scratch.path(), &like, &options).unwrap_err();
    assert!(
        matches!(&error, ZooError::Save(SaveError::Overflow { .. })),
        "{error}"
    );
    assert!(error.to_string().contains("BF16 or F32"), "{error}");
    assert_eq!((entries(scratch.path()), beside()), (before, 1));
    assert!(weights(&open(&scratch.folder(), DType::F32)) == weights(BUILT_IN.model()));
    // The same in another type is saved.
    model
        .save(scratch.path(), &like, &as_type(DType::BF16))
        .unwrap();
    assert_eq!(beside(), 1);
}

/// What is unlocked was left by who is gone; what is locked, somebody writes.
#[test]
fn what_a_killed_save_has_left_is_removed_by_the_next() {
    let scratch = Scratch::new();
    let like = embedded::checkpoint();
    let save = |model: &Model<Backend>| model.save(scratch.at("to"), &like, &as_type(DType::F16));
    save(BUILT_IN.model()).unwrap();
    let begun = [".to.partial-1-0", ".to.partial-2-0", ".other.partial-1-0"];
    for name in begun {
        fs::create_dir(scratch.at(name)).unwrap();
        scratch.write(&format!("{name}/model.safetensors"), "half of i");
        scratch.write(&format!("{name}.lock"), "");
    }
    let busy = File::open(scratch.at(".to.partial-2-0.lock")).unwrap();
    busy.lock().unwrap();
    save(BUILT_IN.model()).unwrap();
    let of_others = [".other.partial-1-0", ".other.partial-1-0.lock"];
    let of_the_living = [".to.partial-2-0", ".to.partial-2-0.lock"];
    let left = [&of_others[..], &of_the_living, &["to"]].concat();
    assert_eq!(scratch.entries(), left);
    drop(busy);
    save(BUILT_IN.model()).unwrap();
    assert_eq!(scratch.entries(), [&of_others[..], &["to"]].concat());

    // Who was killed while folders changed places in steps has left the old one beside.
    let replaced = scratch.at(".to.partial-1-0.replaced");
    fs::rename(scratch.at("to"), replaced).unwrap();
    scratch.write(".to.partial-1-0.lock", "");
    save(&large(BUILT_IN.model().clone())).unwrap_err();
    assert_eq!(scratch.entries(), [&of_others[..], &["to"]].concat());
    open(&Folder::open(scratch.at("to")).unwrap(), DType::F32);
}

#[test]
fn two_saves_to_one_place_do_not_disturb_each_other() {
    let scratch = Scratch::new();
    let like = embedded::checkpoint();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..3 {
                    let options = SaveOptions::default();
                    let saved = BUILT_IN.model().save(scratch.at("to"), &like, &options);
                    saved.unwrap();
                }
            });
        }
    });
    assert_eq!(scratch.entries(), ["to"]);
    let found = open(&Folder::open(scratch.at("to")).unwrap(), DType::F32);
    assert!(weights(&found) == weights(BUILT_IN.model()));
}

/// Where the process that saves does it.
const TO: &str = "REROUTE_SAVE_TO";

/// Saves the built-in model and one of zeros in turn where it is told to, until it is killed. Told nothing,
/// it does nothing.
#[test]
fn the_process_that_saves() {
    let Some(to) = env::var_os(TO) else {
        return;
    };
    let like = embedded::checkpoint();
    let zeros = zeroed(BUILT_IN.model().clone());
    let options = SaveOptions {
        max_shard_bytes: 100_000,
        ..SaveOptions::default()
    };
    loop {
        BUILT_IN.model().save(&to, &like, &options).unwrap();
        zeros.save(&to, &like, &options).unwrap();
    }
}

#[test]
fn a_kill_leaves_the_old_checkpoint_or_the_new_one() {
    let scratch = Scratch::new();
    let like = embedded::checkpoint();
    let to = scratch.at("to");
    let original = weights(BUILT_IN.model());
    let zeros = weights(&zeroed(BUILT_IN.model().clone()));
    BUILT_IN
        .model()
        .save(&to, &like, &SaveOptions::default())
        .unwrap();
    for milliseconds in [0, 7, 19, 40, 75, 120] {
        let mut process = Command::new(env::current_exe().unwrap())
            .args(["--exact", "save::interrupted::the_process_that_saves"])
            .env(TO, &to)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It has begun when there is something beside.
        while scratch.entries() == ["to"] {
            assert!(process.try_wait().unwrap().is_none(), "it ended by itself");
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_millis(milliseconds));
        process.kill().unwrap();
        process.wait().unwrap();
        let found = weights(&open(&Folder::open(&to).unwrap(), DType::F32));
        assert!(found == original || found == zeros, "{milliseconds} ms");
        BUILT_IN
            .model()
            .save(&to, &like, &SaveOptions::default())
            .unwrap();
        assert_eq!(scratch.entries(), ["to"], "{milliseconds} ms");
    }
}
