//! Tables that are wrong, and pictures that are none.

use std::fs;
use std::path::Path;

use reroute_eval::{Data, EvalError, OnError, Reckoning, Task, summaries};

use crate::{fixture, folder, measure, settings};

fn refused(name: &str) -> String {
    let path = fixture("damaged").join(name);
    let result = Data::open(Task::RefCoco, "val", &path);
    result.expect_err("it is wrong").to_string()
}

#[test]
fn what_is_wrong_is_named_with_its_place() {
    for (name, words) in [
        ("no_bbox", &["has no column bbox", "answer, image"][..]),
        ("no_image", &["has no column image", "answer, bbox"]),
        ("text_bbox", &["row 0, column bbox", "four numbers"]),
        ("three_numbers", &["row 1, column bbox", "four numbers"]),
        ("no_area", &["row 0, column bbox", "above 0"]),
        ("nan", &["row 0, column bbox"]),
        ("no_list", &["row 0, column answer", "a list of texts"]),
        ("null_answer", &["row 0, column answer", "a list of texts"]),
        ("image_list", &["column image", "bytes"]),
        (
            "image_text",
            &["column image.bytes", "the bytes of an encoded picture"],
        ),
        ("no_rows", &["has no samples", "val"]),
    ] {
        let error = refused(name);
        for words in words {
            assert!(error.contains(words), "{name}: {error}");
        }
        assert!(
            name == "no_rows" || error.contains("val-00000-of-00001.parquet"),
            "{error}"
        );
    }
    // RefCOCO is no POPE.
    let scratch = folder();
    let test = scratch.path().join("test.parquet");
    fs::copy(fixture("RefCOCO/data/val-00000-of-00002.parquet"), test).expect("a copy");
    let error = Data::open(Task::Pope, "test", scratch.path()).expect_err("another table");
    let error = error.to_string();
    assert!(
        error.contains("row 0, column answer: it should be text"),
        "{error}"
    );
}

/// Reads all that there is; whatever is wrong must be an error.
fn read(path: &Path) -> Result<(), EvalError> {
    let data = Data::open(Task::RefCoco, "val", path)?;
    let mut pictures = data.pictures();
    for sample in &data.samples {
        pictures.read(&sample.picture)?;
    }
    Ok(())
}

#[test]
fn damaged_files_are_errors() {
    let scratch = folder();
    let path = scratch.path().join("val.parquet");
    let mut refused = 0;
    for part in ["val-00000-of-00002", "val-00001-of-00002"] {
        let good = fs::read(fixture("RefCOCO/data").join(part).with_extension("parquet"));
        let good = good.expect("the fixture");
        let mut check = |bytes: &[u8]| {
            fs::write(&path, bytes).expect("a file");
            refused += usize::from(read(scratch.path()).is_err());
        };
        // Cut off everywhere.
        for part in 0..16 {
            check(&good[..good.len() * part / 16]);
        }
        // The pages and, more often, what describes them.
        for step in 0..150 {
            let mut bad = good.clone();
            let at = match step % 3 {
                0 => step * good.len() / 150,
                _ => good.len() - 1 - step * 17 % 3000,
            };
            bad[at] ^= 1 << (step % 8);
            check(&bad);
            let end = (at + 24).min(good.len());
            bad[at..end].fill(step as u8);
            check(&bad);
        }
    }
    // Of a bit in a picture nobody knows.
    assert!(refused > 100, "{refused} of 632");
    fs::write(&path, "no table").expect("a file");
    let error = read(scratch.path()).expect_err("no table").to_string();
    assert!(
        error.contains("val.parquet cannot be read as Parquet"),
        "{error}"
    );
}

#[test]
fn rare_codecs_are_read() {
    for codec in ["lz4", "brotli"] {
        let folder_of = fixture("codecs").join(codec);
        let data = Data::open(Task::RefCoco, "val", &folder_of).expect(codec);
        let scratch = folder();
        let records = measure(&data, &settings(&["dense"]), scratch.path()).expect(codec);
        assert!(records[0].records[&0].answer.is_some(), "{codec}");
    }
}

#[test]
fn pictures_that_are_none_stop_or_count_apart() {
    let data = Data::open(Task::RefCoco, "val", &fixture("damaged/pictures"));
    let data = data.expect("good but for its pictures");
    let scratch = folder();
    let mut settings = settings(&["dense"]);
    let error = measure(&data, &settings, scratch.path())
        .expect_err("a bad picture")
        .to_string();
    for words in [
        "sample 1",
        "val-00000-of-00001.parquet, row 1",
        "cannot be decoded",
        "--on-error skip",
    ] {
        assert!(error.contains(words), "{error}");
    }
    (settings.on_error, settings.resume) = (OnError::Skip, true);
    let records = measure(&data, &settings, scratch.path()).expect("they are skipped");
    let errors: Vec<Option<&str>> = { records[0].records.values() }
        .map(|record| record.error.as_deref())
        .collect();
    assert_eq!(errors.len(), 5);
    assert!(errors[0].is_none() && errors[4].is_none(), "{errors:?}");
    assert!(
        errors[1].is_some_and(|error| error.contains("decoded")),
        "{errors:?}"
    );
    assert!(
        errors[2].is_some_and(|error| error.contains("it is null")),
        "{errors:?}"
    );
    assert!(
        errors[3].is_some_and(|error| error.contains("decoded")),
        "{errors:?}"
    );
    let found = summaries(&records, &Reckoning::default()).expect("a summary");
    assert_eq!(
        (found[0].samples, found[0].errors, found[0].pictures),
        (2, 3, 1)
    );
    // They are tried again, and the others are not asked again.
    let again = measure(&data, &settings, scratch.path()).expect("they are skipped again");
    assert_eq!(again, records);
}
