//! Codes in files: what is written holds the codes that loading would have made, and opens to the same.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::DType;
use reroute_checkpoint::{
    CheckpointError, Layout, LoadOptions, Loading, NameTable, Rule, Save, Shards, StoredCodes,
    TensorError,
};
use reroute_cli::backend::{self, Backend};
use reroute_convert::{Codes, ConvertError, Form, Job, Plan, Report};
use reroute_layers::{CodeFormat, Coded, Linears, VocabularyConfig, Weight};
use reroute_zoo::{AdapterConfig, Folder, Model, ModelConfig, SaveOptions, Vlm, Weights};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};

use super::{BLOCKS, MODELS, apart, open_folder, prefill};
use crate::doctor::doctor;
use crate::golden::{Reference, fixture, values};
use crate::program::{Scratch, refuses, report, reroute};

const FORMATS: [CodeFormat; 2] = [CodeFormat::Int8, CodeFormat::Int4];

const FORMS: [(Form, &str); 3] = [
    (Form::Burnpack, "burnpack"),
    (Form::Safetensors, "safetensors"),
    (Form::HuggingFace, "hf"),
];

fn job(from: &str, to: String, weights: Weights, format: CodeFormat) -> Job {
    let config = ModelConfig::open(&Folder::open(from).unwrap()).unwrap();
    let device = backend::device().unwrap();
    let mut job = Job::new(from, to);
    job.codes = Some(Codes {
        format,
        names: config.names(),
        paths: weights.coded_paths::<Backend>(&config, &device).unwrap(),
    });
    job.max_shard_bytes = 300_000;
    job
}

fn convert(job: &Job) -> Report {
    let report = Plan::new(job).unwrap().write(&mut |_| ());
    report.unwrap_or_else(|error| panic!("{}: {error}", job.from.display()))
}

fn source(name: &str) -> String {
    fixture(&format!("{name}/ckpt")).display().to_string()
}

fn at(path: &str, weights: Weights) -> Vlm<Backend> {
    open_folder(&Folder::open(path).unwrap(), DType::F32, weights)
}

/// Formats and numbers of everything that may be codes, by path.
fn contents(vlm: Vlm<Backend>) -> BTreeMap<String, (Option<CodeFormat>, Vec<f32>)> {
    let mut found = BTreeMap::new();
    vlm.map_model(|mut model: Model<Backend>| {
        let mut weights = Vec::new();
        model.weights("", &mut weights);
        for (path, blocks) in weights {
            let numbers = blocks.iter().flat_map(|block| values(block.val()));
            found.insert(path, (blocks[0].format(), numbers.collect()));
        }
        model
    });
    found
}

#[test]
fn every_form_opens_to_what_loading_would_have_made() {
    for name in MODELS {
        let (from, reference) = (source(name), Reference::open(&format!("{name}/golden")));
        for format in FORMATS {
            let made = at(&from, Weights::Decoder(format));
            let expected = prefill(&made, &reference, "dense");
            let made = contents(made);
            for (form, title) in FORMS {
                let to = Scratch::new();
                let mut job = job(&from, to.at("to"), Weights::Decoder(format), format);
                job.form = Some(form);
                let report = convert(&job);
                let what = format!("{name} {format:?} {title}");
                assert_eq!(
                    report.errors.len(),
                    made.values().filter(|(of, _)| of.is_some()).count()
                );
                let most = if format == CodeFormat::Int8 {
                    0.01
                } else {
                    0.15
                };
                let is_small = |(_, error): &(String, f64)| *error > 0.0 && *error < most;
                assert!(report.errors.iter().all(is_small), "{what}: {report:?}");

                let folder = Folder::open(to.at("to")).unwrap();
                assert_eq!(
                    Weights::stored(&folder).unwrap().1,
                    Weights::Stored,
                    "{what}"
                );
                let stored = at(&to.at("to"), Weights::Stored);
                let found = prefill(&stored, &reference, "dense");
                assert_eq!(apart(&found, &expected), 0.0, "{what}");
                assert!(contents(stored) == made, "{what}");
                // The same format is taken as it is, floats are the numbers that codes stand for.
                assert!(
                    contents(at(&to.at("to"), Weights::Decoder(format))) == made,
                    "{what}"
                );
                for (path, (of, numbers)) in contents(at(&to.at("to"), Weights::Floats)) {
                    assert!(of.is_none() && numbers == made[&path].1, "{what}: {path}");
                }
            }
        }
    }
}

