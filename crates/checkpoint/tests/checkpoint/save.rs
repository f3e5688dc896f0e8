//! Modules that are written: what is in the files, and what never gets there.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::module::{Initializer, Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use half::{bf16, f16};
use reroute_checkpoint::{
    Folder, Layout, LoadOptions, NameTable, Rule, Save, SaveError, Saved, Shards, load_into,
};
use tempfile::TempDir;

use crate::fixture::{
    TABLE, TestBackend, Tiny, counting, counting_file, f32_bytes, folder, load, open, options,
    safetensors, tiny_names,
};

const CONFIG: &[u8] = br#"{"dtype":"?","text":{"torch_dtype":"?","layers":[1]},"hidden":2}"#;

fn tiny(file: &[u8]) -> Tiny<TestBackend> {
    load(&open(file).unwrap(), &options(), &mut |_| ()).unwrap()
}

/// How a [`Tiny`] is written.
fn job<'a>(
    module: &'a Tiny<TestBackend>,
    described: &'a Tiny<TestBackend>,
    like: &'a Folder,
) -> Save<'a, Tiny<TestBackend>> {
    Save {
        module,
        described,
        table: &TABLE,
        file_name: &|path| TABLE.file_name(path),
        linear: Layout::Transposed,
        like,
        codes: Default::default(),
        dtype: DType::F32,
        max_shard_bytes: u64::MAX,
    }
}

/// Name → shape and bytes.
fn contents(folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let shards = Shards::open(&Folder::open(folder).unwrap()).unwrap();
    let tensors = shards.names().map(|name| {
        let mut bytes = Vec::new();
        let mut take = |block: &[u8]| {
            bytes.extend(block);
            Ok::<_, reroute_checkpoint::CheckpointError>(())
        };
        shards.for_each_block(name, &mut take).unwrap();
        (
            name.to_owned(),
            (shards.info(name).unwrap().shape.clone(), bytes),
        )
    });
    tensors.collect()
}

/// Transposed weights, shards, what no parameter stands for, small files: as the source has them.
#[test]
fn a_module_is_written_as_it_was_read() {
    let mut tensors = tiny_names("old");
    tensors.push(("model.new.layers.0.inv_freq".to_owned(), vec![2]));
    let file = counting_file(&tensors);
    let module = tiny(&file);
    let (_dir, like) = folder(&[
        ("config.json", CONFIG),
        ("merges.txt", b"a b"),
        ("README.md", b"not copied"),
        ("model.safetensors", &file),
    ]);
    let described = Tiny::new(&Default::default());
    let scratch = TempDir::new().unwrap();
    for (name, max_shard_bytes) in [("one", u64::MAX), ("pairs", 48), ("each", 1)] {
        let to = scratch.path().join(name);
        let mut job = job(&module, &described, &like);
        job.max_shard_bytes = max_shard_bytes;
        let saved = job.write::<TestBackend>(&to).unwrap();
        let shards = Shards::open(&Folder::open(&to).unwrap()).unwrap();
        assert_eq!(shards.files().count(), saved.files.len());
        let on_disk: u64 = shards
            .files()
            .map(|file| file.metadata().unwrap().len())
            .sum();
        assert_eq!(on_disk, saved.bytes);
        match name {
            "one" => assert_eq!(saved.files, ["model.safetensors"]),
            "each" => assert_eq!(saved.files[1], "model-00002-of-00010.safetensors"),
            _ => assert!((2..10).contains(&saved.files.len()), "{saved:?}"),
        }
        let mut expected = BTreeMap::new();
        for (name, shape) in &tensors {
            let (_, _, _, bytes) = counting(name, shape);
            let name = name.replace("model.new", "old"); // As parameters are called.
            expected.insert(name, (shape.clone(), bytes));
        }
        assert!(contents(&to) == expected, "{name}");
        let config = fs::read_to_string(to.join("config.json")).unwrap();
        assert_eq!(config.matches("\"float32\"").count(), 2, "{config}");
        assert!(to.join("merges.txt").is_file() && !to.join("README.md").exists());
        let again = load(&shards, &options(), &mut |_| ()).unwrap();
        let value = |module: &Tiny<TestBackend>| module.layers[1].proj.weight.val().into_data();
        assert_eq!(value(&again), value(&module));
    }
}

