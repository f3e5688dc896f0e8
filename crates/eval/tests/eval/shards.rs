//! Parts of a run, and the whole that they make.

use std::fs;
use std::path::PathBuf;

use reroute_eval::record::read;
use reroute_eval::{EvalError, Shard, Task, merge};

use crate::{folder, killed, measure, open, settings};

#[test]
fn shards_cover_everything_once() {
    for count in [0, 1, 5, 100, 10_833] {
        for of in [1, 2, 3, 7, 64] {
            let ranges = (1..=of).map(|index| Shard { index, of }.samples(count));
            assert!(ranges.flatten().eq(0..count), "{count} in {of}");
        }
    }
    for (text, good) in [
        ("1/1", true),
        ("3/8", true),
        ("0/3", false),
        ("4/3", false),
        ("2", false),
        ("a/b", false),
    ] {
        assert_eq!(text.parse::<Shard>().is_ok(), good, "{text}");
    }
}

#[test]
fn merged_shards_are_the_whole() {
    let data = open(Task::RefCoco, "RefCOCO");
    let mut settings = settings(&["reroute-pdrop@192", "dense"]);
    settings.limit = Some(17);
    // Alone, so that no answer depends on its neighbours by a last place.
    settings.batch = 1;
    let whole = folder();
    let expected = measure(&data, &settings, whole.path()).expect("a run");
    let parts: Vec<tempfile::TempDir> = (0..3).map(|_| folder()).collect();
    let folders: Vec<PathBuf> = parts.iter().map(|part| part.path().to_owned()).collect();
    let to = folder();
    let refused = |folders: &[PathBuf]| {
        let error = merge(folders, to.path()).expect_err("not the whole");
        assert!(matches!(error, EvalError::Merge { .. }), "{error}");
        assert_eq!(fs::read_dir(to.path()).expect("a folder").count(), 0);
        error.to_string()
    };
    assert!(refused(&folders).contains("no records of shards"));
    let shard = |settings: &mut reroute_eval::Settings, index| {
        settings.shard = Shard { index, of: 3 };
    };
    for index in [1, 3] {
        shard(&mut settings, index);
        measure(&data, &settings, &folders[index - 1]).expect("a part");
    }
    // The second is missing, then killed.
    let error = refused(&folders);
    for words in [
        "6 of 17 samples of dense",
        "(5-10)",
        "shard 2/3",
        "--resume",
    ] {
        assert!(error.contains(words), "{error}");
    }
    shard(&mut settings, 2);
    killed(&data, &settings, &folders[1], 5);
    assert!(refused(&folders).contains("shard 2/3"));
    settings.resume = true;
    measure(&data, &settings, &folders[1]).expect("the rest of it");
    // The same twice, and another run.
    let twice = [&folders[..], &folders[1..2]].concat();
    let error = refused(&twice);
    assert!(
        error.contains("sample 5 of dense is in") && error.contains("once"),
        "{error}"
    );
    let other = folder();
    settings.model = "another".into();
    settings.resume = false;
    measure(&data, &settings, other.path()).expect("a part of another run");
    let mixed = [
        folders[0].clone(),
        other.path().to_owned(),
        folders[2].clone(),
    ];
    let error = refused(&mixed);
    assert!(error.contains("are of different runs: model is"), "{error}");

    let merged = merge(&folders, to.path()).expect("the whole");
    // Dense comes first.
    assert_eq!(merged[0].header, expected[1].header);
    for (merged, expected) in merged.iter().zip(expected.iter().rev()) {
        assert_eq!(merged, expected);
        let path = to
            .path()
            .join(format!("records-{}.jsonl", expected.header.routing));
        assert_eq!(read(&path).expect("records"), *expected);
    }
    // The same again, and never over what another run has left.
    merge(&folders, to.path()).expect("the same");
    let path = to.path().join("records-reroute-pdrop@192.jsonl");
    let mine = fs::read_to_string(&path).expect("records");
    let others = mine.replacen("\"refcoco\"", "\"refcocog\"", 1);
    assert_ne!(mine, others);
    fs::write(&path, &others).expect("a file");
    fs::remove_file(to.path().join("records-dense.jsonl")).expect("removed");
    let error = merge(&folders, to.path()).expect_err("another run");
    assert!(matches!(error, EvalError::OtherRun { .. }), "{error}");
    assert!(error.to_string().contains("task: \"refcocog\""), "{error}");
    assert_eq!(fs::read_to_string(&path).expect("records"), others);
    assert!(!to.path().join("records-dense.jsonl").exists());
    // Neither over what nobody can read, nor while a run is under way.
    fs::write(&path, "what is it?\n").expect("a file");
    let error = merge(&folders, to.path()).expect_err("no records");
    assert!(matches!(error, EvalError::Record { .. }), "{error}");
    fs::remove_file(&path).expect("removed");
    let lock = fs::File::create(to.path().join(".lock")).expect("a file");
    lock.lock().expect("it can be locked");
    let error = merge(&folders, to.path()).expect_err("a run");
    assert!(matches!(error, EvalError::Busy { .. }), "{error}");
}

#[test]
fn a_shard_is_not_measured_twice_at_once() {
    let data = open(Task::RefCoco, "RefCOCO");
    let mut settings = settings(&["dense"]);
    settings.limit = Some(4);
    let scratch = folder();
    let path = scratch.path().join(".lock");
    let file = fs::File::create(path).expect("a file");
    file.lock().expect("it can be locked");
    let error = measure(&data, &settings, scratch.path()).expect_err("somebody is there");
    assert!(matches!(error, EvalError::Busy { .. }), "{error}");
    // Another shard has a lock of its own.
    settings.shard = Shard { index: 2, of: 2 };
    measure(&data, &settings, scratch.path()).expect("a part");
    settings.shard = Shard { index: 5, of: 5 };
    settings.limit = Some(2);
    // 2 samples in 5 parts: the last part has one, the first has none.
    measure(&data, &settings, scratch.path()).expect("a part");
    settings.shard = Shard { index: 1, of: 5 };
    let error = measure(&data, &settings, scratch.path())
        .expect_err("nothing to do")
        .to_string();
    assert!(error.contains("give fewer shards"), "{error}");
}
