use std::ops::ControlFlow;

use burn::module::{Initializer, Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reroute_checkpoint::{
    CheckpointError, LoadOptions, LoadProgress, ModuleMismatch, NameTable, Rule, load_into,
};

use crate::fixture::{TestBackend, counting_file, load, open, options, safetensors, tiny_names};

fn mismatch(tensors: &[(String, Vec<usize>)], options: &LoadOptions) -> ModuleMismatch {
    let shards = open(&counting_file(tensors)).unwrap();
    let mut progress = |_: LoadProgress| panic!("nothing may be loaded before everything fits");
    match load(&shards, options, &mut progress) {
        Err(CheckpointError::Module(mismatch)) => *mismatch,
        other => panic!("{other:?}"),
    }
}

#[test]
fn old_and_new_names_load_the_same_module() {
    for prefix in ["old", "model.new"] {
        let mut tensors = tiny_names(prefix);
        tensors.push((format!("{prefix}.layers.0.inv_freq"), vec![2]));
        let shards = open(&counting_file(&tensors)).unwrap();
        let mut reports = Vec::new();
        let module = load(&shards, &options(), &mut |report| reports.push(report)).unwrap();

        let class = module.class.val().into_data();
        assert_eq!(class.to_vec::<f32>().unwrap(), [0.0, 1.0]);
        let weight = module.layers[1].proj.weight.val();
        assert_eq!(weight.dims(), [2, 3]);
        let weight = weight.into_data().to_vec::<f32>().unwrap();
        assert_eq!(weight, [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
        let gamma = module.layers[1].norm.gamma.val().into_data();
        assert_eq!(gamma.to_vec::<f32>().unwrap(), [0.0, 1.0, 2.0]);

        // The ignored tensor does not count.
        let total_bytes = shards.total_bytes() - 8;
        assert_eq!(reports.len(), 9);
        let last = LoadProgress {
            loaded_bytes: total_bytes,
            total_bytes,
        };
        assert_eq!(reports.last(), Some(&last));
    }
}

/// A list of parameters is one tensor in blocks of rows, whatever type they are loaded as.
#[test]
fn a_list_of_parameters_is_one_tensor_in_blocks() {
    #[derive(Module, Debug)]
    struct Table<B: Backend> {
        weight: Vec<Param<Tensor<B, 2>>>,
    }
    let device = Default::default();
    let block = |rows| Initializer::Zeros.init([rows, 3], &device);
    let load = |heights: &[usize], dtype: DType| {
        let module = Table::<TestBackend> {
            weight: heights.iter().map(|&rows| block(rows)).collect(),
        };
        let shards = open(&counting_file(&[("table.weight".into(), vec![5, 3])])).unwrap();
        let names = NameTable {
            rules: &[Rule {
                module: "*",
                file: &["table.*"],
            }],
            ignore: &[],
        };
        let mut loaded = Vec::new();
        let mut progress = |report: LoadProgress| {
            loaded.push(report.loaded_bytes);
            ControlFlow::Continue(())
        };
        let options = LoadOptions::new(dtype);
        let module = load_into(module, &shards, &names, &options, &mut progress)?;
        let blocks = module.weight.iter().map(|weight| weight.val().into_data());
        let blocks: Vec<Vec<f32>> = blocks.map(|data| data.iter::<f32>().collect()).collect();
        Ok::<_, CheckpointError>((blocks, loaded))
    };
    for dtype in [DType::F32, DType::F16] {
        let (blocks, loaded) = load(&[2, 2, 1], dtype).unwrap();
        let counting = |from: usize, to: usize| (from..to).map(|i| i as f32).collect();
        let expected: [Vec<f32>; 3] = [counting(0, 6), counting(6, 12), counting(12, 15)];
        assert_eq!(blocks, expected);
        assert_eq!(loaded, [24, 48, 60]);
    }
    let Err(CheckpointError::Module(mismatch)) = load(&[2, 2], DType::F32) else {
        panic!("four rows are not five");
    };
    assert_eq!(mismatch.misshapen[0].expected, [4, 3]);
}

#[test]
fn parameters_have_the_type_that_was_asked_for() {
    let shards = open(&counting_file(&tiny_names("old"))).unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let options = LoadOptions { dtype, ..options() };
        let module = load(&shards, &options, &mut |_| ()).unwrap();
        assert_eq!(module.class.val().dtype(), dtype);
        assert_eq!(module.layers[0].proj.weight.val().dtype(), dtype);
    }
    let options = LoadOptions {
        dtype: DType::F64,
        ..options()
    };
    assert!(load(&shards, &options, &mut |_| ()).is_err());
}

#[test]
fn unknown_missing_duplicate_misshapen_and_unreadable_are_told_at_once() {
    let mut tensors = tiny_names("old");
    tensors.retain(|(name, _)| name != "old.layers.0.proj.bias");
    tensors.push(("old.layers.2.proj.bias".to_owned(), vec![3]));
    tensors.push(("visual\u{1b}[31m.weight".to_owned(), vec![1]));
    tensors.push(("model.new.class".to_owned(), vec![2]));
    for (name, shape) in &mut tensors {
        if name == "old.layers.1.proj.weight" || name == "old.layers.1.norm.bias" {
            shape.reverse();
            shape.push(1);
        }
    }
    let mut stored: Vec<_> = (tensors.iter())
        .map(|(name, shape)| {
            let name = name.replace('\u{1b}', "\\u001b");
            let bytes = vec![0; 4 * shape.iter().product::<usize>()];
            (name, "F32", shape.as_slice(), bytes)
        })
        .collect();
    let gamma = (stored.iter_mut()).find(|(name, ..)| name == "old.layers.0.norm.weight");
    gamma.unwrap().1 = "I32";
    let stored: Vec<_> = (stored.iter())
        .map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, *shape, bytes.clone()))
        .collect();
    let shards = open(&safetensors(&stored)).unwrap();

    let error = load(&shards, &options(), &mut |_| ()).unwrap_err();
    let text = error.to_string();
    let CheckpointError::Module(found) = error else {
        panic!("{text}");
    };
    assert_eq!(
        found.unknown,
        ["old.layers.2.proj.bias", "visual\u{1b}[31m.weight"]
    );
    assert_eq!(found.missing, ["layers.0.proj.bias"]);
    assert_eq!(found.duplicate.len(), 1);
    assert_eq!(found.duplicate[0].path, "class");
    assert_eq!(found.duplicate[0].names, ["model.new.class", "old.class"]);
    let misshapen: Vec<_> = (found.misshapen.iter())
        .map(|item| (item.name.as_str(), &item.found[..], &item.expected[..]))
        .collect();
    // The expected shape is the one in the file, not that of the transposed parameter.
    assert_eq!(
        misshapen,
        [
            ("old.layers.1.norm.bias", &[3, 1][..], &[3][..]),
            ("old.layers.1.proj.weight", &[2, 3, 1][..], &[3, 2][..]),
        ]
    );
    assert_eq!(found.unreadable.len(), 1);
    assert!(
        text.contains("config.json and the weights disagree"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn long_lists_are_cut_but_counted() {
    let mut tensors = tiny_names("old");
    tensors.extend((0..30).map(|i| (format!("{}{i}", "x".repeat(500)), vec![1])));
    let mismatch = mismatch(&tensors, &options());
    assert_eq!(mismatch.unknown.len(), 30);
    let text = mismatch.to_string();
    assert!(
        text.contains("30 tensors") && text.contains("and 10 more"),
        "{text}"
    );
    assert!(text.len() < 4000, "{text}");
}

#[test]
fn a_layout_is_never_guessed_from_a_shape() {
    // Without the layout option, [3, 2] is not the [2, 3] that Burn's linear layer has.
    let options = LoadOptions::new(DType::F32);
    let mismatch = mismatch(&tiny_names("old"), &options);
    assert_eq!(mismatch.misshapen.len(), 2);
}

#[test]
fn tensors_a_module_does_without_are_accepted_by_path() {
    for prefix in ["old", "model.new"] {
        let mut tensors = tiny_names(prefix);
        tensors.push((format!("{prefix}.lm_head.weight"), vec![4, 2]));
        tensors.push((format!("{prefix}.layers.2.proj.bias"), vec![3]));
        assert_eq!(mismatch(&tensors, &options()).unknown.len(), 2);

        let shards = open(&counting_file(&tensors)).unwrap();
        let unused = vec!["lm_head.weight".to_owned(), "layers.2.*".to_owned()];
        let options = LoadOptions {
            unused,
            ..options()
        };
        assert!(load(&shards, &options, &mut |_| ()).is_ok());
    }
}

#[test]
fn what_is_declared_unused_is_loaded_where_the_module_has_it() {
    let shards = open(&counting_file(&tiny_names("old"))).unwrap();
    let options = LoadOptions {
        unused: vec!["*".to_owned()],
        ..options()
    };
    let module = load(&shards, &options, &mut |_| ()).unwrap();
    let class = module.class.val().into_data();
    assert_eq!(class.to_vec::<f32>().unwrap(), [0.0, 1.0]);
}

#[test]
fn a_file_that_shrinks_while_loading_is_an_error() {
    let (dir, folder) =
        crate::fixture::folder(&[("model.safetensors", &counting_file(&tiny_names("old")))]);
    let shards = reroute_checkpoint::Shards::open(&folder).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), b"").unwrap();
    let error = load(&shards, &options(), &mut |_| ()).unwrap_err();
    assert!(matches!(error, CheckpointError::Tensor { .. }), "{error}");
}
