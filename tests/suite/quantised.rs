//! Quantised checkpoints (`make_quantised.py`): every weight is, number by number, what the reference makes of
//! the same bits.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::DType;
use half::{bf16, f16};
use reducers::Schedule;
use reroute_checkpoint::{Layout, Shards};
use reroute_cli::backend::{self, Backend, Device};
use reroute_zoo::{Folder, Model, ModelConfig, OpenOptions, PixelTensors, TensorInputs, Vlm};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::{Value, json};

use crate::golden::{fixture, values};
use crate::program::{Scratch, refuses, reroute};
use crate::support::Random;

/// Folders, and what their weights are called.
const FORMS: [(&str, &str); 7] = [
    ("fp8", "FP8"),
    ("awq", "AWQ"),
    ("gptq", "GPTQ"),
    ("gptq_v2", "GPTQ"),
    ("ct_w4", "int4"),
    ("ct_w8", "int8"),
    ("ct_fp8", "FP8"),
];

fn folder(form: &str) -> Folder {
    Folder::open(fixture(&format!("quantised/{form}"))).expect("the fixture is complete")
}

/// Names and numbers.
fn expected(form: &str) -> Vec<(String, Vec<f32>)> {
    let file = fs::read(fixture(&format!("quantised/{form}/expected.safetensors")));
    let file = file.expect("the fixture is complete");
    let tensors = SafeTensors::deserialize(&file).expect("safetensors");
    let numbers = |data: &[u8]| {
        let numbers = data.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x));
        numbers.collect()
    };
    let tensors = tensors.tensors().into_iter();
    tensors
        .map(|(name, view)| (name, numbers(view.data())))
        .collect()
}

/// The bits of a number, in bf16 where the reference rounds to it.
fn bits(form: &str, x: &f32) -> u32 {
    match form.starts_with("ct_") {
        true => bf16::from_f32(*x).to_f32().to_bits(),
        false => x.to_bits(),
    }
}

/// Every weight, as f32.
fn assert_weights(form: &str, shards: &Shards) {
    let round = |x: &f32| bits(form, x);
    let expected = expected(form);
    assert_eq!(expected.len(), 21, "{form}");
    for (name, numbers) in expected {
        let found = shards.read(&name, DType::F32, Layout::AsStored);
        let found = found.unwrap_or_else(|error| panic!("{form}: {error}"));
        let found = found.into_vec::<f32>().expect("f32");
        let pairs = found.iter().map(round).eq(numbers.iter().map(round));
        assert!(pairs, "{form} {name}");
    }
}

#[test]
fn weights_are_those_of_the_reference() {
    for (form, _) in FORMS {
        let shards = Shards::open(&folder(form)).unwrap_or_else(|error| panic!("{form}: {error}"));
        assert_weights(form, &shards);
        // In parts, as blocks of a table are read.
        let (name, numbers) = expected(form).swap_remove(3);
        let columns = shards.info(&name).expect("it is there").shape[1];
        let part = shards.read_rows(&name, 5..9, DType::F32).expect("rows");
        let part = part.into_vec::<f32>().expect("f32");
        let rows = numbers[5 * columns..9 * columns].iter();
        assert!(
            part.iter()
                .map(|x| bits(form, x))
                .eq(rows.map(|x| bits(form, x))),
            "{form}"
        );
    }
}

/// A model opens, and its conversion holds the same and says no more that it is quantised.
#[test]
fn quantised_models_open_and_are_converted() {
    for (form, kind) in FORMS {
        let config = ModelConfig::open(&folder(form)).expect("a configuration");
        let proceed = &mut |_| ControlFlow::Continue(());
        let model = Model::<Backend>::open(
            &config,
            &folder(form),
            DType::BF16,
            &Device::default(),
            proceed,
        );
        assert!(model.is_ok(), "{form}: {:?}", model.err());
        let from = fixture(&format!("quantised/{form}"));
        let from = from.to_str().expect("UTF-8");
        let (doctor, _) = crate::doctor::doctor(&["--model", from]);
        let said = doctor["form"].as_str().expect("a text");
        let expected = format!("21 tensors of {kind}");
        assert!(
            said.contains(&expected) && said.contains("widened to f16"),
            "{said}"
        );

        let scratch = Scratch::new();
        let converted = |to: &str, flags: &[&str]| {
            let line = ["convert", "--from", from, "--to", to, "--format", "hf"];
            reroute(&[&line[..], flags].concat()).expect("a copy");
            Shards::open(&Folder::open(to).expect("a folder")).expect("plain weights")
        };
        assert_weights(form, &converted(&scratch.at("wide"), &["--dtype", "f32"]));
        // Nobody asks for a type: the one that the configuration names.
        let to = scratch.at("copy");
        let copy = converted(&to, &[]);
        for (name, numbers) in self::expected(form) {
            assert_eq!(
                copy.info(&name).expect("it is there").dtype,
                Dtype::F16,
                "{name}"
            );
            let found = copy
                .read(&name, DType::F32, Layout::AsStored)
                .expect("numbers");
            let found = found.into_vec::<f32>().expect("f32");
            let half = |x: &f32| f16::from_f32(*x).to_f32();
            // What the reference has rounded to bf16 (by 2⁻⁹) was another number before (f16: 2⁻¹²).
            let exact = !form.starts_with("ct_");
            let same = |(a, b): (&f32, &f32)| {
                if exact {
                    *a == half(b)
                } else {
                    (a - b).abs() <= b.abs() / 256.0
                }
            };
            assert!(found.iter().zip(&numbers).all(same), "{form} {name}");
        }
        let config = fs::read(Path::new(&to).join("config.json")).expect("a file");
        let config: Value = serde_json::from_slice(&config).expect("JSON");
        assert_eq!(config["quantization_config"], Value::Null, "{form}");
    }
}

