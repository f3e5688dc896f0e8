//! Pickles that are made to do harm are refused, and cost little.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use reroute_convert::{ConvertError, Job, Plan};
use tempfile::TempDir;
use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, ZipWriter};

fn refusal(folder: &Path) -> ConvertError {
    fs::write(folder.join("config.json"), "{}").unwrap();
    let mut job = Job::new(folder, folder.join("new"));
    job.allow_pickle = true;
    match Plan::new(&job) {
        Ok(_) => panic!("it is not refused"),
        Err(error) => error,
    }
}

#[test]
fn what_would_take_all_memory_or_stack_is_refused() {
    let much = "more than a model needs";
    let recalled_marks = [
        b"cmark\nmark\nq\x00".to_vec(),
        b"h\x00".repeat(1000),
        b"N".to_vec(),
        b"t".repeat(1000),
    ];
    let recalled_text = [
        b"X\x00\x00\x10\x00".to_vec(),
        b"a".repeat(1 << 20),
        b"q\x00".to_vec(),
        b"h\x00".repeat(100_000),
    ];
    let long_name = [
        b"}X\x00\x10\x00\x00".to_vec(),
        b"a".repeat(4096),
        b"cx\ny\n)\x81s".to_vec(),
    ];
    for (pickle, words) in [
        ([b"N".to_vec(), b"\x85".repeat(1_000_000)].concat(), much),
        ([b"N".to_vec(), b"q\x00h\x00\x86".repeat(60)].concat(), much),
        ([b"cx\ny\n".to_vec(), b"N\x81".repeat(1000)].concat(), much),
        ([b"(".repeat(3_000_000), b"N".to_vec()].concat(), much),
        (recalled_marks.concat(), much),
        (recalled_text.concat(), much),
        (long_name.concat(), "too long"),
        (b"N".repeat(17 << 20), "too long"),
        (b"X\xff\xff\xff\xff".to_vec(), "damaged at byte 0"),
        (b"\x80\x04\x95".to_vec(), "instruction 0x95 (byte 2)"),
        (b"}X\x01\x00\x00\x00aNs".to_vec(), "no tensor"),
    ] {
        let folder = TempDir::new().unwrap();
        let file = File::create(folder.path().join("pytorch_model.bin")).unwrap();
        let mut archive = ZipWriter::new(file);
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        archive.start_file("archive/data.pkl", stored).unwrap();
        archive.write_all(&pickle).unwrap();
        archive.write_all(b".").unwrap();
        archive.finish().unwrap();
        let error = refusal(folder.path());
        assert!(matches!(error, ConvertError::Pickle { .. }), "{error}");
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
}

/// What is read is bounded by one of the lengths, what is looked at by the other.
#[test]
fn archives_whose_lengths_disagree_are_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("pytorch_model.bin");
    let mut archive = ZipWriter::new(File::create(&path).unwrap());
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    archive.start_file("archive/data.pkl", stored).unwrap();
    archive.write_all(b"}.").unwrap();
    archive.finish().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    // The central directory's entry; there the length without compression is at 24.
    let entry = bytes.windows(4).position(|four| four == b"PK\x01\x02");
    bytes[entry.unwrap() + 24] = 1;
    fs::write(&path, bytes).unwrap();
    let error = refusal(folder.path()).to_string();
    assert!(error.contains("lengths disagree"), "{error}");
}

#[cfg(unix)]
#[test]
fn links_out_of_the_folder_and_pipes_are_refused() {
    let (folder, outside) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = folder.path().join("pytorch_model.bin");
    let secret = outside.path().join("secret");
    fs::write(&secret, "").unwrap();
    std::os::unix::fs::symlink(secret, &path).unwrap();
    let error = refusal(folder.path()).to_string();
    assert!(error.contains("outside the checkpoint"), "{error}");
    fs::remove_file(&path).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    let error = refusal(folder.path()).to_string();
    assert!(error.contains("is not a file"), "{error}");
}
