//! Converted checkpoints: they load, they answer the same, and nothing that went wrong on the way is
//! kept.

mod assemble;
mod interrupted;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use burn::tensor::DType;
use half::f16;
use llava::Llava;
use reroute_checkpoint::{CheckpointError, Dtype, Folder, Layout, LoadOptions, Shards, load_into};
use reroute_cli::backend::{Backend, Device};
use reroute_convert::{ConvertError, Form, Job, Plan, Report};
use reroute_zoo::FamilyModel;
use reroute_zoo::ModelConfig;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::golden::fixture;
use crate::program::{Scratch, f32s, i64s, refuses, report, safetensors};

const FAMILIES: [&str; 4] = ["llava", "qwen2vl", "qwen25vl", "qwen3vl"];

fn source(family: &str) -> String {
    fixture(family).join("ckpt").display().to_string()
}

fn convert(job: &Job) -> Result<Report, ConvertError> {
    Plan::new(job)?.write(&mut |_| ())
}

fn answer(model: &str) -> Value {
    let picture = fixture("qwen_cases/pictures/small.png")
        .display()
        .to_string();
    let question = ["--image", &picture, "--prompt", "What is this?"];
    report(
        &[
            &["ask", "--model", model, "--max-new-tokens", "3"][..],
            &question,
        ]
        .concat(),
    )
}

/// Name → type, shape and bytes.
type Contents = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

fn contents(path: impl AsRef<Path>) -> Contents {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = tensors.iter().map(|(name, tensor)| {
        let (shape, data) = (tensor.shape().to_vec(), tensor.data().to_vec());
        (name.to_owned(), (tensor.dtype(), shape, data))
    });
    tensors.collect()
}

#[test]
fn every_family_answers_the_same_from_every_form() {
    for family in FAMILIES {
        let (from, to) = (source(family), Scratch::new());
        let expected = answer(&from);
        for (form, name) in [
            (Form::Burnpack, "burnpack"),
            (Form::Safetensors, "safetensors"),
            (Form::HuggingFace, "hf"),
        ] {
            let mut job = Job::new(&from, to.at(name));
            job.form = Some(form);
            job.max_shard_bytes = 1_000_000;
            convert(&job).unwrap();
            assert_eq!(answer(&to.at(name)), expected, "{family} as {name}");
        }
    }
}

#[test]
fn half_precision_files_hold_what_loading_would_have_narrowed() {
    for family in ["llava", "qwen3vl"] {
        let (from, to) = (source(family), Scratch::new());
        let mut job = Job::new(&from, to.at("half"));
        job.dtype = Some(Dtype::F16);
        assert_eq!(convert(&job).unwrap(), Report::default());
        let open = |path: &str| Shards::open(&Folder::open(path).unwrap()).unwrap();
        let (wide, half) = (open(&from), open(&to.at("half")));
        for name in wide.names() {
            let read = |shards: &Shards| shards.read(name, DType::F16, Layout::AsStored).unwrap();
            assert_eq!(read(&half), read(&wide), "{family}: {name}");
        }
        let config = fs::read_to_string(to.at("half/config.json")).unwrap();
        assert!(config.contains("\"float16\"") && !config.contains("\"float32\""));
    }
}

