//! GGUF files: every kind of block is, number by number, what the `gguf` package makes of the same bits
//! (`make_gguf.py`), and no header is believed.

use std::fs;

use burn::tensor::DType;
use proptest::prelude::*;
use reroute_checkpoint::{CheckpointError, Gguf, GgufValue, Layout};
use reroute_zoo::Folder;
use safetensors::SafeTensors;

use crate::golden::fixture;
use crate::support::cases;

const FILE: &str = "blocks.gguf";

fn folder() -> Folder {
    Folder::on_disk(&fixture("gguf")).expect("the fixture is complete")
}

fn bits(numbers: Vec<f32>) -> Vec<u32> {
    numbers.into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_kind_of_block_is_what_the_reference_makes_of_it() {
    let file = fs::read(fixture("gguf/expected.safetensors")).expect("the fixture is complete");
    let expected = SafeTensors::deserialize(&file).expect("safetensors");
    for name in [FILE, "split-00001-of-00002.gguf"] {
        let gguf = Gguf::open(&folder(), name).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(gguf.tensors.names().count(), expected.len(), "{name}");
        for (tensor, view) in expected.tensors() {
            let read = |rows| gguf.tensors.read_rows(&tensor, rows, DType::F32);
            let numbers = |rows| bits(read(rows).expect("rows").into_vec().expect("f32"));
            let words = view.data().as_chunks().0.iter();
            let words: Vec<u32> = words.map(|&x| u32::from_le_bytes(x)).collect();
            assert_eq!(numbers(0..3), words, "{name} {tensor}");
            assert_eq!(numbers(1..2), words[512..1024], "{name} {tensor}");
            let narrow = gguf.tensors.read(&tensor, DType::BF16, Layout::Transposed);
            assert_eq!(narrow.expect("bf16").shape.to_vec(), [512, 3], "{tensor}");
        }
    }
}

#[test]
fn a_file_says_what_it_says() {
    let gguf = Gguf::open(&folder(), FILE).expect("a good file");
    let text = |text: &str| GgufValue::Text(text.into());
    for (key, value) in [
        ("general.architecture", text("llama")),
        ("llama.block_count", GgufValue::Integer(2)),
        ("test.float", GgufValue::Float(0.5)),
        ("test.flag", GgufValue::Integer(1)),
        ("test.negative", GgufValue::Integer(-(1 << 40))),
        ("test.text", text("zwölf")),
        (
            "test.texts",
            GgufValue::Texts(["a", "", "ä"].map(String::from).into()),
        ),
        ("test.numbers", GgufValue::Integers(vec![1, -2, 3])),
        ("test.fractions", GgufValue::Floats(vec![0.25, -1.5])),
    ] {
        assert_eq!(gguf.metadata.get(key), Some(&value), "{key}");
    }
}

fn open(file: Vec<u8>) -> Result<Gguf, CheckpointError> {
    Gguf::open(&Folder::in_memory([(FILE.to_owned(), file)]), FILE)
}

#[test]
fn broken_files_are_refused_with_a_reason() {
    let good = fs::read(fixture("gguf/blocks.gguf")).expect("the fixture is complete");
    let at = |needle: &[u8]| {
        let mut windows = good.windows(needle.len());
        windows
            .position(|window| window == needle)
            .expect("it is there")
    };
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    // Behind a tensor's name: axes, their lengths, the type.
    let tensor = at(b"q6_k") + 4;
    let huge = u64::MAX.to_le_bytes();
    for (file, expected) in [
        (b"GGML".to_vec(), "does not begin"),
        (good[..3].to_vec(), "ends behind the file"),
        (good[..200].to_vec(), "ends behind the file"),
        (good[..good.len() - 400].to_vec(), "ends behind the file"),
        (with(4, &[1]), "version is 1"),
        (with(4, &[0, 0, 0, 3]), "big-endian"),
        (with(8, &huge), "tensors, more than are possible"),
        (with(16, &huge), "keys, more than are possible"),
        (with(at(b"test.texts") + 14, &huge), "items of a list"),
        (with(at(b"test.text") - 8, &huge), "ends behind the file"),
        (with(at(b"test.numbers") + 16, &[9]), "lists of lists"),
        (with(at(b"test.float") + 10, &[77]), "kind (77)"),
        (with(tensor, &[5]), "5 axes"),
        (with(tensor + 4, &huge), "larger than any file"),
        (with(tensor + 4, &[0; 8]), "no possible length"),
        (with(tensor + 4, &[8, 0]), "no blocks of 256"),
        (with(tensor + 20, &[10]), "Q2_K"),
        (with(tensor + 20, &[99]), "type 99"),
        (with(tensor + 24, &[1]), "not aligned"),
        (
            with(tensor + 24, &(1_u64 << 62).to_le_bytes()),
            "ends behind the file",
        ),
    ] {
        let error = open(file).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let alone = fs::read(fixture("gguf/split-00001-of-00002.gguf")).expect("a part");
    let error = open(alone).expect_err("a part alone").to_string();
    assert!(error.contains("give the first"), "{error}");
}

proptest! {
    #![proptest_config(cases(512))]

    /// Whatever a file claims, it is read or refused.
    #[test]
    fn damaged_files_are_read_or_refused(
        changes in prop::collection::vec((0..3000_usize, any::<u8>()), 1..6),
        length in 0..23_000_usize,
    ) {
        let mut file = fs::read(fixture("gguf/blocks.gguf")).expect("the fixture is complete");
        file.truncate(length.max(64));
        for (at, byte) in changes {
            if let Some(place) = file.get_mut(at) {
                *place = byte;
            }
        }
        if let Ok(gguf) = open(file) {
            let names: Vec<String> = gguf.tensors.names().map(str::to_owned).collect();
            for name in names {
                let _ = gguf.tensors.read(&name, DType::F32, Layout::AsStored);
            }
        }
    }
}
