use reroute_checkpoint::{CheckpointError, Shards};

use crate::fixture::{counting, entry, file, folder, open, safetensors};

#[track_caller]
fn error(content: &[u8]) -> CheckpointError {
    open(content).expect_err("the file lies")
}

#[test]
fn an_honest_file_is_described() {
    let shards = open(&safetensors(&[
        counting("b", &[2, 3]),
        counting("a", &[]),
        ("empty", "BF16", &[0, 5], vec![]),
    ]))
    .unwrap();
    assert_eq!(shards.names().collect::<Vec<_>>(), ["a", "b", "empty"]);
    let info = shards.info("b").unwrap();
    assert_eq!((info.shape.as_slice(), info.bytes), (&[2, 3][..], 24));
    assert_eq!(shards.total_bytes(), 28);
    assert!(shards.info("c").is_none());
}

#[test]
fn a_file_that_is_too_short_or_no_safetensors_file_is_refused() {
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    for content in [&b""[..], b"1234567", &[0; 8], lfs] {
        assert!(matches!(
            error(content),
            CheckpointError::HeaderLength { .. }
        ));
    }
}

#[test]
fn a_truncated_or_extended_file_is_refused() {
    let whole = safetensors(&[counting("a", &[4])]);
    for cut in 8..whole.len() - 16 {
        let error = error(&whole[..cut]);
        assert!(
            matches!(error, CheckpointError::HeaderLength { .. }),
            "{error}"
        );
    }
    for cut in whole.len() - 16..whole.len() {
        let error = error(&whole[..cut]);
        assert!(
            matches!(error, CheckpointError::FileLength { .. }),
            "{error}"
        );
    }
    let longer = [&whole[..], &[0]].concat();
    assert!(matches!(error(&longer), CheckpointError::FileLength { .. }));
}

#[test]
fn a_huge_length_prefix_allocates_nothing() {
    for claimed in [u64::MAX, 1 << 62, 100_000_001, 100_000_000] {
        let mut content = safetensors(&[counting("a", &[4])]);
        content[..8].copy_from_slice(&claimed.to_le_bytes());
        assert!(matches!(
            error(&content),
            CheckpointError::HeaderLength { header_bytes, .. } if header_bytes == claimed
        ));
    }
}

#[test]
fn offsets_that_lie_are_refused() {
    let a = entry("a", "F32", &[2], 0, 8);
    let max = usize::MAX;
    for other in [
        entry("b", "F32", &[2], 12, 20),       // a hole
        entry("b", "F32", &[2], 4, 12),        // an overlap
        entry("b", "F32", &[2], 0, 8),         // the same place
        entry("b", "F32", &[2], 16, 8),        // backwards
        entry("b", "F32", &[3], 8, 16),        // more elements than bytes
        entry("b", "F16", &[2], 8, 16),        // fewer
        entry("b", "F32", &[max, 2], 8, 16),   // an overflow
        entry("b", "F32", &[2], max - 8, max), // far beyond the file
    ] {
        let error = error(&file(&format!("{{{a},{other}}}"), &[0; 16]));
        assert!(matches!(error, CheckpointError::Header { .. }), "{error}");
        assert!(std::error::Error::source(&error).is_some());
    }
    let beyond = entry("b", "F32", &[6], 8, 32);
    let error = error(&file(&format!("{{{a},{beyond}}}"), &[0; 16]));
    assert!(
        matches!(error, CheckpointError::FileLength { .. }),
        "{error}"
    );
}

#[test]
fn a_header_that_is_not_a_header_is_refused() {
    for header in [
        " ",
        "[]",
        "{",
        "{}}",
        r#"{"a":1}"#,
        r#"{"a":{"dtype":"F33","shape":[],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1e3],"data_offsets":[0,0]}}"#,
        r#"{"__metadata__":{"format":1}}"#,
    ] {
        let error = error(&file(header, &[]));
        assert!(
            matches!(error, CheckpointError::HeaderJson { .. }),
            "{header}: {error}"
        );
    }
    let deep = "[".repeat(100_000);
    assert!(matches!(
        error(&file(&format!(r#"{{"a":{deep}"#), &[])),
        CheckpointError::HeaderJson { .. }
    ));
}

#[test]
fn duplicate_keys_are_refused_even_where_offsets_agree() {
    let a = entry("a", "F32", &[2], 0, 8);
    let content = file(&format!("{{{a},{a}}}"), &[0; 8]);
    assert!(matches!(
        error(&content),
        CheckpointError::DuplicateKey { key, .. } if key == "a"
    ));
}

#[test]
fn pickles_are_refused_with_advice() {
    let (_dir, pickle) = folder(&[("pytorch_model-00001-of-00002.bin", b"")]);
    let error = Shards::open(&pickle).unwrap_err();
    assert!(matches!(error, CheckpointError::Pickle { .. }));
    assert!(error.to_string().contains("--allow-pickle"), "{error}");

    let (_dir, empty) = folder(&[]);
    let error = Shards::open(&empty).unwrap_err();
    assert!(matches!(error, CheckpointError::NoWeights { .. }));
    assert!(error.to_string().contains("model.safetensors"), "{error}");
}
