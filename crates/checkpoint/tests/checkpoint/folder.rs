use std::fs;

use burn::tensor::DType;
use reroute_checkpoint::{CheckpointError, Folder, Layout, Shards};
use serde_json::Value;

use crate::fixture::{counting, folder, safetensors};

#[test]
fn a_folder_that_is_none_is_refused() {
    let (dir, _folder) = folder(&[("config.json", b"{}")]);
    let path = dir.path().join("config.json");
    assert!(matches!(
        Folder::open(path),
        Err(CheckpointError::NotAFolder { .. })
    ));
    let error = Folder::open(dir.path().join("nowhere")).unwrap_err();
    assert!(matches!(error, CheckpointError::OpenFolder { .. }));
    assert!(std::error::Error::source(&error).is_some());
}

#[test]
fn files_are_read_up_to_their_limit() {
    let (_dir, folder) = folder(&[("config.json", br#"{"a": 1}"#)]);
    assert_eq!(folder.read("config.json", 8).unwrap().len(), 8);
    assert!(matches!(
        folder.read("config.json", 7),
        Err(CheckpointError::TooLarge {
            bytes: 8,
            max_bytes: 7,
            ..
        })
    ));
    let value: Value = folder.read_json("config.json", 8).unwrap();
    assert_eq!(value["a"], 1);
}

#[test]
fn missing_and_broken_files_are_named() {
    let (_dir, folder) = folder(&[("config.json", b"{")]);
    assert!(!folder.has("tokenizer.json"));
    let error = folder.read("tokenizer.json", 8).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    let error = folder.read_json::<Value>("config.json", 8).unwrap_err();
    assert!(matches!(error, CheckpointError::Json { .. }));
    assert!(error.to_string().contains("config.json"), "{error}");
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let (dir, _folder) = folder(&[("secret", b"x")]);
    fs::create_dir(dir.path().join("checkpoint")).unwrap();
    let folder = Folder::open(dir.path().join("checkpoint")).unwrap();
    let absolute = dir.path().join("secret").display().to_string();
    for name in [
        "../secret",
        "..",
        ".",
        "",
        "/",
        "a/b",
        "./a",
        "a/",
        "a\\b",
        "c:a",
        "a\0b",
        &absolute,
    ] {
        assert!(!folder.has(name), "{name:?}");
        let error = folder.read(name, 8).unwrap_err();
        assert!(
            matches!(error, CheckpointError::FileName { .. }),
            "{name:?}: {error}"
        );
    }
}

#[test]
fn a_directory_is_not_a_file() {
    let (dir, folder) = folder(&[]);
    fs::create_dir(dir.path().join("config.json")).unwrap();
    assert!(matches!(
        folder.read("config.json", 8),
        Err(CheckpointError::NotAFile { .. })
    ));
}

#[cfg(unix)]
#[test]
fn links_out_of_the_folder_are_refused() {
    use std::os::unix::fs::symlink;

    let (dir, _folder) = folder(&[("secret", b"x")]);
    let inner = dir.path().join("checkpoint");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("real.json"), b"{}").unwrap();
    symlink("real.json", inner.join("inside.json")).unwrap();
    symlink("../secret", inner.join("config.json")).unwrap();
    let folder = Folder::open(&inner).unwrap();
    assert_eq!(folder.read("inside.json", 8).unwrap(), b"{}");
    // The entry is there, so that the refusal is told instead of "no such file".
    assert!(folder.has("config.json"));
    assert!(matches!(
        folder.read("config.json", 8),
        Err(CheckpointError::LinkOutside { .. })
    ));
}

#[cfg(unix)]
#[test]
fn links_of_the_hugging_face_cache_are_followed() {
    use std::os::unix::fs::symlink;

    let (dir, _folder) = folder(&[]);
    let (blobs, snapshot) = (
        dir.path().join("repo/blobs"),
        dir.path().join("repo/snapshots/0123"),
    );
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(blobs.join("abcd"), b"{}").unwrap();
    fs::write(dir.path().join("repo/refs"), b"x").unwrap();
    symlink("../../blobs/abcd", snapshot.join("config.json")).unwrap();
    symlink("../../refs", snapshot.join("refs.json")).unwrap();
    let folder = Folder::open(&snapshot).unwrap();
    assert_eq!(folder.read("config.json", 8).unwrap(), b"{}");
    assert!(matches!(
        folder.read("refs.json", 8),
        Err(CheckpointError::LinkOutside { .. })
    ));
}

#[test]
fn a_folder_in_memory_reads_like_one_on_disk() {
    let weights: &'static [u8] = safetensors(&[counting("a", &[2])]).leak();
    let files: &'static [(&'static str, &'static [u8])] =
        vec![("config.json", &b"{}"[..]), ("model.safetensors", weights)].leak();
    let owned = files
        .iter()
        .map(|(name, bytes)| (name.to_string(), bytes.to_vec()));
    for folder in [Folder::embedded(files), Folder::in_memory(owned)] {
        assert_eq!(folder.read("config.json", 8).unwrap(), b"{}");
        assert!(matches!(
            folder.read("other", 8),
            Err(CheckpointError::MissingFile { .. })
        ));
        let shards = Shards::open(&folder).unwrap();
        assert_eq!(shards.names().collect::<Vec<_>>(), ["a"]);
        assert_eq!(shards.total_bytes(), 8);
        let numbers = shards.read("a", DType::F32, Layout::AsStored).unwrap();
        assert_eq!(numbers.into_vec::<f32>().unwrap(), [0.0, 1.0]);
    }
}

/// A repository in the cache is its current snapshot; the cache itself points to all of them.
#[test]
fn a_cache_points_to_its_snapshots() {
    let (dir, _folder) = folder(&[]);
    let repository = dir.path().join("models--org--name");
    for revision in ["aaa", "bbb"] {
        fs::create_dir_all(repository.join("snapshots").join(revision)).unwrap();
    }
    fs::create_dir(repository.join("refs")).unwrap();
    fs::write(repository.join("refs").join("main"), "bbb\n").unwrap();
    let error = Folder::open(dir.path()).unwrap_err();
    let CheckpointError::CacheRoot { snapshots, .. } = &error else {
        panic!("{error}");
    };
    let expected = ["bbb", "aaa"].map(|revision| repository.join("snapshots").join(revision));
    assert_eq!(snapshots[..], expected);
    assert!(error.to_string().contains("snapshots/bbb"), "{error}");

    let current = expected[0].canonicalize().unwrap();
    for opened in [
        Folder::open(&repository),
        Folder::open(&expected[0]),
        Folder::cached(dir.path(), "org/name"),
    ] {
        let opened = opened.unwrap();
        assert_eq!(opened.root(), Some(current.as_path()));
        assert_eq!(opened.repository().as_deref(), Some("org/name"));
        let error = opened.read("config.json", 8).unwrap_err().to_string();
        assert!(error.contains("hf download org/name"), "{error}");
        let error = Shards::open(&opened).unwrap_err().to_string();
        assert!(error.contains("hf download org/name"), "{error}");
    }
    for missing in [
        "org/other",
        "../name",
        "org/../name",
        "org/name/x",
        "name",
        "/",
        "org/",
    ] {
        let error = Folder::cached(dir.path(), missing).unwrap_err().to_string();
        assert!(error.contains(&format!("hf download {missing}")), "{error}");
    }
    // Of several that nothing chooses from, none is taken.
    for content in ["", "ccc", "../..", "\n\n"] {
        fs::write(repository.join("refs").join("main"), content).unwrap();
        let error = Folder::cached(dir.path(), "org/name").unwrap_err();
        let CheckpointError::CacheRoot { snapshots, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(snapshots.len(), 2);
    }
    // A snapshot that leads back is no way around.
    #[cfg(unix)]
    {
        let circle = dir.path().join("models--org--circle");
        fs::create_dir_all(circle.join("snapshots")).unwrap();
        std::os::unix::fs::symlink("..", circle.join("snapshots").join("aaa")).unwrap();
        let opened = Folder::open(&circle).unwrap();
        assert!(opened.read("config.json", 8).is_err());
    }
    // A checkpoint may have a folder of this name.
    fs::write(repository.join("config.json"), "{}").unwrap();
    assert!(Folder::open(repository).is_ok());
}
