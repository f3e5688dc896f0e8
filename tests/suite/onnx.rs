//! ONNX files: where tensors lie and who uses them, of files made by hand; and no file is believed.

use std::fs;

use burn::tensor::DType;
use proptest::prelude::*;
use reroute_checkpoint::{CheckpointError, Layout, Onnx};
use reroute_convert::{Assembly, Job, Plan};
use reroute_zoo::Folder;

use crate::golden::fixture;
use crate::program::Scratch;
use crate::support::cases;

const FILE: &str = "tower.onnx";

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number > 0x7F {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// A field of so many bytes.
fn bytes(field: u64, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    [
        varint(field << 3 | 2),
        varint(content.len() as u64),
        content.to_vec(),
    ]
    .concat()
}

fn number(field: u64, number: u64) -> Vec<u8> {
    [varint(field << 3), varint(number)].concat()
}

/// `TensorProto`, its numbers as this field has them.
fn tensor(name: &str, kind: u64, shape: &[u64], data: Vec<u8>) -> Vec<u8> {
    let dims = shape.iter().flat_map(|&side| number(1, side));
    let tensor = [dims.collect(), number(2, kind), bytes(8, name), data].concat();
    bytes(5, tensor)
}

/// `NodeProto`
fn node(name: &str, op: &str, inputs: &[&str], output: &str) -> Vec<u8> {
    let inputs = inputs.iter().flat_map(|input| bytes(1, input));
    let node = [
        inputs.collect(),
        bytes(2, output),
        bytes(3, name),
        bytes(4, op),
    ];
    bytes(1, node.concat())
}

fn model(parts: &[Vec<u8>]) -> Vec<u8> {
    [number(1, 8), bytes(7, parts.concat())].concat()
}

fn floats(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn open(file: Vec<u8>) -> Result<Onnx, CheckpointError> {
    Onnx::open(&Folder::in_memory([(FILE.to_owned(), file)]), FILE)
}

#[test]
fn numbers_are_found_wherever_they_are_kept() {
    let (raw, packed, doubles) = (9, 4, 10);
    let data = floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let halves: Vec<u8> = [1.0, 2.0]
        .iter()
        .flat_map(|&x| half::f16::from_f32(x).to_le_bytes())
        .collect();
    let wide: Vec<u8> = [7.0_f64].iter().flat_map(|x| x.to_le_bytes()).collect();
    let constant = tensor("", 1, &[2], bytes(raw, floats(&[8.0, 9.0])));
    // The tensor of an attribute is its field 5, as it is that of a graph.
    let attribute = bytes(5, [bytes(1, "value"), constant].concat());
    let node_of = [bytes(2, "c"), bytes(4, "Constant"), attribute].concat();
    let onnx = open(model(&[
        bytes(1, node_of),
        tensor("raw", 1, &[2, 3], bytes(raw, &data)),
        tensor("packed", 1, &[3, 2], bytes(packed, &data)),
        tensor("halves", 10, &[2], bytes(raw, halves)),
        tensor("wide", 11, &[1], bytes(doubles, wide)),
        tensor("empty", 1, &[0, 4], Vec::new()),
        tensor("texts", 8, &[1], bytes(6, "text")),
        tensor("shape", 7, &[1], number(7, 5)),
    ]));
    let onnx = onnx.unwrap_or_else(|error| panic!("{error}"));
    let names: Vec<&str> = onnx.tensors.names().collect();
    assert_eq!(names, ["c", "empty", "halves", "packed", "raw", "wide"]);
    for (name, shape, numbers) in [
        ("raw", vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        ("packed", vec![3, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        ("halves", vec![2], vec![1.0, 2.0]),
        ("c", vec![2], vec![8.0, 9.0]),
        ("empty", vec![0, 4], vec![]),
    ] {
        let data = onnx
            .tensors
            .read(name, DType::F32, Layout::AsStored)
            .unwrap();
        assert_eq!(data.shape.to_vec(), shape, "{name}");
        assert_eq!(data.into_vec::<f32>().unwrap(), numbers, "{name}");
    }
}

#[test]
fn numbers_beside_the_file_are_found_and_none_outside_of_its_folder() {
    let scratch = Scratch::new();
    let entry = |key: &str, value: &str| bytes(13, [bytes(1, key), bytes(2, value)].concat());
    let external = |location: &str, offset: &str| {
        let place = [
            entry("location", location),
            entry("offset", offset),
            number(14, 1),
        ];
        model(&[tensor("a", 1, &[2], place.concat())])
    };
    scratch.write("weights.bin", floats(&[1.0, 2.0, 3.0]));
    let secret = Scratch::new();
    secret.write("secret.bin", floats(&[1.0, 2.0, 3.0]));
    let open = |file: Vec<u8>| Onnx::open_path(scratch.write(FILE, file));
    let onnx = open(external("weights.bin", "4")).unwrap();
    let data = onnx
        .tensors
        .read("a", DType::F32, Layout::AsStored)
        .unwrap();
    assert_eq!(data.into_vec::<f32>().unwrap(), [2.0, 3.0]);
    let outside = secret.at("secret.bin");
    for (location, offset, expected) in [
        ("weights.bin", "8", "ends behind"),
        ("weights.bin", "18446744073709551615", "ends behind"),
        ("weights.bin", "four", "no number"),
        ("absent.bin", "0", "absent.bin"),
        ("../secret.bin", "0", "../secret.bin"),
        (outside.as_str(), "0", "secret.bin"),
    ] {
        let error = open(external(location, offset))
            .expect_err(expected)
            .to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&outside, scratch.at("link.bin")).unwrap();
        let error = open(external("link.bin", "0")).expect_err("a link");
        assert!(
            matches!(error, CheckpointError::LinkOutside { .. }),
            "{error}"
        );
    }
}

#[test]
fn nodes_say_what_a_tensor_is() {
    let weight = |name: &str| tensor(name, 1, &[2, 2], bytes(9, floats(&[1.0; 4])));
    let scopes = "['', 'a', 'a.b', 'a.b.c', 'linear']";
    let scopes = bytes(
        9,
        [bytes(1, "pkg.torch.onnx.name_scopes"), bytes(2, scopes)].concat(),
    );
    let named = [
        bytes(1, "x"),
        bytes(1, "w2"),
        bytes(3, "node_7"),
        bytes(4, "MatMul"),
        scopes,
    ];
    let trans_b = bytes(5, [bytes(1, "transB"), number(3, 1)].concat());
    let gemm = [
        bytes(1, "x"),
        bytes(1, "w3"),
        bytes(3, "/g/Gemm"),
        bytes(4, "Gemm"),
        trans_b,
    ];
    let onnx = open(model(&[
        node("/a/b.0/c/MatMul", "MatMul", &["x", "w"], "y"),
        bytes(1, named.concat()),
        bytes(1, gemm.concat()),
        // Another name, and a circle of names, which means nothing.
        node("", "Identity", &["w"], "alias"),
        node("", "Identity", &["circle"], "circle"),
        node("/d/MatMul", "MatMul", &["x", "alias"], "z"),
        node("/d/MatMul", "MatMul", &["x", "circle"], "z"),
        node("/mlp/act/Erf", "Erf", &["x"], "e"),
        node("/e/Add", "Add", &["x", "y"], "f"),
        weight("w"),
        weight("w2"),
        weight("w3"),
    ]));
    let onnx = onnx.unwrap_or_else(|error| panic!("{error}"));
    let found: Vec<_> = (onnx.nodes.iter())
        .map(|node| {
            let input = node.inputs.first();
            let input = input.map(|input| (input.at, input.tensor.as_str(), input.is_transposed));
            (node.scope.as_str(), node.op.as_str(), input)
        })
        .collect();
    assert_eq!(
        found,
        [
            ("a.b.0.c", "MatMul", Some((1, "w", true))),
            ("a.b.c", "MatMul", Some((1, "w2", true))),
            ("g", "Gemm", Some((1, "w3", false))),
            ("d", "MatMul", Some((1, "w", true))),
            ("mlp.act", "Erf", None),
        ]
    );
}

/// Numbers of attributes, however Protocol Buffers keep them; of others nothing is known.
#[test]
fn nodes_say_how_they_compute() {
    let float =
        |field: u64, number: f32| [varint(field << 3 | 5), number.to_le_bytes().to_vec()].concat();
    let attribute = |name: &str, value: Vec<u8>| bytes(5, [bytes(1, name), value].concat());
    let mut gemm = node("/a/Gemm", "Gemm", &["x", "w"], "y");
    let attributes = [
        attribute("alpha", float(2, 0.5)),
        attribute("transB", number(3, 1)),
        attribute("strides", bytes(8, [14, 200, 1])),
        attribute("pads", [number(8, 3), number(8, 4)].concat()),
        attribute("group", number(3, 7)),
    ];
    // One node: its fields, and these behind them.
    let inner = [gemm.split_off(2), attributes.concat()].concat();
    let weight = tensor("w", 1, &[1, 2], bytes(9, floats(&[1.0, 2.0])));
    let file = open(model(&[bytes(1, inner), weight])).expect("a good file");
    let [node] = file.nodes.as_slice() else {
        panic!("{:?}", file.nodes);
    };
    let attributes: Vec<(&str, &[f64])> = { node.attributes.iter() }
        .map(|(name, numbers)| (name.as_str(), numbers.as_slice()))
        .collect();
    let expected: [(&str, &[f64]); 4] = [
        ("alpha", &[0.5]),
        ("pads", &[3.0, 4.0]),
        ("strides", &[14.0, 200.0]),
        ("transB", &[1.0]),
    ];
    assert_eq!(attributes, expected);
    assert!(!node.inputs[0].is_transposed);
}

#[test]
fn broken_files_are_refused_with_a_reason() {
    let good = fs::read(fixture("onnx/facebook.onnx")).expect("the fixture is complete");
    let one = |shape: &[u64], data: Vec<u8>| model(&[tensor("a", 1, shape, data)]);
    let data = bytes(9, floats(&[1.0]));
    let minus_one = u64::MAX;
    for (file, expected) in [
        (Vec::new(), "0 graphs"),
        (b"GGUF, if anything".to_vec(), "is it an ONNX file?"),
        (good[..1000].to_vec(), "ends behind the whole"),
        (good[..good.len() - 1].to_vec(), "ends behind the whole"),
        ([good.clone(), bytes(7, [])].concat(), "2 graphs"),
        (model(&[]), "no weights"),
        (
            one(&[2], data.clone()),
            "4 bytes, but its shape and type need 8",
        ),
        (one(&[minus_one], data.clone()), "larger than any file"),
        (
            one(&[1 << 40, 1 << 40], data.clone()),
            "larger than any file",
        ),
        (one(&[1; 9], data.clone()), "no possible shape"),
        (
            one(&[2], [data.clone(), data.clone()].concat()),
            "in pieces",
        ),
        (one(&[1], vec![4 << 3 | 5, 0, 0, 0, 0]), "in pieces"),
        (
            model(&[tensor("a", 10, &[1], number(5, 1))]),
            "save it with raw_data",
        ),
        (
            model(&[
                tensor("a", 1, &[1], data.clone()),
                tensor("a", 1, &[1], data.clone()),
            ]),
            "twice",
        ),
        (
            model(&[tensor(&"a".repeat(5000), 1, &[1], data.clone())]),
            "a name has 5000 bytes",
        ),
        (model(&[bytes(1, bytes(3, [0xFF]))]), "not UTF-8"),
        (
            model(&[bytes(1, bytes(1, "x").repeat(5000))]),
            "too many inputs",
        ),
        ([vec![8], vec![0xFF; 10]].concat(), "longer than 64 bits"),
        (
            [varint(7 << 3 | 2), varint(u64::MAX)].concat(),
            "ends behind the whole",
        ),
        (vec![7 << 3 | 3], "is it an ONNX file?"),
    ] {
        let error = open(file).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

proptest! {
    #![proptest_config(cases(256))]

    /// Whatever a file claims, it is read or refused, and so is the tower.
    #[test]
    fn damaged_files_are_read_or_refused(
        changes in prop::collection::vec((0..121_000_usize, any::<u8>()), 1..6),
        early in prop::collection::vec((0..30_000_usize, any::<u8>()), 0..4),
        length in 100_000..130_000_usize,
    ) {
        let mut file = fs::read(fixture("onnx/facebook.onnx")).expect("the fixture is complete");
        file.truncate(length);
        for (at, byte) in changes.into_iter().chain(early) {
            if let Some(place) = file.get_mut(at) {
                *place = byte;
            }
        }
        let scratch = Scratch::new();
        let mut job = Job::new(fixture("onnx/decoder"), scratch.at("to"));
        job.vision_tower = Some(scratch.write(FILE, file).into());
        job.assembly = Some(Assembly::default());
        let _ = Plan::new(&job).and_then(|plan| plan.write(&mut |_| ()));
    }
}
