//! Runs that were interrupted, met others, or found something changed.

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use reroute_convert::{ConvertError, Form, Job, Phase, Plan, Report};

use super::{contents, convert, small, source};
use crate::program::{Scratch, f32s, safetensors};

/// Runs a conversion that dies when so many bytes have been written and verified.
fn interrupted(job: &Job, at: u64) {
    let plan = Plan::new(job).unwrap();
    let run = catch_unwind(AssertUnwindSafe(|| {
        plan.write(&mut |progress| assert!(progress.done_bytes < at, "interrupted"))
    }));
    assert!(run.is_err(), "it was not interrupted");
}

#[test]
fn an_interrupted_run_is_taken_up_and_ends_the_same() {
    let (from, to) = (source("llava"), Scratch::new());
    let job_to = |name: &str, form: Form| {
        let mut job = Job::new(&from, to.at(name));
        job.form = Some(form);
        job.max_shard_bytes = 1_000_000;
        job
    };
    for form in [Form::Burnpack, Form::HuggingFace] {
        let whole = job_to(&format!("whole {form:?}"), form);
        convert(&whole).unwrap();
        let total_bytes = 2 * Plan::new(&Job::new(&from, to.at("any")))
            .unwrap()
            .total_bytes();
        for tenth in [1, 4, 6, 9] {
            let name = format!("{form:?} {tenth}");
            let job = job_to(&name, form);
            interrupted(&job, total_bytes * tenth / 10);
            let mut written = 0;
            let report = Plan::new(&job).unwrap().write(&mut |progress| {
                written += usize::from(progress.phase == Phase::Write);
            });
            let resumed = report.unwrap().resumed;
            assert!(resumed > 0, "{name}");
            // One call for each tensor, which are smaller than a MiB, and one for each header.
            assert!(written <= 150 - resumed + 4, "{name}");
            for entry in whole.to.read_dir().unwrap() {
                let entry = entry.unwrap();
                let twin = fs::read(job.to.join(entry.file_name())).unwrap();
                assert!(twin == fs::read(entry.path()).unwrap(), "{name}: {entry:?}");
            }
            let left = job.to.read_dir().unwrap().count();
            assert_eq!(left, whole.to.read_dir().unwrap().count(), "{name}");
        }
    }
}

/// A conversion to a folder of four shards.
fn to_shards(from: &str, to: String) -> Job {
    let mut job = Job::new(from, to);
    job.form = Some(Form::HuggingFace);
    job.max_shard_bytes = 1_000_000;
    job
}

#[test]
fn finished_shards_that_have_come_to_harm_are_written_again() {
    let (from, to) = (source("llava"), Scratch::new());
    let whole = to_shards(&from, to.at("whole"));
    convert(&whole).unwrap();
    let bytes = Plan::new(&to_shards(&from, to.at("any"))).unwrap();
    let bytes = bytes.total_bytes();
    let harm = |name: &str, harm: fn(&mut Vec<u8>)| {
        let job = to_shards(&from, to.at(name));
        interrupted(&job, bytes * 3 / 2);
        let shard = job.to.join("model-00002-of-00004.safetensors");
        let mut content = fs::read(&shard).unwrap();
        harm(&mut content);
        fs::write(&shard, content).unwrap();
        let mut done = 0;
        let plan = Plan::new(&job);
        let written = plan.and_then(|plan| plan.write(&mut |now| done = now.done_bytes));
        assert!(done <= 2 * bytes);
        (job, written)
    };
    for (name, how) in [
        (
            "cut off",
            (|content| content.truncate(content.len() / 2)) as fn(&mut Vec<u8>),
        ),
        ("flipped", |content| *content.last_mut().unwrap() ^= 1),
        ("too long", |content| content.push(0)),
    ] {
        let (job, written) = harm(name, how);
        assert!((1..100).contains(&written.unwrap().resumed), "{name}");
        for entry in whole.to.read_dir().unwrap() {
            let entry = entry.unwrap();
            let twin = fs::read(job.to.join(entry.file_name())).unwrap();
            assert!(twin == fs::read(entry.path()).unwrap(), "{name}: {entry:?}");
        }
    }
    // What begins in another way is of others.
    let (job, written) = harm("replaced", |content| *content = b"precious".to_vec());
    let error = written.unwrap_err();
    assert!(matches!(error, ConvertError::Occupied { .. }), "{error}");
    let shard = job.to.join("model-00002-of-00004.safetensors");
    assert_eq!(fs::read(shard).unwrap(), b"precious");
}

