//! Burnpack files: ours, Burn's, and damaged ones.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use burn::tensor::{AllocationProperty, DType, Tensor};
use burn_store::{BurnpackStore, ModuleSnapshot, ModuleStore};
use reroute_checkpoint::{
    CONVERTED_FROM, CheckpointError, Dtype, Folder, Format, Layout, NewTensor, Shards, WeightsFile,
};
use tempfile::TempDir;

use crate::fixture::{
    TestBackend, Tiny, counting, f32_bytes, folder, load, options, safetensors, tiny_names,
};

/// A file of counting f32 tensors.
pub fn burnpack(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    noted(tensors, &[])
}

/// The same with notes.
fn noted(tensors: &[(String, Vec<usize>)], notes: &[(&str, &str)]) -> Vec<u8> {
    let notes = notes
        .iter()
        .map(|(key, note)| ((*key).into(), (*note).into()));
    let notes: BTreeMap<String, String> = notes.collect();
    let tensors: Vec<NewTensor> = tensors
        .iter()
        .map(|(name, shape)| NewTensor {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: shape.clone(),
        })
        .collect();
    let layout = WeightsFile::with_notes(Format::Burnpack, &tensors, &notes).unwrap();
    let mut file = layout.header;
    for (tensor, offset) in tensors.iter().zip(layout.offsets) {
        file.resize(offset as usize, 0);
        let elements: usize = tensor.shape.iter().product();
        file.extend(f32_bytes((0..elements).map(|i| i as f32)));
    }
    assert_eq!(file.len() as u64, layout.bytes);
    file
}

fn tiny_file() -> Vec<u8> {
    burnpack(&tiny_names("old"))
}

fn open(content: &[u8]) -> Result<Shards, CheckpointError> {
    let (_dir, folder) = folder(&[("model.bpk", content)]);
    Shards::open(&folder)
}

fn values<const D: usize>(tensor: &Tensor<TestBackend, D>) -> Vec<f32> {
    tensor.to_data().to_vec().unwrap()
}

#[test]
fn our_files_load_into_a_module() {
    let (_dir, folder) = folder(&[("model.bpk", &tiny_file())]);
    let shards = Shards::open(&folder).unwrap();
    let tiny = load(&shards, &options(), &mut |_| ()).unwrap();
    assert_eq!(values(&tiny.class.val()), [0.0, 1.0]);
    let weight = tiny.layers[1].proj.weight.val();
    assert_eq!(values(&weight), [0.0, 2.0, 4.0, 1.0, 3.0, 5.0], "[in, out]");
}

#[test]
fn tensors_of_the_wanted_type_are_mapped_and_others_converted() {
    let (_dir, folder) = folder(&[("model.bpk", &tiny_file())]);
    let shards = Shards::open(&folder).unwrap();
    let name = "old.layers.0.proj.weight";
    let mapped = shards.read(name, DType::F32, Layout::AsStored).unwrap();
    assert!(matches!(mapped.bytes.property(), AllocationProperty::File));
    assert_eq!(
        mapped.to_vec::<f32>().unwrap(),
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    );
    let rows = shards.read_rows(name, 1..2, DType::F32).unwrap();
    assert!(matches!(rows.bytes.property(), AllocationProperty::File));
    assert_eq!(rows.to_vec::<f32>().unwrap(), [2.0, 3.0]);
    for (dtype, layout) in [
        (DType::F16, Layout::AsStored),
        (DType::F32, Layout::Transposed),
    ] {
        let read = shards.read(name, dtype, layout).unwrap();
        assert!(!matches!(read.bytes.property(), AllocationProperty::File));
    }
}

#[test]
fn a_mapping_outlives_the_folder() {
    let (dir, folder) = folder(&[("model.bpk", &tiny_file())]);
    let shards = Shards::open(&folder).unwrap();
    let tiny = load(&shards, &options(), &mut |_| ()).unwrap();
    drop((shards, dir));
    assert_eq!(values(&tiny.layers[0].norm.gamma.val()), [0.0, 1.0, 2.0]);
}

#[test]
fn burn_reads_our_files() {
    let (dir, _folder) = folder(&[("model.bpk", &tiny_file())]);
    let mut store = BurnpackStore::from_file(dir.path().join("model.bpk"));
    let found = store
        .get_snapshot("old.layers.1.proj.weight")
        .unwrap()
        .unwrap();
    let data = found.to_data().unwrap();
    assert_eq!(data.shape.to_vec(), [3, 2]);
    assert_eq!(
        data.to_vec::<f32>().unwrap(),
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    );
}

