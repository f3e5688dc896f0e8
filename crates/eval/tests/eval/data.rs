//! What is read of the tables.

use std::fs;

use reroute_eval::{Data, PictureAt, Task, Truth};
use reroute_zoo::{DecodeLimits, decode};

use crate::{fixture, folder, open};

#[test]
fn an_expression_is_a_sample() {
    let data = open(Task::RefCoco, "RefCOCO");
    // 24 objects: one of them without expressions, four have another one, four three.
    assert_eq!(data.samples.len(), 24 - 1 + 4 + 4 * 2);
    assert!(data.has_boxes());
    let about: Vec<&str> = data.samples.iter().map(|sample| &*sample.id).collect();
    assert_eq!(
        about[..7],
        ["1000", "1001", "1001", "1002", "1002", "1002", "1003"]
    );
    assert_eq!(
        data.samples[2].question,
        "das Größte — ③ 🟦 the small orange ring"
    );
    for (index, sample) in data.samples.iter().enumerate() {
        assert_eq!(sample.index, index);
        let Truth::Box([x1, y1, x2, y2]) = sample.truth else {
            panic!("no box");
        };
        assert!(0.0 <= x1 && x1 < x2 && 0.0 <= y1 && y1 < y2);
        // Of the wide picture the last column is 168.
        assert!(x2 <= 224.0 && y2 <= 224.0);
    }
    let scene = [30.0, 6.0, 51.0, 27.0];
    let Truth::Box(first) = data.samples[0].truth else {
        panic!("no box");
    };
    assert!(
        first.iter().zip(scene).all(|(a, b)| (a - b).abs() < 0.01),
        "{first:?}"
    );
}

#[test]
fn pictures_are_read_in_any_order() {
    let data = open(Task::RefCoco, "RefCOCO");
    let mut pictures = data.pictures();
    let sizes: Vec<[usize; 2]> = { data.samples.iter() }
        .map(|sample| {
            let bytes = pictures.read(&sample.picture).expect("a picture");
            let image = decode(&bytes, &DecodeLimits::default()).expect("a good one");
            [image.width(), image.height()]
        })
        .collect();
    let of = |id: &str| {
        let at = data.samples.iter().position(|sample| sample.id == id);
        sizes[at.expect("it is there")]
    };
    assert_eq!(of("1005"), [224, 224]);
    assert_eq!(of("1007"), [168, 112]);
    assert_eq!(of("1023"), [112, 112]);
    // Backwards the bytes are the same.
    let mut forwards = data.pictures();
    let inorder: Vec<Vec<u8>> = { data.samples.iter() }
        .map(|sample| forwards.read(&sample.picture).expect("a picture"))
        .collect();
    for (sample, expected) in data.samples.iter().zip(inorder).rev() {
        assert_eq!(pictures.read(&sample.picture).expect("a picture"), expected);
    }
}

#[test]
fn every_task_has_its_columns() {
    let pope = open(Task::Pope, "POPE");
    assert_eq!(pope.samples.len(), 12);
    let categories = pope.samples.iter().map(|sample| sample.category.as_deref());
    let expected = [
        "adversarial",
        "adversarial",
        "popular",
        "popular",
        "random",
        "random",
    ];
    assert!(categories.eq(expected.iter().chain(&expected).map(|name| Some(*name))));
    assert_eq!(pope.samples[1].truth, Truth::Yes(false));

    let gqa = open(Task::Gqa, "GQA");
    let pictures: Vec<&PictureAt> = gqa.samples.iter().map(|sample| &sample.picture).collect();
    let row = |row| PictureAt::Table { table: 0, row };
    // By their names, which stand in another order.
    assert_eq!(pictures, [&row(1), &row(0), &row(1), &row(0)]);
    assert_eq!(gqa.samples[2].truth, Truth::Answer("it's blue".into()));
    assert!(gqa.pictures().read(&row(1)).is_ok());

    let text = open(Task::TextVqa, "textvqa");
    let ids: Vec<&str> = text.samples.iter().map(|sample| &*sample.id).collect();
    assert_eq!(ids, ["34602", "34603", "34604", "34605"]);
    let Truth::Answers(answers) = &text.samples[0].truth else {
        panic!("no answers");
    };
    assert_eq!((answers.len(), &*answers[0]), (10, "nous les gosses"));
}