#[test]
fn two_conversions_do_not_write_to_one_place() {
    let (from, to) = (source("llava"), Scratch::new());
    let job = Job::new(&from, to.at("model.bpk"));
    let (first, second) = (Plan::new(&job).unwrap(), Plan::new(&job).unwrap());
    let of_others = Plan::new(&Job::new(source("qwen2vl"), to.at("model.bpk"))).unwrap();
    let mut refused = false;
    let written = first.write(&mut |_| {
        refused |= matches!(second.write(&mut |_| ()), Err(ConvertError::Busy { .. }));
    });
    assert_eq!(written.unwrap(), Report::default());
    assert!(refused);
    // They were planned when the place was free.
    let content = to.read("model.bpk");
    for late in [second, of_others] {
        let error = late.write(&mut |_| ()).unwrap_err();
        assert!(matches!(error, ConvertError::Occupied { .. }), "{error}");
        assert_eq!(to.entries(), ["model.bpk"]);
    }
    assert!(to.read("model.bpk") == content);
}

#[test]
fn a_source_that_changes_meanwhile_is_noticed() {
    for name in ["model.safetensors", "config.json", "merges.txt"] {
        let (from, to) = (small(&[("a", &[1.0]), ("b", &[2.0])]), Scratch::new());
        from.write("merges.txt", "a b");
        let plan = Plan::new(&Job::new(from.path(), to.at("new"))).unwrap();
        let content = from.read(name);
        let longer = [&content[..], b" "].concat();
        let error = plan.write(&mut |progress| {
            if progress.phase == Phase::Write {
                from.write(name, &longer);
            }
        });
        let error = error.unwrap_err();
        let is_noticed = matches!(error, ConvertError::SourceChanged { .. });
        assert!(is_noticed && error.to_string().contains(name), "{error}");
        let finished = ["model.bpk", "config.json", "merges.txt"];
        let is_there = |name: &&str| Path::new(&to.at("new")).join(name).exists();
        assert!(!finished.iter().any(is_there), "{name}");
        from.write(name, content);
        convert(&Job::new(from.path(), to.at("new"))).unwrap();
    }
}

/// With its time, as a backup is: nothing that was read meanwhile is taken for the source's.
#[test]
fn a_source_that_is_put_back_is_read_again() {
    let (from, to) = (small(&[("a", &[1.0]), ("b", &[2.0])]), Scratch::new());
    let source = from.at("model.safetensors");
    let modified = fs::metadata(&source).unwrap().modified().unwrap();
    let content = from.read("model.safetensors");
    let job = Job::new(from.path(), to.at("model.bpk"));
    let mut other = content.clone();
    *other.last_mut().unwrap() ^= 1;
    let plan = Plan::new(&job).unwrap();
    let error = plan.write(&mut |progress| {
        if progress.phase == Phase::Write {
            from.write("model.safetensors", &other);
        }
    });
    assert!(matches!(error, Err(ConvertError::SourceChanged { .. })));
    from.write("model.safetensors", content);
    let file = fs::File::options().write(true).open(&source).unwrap();
    file.set_modified(modified).unwrap();
    assert_eq!(convert(&job).unwrap().resumed, 0);
    convert(&Job::new(from.path(), to.at("clean.bpk"))).unwrap();
    assert!(to.read("model.bpk") == to.read("clean.bpk"));
}

#[test]
fn a_change_of_the_source_begins_anew() {
    let (from, to) = (small(&[("a", &[1.0]), ("b", &[2.0])]), Scratch::new());
    let job = Job::new(from.path(), to.at("model.safetensors"));
    interrupted(&job, Plan::new(&job).unwrap().total_bytes());
    from.write(
        "model.safetensors",
        safetensors(&[
            f32s("a", [1], [3.0]),
            f32s("b", [1], [4.0]),
            f32s("c", [1], [5.0]),
        ]),
    );
    assert_eq!(convert(&job).unwrap().resumed, 0);
    let expected = contents(from.at("model.safetensors"));
    assert!(contents(to.at("model.safetensors")) == expected);
}