#[test]
fn we_read_burns_files() {
    let (from, _folder) = folder(&[("model.bpk", &tiny_file())]);
    let shards = Shards::open(&Folder::open(from.path()).unwrap()).unwrap();
    let tiny = load(&shards, &options(), &mut |_| ()).unwrap();
    let to = TempDir::new().unwrap();
    let mut store = BurnpackStore::from_file(to.path().join("model.bpk"));
    Tiny::save_into(&tiny, &mut store).unwrap();
    let shards = Shards::open(&Folder::open(to.path()).unwrap()).unwrap();
    assert_eq!(shards.names().count(), 9);
    let weight = shards
        .read("layers.1.proj.weight", DType::F32, Layout::AsStored)
        .unwrap();
    assert_eq!(
        weight.to_vec::<f32>().unwrap(),
        [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
    );
}

#[test]
fn a_burnpack_file_goes_before_safetensors() {
    let names = tiny_names("old");
    let (dir, folder) = folder(&[
        ("model.bpk", &tiny_file()),
        ("model.safetensors", b"broken"),
    ]);
    assert_eq!(Shards::open(&folder).unwrap().names().count(), names.len());
    fs::remove_file(dir.path().join("model.bpk")).unwrap();
    assert!(Shards::open(&folder).is_err());
}

fn is_stale(folder: &Folder) -> bool {
    match Shards::open(folder) {
        Ok(_) => false,
        Err(error @ CheckpointError::Stale { .. }) => {
            let text = error.to_string();
            assert!(text.contains("remove model.bpk"), "{text}");
            true
        }
        Err(error) => panic!("{error}"),
    }
}

/// The file says what it was converted from; other weights beside it are not hidden by it.
#[test]
fn a_burnpack_file_beside_weights_that_it_was_not_converted_from_is_refused() {
    let write = |dir: &TempDir, name: &str, content: &[u8]| {
        fs::write(dir.path().join(name), content).unwrap();
    };
    let source = safetensors(&[counting("a", &[300]), counting("b", &[2])]);
    let (dir, folder) = folder(&[("model.safetensors", &source)]);
    let fingerprint = Shards::open(&folder).unwrap().fingerprint().unwrap();
    let converted = noted(&tiny_names("old"), &[(CONVERTED_FROM, &fingerprint)]);
    write(&dir, "model.bpk", &converted);
    assert!(!is_stale(&folder));
    let shards = Shards::open(&folder).unwrap();
    assert_eq!(shards.converted_from(), Some(fingerprint.as_str()));
    // The same weights, in other files.
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    write(
        &dir,
        "model-00001-of-00002.safetensors",
        &safetensors(&[counting("a", &[300])]),
    );
    write(
        &dir,
        "model-00002-of-00002.safetensors",
        &safetensors(&[counting("b", &[2])]),
    );
    assert!(!is_stale(&folder));
    // Another number, another shape, a shard less.
    let mut other = counting("b", &[2]);
    other.3[7] ^= 1;
    for other in [other, counting("b", &[1, 2])] {
        write(
            &dir,
            "model-00002-of-00002.safetensors",
            &safetensors(&[other]),
        );
        assert!(is_stale(&folder));
    }
    fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(is_stale(&folder));
}

/// Burn's own files do not say what they were made of; time must do.
#[test]
fn a_burnpack_file_that_is_older_than_weights_beside_it_is_refused() {
    let (dir, folder) = folder(&[
        ("model.bpk", &tiny_file()),
        ("model.safetensors", &safetensors(&[counting("a", &[1])])),
    ]);
    assert!(!is_stale(&folder));
    let now = SystemTime::now();
    for (age, expected) in [(3600, true), (0, false)] {
        let file = File::options()
            .write(true)
            .open(dir.path().join("model.bpk"));
        file.unwrap()
            .set_modified(now - Duration::from_secs(age))
            .unwrap();
        assert_eq!(is_stale(&folder), expected);
    }
}

#[test]
fn embedded_files_are_read() {
    let content: &'static [u8] = tiny_file().leak();
    let folder = Folder::embedded(vec![("model.bpk", content)].leak());
    let shards = Shards::open(&folder).unwrap();
    let class = shards
        .read("old.class", DType::F32, Layout::AsStored)
        .unwrap();
    assert_eq!(class.to_vec::<f32>().unwrap(), [0.0, 1.0]);
}

#[test]
fn every_cut_is_noticed() {
    let content = tiny_file();
    for length in 0..content.len() {
        let error = open(&content[..length]).unwrap_err();
        let known = matches!(
            error,
            CheckpointError::NotBurnpack { .. } | CheckpointError::FileLength { .. }
        );
        assert!(known, "cut to {length} bytes: {error}");
    }
    let mut longer = content;
    longer.push(0);
    assert!(matches!(
        open(&longer),
        Err(CheckpointError::FileLength { .. })
    ));
}

#[test]
fn other_files_and_versions_are_refused() {
    let mut content = tiny_file();
    content[4] = 2;
    for content in [&content[..], b"version https://git-lfs.github.com/spec/v1"] {
        assert!(matches!(
            open(content),
            Err(CheckpointError::NotBurnpack { .. })
        ));
    }
}

/// Headers that a program could be led astray with: position in CBOR is easier found than computed.
#[test]
fn contradictory_headers_are_refused() {
    let content = burnpack(&[("a".into(), vec![64]), ("b".into(), vec![64])]);
    let replaced = |from: &[u8], to: &[u8]| {
        let at = content.windows(from.len()).position(|bytes| bytes == from);
        let at = at.unwrap_or_else(|| panic!("no {from:?}"));
        let mut content = content.clone();
        content[at..at + from.len()].copy_from_slice(to);
        open(&content).unwrap_err()
    };
    // `b` lies in 256..512: two-byte numbers, 0x19 before them.
    let moved = replaced(&[0x19, 1, 0, 0x19, 2, 0], &[0x19, 0, 0, 0x19, 2, 0]);
    assert!(
        matches!(moved, CheckpointError::BurnpackTensor { .. }),
        "{moved}"
    );
    // `a` has 64 elements, 0x18 before the number.
    let grown = replaced(&[0x81, 0x18, 64], &[0x81, 0x18, 65]);
    assert!(
        matches!(grown, CheckpointError::BurnpackTensor { .. }),
        "{grown}"
    );
    // Both are called `a`.
    let same = replaced(&[0x61, b'b'], &[0x61, b'a']);
    assert!(
        matches!(same, CheckpointError::DuplicateKey { .. }),
        "{same}"
    );
    let unknown = replaced(b"cF32", b"cF31");
    assert!(
        matches!(unknown, CheckpointError::BurnpackHeader { .. }),
        "{unknown}"
    );
}
