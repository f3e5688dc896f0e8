use burn::tensor::DType;
use reroute_checkpoint::{CheckpointError, Disagreement, IndexMismatch, Layout, Shards};

use crate::fixture::{counting, folder, safetensors};

const INDEX: &str = "model.safetensors.index.json";
const A: &str = "model-00001-of-00002.safetensors";
const B: &str = "model-00002-of-00002.safetensors";

/// An index that maps tensors to shards.
fn index(weight_map: &[(&str, &str)]) -> Vec<u8> {
    let entries: Vec<_> = (weight_map.iter())
        .map(|(tensor, shard)| format!("{tensor:?}: {shard:?}"))
        .collect();
    format!(
        r#"{{"metadata": {{"total_size": 1}}, "weight_map": {{{}}}}}"#,
        entries.join(", ")
    )
    .into_bytes()
}

/// Opens an index beside shard A with `a`, `b` and shard B with `c`.
fn open(weight_map: &[(&str, &str)]) -> Result<Shards, CheckpointError> {
    let (_dir, folder) = folder(&[
        (INDEX, &index(weight_map)),
        (A, &safetensors(&[counting("a", &[1]), counting("b", &[2])])),
        (B, &safetensors(&[counting("c", &[3])])),
    ]);
    Shards::open(&folder)
}

fn mismatch(result: Result<Shards, CheckpointError>) -> IndexMismatch {
    match result {
        Err(CheckpointError::Index(mismatch)) => *mismatch,
        other => panic!("{other:?}"),
    }
}

fn found(tensor: &str, shard: &str) -> Disagreement {
    Disagreement {
        tensor: tensor.to_owned(),
        shard: shard.to_owned(),
    }
}

#[test]
fn shards_are_opened_by_the_index_and_nothing_else() {
    let (_dir, folder) = folder(&[
        (INDEX, &index(&[("a", A), ("c", B)])),
        (A, &safetensors(&[counting("a", &[1])])),
        (B, &safetensors(&[counting("c", &[3])])),
        ("model.safetensors", b"not looked at"),
        ("model-00003-of-00003.safetensors", b"not looked at"),
    ]);
    let shards = Shards::open(&folder).unwrap();
    assert_eq!(shards.names().collect::<Vec<_>>(), ["a", "c"]);
    assert_eq!(shards.total_bytes(), 16);
    let c = shards.read("c", DType::F32, Layout::AsStored).unwrap();
    assert_eq!(c.to_vec::<f32>().unwrap(), [0.0, 1.0, 2.0]);
}

#[test]
fn shard_names_that_lead_elsewhere_are_refused() {
    for name in [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "c:model.safetensors",
        "model.bin",
        "",
        "..",
    ] {
        let error = open(&[("a", A), ("c", name)]).unwrap_err();
        assert!(
            matches!(error, CheckpointError::ShardName { .. }),
            "{name}: {error}"
        );
    }
}

#[cfg(unix)]
#[test]
fn a_shard_that_links_out_of_the_folder_is_refused() {
    let weights = safetensors(&[counting("a", &[1])]);
    let (outside, _) = folder(&[("secret.safetensors", &weights)]);
    let (dir, folder) = folder(&[(INDEX, &index(&[("a", A)]))]);
    let secret = outside.path().join("secret.safetensors");
    std::os::unix::fs::symlink(secret, dir.path().join(A)).unwrap();
    assert!(matches!(
        Shards::open(&folder),
        Err(CheckpointError::LinkOutside { .. })
    ));
}

#[test]
fn missing_shards_are_all_named() {
    let error = open(&[
        ("a", A),
        ("x", "model-00003.safetensors"),
        ("y", "model-00004.safetensors"),
    ])
    .unwrap_err();
    assert!(matches!(&error, CheckpointError::MissingShards { shards, .. } if shards.len() == 2));
    let text = error.to_string();
    assert!(
        text.contains("model-00003") && text.contains("model-00004"),
        "{text}"
    );
}

#[test]
fn index_and_shards_must_agree() {
    let honest = [("a", A), ("b", A), ("c", B)];
    assert!(open(&honest).is_ok());

    let lists_too_much = mismatch(open(&[("a", A), ("b", A), ("c", B), ("d", B)]));
    assert_eq!(lists_too_much.not_stored, [found("d", B)]);
    assert!(lists_too_much.not_listed.is_empty());

    let lists_too_little = mismatch(open(&[("a", A), ("c", B)]));
    assert_eq!(lists_too_little.not_listed, [found("b", A)]);

    let swapped = mismatch(open(&[("a", A), ("b", B), ("c", B)]));
    assert_eq!(swapped.not_stored, [found("b", B)]);
    assert_eq!(swapped.not_listed, [found("b", A)]);
}

#[test]
fn a_tensor_in_two_shards_is_a_duplicate() {
    for listed in [A, B] {
        let (_dir, folder) = folder(&[
            (INDEX, &index(&[("a", listed), ("b", A), ("c", B)])),
            (A, &safetensors(&[counting("a", &[1]), counting("b", &[1])])),
            (B, &safetensors(&[counting("a", &[1]), counting("c", &[1])])),
        ]);
        let mismatch = mismatch(Shards::open(&folder));
        let other = if listed == A { B } else { A };
        assert_eq!(mismatch.duplicate, [found("a", other)]);
        assert!(mismatch.not_listed.is_empty() && mismatch.not_stored.is_empty());
    }
}

#[test]
fn a_tensor_listed_twice_is_refused() {
    let error = open(&[("a", A), ("b", A), ("c", B), ("a", B)]).unwrap_err();
    assert!(matches!(error, CheckpointError::DuplicateKey { key, .. } if key == "a"));
}

/// The numbers in the names say that nothing is missing.
#[test]
fn numbered_shards_without_an_index_are_opened() {
    let (a, b) = (
        safetensors(&[counting("a", &[1]), counting("b", &[2])]),
        safetensors(&[counting("c", &[3])]),
    );
    let (dir, folder) = folder(&[
        (A, &a),
        (B, &b),
        ("model-1-of-2.safetensors", b"not looked at"),
        ("adapter-00001-of-00001.safetensors", b"not looked at"),
    ]);
    let shards = Shards::open(&folder).unwrap();
    assert_eq!(shards.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    let c = shards.read("c", DType::F32, Layout::AsStored).unwrap();
    assert_eq!(c.to_vec::<f32>().unwrap(), [0.0, 1.0, 2.0]);

    let write =
        |name: &str, content: &[u8]| std::fs::write(dir.path().join(name), content).unwrap();
    write(B, &a);
    let error = Shards::open(&folder).unwrap_err();
    assert!(matches!(&error, CheckpointError::DuplicateKey { key, .. } if key == "a"));
    assert!(error.to_string().contains(B), "{error}");

    std::fs::remove_file(dir.path().join(A)).unwrap();
    match Shards::open(&folder).unwrap_err() {
        CheckpointError::MissingShards { shards, .. } => assert_eq!(shards, [A]),
        other => panic!("{other}"),
    }

    write("model-00001-of-00003.safetensors", &b);
    let error = Shards::open(&folder).unwrap_err();
    assert!(matches!(&error, CheckpointError::SeveralSets { counts, .. } if counts[..] == [2, 3]));
    assert!(error.to_string().contains(INDEX), "{error}");
}