#[test]
fn the_hub_has_files_in_several_places() {
    let expected = open(Task::RefCoco, "RefCOCO");
    let scratch = folder();
    let copy = |to: &str| {
        let to = scratch.path().join(to);
        fs::create_dir_all(&to).expect("a folder");
        for part in ["val-00000-of-00002.parquet", "val-00001-of-00002.parquet"] {
            let from = fixture("RefCOCO/data").join(part);
            fs::copy(from, to.join(part)).expect("a copy");
        }
    };
    let opened = |below: &str| {
        let path = scratch.path().join(below);
        Data::open(Task::RefCoco, "val", &path).expect("the same data")
    };
    // A folder of repositories; the folder of the files; the cache, whose main revision is not the last by name.
    copy("copies/RefCOCO/data");
    copy("cache/datasets--lmms-lab--RefCOCO/snapshots/abc/data");
    let cached = scratch.path().join("cache/datasets--lmms-lab--RefCOCO");
    fs::create_dir_all(cached.join("snapshots/bcd")).expect("a folder");
    fs::create_dir_all(cached.join("refs")).expect("a folder");
    fs::write(cached.join("refs/main"), "abc\n").expect("a file");
    for below in [
        "copies",
        "copies/RefCOCO",
        "copies/RefCOCO/data",
        "cache",
        "cache/datasets--lmms-lab--RefCOCO",
        "cache/datasets--lmms-lab--RefCOCO/snapshots/abc",
    ] {
        let found = opened(below);
        assert_eq!(found.samples, expected.samples, "{below}");
        assert_eq!(found.fingerprint, expected.fingerprint, "{below}");
    }
}

#[test]
fn what_is_not_there_is_named() {
    let scratch = folder();
    let refused = |task, split: &str, path: &std::path::Path| {
        let error = Data::open(task, split, path).expect_err("it is not there");
        error.to_string()
    };
    let error = refused(Task::RefCoco, "val", &scratch.path().join("nope"));
    assert!(error.contains("nope is no folder"), "{error}");
    let error = refused(Task::RefCoco, "testA", &fixture("RefCOCO"));
    assert!(
        error.contains("data/testA-00000") && error.contains("lmms-lab-encoder/RefCOCO"),
        "{error}"
    );
    // `test` is not the beginning of `testA`.
    let data = scratch.path().join("data");
    fs::create_dir_all(&data).expect("a folder");
    fs::write(data.join("testA-00000-of-00001.parquet"), "").expect("a file");
    assert!(refused(Task::RefCoco, "test", scratch.path()).contains("has no data/test-"));
    // Of two downloads, each whole.
    let other = scratch.path().join("other/data");
    fs::create_dir_all(&other).expect("a folder");
    for (name, extra) in [
        ("val-00000-of-00001-0a1b.parquet", true),
        ("val-00001-of-00003.parquet", true),
        ("val.parquet", true),
        ("value.parquet", false),
    ] {
        fs::write(other.join("val-00000-of-00001.parquet"), "").expect("a file");
        fs::write(other.join(name), "").expect("a file");
        let error = refused(Task::RefCoco, "val", &scratch.path().join("other"));
        assert_eq!(
            error.contains("is none of the 1 parts"),
            extra,
            "{name}: {error}"
        );
        fs::remove_file(other.join(name)).expect("removed");
    }
    // The second of three parts.
    for part in [0, 2] {
        fs::write(data.join(format!("val-{part:05}-of-00003.parquet")), "").expect("a file");
    }
    let error = refused(Task::RefCoco, "val", scratch.path());
    assert!(
        error.contains("val-00001-of-00003.parquet is missing"),
        "{error}"
    );
    let error = refused(Task::Gqa, "testdev", &fixture("RefCOCO"));
    assert!(error.contains("testdev_balanced_images"), "{error}");
    let error = refused(Task::Own, "all", &scratch.path().join("none.jsonl"));
    assert!(
        error.contains("none.jsonl") && error.contains("check the path"),
        "{error}"
    );
}