#[test]
fn the_tower_becomes_codes_if_it_is_asked_for() {
    for name in MODELS {
        let (from, to) = (source(name), Scratch::new());
        let all = Weights::All(CodeFormat::Int4);
        let report = convert(&job(&from, to.at("to"), all, CodeFormat::Int4));
        let made = contents(at(&from, all));
        let outside = |path: &&String| !path.starts_with("language_model.");
        assert!(
            made.iter()
                .filter(|(path, _)| outside(path))
                .all(|(_, (of, _))| of.is_some())
        );
        assert!(made["language_model.embed_tokens.weight"].0.is_none());
        assert_eq!(
            report.errors.len(),
            made.values().filter(|(of, _)| of.is_some()).count()
        );
        assert!(
            contents(at(&to.at("to"), Weights::Stored)) == made,
            "{name}"
        );
    }
}

/// What is in codes already stays so, until floats are asked for.
#[test]
fn codes_are_kept_from_form_to_form() {
    let (from, to) = (source("qwen25vl"), Scratch::new());
    convert(&job(
        &from,
        to.at("burnpack"),
        Weights::Decoder(CodeFormat::Int4),
        CodeFormat::Int4,
    ));
    let expected = contents(at(&to.at("burnpack"), Weights::Stored));
    let kept = convert(&Job::new(to.at("burnpack"), to.at("hf")));
    assert!(kept.errors.is_empty());
    assert!(contents(at(&to.at("hf"), Weights::Stored)) == expected);
    let config: Value = serde_json::from_slice(&to.read("hf/config.json")).unwrap();
    let said = json!({"quant_method": "reroute", "formats": ["int4"]});
    assert_eq!(config["quantization_config"], said);
    // Asked for again, they are not made again.
    let again = job(
        &to.at("hf"),
        to.at("again"),
        Weights::Decoder(CodeFormat::Int4),
        CodeFormat::Int4,
    );
    assert!(convert(&again).errors.is_empty());
    assert!(contents(at(&to.at("again"), Weights::Stored)) == expected);
    let mut wide = Job::new(to.at("hf"), to.at("wide"));
    wide.dtype = Some(reroute_checkpoint::Dtype::F32);
    convert(&wide);
    let config: Value = serde_json::from_slice(&to.read("wide/config.json")).unwrap();
    assert!(config["quantization_config"].is_null());
    for (path, (of, numbers)) in contents(at(&to.at("wide"), Weights::Stored)) {
        assert!(of.is_none() && numbers == expected[&path].1, "{path}");
    }
}

#[test]
fn a_conversion_to_codes_is_taken_up_where_it_was_interrupted() {
    for (form, title) in [FORMS[0], FORMS[2]] {
        let to = Scratch::new();
        let job_to = |name: &str| {
            let weights = Weights::All(CodeFormat::Int8);
            let mut job = job(&source("llava"), to.at(name), weights, CodeFormat::Int8);
            job.form = Some(form);
            job
        };
        let whole = convert(&job_to("whole"));
        let total_bytes = 2 * Plan::new(&job_to("any")).unwrap().total_bytes();
        for tenth in [1, 4, 6, 9] {
            let job = job_to(&format!("{title}{tenth}"));
            let plan = Plan::new(&job).unwrap();
            let dies = catch_unwind(AssertUnwindSafe(|| {
                plan.write(&mut |progress| assert!(progress.done_bytes < total_bytes * tenth / 10))
            }));
            assert!(dies.is_err());
            drop(plan);
            let report = convert(&job);
            assert!(report.resumed > 0, "{title} {tenth}");
            assert_eq!(report.errors, whole.errors, "{title} {tenth}");
            for entry in fs::read_dir(to.at("whole")).unwrap() {
                let entry = entry.unwrap();
                let twin = fs::read(job.to.join(entry.file_name())).unwrap();
                assert!(
                    twin == fs::read(entry.path()).unwrap(),
                    "{title} {tenth}: {entry:?}"
                );
            }
        }
    }
}