/// What is quantised otherwise, or does not fit, is refused by name.
#[test]
fn what_is_not_known_is_refused_by_name() {
    let refused = |form: &str, key: &str, value: Value, expected: &[&str]| {
        let scratch = Scratch::new();
        for name in ["config.json", "model.safetensors"] {
            let file = fs::read(fixture(&format!("quantised/{form}/{name}")));
            scratch.write(name, file.expect("the fixture is complete"));
        }
        scratch.set("config.json", &format!("/quantization_config{key}"), value);
        let to = scratch.at("copy");
        refuses(
            &["convert", "--from", &scratch.path(), "--to", &to],
            expected,
        );
        assert!(!Path::new(&to).exists());
    };
    let group = "/config_groups/group_0/weights";
    for (form, key, value, expected) in [
        (
            "awq",
            "/quant_method",
            json!("bitsandbytes"),
            &["bitsandbytes", "not supported"][..],
        ),
        (
            "awq",
            "/quant_method",
            json!("hqq"),
            &["hqq", "not supported"],
        ),
        ("awq", "/version", json!("gemv"), &["gemv"]),
        ("awq", "/bits", json!(3), &["3 bits"]),
        ("awq", "/group_size", json!(32), &["qzeros", "groups of 32"]),
        ("gptq", "/bits", json!(3), &["3", "4 and 8"]),
        ("gptq", "/bits", json!(8), &["qzeros"]),
        ("gptq", "/checkpoint_format", json!("marlin"), &["marlin"]),
        (
            "fp8",
            "/weight_block_size",
            json!([4, 4]),
            &["scales", "[4, 4]"],
        ),
        ("ct_w4", "/format", json!("marlin-24"), &["marlin-24"]),
        ("ct_w4", &format!("{group}/num_bits"), json!(3), &["3 bits"]),
        (
            "ct_w4",
            &format!("{group}/symmetric"),
            json!(false),
            &["asymmetric"],
        ),
        (
            "ct_w4",
            &format!("{group}/actorder"),
            json!("group"),
            &["actorder"],
        ),
        (
            "ct_w4",
            &format!("{group}/group_size"),
            json!(8),
            &["scales"],
        ),
        ("fp8", "/weight_block_size", json!(null), &["scales"]),
        (
            "ct_w8",
            &format!("{group}/strategy"),
            json!("tensor"),
            &["scales"],
        ),
        (
            "ct_w8",
            "/transform_config",
            json!({"config_groups": {"R1": {"type": "hadamard"}}}),
            &["transform_config"],
        ),
        (
            "fp8",
            "/quant_method",
            json!("awq"),
            &["is a part of no weight"],
        ),
    ] {
        refused(form, key, value, expected);
    }
}

