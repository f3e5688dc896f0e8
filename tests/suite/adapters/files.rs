//! Adapters on disk: saved and read again, PEFT's own, and whatever else lies in a folder.

use std::fs;
use std::path::Path;

use reducers::Schedule;
use reroute_cli::backend::Backend;
use reroute_zoo::reroute_checkpoint::CheckpointError;
use reroute_zoo::{AdapterConfig, AdapterError, Folder, Model, ZooError};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{adapted, all_linear, bits, linears, logits, names, schedules, with_model};
use crate::golden::{Reference, assert_close, fixture, open};
use crate::support::values;

const SETTINGS: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

fn load(model: &Model<Backend>, folder: &Path) -> Result<Model<Backend>, ZooError> {
    model.load_adapter(&Folder::open(folder)?)
}

/// Numbers, alpha and kind of scaling of every adapter, by path.
type Contents = Vec<(String, [Vec<u32>; 2], f64, bool)>;

fn contents(model: &Model<Backend>) -> Contents {
    let mut model = model.clone();
    let adapters = linears(&mut model)
        .into_iter()
        .filter_map(|(path, linear)| {
            let adapter = linear.adapter.take()?;
            let numbers = [&adapter.down, &adapter.up].map(|factor| bits(&values(factor.val())));
            let scaling = adapter.scaling;
            Some((path, numbers, scaling.alpha, scaling.rank_stabilized))
        });
    adapters.collect()
}

fn json_of(folder: &Path) -> Value {
    let text = fs::read(folder.join(SETTINGS)).expect("settings");
    serde_json::from_slice(&text).expect("JSON")
}

fn configurations() -> [AdapterConfig; 4] {
    [
        AdapterConfig::new(["q_proj", "v_proj"], 4),
        AdapterConfig {
            alpha: 3.5,
            rank_stabilized: true,
            ..all_linear(2)
        },
        AdapterConfig::new(["layers.*"], 2),
        AdapterConfig {
            alpha: 8.0,
            rank_pattern: vec![
                ("layers.1.self_attn.q_proj".into(), 1),
                ("q_proj".into(), 3),
            ],
            alpha_pattern: vec![("layers.2.mlp.up_proj".into(), 1.25)],
            ..AdapterConfig::new(["q_proj", "up_proj"], 2)
        },
    ]
}

/// Every family, every kind of configuration: bit for bit, and over an adapter that is there.
#[test]
fn what_is_saved_is_read_again() {
    let folder = TempDir::new().expect("a folder");
    let folder = folder.path().join("some/adapter");
    for family in super::FAMILIES {
        let vlm = open(family);
        let decoder = match family {
            "llava" => "language_model.model.layers.*",
            "qwen3vl" => "model.language_model.layers.*",
            _ => "model.layers.*",
        };
        let mut configurations = configurations();
        configurations[2] = AdapterConfig::new([decoder], 2);
        for config in configurations {
            let model = adapted(vlm.model(), &config);
            model.save_adapter(&folder).expect("a folder to write to");
            let read = load(vlm.model(), &folder).expect("its own adapter");
            assert!(contents(&read) == contents(&model), "{family} {config:?}");
            let entries = fs::read_dir(&folder).expect("a folder").count();
            assert_eq!(entries, 2, "nothing is left behind");
        }
    }
    let vlm = open("llava");
    let error = vlm.model().save_adapter(&folder).expect_err("no adapter");
    assert!(matches!(error, ZooError::Adapter(AdapterError::NotAdapted)));
}

