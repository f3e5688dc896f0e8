//! Whatever bytes a folder holds: a module, or an error. Never a panic.

use burn::tensor::DType;
use proptest::prelude::*;
use reroute_checkpoint::{Layout, LoadOptions, Shards};

use crate::burnpack::burnpack;
use crate::fixture::{TABLE, counting_file, entry, file, folder, load, options, tiny_names};

/// Opens, reads everything that can be read, loads.
fn exercise(files: &[(&str, &[u8])]) {
    let (_dir, folder) = folder(files);
    let shards = match Shards::open(&folder) {
        Ok(shards) => shards,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    for name in shards.names() {
        for dtype in [DType::F32, DType::F16] {
            for layout in [Layout::AsStored, Layout::Transposed] {
                if let Ok(data) = shards.read(name, dtype, layout) {
                    let shape = &shards.info(name).unwrap().shape;
                    assert_eq!(data.num_elements(), shape.iter().product::<usize>());
                }
            }
        }
    }
    for dtype in [DType::F32, DType::F16] {
        let options = LoadOptions { dtype, ..options() };
        if let Err(error) = load(&shards, &options, &mut |_| ()) {
            assert!(!error.to_string().is_empty());
        }
    }
}

/// Numbers at the edges, and a few that fit.
fn number() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 0..20usize,
        1 => prop_oneof![Just(usize::MAX), Just(usize::MAX / 4), Just(1 << 32)],
        1 => any::<usize>(),
    ]
}

fn any_entry() -> impl Strategy<Value = String> {
    let dtype = prop::sample::select(vec!["F32", "F16", "BF16", "F64", "F4", "BOOL", "I8"]);
    let shape = prop::collection::vec(number(), 0..4);
    ("[a-c]", dtype, shape, number(), number())
        .prop_map(|(name, dtype, shape, start, end)| entry(&name, dtype, &shape, start, end))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        exercise(&[("model.safetensors", &bytes)]);
        exercise(&[("model.safetensors.index.json", &bytes)]);
        exercise(&[("model.bpk", &bytes)]);
        exercise(&[("model.safetensors", &file(&String::from_utf8_lossy(&bytes), &[0; 8]))]);
    }

    #[test]
    fn arbitrary_entries(entries in prop::collection::vec(any_entry(), 0..4), data in 0..64usize) {
        let header = format!("{{{}}}", entries.join(","));
        exercise(&[("model.safetensors", &file(&header, &vec![0; data]))]);
    }

    #[test]
    fn mutated_files(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let files = [
            ("model.safetensors", counting_file(&tiny_names("old"))),
            ("model.bpk", burnpack(&tiny_names("old"))),
        ];
        for (name, mut content) in files {
            for (at, byte) in &changes {
                let at = at.index(content.len());
                content[at] = *byte;
            }
            if let Some(cut) = cut {
                content.truncate(cut.index(content.len()));
            }
            exercise(&[(name, &content)]);
        }
    }

    /// Most of a Burnpack file is padding: these changes hit its header.
    #[test]
    fn mutated_burnpack_headers(
        changes in prop::collection::vec((0..400usize, any::<u8>()), 1..4),
    ) {
        let mut content = burnpack(&tiny_names("old"));
        for (at, byte) in changes {
            content[at] = byte;
        }
        exercise(&[("model.bpk", &content)]);
    }

    #[test]
    fn arbitrary_shard_maps(map in prop::collection::btree_map(".*", ".*", 0..4)) {
        let index = serde_json::json!({ "weight_map": map }).to_string();
        exercise(&[("model.safetensors.index.json", index.as_bytes())]);
    }

    #[test]
    fn arbitrary_names(name in ".*", dotted in "[a-z0-9.{}*]{0,20}") {
        for name in [name, dotted.clone(), format!("old.layers.{dotted}"), format!("old.{dotted}.inv_freq")] {
            let _ = (TABLE.module_path(&name), TABLE.ignores(&name));
            let (_dir, folder) = folder(&[]);
            prop_assert!(!folder.has(&name));
            prop_assert!(folder.read(&name, 1).is_err());
        }
    }
}