/// To the nearest, ties to even; what is infinite stays so, what would become so is refused by name.
#[test]
fn numbers_are_rounded_and_never_lost() {
    // Halfway between two numbers of f16, then of bf16, above an even one and below one.
    let halfway = |steps: f32, last_bit: i32| 1.0 + steps / 2.0 * 2_f32.powi(last_bit);
    let values = [
        halfway(1.0, -10),
        halfway(3.0, -10),
        halfway(1.0, -7),
        halfway(3.0, -7),
        f32::INFINITY,
        1e-8,
    ];
    let shape = [values.len()];
    let wide = |values: &[f32]| {
        let names = tiny_names("old");
        let mut tensors: Vec<_> = names
            .iter()
            .map(|(name, shape)| counting(name, shape))
            .collect();
        tensors.push((
            "old.layers.0.inv_freq",
            "F32",
            &shape,
            f32_bytes(values.iter().copied()),
        ));
        safetensors(&tensors)
    };
    let described = Tiny::new(&Default::default());
    let scratch = TempDir::new().unwrap();
    let save = |like: &Folder, module: &Tiny<TestBackend>, dtype: DType| {
        let job = Save {
            dtype,
            ..job(module, &described, like)
        };
        job.write::<TestBackend>(&scratch.path().join("to"))
    };
    let file = wide(&values);
    let module = tiny(&file);
    let (_dir, like) = folder(&[("config.json", CONFIG), ("model.safetensors", &file)]);
    for dtype in [DType::F16, DType::BF16] {
        save(&like, &module, dtype).unwrap();
        let expected: Vec<u8> = match dtype {
            DType::F16 => values
                .iter()
                .flat_map(|x| f16::from_f32(*x).to_le_bytes())
                .collect(),
            _ => values
                .iter()
                .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
                .collect(),
        };
        let found = contents(&scratch.path().join("to"));
        assert_eq!(found["old.layers.0.inv_freq"].1, expected);
        let config = fs::read_to_string(scratch.path().join("to/config.json")).unwrap();
        let name = if dtype == DType::F16 {
            "\"float16\""
        } else {
            "\"bfloat16\""
        };
        assert_eq!(config.matches(name).count(), 2, "{config}");
    }
    let even = [f16::from_f32(values[0]), f16::from_f32(values[1])].map(f16::to_f32);
    assert_eq!(even, [1.0, 1.0 + 2_f32.powi(-9)]);
    let even = [bf16::from_f32(values[2]), bf16::from_f32(values[3])].map(bf16::to_f32);
    assert_eq!(even, [1.0, 1.0 + 2_f32.powi(-6)]);

    let before = contents(&scratch.path().join("to"));
    let mut large = tiny(&file);
    large.layers[1].proj.bias =
        { large.layers[1].proj.bias.take() }.map(|bias| bias.map(|bias| bias * 65520.0));
    let error = save(&like, &large, DType::F16).unwrap_err();
    assert!(
        matches!(&error, SaveError::Overflow { name, values: 2, .. } if name == "old.layers.1.proj.bias"),
        "{error}"
    );
    let wider = wide(&[1e39_f64 as f32, 1e6, 0.0, 0.0, 0.0, 0.0]);
    let (_dir, wider) = folder(&[("config.json", CONFIG), ("model.safetensors", &wider)]);
    let error = save(&wider, &module, DType::F16).unwrap_err();
    assert!(
        matches!(&error, SaveError::Overflow { values: 1, .. }),
        "{error}"
    );
    let error = save(&like, &module, DType::F64).unwrap_err();
    assert!(matches!(&error, SaveError::Dtype { .. }), "{error}");
    assert!(contents(&scratch.path().join("to")) == before);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
}