/// The settings are PEFT's; targets are as short as they can be and mean nothing else.
#[test]
fn saved_settings_are_those_of_peft() {
    let folder = TempDir::new().expect("a folder");
    let vlm = open("llava");
    let targets = |config: AdapterConfig| {
        let model = vlm.model().adapt(&config).expect("good targets");
        model.save_adapter(folder.path()).expect("a folder");
        json_of(folder.path())["target_modules"].clone()
    };
    let both = AdapterConfig {
        alpha: 16.0,
        rank_stabilized: true,
        ..AdapterConfig::new(["q_proj", "v_proj"], 8)
    };
    assert_eq!(targets(both), json!(["q_proj", "v_proj"]));
    let settings = json_of(folder.path());
    for (name, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("r", json!(8)),
        ("lora_alpha", json!(16.0)),
        ("use_rslora", json!(true)),
        ("bias", json!("none")),
        ("rank_pattern", json!({})),
    ] {
        assert_eq!(settings[name], value, "{name}");
    }
    let file = fs::read(folder.path().join(TENSORS)).expect("tensors");
    let tensors = SafeTensors::deserialize(&file).expect("safetensors");
    let name = "base_model.model.model.language_model.layers.7.self_attn.v_proj.lora_B.weight";
    let tensor = tensors.tensor(name).expect("the last layer's");
    assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, &[96, 8][..]));

    // The tower has such names, too.
    let one = targets(AdapterConfig::new(["model.layers.2.self_attn.q_proj"], 8));
    assert_eq!(one, json!(["language_model.layers.2.self_attn.q_proj"]));
}

/// Whatever step a save is stopped at, the old adapter or the new one is read.
#[test]
fn a_save_that_is_stopped_leaves_an_adapter() {
    let vlm = open("llava");
    let [old, new] = [4, 2].map(|rank| adapted(vlm.model(), &AdapterConfig::new("o_proj", rank)));
    let finished = TempDir::new().expect("a folder");
    new.save_adapter(finished.path()).expect("a folder");
    let [settings, tensors] =
        [SETTINGS, TENSORS].map(|name| fs::read(finished.path().join(name)).expect("a file"));
    let [new_settings, new_tensors] = [SETTINGS, TENSORS].map(|name| format!("{name}.partial"));
    // How much of the new files lies beside, whether the tensors are in place, and whose adapter it is.
    let all = (tensors.len(), settings.len());
    for (written, is_replaced, expected) in [
        ((Some(9), None), false, &old),
        ((Some(all.0), Some(5)), false, &old),
        ((Some(all.0), Some(all.1)), false, &old),
        ((None, Some(all.1)), true, &new),
    ] {
        let folder = TempDir::new().expect("a folder");
        old.save_adapter(folder.path()).expect("a folder");
        if let Some(length) = written.0 {
            fs::write(folder.path().join(&new_tensors), &tensors[..length]).expect("a file");
        }
        if let Some(length) = written.1 {
            fs::write(folder.path().join(&new_settings), &settings[..length]).expect("a file");
        }
        if is_replaced {
            fs::write(folder.path().join(TENSORS), &tensors).expect("a file");
        }
        let found = load(vlm.model(), folder.path()).expect("an adapter");
        assert!(contents(&found) == contents(expected));
        old.save_adapter(folder.path()).expect("a folder");
        let found = load(vlm.model(), folder.path()).expect("an adapter");
        assert!(contents(&found) == contents(&old));
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 2);
    }
}

/// An adapter of PEFT's own (`make_adapters.py`): its settings, its names, its logits, beside the weights
/// and in them.
#[test]
fn adapters_of_peft_say_what_they_say_there() {
    for (adapters, expected, maps) in [
        (&["llava"][..], "logits", 26),
        (&["llava_second"], "logits", 20),
        (&["llava_second", "llava"], "both", 34),
        (&["qwen25vl"], "logits", 78),
        // Magnitudes, look-ahead, expressions.
        (&["qwen2vl"], "logits", 56),
        // Modules as a whole.
        (&["qwen3vl"], "logits", 16),
        (&["qwen25vl_head"], "logits", 8),
    ] {
        let family = adapters[0].split('_').next().expect("a name");
        let inputs = match family {
            "llava" => "llava/golden".to_owned(),
            _ => format!("qwen_cases/{family}/turns"),
        };
        let folder = |name| Folder::open(fixture(&format!("adapters/{name}")));
        let folders: Vec<Folder> = { adapters.iter() }
            .map(|name| folder(name).expect("the fixture is complete"))
            .collect();
        let vlm = open(family);
        let model = vlm.model().load_adapters(&folders);
        let model = model.unwrap_or_else(|error| panic!("{adapters:?}: {error}"));
        assert_eq!(names(&model).len(), maps, "{adapters:?}");
        let golden = Reference::open(&format!("adapters/{}/expected", adapters[0]));
        let expected = golden.floats(expected);
        for model in [model.clone(), model.merge_adapters()] {
            let vlm = with_model(open(family), model);
            let inputs = Reference::open(&inputs).inputs();
            let out = vlm.run_tensors(inputs, Schedule::dense(), 1, false);
            let found = values(out.expect("good inputs").logits);
            assert_close(&format!("{adapters:?}"), &found, &expected, 3e-4);
        }
    }
}