#[test]
fn models_in_codes_are_saved_as_they_are() {
    let families = MODELS.map(|name| (format!("{name}/ckpt"), Weights::All(CodeFormat::Int4)));
    let blocks = BLOCKS.map(|name| (format!("gguf_models/{name}"), Weights::Stored));
    for (path, weights) in families.into_iter().chain(blocks) {
        let like = Folder::open(fixture(&path)).unwrap();
        let vlm = open_folder(&like, DType::F32, weights);
        let scratch = Scratch::new();
        let options = SaveOptions {
            max_shard_bytes: 200_000,
            ..SaveOptions::default()
        };
        let saved = vlm.model().save(scratch.at("saved"), &like, &options);
        let saved = saved.unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(saved.files.len() > 1, "{path}");
        let expected = contents(vlm);
        let again = at(&scratch.at("saved"), Weights::Stored);
        assert!(contents(again) == expected, "{path}");
        let config: Value = serde_json::from_slice(&scratch.read("saved/config.json")).unwrap();
        assert_eq!(
            config["quantization_config"]["quant_method"], "reroute",
            "{path}"
        );
        // Of a folder that holds codes, like itself.
        let like = Folder::open(scratch.at("saved")).unwrap();
        let vlm = open_folder(&like, DType::F32, Weights::Stored);
        let saved = vlm
            .model()
            .save(scratch.at("saved"), &like, &SaveOptions::default());
        assert_eq!(saved.unwrap().files, ["model.safetensors"], "{path}");
        assert!(
            contents(at(&scratch.at("saved"), Weights::Stored)) == expected,
            "{path}"
        );
    }
}

/// Bytes with a scale for each row are the same in files of compressed-tensors.
#[test]
fn bytes_of_compressed_tensors_stay_bytes() {
    let folder = Folder::open(fixture("quantised/ct_w8")).unwrap();
    let shards = Shards::open(&folder).unwrap();
    let mut count = 0;
    for name in shards.names() {
        let Some(codes) = shards.stored_codes(name, 1..4).unwrap() else {
            continue;
        };
        assert_eq!(codes.format, CodeFormat::Int8);
        let types = (&backend::device().unwrap(), DType::F32);
        let coded = Coded::<Backend>::new(codes.format, codes.columns, codes.words, types);
        let found = values(Weight::Coded(coded.unwrap()).val());
        let expected = shards.read_rows(name, 1..4, DType::F32).unwrap();
        assert_eq!(found, expected.into_vec::<f32>().unwrap(), "{name}");
        count += 1;
    }
    assert_eq!(count, 21);
}

/// A checkpoint of one weight in codes, of which its file says this.
fn one(note: Option<&str>, shape: [usize; 2], bytes: &[u8], config: &str) -> Scratch {
    let view = TensorView::new(Dtype::U8, shape.to_vec(), bytes).unwrap();
    let notes = note.map(|note| [("codes.a.weight".to_owned(), note.to_owned())].into());
    let scratch = Scratch::new();
    scratch.write(
        "model.safetensors",
        serialize([("a.weight", view)], notes).unwrap(),
    );
    scratch.write("config.json", config);
    scratch
}