/// There and back again: what transformers wrote is what transformers gets.
#[test]
fn a_hugging_face_folder_has_the_names_shapes_and_values_of_the_source() {
    for family in FAMILIES {
        let (from, to) = (source(family), Scratch::new());
        convert(&Job::new(&from, to.at("burnpack"))).unwrap();
        // The name says the form.
        let mut job = Job::new(to.at("burnpack"), to.at("hf"));
        job.max_shard_bytes = 1_000_000;
        convert(&job).unwrap();

        let index = fs::read(to.at("hf/model.safetensors.index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        let weight_map = index["weight_map"].as_object().unwrap();
        let mut found = Contents::new();
        for shard in weight_map.values().map(|shard| shard.as_str().unwrap()) {
            let path = to.at(&format!("hf/{shard}"));
            let tensors = contents(&path);
            assert!(tensors.keys().all(|name| weight_map[name] == shard));
            found.extend(tensors);
        }
        let total_size = found.values().map(|(_, _, data)| data.len()).sum::<usize>();
        assert!(weight_map.len() == found.len() && total_size > 3_000_000);
        assert_eq!(index["metadata"]["total_size"], total_size);
        let expected = contents(Path::new(&from).join("model.safetensors"));
        assert!(found == expected, "{family}");
        for entry in Path::new(&from).read_dir().unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let there = Path::new(&to.at("hf")).join(&name).is_file();
            assert!(there || name == "model.safetensors", "{family}: {name}");
        }
    }
}

fn original(to: &Scratch) -> Job {
    let mut job = Job::new(fixture("convert/original"), to.at("hub"));
    job.vision_tower = Some(fixture("convert/clip"));
    job.tokenizer = Some(source("llava").into());
    job.form = Some(Form::Safetensors);
    job.allow_pickle = true;
    job
}

#[test]
fn llava_as_its_authors_published_it_becomes_that_of_the_hub() {
    let to = Scratch::new();
    convert(&original(&to)).unwrap();
    let found = contents(to.at("hub/model.safetensors"));
    let expected = contents(fixture("convert/expected.safetensors"));
    let names = |contents: &Contents| contents.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
    for (name, tensor) in &expected {
        assert!(found[name] == *tensor, "{name}");
    }
    assert!(Path::new(&to.at("hub/tokenizer.json")).is_file());

    let folder = Folder::open(to.at("hub")).unwrap();
    let ModelConfig::Llava(config) = ModelConfig::open(&folder).unwrap() else {
        panic!("another family");
    };
    assert_eq!((config.image_token, config.text.vocab_size), (70, 128));
    let shards = Shards::open(&folder).unwrap();
    let model = Llava::<Backend>::new(&config, &Device::default()).unwrap();
    let options = LoadOptions::new(DType::F32);
    load_into(model, &shards, &llava::NAMES, &options, &mut |_| {
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
}

#[test]
fn pickles_are_read_only_when_allowed_and_whole() {
    let to = Scratch::new();
    let mut job = original(&to);
    job.allow_pickle = false;
    let error = convert(&job).unwrap_err();
    assert!(error.to_string().contains("--allow-pickle"), "{error}");

    // `burn-store` alone would put zeros where bytes are wrong or missing.
    let shard = "pytorch_model-00001-of-00002.bin";
    let intact = fs::read(fixture("convert/original").join(shard)).unwrap();
    let from = Scratch::new();
    for entry in fixture("convert/original").read_dir().unwrap() {
        let entry = entry.unwrap();
        from.write(
            entry.file_name().to_str().unwrap(),
            fs::read(entry.path()).unwrap(),
        );
    }
    job = original(&to);
    job.from = from.path().into();
    let mut flipped = intact.clone();
    flipped[intact.len() / 2] ^= 1;
    let cut = intact[..intact.len() - 100].to_vec();
    for damaged in [flipped, cut, b"\x80\x02}q\x00.".to_vec(), Vec::new()] {
        from.write(shard, damaged);
        let error = convert(&job).unwrap_err();
        assert!(matches!(error, ConvertError::Pickle { .. }), "{error}");
        assert!(error.to_string().contains(shard), "{error}");
    }
    from.remove(shard);
    let error = convert(&job).unwrap_err().to_string();
    assert!(
        error.contains(shard) && error.contains("download"),
        "{error}"
    );
    from.write(shard, intact);
    let name = "pytorch_model.bin.index.json";
    let index = String::from_utf8(from.read(name)).unwrap();
    let of_other_shards = index.replacen(shard, "pytorch_model-00002-of-00002.bin", 1);
    let of_more = index.replacen("\"weight_map\": {", "&\"ghost\": \"SHARD\",", 1);
    let of_more = of_more
        .replace('&', "\"weight_map\": {")
        .replace("SHARD", shard);
    for wrong in [of_other_shards, of_more] {
        assert_ne!(wrong, index);
        from.write(name, wrong);
        let error = convert(&job).unwrap_err();
        let is_index = matches!(
            error,
            ConvertError::Checkpoint(CheckpointError::Index { .. })
        );
        assert!(is_index, "{error}");
    }
    from.remove(name);
    let error = convert(&job).unwrap_err().to_string();
    assert!(error.contains("neither pytorch_model.bin nor"), "{error}");
    assert_eq!(to.entries(), [""; 0]);
    from.write(name, index);
    convert(&job).unwrap();
}

#[test]
fn pickled_tensors_are_what_pytorch_would_have_loaded() {
    let to = Scratch::new();
    let mut job = Job::new(fixture("convert/unusual"), to.at("model.safetensors"));
    job.allow_pickle = true;
    convert(&job).unwrap();
    let found = contents(to.at("model.safetensors"));
    assert!(found == contents(fixture("convert/unusual/expected.safetensors")));
    job.from = fixture("convert/transposed");
    job.to = to.at("transposed.safetensors").into();
    let error = convert(&job).unwrap_err();
    assert!(error.to_string().contains("row by row"), "{error}");
}

#[test]
fn small_files_are_those_of_the_language_model_and_small() {
    let (from, tower, to) = (Scratch::new(), Scratch::new(), Scratch::new());
    for (folder, name) in [(&from, "convert/original"), (&tower, "convert/clip")] {
        for entry in fixture(name).read_dir().unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            folder.write(&name, fs::read(entry.path()).unwrap());
        }
    }
    tower.write("tokenizer.json", "CLIP's own");
    let mut job = original(&to);
    job.from = from.path().into();
    job.vision_tower = Some(tower.path().into());
    job.tokenizer = None;
    let names = |job: &Job| {
        let plan = Plan::new(job)?;
        Ok::<_, ConvertError>(plan.companions().map(str::to_owned).collect::<Vec<_>>())
    };
    assert_eq!(
        names(&job).unwrap(),
        ["preprocessor_config.json", "config.json"]
    );
    let notes = from.write("notes.txt", "");
    let notes = File::options().write(true).open(notes).unwrap();
    notes
        .set_len(reroute_checkpoint::TOKENIZER_MAX_BYTES + 1)
        .unwrap();
    assert_eq!(names(&job).unwrap().len(), 2);
    let left_out = Plan::new(&job).unwrap().left_out().to_vec();
    assert_eq!(left_out, [Path::new(&from.at("notes.txt"))]);
    // A link may be what the user calls a tokenizer.
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(tower.at("tokenizer.json"), from.at("tokenizer.json")).unwrap();
        let error = names(&job).unwrap_err().to_string();
        assert!(error.contains("outside the checkpoint"), "{error}");
    }
}

/// A checkpoint of these f32 tensors.
fn small(tensors: &[(&str, &[f32])]) -> Scratch {
    let folder = Scratch::new();
    let tensors: Vec<_> = (tensors.iter())
        .map(|(name, values)| f32s(name, [values.len()], values))
        .collect();
    folder.write("model.safetensors", safetensors(&tensors));
    folder.write("config.json", "{}");
    folder
}

#[test]
fn values_beyond_the_range_of_f16_are_counted_and_become_the_largest() {
    let values = [1.0, 65519.0, 65520.0, -1e6, f32::INFINITY, 1e-9];
    let from = small(&[("fits", &[0.5, -65504.0]), ("wide", &values)]);
    let mut job = Job::new(from.path(), from.at("half.safetensors"));
    job.dtype = Some(Dtype::F16);
    // As when it is loaded, unless asked otherwise; nothing is left then.
    let error = convert(&job).unwrap_err();
    assert!(
        matches!(&error, ConvertError::Overflow { name, values: 2, .. } if name == "wide"),
        "{error}"
    );
    assert!(error.to_string().contains("--clamp"), "{error}");
    assert!(!Path::new(&from.at("half.safetensors")).exists());
    job.clamp = true;
    let report = convert(&job).unwrap();
    assert_eq!(report.overflows, [("wide".to_owned(), 2)]);
    let found = contents(from.at("half.safetensors"));
    let halves = found["wide"]
        .2
        .as_chunks()
        .0
        .iter()
        .map(|raw| f16::from_le_bytes(*raw).to_f32());
    let expected = [1.0, 65504.0, 65504.0, -65504.0, f32::INFINITY, 0.0];
    assert_eq!(halves.collect::<Vec<_>>(), expected);

    job = Job::new(from.path(), from.at("brain.safetensors"));
    job.dtype = Some(Dtype::BF16);
    assert_eq!(convert(&job).unwrap().overflows, []);
}

#[test]
fn doubles_become_what_is_asked_for() {
    let (from, to) = (small(&[]), Scratch::new());
    let values = [0.1, 65519.0, 1e6, -1e300, f64::INFINITY];
    let bytes = values.iter().flat_map(|value: &f64| value.to_le_bytes());
    let tensor = ("a", Dtype::F64, vec![5], bytes.collect());
    from.write("model.safetensors", safetensors(&[tensor]));
    let largest = f32::MAX;
    for (dtype, expected, lost) in [
        (Dtype::F32, [0.1, 65519.0, 1e6, -largest, f32::INFINITY], 1),
        (
            Dtype::F16,
            [0.1, 65504.0, 65504.0, -65504.0, f32::INFINITY],
            2,
        ),
    ] {
        let mut job = Job::new(from.path(), to.at(&format!("{dtype}.safetensors")));
        job.dtype = Some(dtype);
        job.clamp = true;
        assert_eq!(convert(&job).unwrap().overflows, [("a".to_owned(), lost)]);
        let (found, _, bytes) = &contents(&job.to)["a"];
        let expected = expected.iter().flat_map(|value: &f32| match dtype {
            Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        });
        assert_eq!((*found, bytes), (dtype, &expected.collect()));
    }
}

#[test]
fn integers_stay_as_they_are() {
    let (from, to) = (small(&[]), Scratch::new());
    let tensors = [
        f32s("a", [3], [1.0, 2.0, 3.0]),
        i64s("b", [1, 2], [-7, 1 << 40]),
    ];
    from.write("model.safetensors", safetensors(&tensors));
    let mut job = Job::new(from.path(), to.at("model.bpk"));
    job.dtype = Some(Dtype::F16);
    convert(&job).unwrap();
    to.write("config.json", "{}");
    convert(&Job::new(to.path(), to.at("back.safetensors"))).unwrap();
    let (found, stored) = (
        contents(to.at("back.safetensors")),
        contents(from.at("model.safetensors")),
    );
    assert!(found["b"] == stored["b"]);
    assert_eq!((found["a"].0, &found["a"].1[..]), (Dtype::F16, &[3][..]));
}

// macOS has no such names.
#[cfg(target_os = "linux")]
#[test]
fn names_that_are_no_text_are_refused_as_targets_and_read_as_sources() {
    use std::os::unix::ffi::OsStrExt;
    let (from, to) = (small(&[("a", &[1.0])]), Scratch::new());
    let odd = |scratch: &Scratch, name: &[u8]| {
        Path::new(&scratch.path()).join(std::ffi::OsStr::from_bytes(name))
    };
    let target = odd(&to, b"\xff.bpk");
    fs::write(&target, "precious").unwrap();
    let error = convert(&Job::new(from.path(), &target)).unwrap_err();
    assert!(matches!(error, ConvertError::Target { .. }), "{error}");
    assert_eq!(fs::read(target).unwrap(), b"precious");

    let source = odd(&to, b"\xff");
    fs::rename(from.path(), &source).unwrap();
    convert(&Job::new(&source, source.join("new"))).unwrap();
    fs::remove_dir_all(source).unwrap();
}

#[test]
fn nothing_is_overwritten_and_a_plan_writes_nothing() {
    let (from, to) = (source("llava"), Scratch::new());
    let folder = Job::new(&from, to.at("new"));
    let plan = Plan::new(&folder).unwrap();
    assert!(plan.companions().any(|name| name == "tokenizer.json"));
    assert_eq!(plan.missing_bytes(), plan.total_bytes());
    assert_eq!(to.entries(), [""; 0]);
    plan.write(&mut |_| ()).unwrap();
    for form in [Form::Burnpack, Form::Safetensors, Form::HuggingFace] {
        let mut again = folder.clone();
        again.form = Some(form);
        let error = convert(&again).unwrap_err();
        assert!(matches!(error, ConvertError::Occupied { .. }), "{error}");
    }
    let error = convert(&Job::new(&from, &from)).unwrap_err();
    assert!(matches!(error, ConvertError::Occupied { .. }), "{error}");
    for name in [
        "config.json",
        "model-00002-of-00004.safetensors",
        "model-00002-of-00004.safetensors.partial",
        "model.journal",
    ] {
        let of_others = Scratch::new();
        of_others.write(name, b"precious \xff");
        let mut job = Job::new(&from, of_others.path());
        job.form = Some(Form::HuggingFace);
        job.max_shard_bytes = 1_000_000;
        let error = convert(&job).unwrap_err();
        assert!(matches!(error, ConvertError::Occupied { .. }), "{error}");
        assert_eq!(of_others.entries(), [name]);
    }
    let mut job = Job::new(&from, to.at("model.bpk"));
    job.form = Some(Form::HuggingFace);
    let error = convert(&job).unwrap_err();
    assert!(matches!(error, ConvertError::Target { .. }), "{error}");
    // A folder's name says the form where nothing else does.
    for (name, form, written) in [
        ("hf", None, "model.safetensors"),
        ("safetensors", None, "model.safetensors"),
        ("burnpack", None, "model.bpk"),
        ("hf", Some(Form::Burnpack), "model.bpk"),
    ] {
        let mut job = Job::new(&from, to.at(name));
        job.form = form;
        let plan = Plan::new(&job).unwrap();
        assert_eq!(plan.files()[0].path, job.to.join(written));
    }
    let error = convert(&Job::new(&from, to.at("a\n.bpk"))).unwrap_err();
    assert!(matches!(error, ConvertError::Target { .. }), "{error}");
    // It would be opened instead of what is there.
    let of_others = Scratch::checkpoint();
    let error = convert(&Job::new(&from, of_others.at("model.bpk"))).unwrap_err();
    assert!(matches!(error, ConvertError::Occupied { .. }), "{error}");
    // Beside its source, a file is no second checkpoint.
    let from = Scratch::checkpoint();
    convert(&Job::new(from.path(), from.at("model.bpk"))).unwrap();
    from.remove("model.safetensors");
    report(&[
        "ask",
        "--model",
        &from.path(),
        "--prompt",
        "Hi",
        "--max-new-tokens",
        "1",
    ]);
}

#[test]
fn a_disk_that_is_too_full_is_noticed_before_anything_is_written() {
    let (from, to) = (small(&[]), Scratch::new());
    let bytes = 8_u64 << 40;
    let header = format!(
        r#"{{"a":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{bytes}]}}}}"#,
        bytes / 4
    );
    let mut content = (header.len() as u64).to_le_bytes().to_vec();
    content.extend(header.as_bytes());
    let path = from.write("model.safetensors", &content);
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(content.len() as u64 + bytes).unwrap(); // Takes no place on the disk.
    let error = convert(&Job::new(from.path(), to.at("model.bpk"))).unwrap_err();
    assert!(matches!(error, ConvertError::DiskFull { .. }), "{error}");
    let error = convert(&Job::new(from.path(), to.at("new/folder"))).unwrap_err();
    assert!(matches!(error, ConvertError::DiskFull { .. }), "{error}");
    assert_eq!(to.entries(), [""; 0]);
}

#[test]
fn damaged_burnpack_files_are_refused_with_advice() {
    let (from, to) = (source("llava"), Scratch::new());
    convert(&Job::new(&from, to.at("model.bpk"))).unwrap();
    for entry in Path::new(&from).read_dir().unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if !name.starts_with("model.") {
            to.write(&name, fs::read(entry.path()).unwrap());
        }
    }
    let flags = ["ask", "--model", &to.path(), "--prompt", "Hi"];
    let whole = to.read("model.bpk");
    to.write("model.bpk", &whole[..whole.len() / 2]);
    refuses(&flags, &["model.bpk", "bytes where its header needs"]);
    to.write("model.bpk", b"version https://git-lfs.github.com/spec/v1");
    refuses(&flags, &["model.bpk", "not a Burnpack file", "convert"]);
    to.remove("model.bpk");
    refuses(&flags, &["none of model.bpk"]);
}

/// Nothing could open what they would become.
#[test]
fn what_nothing_opens_is_not_converted() {
    for (file, pointer, value, expected) in [
        (
            "config.json",
            "/model_type",
            json!("llava_next"),
            "llava_next",
        ),
        (
            "config.json",
            "/quantization_config",
            json!({"quant_method": "bitsandbytes"}),
            "bitsandbytes",
        ),
    ] {
        let folder = Scratch::checkpoint();
        folder.set(file, pointer, value);
        let to = folder.at("to");
        refuses(
            &["convert", "--from", &folder.path(), "--to", &to],
            &[expected],
        );
        assert!(!std::path::Path::new(&to).exists());
    }
}