/// Tensors under other names, of other shapes or types.
fn rewrite(folder: &Path, mut change: impl FnMut(&str) -> Option<(String, Dtype, Vec<usize>)>) {
    let path = folder.join(TENSORS);
    let file = fs::read(&path).expect("tensors");
    let tensors = SafeTensors::deserialize(&file).expect("safetensors");
    let zeros = vec![0; 1 << 20];
    let views = tensors.iter().filter_map(|(name, tensor)| {
        let (new_name, dtype, shape) = change(name)?;
        let view = match (dtype, &shape[..]) == (tensor.dtype(), tensor.shape()) {
            true => tensor,
            false => {
                let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
                TensorView::new(dtype, shape, &zeros[..bytes]).expect("a tensor")
            }
        };
        Some((new_name, view))
    });
    let file = serialize(views.collect::<Vec<_>>(), None).expect("safetensors");
    fs::write(path, file).expect("a folder to write to");
}

/// A folder with an adapter of LLaVA's output projections and projector.
fn folder() -> TempDir {
    let folder = TempDir::new().expect("a folder");
    let config = AdapterConfig::new(["o_proj", "linear_1"], 2);
    let model = adapted(open("llava").model(), &config);
    model.save_adapter(folder.path()).expect("a folder");
    folder
}

/// The shape of a tensor of rank 2 in the adapter of [`folder`].
fn shape_of(name: &str) -> Vec<usize> {
    let input = if name.contains("linear_1") { 64 } else { 96 };
    match name.contains("lora_A") {
        true => vec![2, input],
        false => vec![96, 2],
    }
}

/// Several saves to one folder leave one of them, whole.
#[test]
fn saves_at_once_leave_one_adapter() {
    let folder = TempDir::new().expect("a folder");
    let vlm = open("llava");
    let adapted = [1, 2, 5].map(|rank| {
        let config = AdapterConfig::new(["q_proj"], rank);
        vlm.model().adapt(&config).expect("there are such maps")
    });
    for _ in 0..10 {
        std::thread::scope(|scope| {
            for model in &adapted {
                let folder = folder.path();
                scope.spawn(move || model.save_adapter(folder).expect("a folder"));
            }
        });
        load(vlm.model(), folder.path()).expect("one of them");
    }
}