#[test]
fn what_an_interrupted_run_has_left_is_removed_by_one_of_another_form() {
    let (from, to) = (source("llava"), Scratch::new());
    let mut job = Job::new(&from, to.at("new"));
    job.form = Some(Form::HuggingFace);
    job.max_shard_bytes = 1_000_000;
    interrupted(&job, Plan::new(&job).unwrap().total_bytes());
    assert!(Path::new(&to.at("new/model-00001-of-00004.safetensors")).exists());
    job.form = Some(Form::Burnpack);
    interrupted(&job, 1_000_000);
    job.form = Some(Form::Safetensors);
    assert_eq!(convert(&job).unwrap().resumed, 0);
    assert!(!Path::new(&to.at("new/model-00001-of-00004.safetensors")).exists());
    job.to = to.at("clean").into();
    convert(&job).unwrap();
    let names = |folder: &str| {
        let entries = Path::new(&to.at(folder)).read_dir().unwrap();
        entries
            .map(|entry| entry.unwrap().file_name())
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(names("new"), names("clean"));

    // But not what somebody has put in the place of it.
    let mut job = to_shards(&from, to.at("others"));
    interrupted(&job, Plan::new(&job).unwrap().total_bytes());
    let replaced = to.write("others/model-00001-of-00004.safetensors", "precious");
    job.max_shard_bytes = 2_000_000;
    convert(&job).unwrap();
    assert_eq!(fs::read(replaced).unwrap(), b"precious");
}

#[test]
fn a_longer_file_in_the_place_of_a_small_one_stays() {
    let (from, to) = (small(&[("a", &[1.0])]), Scratch::new());
    from.write("merges.txt", "");
    let job = Job::new(from.path(), to.at("new"));
    interrupted(&job, 1);
    let merges = to.write("new/merges.txt", "precious");
    let error = convert(&job).unwrap_err();
    assert!(matches!(error, ConvertError::Occupied { .. }), "{error}");
    assert_eq!(fs::read(merges).unwrap(), b"precious");
}

#[test]
fn the_source_is_nothing_that_an_interrupted_run_has_left() {
    let (from, to) = (small(&[("a", &[1.0])]), Scratch::new());
    from.write("merges.txt", "a b");
    interrupted(&Job::new(from.path(), to.at("new")), 1);
    for name in ["config.json", "merges.txt", "model.safetensors"] {
        to.write(&format!("new/{name}"), from.read(name));
    }
    let job = Job::new(to.at("new"), to.at("new/model.bpk"));
    let error = convert(&job).unwrap_err();
    assert!(matches!(error, ConvertError::Occupied { .. }), "{error}");
    assert_eq!(to.read("new/merges.txt"), b"a b");
}

#[test]
fn a_run_is_taken_up_under_another_spelling_of_its_source() {
    let (from, to) = (source("llava"), Scratch::new());
    let job = Job::new(&from, to.at("model.bpk"));
    interrupted(&job, Plan::new(&job).unwrap().total_bytes());
    let other = Job::new(Path::new(&from).join("."), to.at("model.bpk"));
    assert!(convert(&other).unwrap().resumed > 0);
}

#[test]
fn a_file_that_does_not_hold_what_was_written_is_not_kept() {
    let (from, to) = (source("llava"), Scratch::new());
    let job = Job::new(&from, to.at("model.bpk"));
    let bytes = Plan::new(&job).unwrap().total_bytes();
    interrupted(&job, bytes);
    let partial = to.at("model.bpk.partial");
    let mut content = fs::read(&partial).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    fs::write(&partial, content).unwrap();
    let error = convert(&job).unwrap_err();
    assert!(matches!(error, ConvertError::Damaged { .. }), "{error}");
    assert_eq!(to.entries(), ["model.journal"]);
    assert_eq!(convert(&job).unwrap().resumed, 0);
    assert_eq!(to.entries(), ["model.bpk"]);
}

#[cfg(unix)]
#[test]
fn a_link_in_the_place_of_an_unfinished_file_is_not_followed() {
    let (from, to) = (source("llava"), Scratch::new());
    let job = Job::new(&from, to.at("model.bpk"));
    interrupted(&job, 1_000_000);
    let precious = to.write("precious", "precious");
    to.remove("model.bpk.partial");
    std::os::unix::fs::symlink(&precious, to.at("model.bpk.partial")).unwrap();
    let error = convert(&job).unwrap_err();
    assert!(matches!(error, ConvertError::Occupied { .. }), "{error}");
    assert_eq!(to.read("precious"), b"precious");
}