#[test]
fn codes_that_are_no_codes_are_refused_by_name() {
    let row = |scale: f32| [&scale.to_le_bytes()[..], &[1; 8]].concat();
    let good = [row(0.5), row(0.25)].concat();
    let own = r#"{"quantization_config": {"quant_method": "reroute"}}"#;
    let scratch = one(Some("int8 8"), [2, 12], &good, own);
    let shards = Shards::open(&scratch.folder()).unwrap();
    let numbers = shards
        .read("a.weight", DType::F32, Layout::AsStored)
        .unwrap();
    let expected: Vec<f32> = [[0.5; 8], [0.25; 8]].concat();
    assert_eq!(numbers.into_vec::<f32>().unwrap(), expected);

    for (note, shape, reason) in [
        ("int8 16", [2, 12], "rows of 16"),
        ("int8 0", [2, 12], "rows of 0"),
        ("int3 8", [2, 12], "int3"),
        ("int8", [2, 12], "not a format and columns"),
        ("int8 -8", [2, 12], "not a format and columns"),
        ("Q8_0 8", [2, 12], "no blocks"),
        ("int4 64", [1, 24], "rows of 64"),
        ("int8 18446744073709551615", [2, 12], "18446744073709551615"),
        ("int8 8", [4, 6], "rows of 8"),
    ] {
        let scratch = one(Some(note), shape, &good, own);
        let error = Shards::open(&scratch.folder()).unwrap_err();
        assert!(matches!(error, CheckpointError::Tensor { .. }), "{error}");
        let said = error.to_string();
        let says = ["a.weight", reason, "model.safetensors", "download it again"];
        assert!(says.iter().all(|part| said.contains(part)), "{said}");
    }
    // A file that has lost its notes, and others' words for ours.
    let scratch = one(None, [2, 12], &good, own);
    let error = Shards::open(&scratch.folder()).unwrap_err().to_string();
    assert!(
        error.contains("a.weight") && error.contains("does not say"),
        "{error}"
    );
    let scratch = one(None, [2, 12], &good, &own.replace("reroute", "quarot"));
    let error = Shards::open(&scratch.folder()).unwrap_err().to_string();
    assert!(error.contains("quarot"), "{error}");

    for scale in [f32::NAN, f32::INFINITY, f32::MAX] {
        let scratch = one(
            Some("int8 8"),
            [2, 12],
            &[row(0.5), row(scale)].concat(),
            own,
        );
        let shards = Shards::open(&scratch.folder()).unwrap();
        let wide = shards.read("a.weight", DType::F32, Layout::AsStored).err();
        let codes = shards.stored_codes("a.weight", 0..2).err();
        for error in [wide, codes] {
            let error = error.expect("it is refused");
            let said = error.to_string();
            assert!(
                said.contains("a.weight") && said.contains("a scale of it"),
                "{said}"
            );
            let CheckpointError::Tensor { source, .. } = error else {
                panic!("{said}");
            };
            assert!(matches!(source, TensorError::Quantised { .. }), "{source}");
        }
        assert!(shards.stored_codes("a.weight", 0..1).unwrap().is_some());
    }
    let scratch = one(Some("int8 8"), [2, 12], &good, own);
    let file = scratch.read("model.safetensors");
    scratch.write("model.safetensors", &file[..file.len() - 1]);
    let error = Shards::open(&scratch.folder()).unwrap_err();
    assert!(
        matches!(error, CheckpointError::FileLength { .. }),
        "{error}"
    );
}