/// What would count for nothing, or is no number, is refused when it is read, too.
#[test]
fn numbers_without_sense_are_refused() {
    let vlm = open("llava");
    for alpha in [0.0, 1e300, 1e-320] {
        let folder = folder();
        let mut settings = json_of(folder.path());
        settings["lora_alpha"] = alpha.into();
        fs::write(
            folder.path().join("adapter_config.json"),
            settings.to_string(),
        )
        .unwrap();
        let error = super::refused(load(vlm.model(), folder.path()));
        assert!(matches!(error, AdapterError::Alpha { .. }), "{error}");
    }
    let folder = folder();
    let path = folder.path().join("adapter_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let error = super::refused(load(vlm.model(), folder.path()));
    assert!(matches!(error, AdapterError::NotFinite { .. }), "{error}");
}

/// Everything that does not fit is told at once.
#[test]
fn tensors_that_do_not_fit_are_told_at_once() {
    let folder = folder();
    rewrite(folder.path(), |name| {
        let shape = shape_of(name);
        let layer = |layer: usize| name.contains(&format!("layers.{layer}."));
        match name {
            _ if layer(0) && name.contains("lora_A") => None,
            _ if layer(1) => Some((name.replace("o_proj", "out_proj"), Dtype::F32, shape)),
            _ if layer(2) => None,
            _ if layer(3) => Some((name.into(), Dtype::F32, vec![3, 3])),
            _ if layer(4) => Some((name.into(), Dtype::F64, shape)),
            _ => Some((name.into(), Dtype::F32, shape)),
        }
    });
    let vlm = open("llava");
    let error = super::refused(load(vlm.model(), folder.path()));
    let AdapterError::Mismatch(mismatch) = &error else {
        panic!("{error}");
    };
    let mismatch = &mismatch.mismatch;
    assert_eq!(mismatch.unknown.len(), 2, "{error}");
    let layer = |layer: usize| format!("language_model.model.layers.{layer}.self_attn.o_proj");
    let half = "base_model.model.model.language_model.layers.0.self_attn.o_proj.lora_A.weight";
    assert_eq!(mismatch.missing, [&layer(1), &layer(2), half], "{error}");
    assert_eq!(mismatch.misshapen.len(), 2, "{error}");
    assert_eq!(mismatch.unreadable.len(), 2, "{error}");
    assert!(
        error.to_string().contains("does not fit this model"),
        "{error}"
    );

    // Of another model: another family's names, another size.
    let error = super::refused(load(open("qwen25vl").model(), folder.path()));
    assert!(matches!(error, AdapterError::Mismatch(_)), "{error}");
    // The same map under two names.
    let folder = self::folder();
    let mut copies = 0;
    rewrite(folder.path(), |name| {
        let is_copy = name.contains("layers.1.");
        copies += usize::from(is_copy);
        let new = match is_copy {
            true => name.replace(
                "model.language_model.layers.1.",
                "language_model.model.layers.0.",
            ),
            false => name.into(),
        };
        let shape = shape_of(name);
        Some((new, Dtype::F32, shape))
    });
    let error = super::refused(load(vlm.model(), folder.path()));
    let AdapterError::Mismatch(mismatch) = &error else {
        panic!("{error}");
    };
    assert_eq!(
        (copies, mismatch.mismatch.duplicate.len()),
        (2, 2),
        "{error}"
    );
}

/// Adapters of a part of a model are adapters: tensors say what is adapted, not the list of targets.
#[test]
fn an_adapter_of_the_decoder_alone_is_read() {
    let vlm = open("llava");
    let folder = TempDir::new().expect("a folder");
    let model = adapted(
        vlm.model(),
        &AdapterConfig::new(["language_model.*.q_proj"], 2),
    );
    model.save_adapter(folder.path()).expect("a folder");
    let mut settings = json_of(folder.path());
    // The tower has q_proj, too. A regular expression is not looked at.
    for targets in [
        json!(["q_proj", "absent"]),
        json!(".*language_model.*q_proj"),
        json!(null),
    ] {
        settings["target_modules"] = targets;
        fs::write(folder.path().join(SETTINGS), settings.to_string()).expect("a file");
        let found = load(vlm.model(), folder.path()).expect("an adapter");
        assert!(contents(&found) == contents(&model));
    }
}

/// What changes numbers and is not there is refused by name; what changes none is not.
#[test]
fn settings_that_are_not_supported_are_refused_by_name() {
    let (folder, vlm) = (folder(), open("llava"));
    let settings = json_of(folder.path());
    let with = |name: &str, value: Value| {
        let mut settings = settings.clone();
        settings[name] = value;
        fs::write(folder.path().join(SETTINGS), settings.to_string()).expect("a file");
        load(vlm.model(), folder.path())
    };
    let expressions = (0..65).map(|n| (format!("layers.(?!{n}).*"), json!(2)));
    let expressions = Value::Object(expressions.collect());
    for (name, value) in [
        ("peft_type", json!("IA3")),
        ("bias", json!("all")),
        ("fan_in_fan_out", json!(true)),
        ("lora_bias", json!(true)),
        ("trainable_token_indices", json!([1, 2])),
        ("layer_replication", json!([[0, 4]])),
        ("init_lora_weights", json!("pissa")),
        ("target_parameters", json!(["experts.gate"])),
        ("rank_pattern", json!({"(q_proj": 4})),
        ("alpha_pattern", expressions),
        // It would search for ages.
        (
            "alpha_pattern",
            json!({"(.*)(.*)(.*)(.*)\\1\\2\\3\\4zz": 4}),
        ),
        ("a_setting_to_come", json!({"strength": 2})),
    ] {
        let error = super::refused(with(name, value));
        let AdapterError::Unsupported { setting, .. } = &error else {
            panic!("{name}: {error}");
        };
        assert_eq!(setting, name);
    }
    for (name, value) in [
        ("lora_dropout", json!(0.1)),
        ("alpha_pattern", json!({"(q|v)_proj": 4})),
    ] {
        with(name, value).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// Nothing that lies in a folder is more than an error.
#[test]
fn broken_folders_are_errors() {
    let vlm = open("llava");
    let load = |folder: &Path| match load(vlm.model(), folder) {
        Err(error) => error,
        Ok(_) => panic!("{} is read", folder.display()),
    };
    let empty = TempDir::new().expect("a folder");
    let error = load(empty.path());
    let ZooError::Checkpoint(CheckpointError::MissingFile { name, .. }) = &error else {
        panic!("{error}");
    };
    assert_eq!(name, SETTINGS);

    let good = json_of(folder().path());
    let set = |name: &str, value: Value| {
        let mut settings = good.clone();
        settings[name] = value;
        settings.to_string()
    };
    let settings = [
        String::new(),
        "[]".into(),
        "{}".into(),
        r#"{"peft_type": "LORA"}"#.into(),
        set("peft_type", json!(3)),
        set("r", json!("2")),
        set("r", json!(-2)),
        set("r", json!(2.5)),
        set("r", json!(0)),
        set("r", json!(u64::MAX)),
        set("r", json!(3)),
        set("lora_alpha", json!(null)),
        good.to_string().replace("2.0", "NaN"),
        good.to_string().replace("2.0", "1e999"),
        set("use_rslora", json!("yes")),
        set("target_modules", json!(5)),
        set("target_modules", json!([5])),
        set("rank_pattern", json!(["o_proj"])),
        set("rank_pattern", json!({"o_proj": "two"})),
        set("rank_pattern", json!({"o_proj": 0})),
        set("alpha_pattern", json!({"o_proj": []})),
    ];
    for settings in settings {
        let folder = folder();
        fs::write(folder.path().join(SETTINGS), &settings).expect("a file");
        let error = load(folder.path());
        let is_typed = matches!(
            error,
            ZooError::Checkpoint(CheckpointError::Json { .. })
                | ZooError::Adapter(AdapterError::Mismatch(_))
        );
        assert!(is_typed, "{settings}: {error}");
    }

    let folder = folder();
    let whole = fs::read(folder.path().join(TENSORS)).expect("tensors");
    for length in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(folder.path().join(TENSORS), &whole[..length]).expect("a file");
        assert!(
            matches!(load(folder.path()), ZooError::Checkpoint(_)),
            "{length}"
        );
    }
    rewrite_empty(folder.path());
    assert!(matches!(
        load(folder.path()),
        ZooError::Adapter(AdapterError::Mismatch(_))
    ));
    fs::remove_file(folder.path().join(TENSORS)).expect("a file");
    assert!(matches!(load(folder.path()), ZooError::Checkpoint(_)));
    fs::create_dir(folder.path().join(TENSORS)).expect("a folder");
    assert!(matches!(load(folder.path()), ZooError::Checkpoint(_)));

    // Where nothing can be written.
    let model = adapted(vlm.model(), &AdapterConfig::new("o_proj", 2));
    for place in [folder.path().join(SETTINGS), folder.path().to_owned()] {
        let error = model.save_adapter(place).expect_err("no place to write to");
        assert!(
            matches!(error, ZooError::Adapter(AdapterError::Write { .. })),
            "{error}"
        );
    }
}

/// A file without tensors.
fn rewrite_empty(folder: &Path) {
    let none: Vec<(String, TensorView<'_>)> = Vec::new();
    let file = serialize(none, None).expect("safetensors");
    fs::write(folder.join(TENSORS), file).expect("a folder to write to");
}

/// Saved and loaded, an adapter answers as it did, plain and routed.
#[test]
fn a_loaded_adapter_answers_as_the_saved_one() {
    let folder = TempDir::new().expect("a folder");
    let vlm = open("qwen3vl");
    let model = adapted(vlm.model(), &all_linear(2));
    model.save_adapter(folder.path()).expect("a folder");
    let loaded = load(vlm.model(), folder.path()).expect("its own adapter");
    let [saved, loaded] = [model, loaded].map(|model| {
        let vlm = with_model(open("qwen3vl"), model);
        schedules().map(|schedule| bits(&logits(&vlm, &schedule)))
    });
    assert!(saved == loaded);
}