/// A table that is kept in blocks is one tensor, and the type of its elements does not matter.
#[test]
fn a_list_of_parameters_is_one_tensor() {
    #[derive(Module, Debug)]
    struct Table<B: Backend> {
        weight: Vec<Param<Tensor<B, 2>>>,
    }
    let device = Default::default();
    let table = |heights: &[usize]| {
        let block = |&rows: &usize| Initializer::Zeros.init([rows, 3], &device);
        Table::<TestBackend> {
            weight: heights.iter().map(block).collect(),
        }
    };
    let names = NameTable {
        rules: &[Rule {
            module: "*",
            file: &["table.*"],
        }],
        ignore: &[],
    };
    let shards = open(&counting_file(&[("table.weight".into(), vec![5, 3])])).unwrap();
    let (_dir, like) = folder(&[("config.json", CONFIG)]);
    let scratch = TempDir::new().unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let options = LoadOptions::new(dtype);
        let module = load_into(table(&[2, 2, 1]), &shards, &names, &options, &mut |_| {
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        let save = |described: &Table<TestBackend>| {
            let job = Save {
                module: &module,
                described,
                table: &names,
                file_name: &|path| names.file_name(path),
                linear: Layout::AsStored,
                like: &like,
                codes: Default::default(),
                dtype: DType::F32,
                max_shard_bytes: 24,
            };
            job.write::<TestBackend>(&scratch.path().join("to"))
        };
        let saved: Saved = save(&table(&[5])).unwrap();
        assert_eq!(saved.files, ["model.safetensors"]);
        let (_, _, _, bytes) = counting("table.weight", &[5, 3]);
        let expected = ("table.weight".to_owned(), (vec![5, 3], bytes));
        assert!(contents(&scratch.path().join("to")) == BTreeMap::from([expected]));
        let error = save(&table(&[2, 2])).unwrap_err().to_string();
        assert!(
            error.contains("table.weight") && error.contains("[5, 3]"),
            "{error}"
        );
    }
}

/// Parameters that a checkpoint of this model has not, and those that it lacks, are told by name before
/// anything is written.
#[test]
fn only_what_the_folder_describes_is_written() {
    let module = tiny(&counting_file(&tiny_names("old")));
    let described = Tiny::new(&Default::default());
    let (_dir, like) = folder(&[("config.json", CONFIG)]);
    let scratch = TempDir::new().unwrap();
    let refuse = |job: Save<'_, Tiny<TestBackend>>| match job
        .write::<TestBackend>(&scratch.path().join("to"))
    {
        Err(SaveError::OtherModel { mismatch, .. }) => *mismatch,
        other => panic!("{other:?}"),
    };
    let (mut fewer, mut more) = (module.clone(), module.clone());
    fewer.layers.pop();
    let extra = more.layers[0].clone();
    more.layers.push(extra);
    let mismatch = refuse(job(&fewer, &described, &like));
    assert_eq!(mismatch.missing.len(), 4);
    let mismatch = refuse(job(&more, &described, &like));
    assert!(
        mismatch
            .unknown
            .contains(&"old.layers.2.norm.bias".to_owned())
    );

    // The table has no name for it, or one that is taken.
    let nameless = |path: &str| TABLE.file_name(path).filter(|_| path != "class");
    let mut job_of = job(&module, &described, &like);
    job_of.file_name = &nameless;
    let mismatch = refuse(job_of);
    assert_eq!(
        (mismatch.unknown, mismatch.missing),
        (vec!["class".into()], vec!["class".into()])
    );
    let taken = |path: &str| TABLE.file_name(&path.replace("norm.beta", "norm.gamma"));
    let mut job_of = job(&module, &described, &like);
    job_of.file_name = &taken;
    assert_eq!(
        refuse(job_of).missing,
        ["layers.0.norm.beta", "layers.1.norm.beta"]
    );
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
}