/// Parts that do not make the weight that they should.
#[test]
fn parts_that_do_not_fit_are_refused() {
    type Part = (Dtype, Vec<usize>, Vec<u8>);
    type Change = fn(&mut BTreeMap<String, Part>);
    fn part<'t>(tensors: &'t mut BTreeMap<String, Part>, end: &str) -> &'t mut Part {
        let name = format!("language_model.model.layers.0.mlp.down_proj.{end}");
        tensors
            .entry(name)
            .or_insert((Dtype::F16, vec![2, 2], vec![0; 8]))
    }
    fn without(tensors: &mut BTreeMap<String, Part>, end: &str) {
        tensors.retain(|name, _| !name.ends_with(&format!("layers.0.mlp.down_proj.{end}")));
    }
    let cases: [(&str, Change, &str); 9] = [
        (
            "fp8",
            |t| {
                let (_, shape, bytes) = part(t, "weight_scale_inv");
                bytes.truncate(shape[1] * 2);
                shape[0] = 1;
            },
            "its scales are",
        ),
        (
            "fp8",
            |t| {
                *part(t, "weight_scale_inv") = (Dtype::F32, vec![], vec![0; 4]);
            },
            "its scales are",
        ),
        (
            "fp8",
            |t| part(t, "weight_scale_inv").2[..2].copy_from_slice(&[0x80, 0x7f]),
            "NaN or infinite",
        ),
        ("fp8", |t| without(t, "weight"), "is a part of no weight"),
        ("awq", |t| without(t, "qweight"), "is a part of no weight"),
        ("awq", |t| without(t, "qzeros"), "qzeros is missing"),
        (
            "awq",
            |t| drop(part(t, "weight").clone()),
            "both as it is and in parts",
        ),
        ("gptq", |t| without(t, "g_idx"), "g_idx is missing"),
        (
            "gptq",
            |t| part(t, "g_idx").2[0] = 99,
            "a group that is not there",
        ),
    ];
    for (form, change, expected) in cases {
        let file = fs::read(fixture(&format!("quantised/{form}/model.safetensors")));
        let file = file.expect("the fixture is complete");
        let tensors = SafeTensors::deserialize(&file).expect("safetensors");
        let tensors = tensors.tensors().into_iter();
        let owned = |view: TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        let mut tensors: BTreeMap<String, Part> =
            tensors.map(|(name, view)| (name, owned(view))).collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            (name.as_str(), view.expect("of this size"))
        });
        let scratch = Scratch::new();
        scratch.write("model.safetensors", serialize(views, None).expect("a file"));
        let config = fs::read(fixture(&format!("quantised/{form}/config.json")));
        scratch.write("config.json", config.expect("the fixture is complete"));
        let to = scratch.at("copy");
        refuses(
            &["convert", "--from", &scratch.path(), "--to", &to],
            &[expected],
        );
        assert!(!Path::new(&to).join("config.json").exists(), "{expected}");
    }
}