#[test]
fn numbers_without_codes_are_not_converted() {
    let (from, to) = (Scratch::copy(&fixture("llava/ckpt")), Scratch::new());
    let file = from.read("model.safetensors");
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut tensors: Vec<_> = tensors.tensors();
    let name = "language_model.model.layers.1.mlp.up_proj.weight";
    let at = tensors
        .iter()
        .position(|(of, _)| of.ends_with("layers.1.mlp.up_proj.weight") && !of.contains("vision"));
    let (name, view) = &tensors[at.unwrap_or_else(|| panic!("{name}"))];
    let (name, shape) = (name.clone(), view.shape().to_vec());
    let mut data = view.data().to_vec();
    data[4..8].copy_from_slice(&f32::INFINITY.to_le_bytes());
    tensors[at.unwrap()] = (
        name.clone(),
        TensorView::new(Dtype::F32, shape, &data).unwrap(),
    );
    from.write("model.safetensors", serialize(tensors, None).unwrap());
    let job = job(
        &from.path(),
        to.at("to"),
        Weights::Decoder(CodeFormat::Int8),
        CodeFormat::Int8,
    );
    let error = Plan::new(&job).unwrap().write(&mut |_| ()).unwrap_err();
    assert!(matches!(error, ConvertError::NotCoded { .. }), "{error}");
    let said = error.to_string();
    assert!(
        said.contains(&name) && said.contains("--dtype bf16"),
        "{said}"
    );
    assert!(!fs::exists(to.at("to/model.bpk")).unwrap());
}

#[test]
fn the_program_converts_to_codes_and_says_what_they_are_off_by() {
    let (from, to) = (source("qwen2vl"), Scratch::new());
    let picture = fixture("qwen_cases/pictures/small.png")
        .display()
        .to_string();
    let ask = |model: &str, flags: &[&str]| {
        let question = [
            "--image",
            &picture,
            "--prompt",
            "What is this?",
            "--max-new-tokens",
            "4",
        ];
        report(&[&["ask", "--model", model], &question[..], flags].concat())
    };
    for (dtype, coded) in [("int8", "decoder"), ("q4", "all")] {
        let path = to.at(dtype);
        let how = ["--dtype", dtype, "--coded", coded];
        let line = [&["convert", "--from", &from, "--to", &path], &how[..]].concat();
        let said = reroute(&line).unwrap();
        let parts = ["weights became codes", "%", ".weight", "verified"];
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
        assert_eq!(ask(&path, &[]), ask(&from, &how), "{dtype}");
        // What doctor says of the file is what it says of the codes that it holds.
        let weights = |flags: &[&str]| {
            let (report, _) = doctor(flags);
            report["needs"][0]["weights_bytes"].as_u64().unwrap()
        };
        let made = [&["--model", &from], &how[..]].concat();
        assert_eq!(weights(&["--model", &path]), weights(&made), "{dtype}");
        assert!(weights(&["--model", &path]) < weights(&["--model", &path, "--dtype", "bf16"]));
    }
    refuses(
        &[
            "convert",
            "--from",
            &from,
            "--to",
            &to.at("x"),
            "--dtype",
            "int3",
        ],
        &["int3", "int8", "q4"],
    );
    let tower = fixture("convert/clip").display().to_string();
    refuses(
        &[
            "convert",
            "--from",
            &from,
            "--to",
            &to.at("x"),
            "--dtype",
            "q4",
            "--vision-tower",
            &tower,
        ],
        &["--dtype int8 and q4", "convert the parts without it"],
    );
}