/// Tables of expressions look alike.
#[test]
fn a_folder_of_another_task_is_refused() {
    let error = Data::open(Task::RefCocoPlus, "val", &fixture("RefCOCO"));
    let error = error.expect_err("data of another task").to_string();
    assert!(
        error.contains("lmms-lab-encoder/RefCOCO,") && error.contains("RefCOCOplus"),
        "{error}"
    );
}

#[test]
fn lines_of_ones_own() {
    let scratch = folder();
    let file = scratch.path().join("own.jsonl");
    let lines = "\u{feff}{\"image\": \"a/b.png\", \"expression\": \"the cup\", \"box\": [1, 2, 3, 4.5]}\n\n\
                 {\"image\": \"a/b.png\", \"question\": \"Wie viele?\", \"answers\": [\"zwei\", \"2\"], \"id\": 7}\n\
                 {\"image\": \"/c.png\", \"question\": \"?\", \"answer\": \"ja\", \"id\": \"x\", \"category\": \"k\", \"more\": 1}";
    fs::write(&file, lines).expect("a file");
    let data = Data::open(Task::Own, "all", &file).expect("good lines");
    let ids: Vec<&str> = data.samples.iter().map(|sample| &*sample.id).collect();
    assert_eq!(ids, ["1", "7", "x"]);
    assert_eq!(data.samples[0].truth, Truth::Box([1.0, 2.0, 3.0, 4.5]));
    assert_eq!(
        data.samples[0].picture,
        PictureAt::File(scratch.path().join("a/b.png"))
    );
    assert_eq!(data.samples[2].picture, PictureAt::File("/c.png".into()));
    let answers = ["zwei", "2"].map(String::from).to_vec();
    assert_eq!(data.samples[1].truth, Truth::AnyOf(answers));
    assert_eq!(data.samples[2].category.as_deref(), Some("k"));

    let error = Data::open(Task::Own, "val", &file).expect_err("no split");
    assert!(error.to_string().contains("leave it out"), "{error}");

    for (line, words) in [
        ("{", "line 1"),
        ("[\"a.png\", \"?\", null, \"x\"]", "it is no object"),
        ("[1]", "an object with image"),
        ("{\"image\": \"a\", \"question\": \"b\"}", "one of answer"),
        (
            "{\"image\": \"a\", \"question\": \"b\", \"answer\": \"c\", \"box\": [1, 2, 3, 4]}",
            "one of answer",
        ),
        (
            "{\"image\": \"a\", \"question\": \"b\", \"answers\": []}",
            "one of answer",
        ),
        (
            "{\"image\": \"a\", \"question\": \"b\", \"box\": [3, 2, 1, 4]}",
            "x1 < x2",
        ),
        (
            "{\"image\": \"a\", \"question\": \"b\", \"box\": [0.1, 0.2, 0.3, 1]}",
            "not in shares",
        ),
        (
            "{\"image\": \"a\", \"question\": \"b\", \"expression\": \"c\", \"answer\": \"d\"}",
            "one of question and expression",
        ),
        (
            "{\"image\": \"a\", \"answer\": \"d\"}",
            "one of question and expression",
        ),
        (
            "{\"image\": \"a\", \"question\": \"b\", \"box\": [1, 2, 3]}",
            "an object with image",
        ),
        ("", "no samples"),
    ] {
        fs::write(&file, line).expect("a file");
        let error = Data::open(Task::Own, "all", &file)
            .expect_err("a bad line")
            .to_string();
        assert!(error.contains(words), "{line}: {error}");
    }
    let error = Data::open(Task::Own, "all", scratch.path()).expect_err("a folder");
    assert!(error.to_string().contains("it is no file"), "{error}");
    fs::write(&file, "x".repeat(2 << 20)).expect("a file");
    let error = Data::open(Task::Own, "all", &file)
        .expect_err("too long")
        .to_string();
    assert!(error.contains("longer than 1 MiB"), "{error}");
}