/// A tensor of a file: type, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// How linear weights are kept in fewer bits: the parts of one, and its numbers.
type Packing = fn(&mut Random, [usize; 2]) -> (Vec<(&'static str, Stored)>, Vec<f32>);

/// Numbers from 0 to below `count`.
fn draw(random: &mut Random, count: u8) -> u8 {
    // From -1 to below 1.
    let number = (random.next() + 1.0) / 2.0 * f32::from(count);
    (number as u8).min(count - 1)
}

/// E4M3 with one scale for a block of 128 x 128, as Qwen3-VL-*-FP8 has it.
fn fp8(
    random: &mut Random,
    [rows, columns]: [usize; 2],
) -> (Vec<(&'static str, Stored)>, Vec<f32>) {
    let (down, across) = (rows.div_ceil(128), columns.div_ceil(128));
    let scales: Vec<f32> = (0..down * across)
        .map(|_| 0.02 + random.next().abs() / 50.0)
        .collect();
    // Up to 240, of either sign.
    let codes: Vec<u8> = (0..rows * columns)
        .map(|_| draw(random, 0x78) | (draw(random, 2) << 7))
        .collect();
    let decode = |code: u8| {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let size = match exponent {
            0 => mantissa / 512.0,
            _ => (1.0 + mantissa / 8.0) * 2_f32.powi(exponent - 7),
        };
        if code >> 7 == 1 { -size } else { size }
    };
    let scale = |at: usize| scales[at / columns / 128 * across + at % columns / 128];
    let numbers = codes
        .iter()
        .enumerate()
        .map(|(at, code)| decode(*code) * scale(at));
    let numbers = numbers.collect();
    let bytes = scales
        .iter()
        .flat_map(|scale| scale.to_le_bytes())
        .collect();
    let parts = vec![
        ("weight", (Dtype::F8_E4M3, vec![rows, columns], codes)),
        ("weight_scale_inv", (Dtype::F32, vec![down, across], bytes)),
    ];
    (parts, numbers)
}

/// 4 bits in groups of 32, packed along the outputs, as Qwen2.5-VL-*-AWQ has it.
fn awq(
    random: &mut Random,
    [rows, columns]: [usize; 2],
) -> (Vec<(&'static str, Stored)>, Vec<f32>) {
    const GROUP: usize = 32;
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let groups = columns / GROUP;
    let mut codes = |count: usize| -> Vec<u8> { (0..count).map(|_| draw(random, 16)).collect() };
    let (codes, zeros) = (codes(columns * rows), codes(groups * rows));
    let scales: Vec<f16> = (0..groups * rows)
        .map(|_| f16::from_f32(0.01 + random.next().abs() / 50.0))
        .collect();
    let pack = |codes: &[u8]| {
        let words = codes.chunks_exact(8).map(|codes| {
            let nibbles = ORDER.iter().enumerate();
            nibbles.fold(0, |word, (at, code)| {
                word | u32::from(codes[*code]) << (4 * at)
            })
        });
        words.flat_map(u32::to_le_bytes).collect()
    };
    let number = |at: usize| {
        let (row, column) = (at / columns, at % columns);
        let group = column / GROUP * rows + row;
        (f32::from(codes[column * rows + row]) - f32::from(zeros[group])) * scales[group].to_f32()
    };
    let bytes = scales
        .iter()
        .flat_map(|scale| scale.to_le_bytes())
        .collect();
    let parts = vec![
        (
            "qweight",
            (Dtype::I32, vec![columns, rows / 8], pack(&codes)),
        ),
        ("qzeros", (Dtype::I32, vec![groups, rows / 8], pack(&zeros))),
        ("scales", (Dtype::F16, vec![groups, rows], bytes)),
    ];
    (parts, (0..rows * columns).map(number).collect())
}

/// A checkpoint of the fixtures with other tensors, and another configuration.
fn checkpoint(family: &str, tensors: &BTreeMap<String, Stored>, how: Option<Value>) -> Scratch {
    let folder = Scratch::copy(&fixture(&format!("{family}/ckpt")));
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).expect("a consistent tensor");
        (name.as_str(), view)
    });
    folder.write(
        "model.safetensors",
        serialize(views, None).expect("serialisable"),
    );
    if let Some(how) = how {
        folder.set("config.json", "/quantization_config", how);
    }
    folder
}

/// Decoders of every family whose linear maps are FP8 or AWQ give what they give with the same numbers in f32.
#[test]
fn every_family_computes_with_the_numbers_of_fewer_bits() {
    let forms: [(Packing, Value); 2] = [
        (
            fp8,
            json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ),
        (
            awq,
            json!({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
        ),
    ];
    for family in ["llava", "qwen2vl", "qwen25vl", "qwen3vl"] {
        let file = fs::read(fixture(&format!("{family}/ckpt/model.safetensors")));
        let file = file.expect("the fixture is complete");
        let stored = SafeTensors::deserialize(&file).expect("safetensors");
        for (packing, how) in &forms {
            let mut random = Random::new(7);
            let (mut packed, mut plain) = (BTreeMap::new(), BTreeMap::new());
            let mut weights = 0;
            for (name, view) in stored.tensors() {
                let linear = name.strip_suffix(".weight").filter(|name| {
                    name.contains(".layers.") && name.ends_with("_proj") && !name.contains("vision")
                });
                let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                let (Some(linear), &[rows, columns]) = (linear, view.shape()) else {
                    packed.insert(name.clone(), tensor.clone());
                    plain.insert(name, tensor);
                    continue;
                };
                let (parts, numbers) = packing(&mut random, [rows, columns]);
                for (part, tensor) in parts {
                    packed.insert(format!("{linear}.{part}"), tensor);
                }
                let bytes = numbers
                    .iter()
                    .flat_map(|number| number.to_le_bytes())
                    .collect();
                plain.insert(name, (Dtype::F32, vec![rows, columns], bytes));
                weights += 1;
            }
            assert!(weights >= 7 * 8, "{family}");
            let logits = |folder: Scratch| {
                let device = backend::device().expect("a device");
                let vlm = Vlm::<Backend>::open(&folder.folder(), &OpenOptions::default(), &device);
                let vlm = vlm.unwrap_or_else(|error| panic!("{family}: {error}"));
                let inputs = TensorInputs {
                    samples: vec![(1..20).collect()],
                    pixels: PixelTensors::default(),
                    second_per_grid_ts: Vec::new(),
                };
                let out = vlm.run_tensors(inputs, Schedule::dense(), 1, false);
                values(out.expect("a prompt").logits)
            };
            let expected = logits(checkpoint(family, &plain, None));
            assert!(expected.iter().all(|logit| logit.is_finite()), "{family}");
            let found = logits(checkpoint(family, &packed, Some(how.clone())));
            assert_eq!(found, expected, "{family} {how}");
        }
    }
}