/// A vocabulary in blocks is one tensor, and is read block by block.
#[test]
fn tables_in_codes_are_saved_and_loaded_in_blocks() {
    const NAMES: NameTable = NameTable {
        rules: &[Rule {
            module: "*",
            file: &["table.*"],
        }],
        ignore: &[],
    };
    let device = backend::device().unwrap();
    let table = |block| {
        let config = VocabularyConfig {
            entries: 5,
            features: 32,
            block,
        };
        config.init::<Backend>(&device)
    };
    let coded = |codes: StoredCodes| {
        Coded::<Backend>::new(
            codes.format,
            codes.columns,
            codes.words,
            (&device, DType::F32),
        )
    };
    let (wide, mut module) = (table(5), table(2));
    let numbers = values(wide.weight[0].val());
    for (block, numbers) in module.weight.iter_mut().zip(numbers.chunks(2 * 32)) {
        let bytes = CodeFormat::Int8.quantise_rows(numbers, 32).unwrap();
        let words = bytes.as_chunks().0.iter();
        let words = words.map(|&word| i32::from_ne_bytes(word)).collect();
        let (format, columns) = (CodeFormat::Int8, 32);
        *block = Weight::Coded(
            coded(StoredCodes {
                format,
                columns,
                words,
            })
            .unwrap(),
        );
    }
    let scratch = Scratch::new();
    scratch.write("config.json", "{}");
    let save = Save {
        module: &module,
        described: &wide,
        table: &NAMES,
        file_name: &|path| NAMES.file_name(path),
        linear: Layout::AsStored,
        like: &scratch.folder(),
        codes: [("weight".to_owned(), (CodeFormat::Int8, 32))].into(),
        dtype: DType::F32,
        max_shard_bytes: u64::MAX,
    };
    save.write::<Backend>(scratch.at("saved").as_ref()).unwrap();
    let shards = Shards::open(&Folder::open(scratch.at("saved")).unwrap()).unwrap();
    for height in [1, 2, 3, 5] {
        let mut again = table(height);
        let options = LoadOptions::new(DType::F32);
        let proceed = &mut |_| ControlFlow::Continue(());
        let mut loading = Loading::begin(&again, &shards, &NAMES, &options, proceed).unwrap();
        let heights: Vec<usize> = again.weight.iter().map(|block| block.dims()[0]).collect();
        let blocks = loading.codes("weight", &heights, None, coded).unwrap();
        again.weight = blocks.unwrap().into_iter().map(Weight::Coded).collect();
        let again = loading.fill(again).unwrap();
        let ids = [4, 0, 3, 3, 1, 2];
        let [found, expected] = [&again, &module].map(|table| values(table.embed(&ids).unwrap()));
        assert_eq!(found, expected, "{height}");
        let x = wide.weight[0].val().narrow(0, 1, 2).transpose();
        let [found, expected] = [&again, &module].map(|table| values(table.logits(x.clone())));
        assert_eq!(found, expected, "{height}");
    }
}

/// A head that an adapter has as a whole takes the place of one in codes.
#[test]
fn whole_modules_of_adapters_replace_codes() {
    let like = Folder::open(fixture("gguf_models/qwen3vl_q8_0")).unwrap();
    let vlm = open_folder(&like, DType::F32, Weights::Stored);
    let path = "language_model.lm_head.weight";
    let scratch = Scratch::new();
    let adapted = vlm.model().adapt(&AdapterConfig::new("q_proj", 2)).unwrap();
    adapted.save_adapter(scratch.at("adapter")).unwrap();
    scratch.set(
        "adapter/adapter_config.json",
        "/modules_to_save",
        json!(["lm_head"]),
    );
    let file = scratch.read("adapter/adapter_model.safetensors");
    let numbers: Vec<u8> = (0..640 * 64)
        .flat_map(|at| (at as f32).sin().to_le_bytes())
        .collect();
    let mut tensors = SafeTensors::deserialize(&file).unwrap().tensors();
    let head = TensorView::new(Dtype::F32, vec![640, 64], &numbers).unwrap();
    tensors.push(("base_model.model.lm_head.weight".to_owned(), head));
    scratch.write(
        "adapter/adapter_model.safetensors",
        serialize(tensors, None).unwrap(),
    );
    assert!(
        contents(open_folder(&like, DType::F32, Weights::Stored))[path]
            .0
            .is_some()
    );
    let folder = Folder::open(scratch.at("adapter")).unwrap();
    let model = vlm.model().load_adapter(&folder).unwrap();
    let (format, found) = contents(vlm.map_model(|_| model)).remove(path).unwrap();
    let expected: Vec<f32> = (0..640 * 64).map(|at| (at as f32).sin()).collect();
    assert!(format.is_none() && found == expected);
}
