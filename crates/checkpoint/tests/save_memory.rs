//! Memory does not grow with the model that is saved.

use burn::module::{Initializer, Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use burn_flex::Flex;
use peak_alloc::PeakAlloc;
use reroute_checkpoint::{Folder, Layout, NameTable, Rule, Save};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

const TABLE: NameTable = NameTable {
    rules: &[Rule {
        module: "*",
        file: &["model.*"],
    }],
    ignore: &[],
};

#[derive(Module, Debug)]
struct Layer<B: Backend> {
    weight: Param<Tensor<B, 2>>,
}

#[derive(Module, Debug)]
struct Layers<B: Backend> {
    layers: Vec<Layer<B>>,
}

const SHAPE: [usize; 2] = [8192, 1024];
const TENSOR_BYTES: usize = 4 * SHAPE[0] * SHAPE[1];

fn layers(count: usize) -> Layers<Flex> {
    let device = Default::default();
    let layer = |_| Layer {
        weight: Initializer::Ones.init(SHAPE, &device),
    };
    Layers {
        layers: (0..count).map(layer).collect(),
    }
}

/// Bytes at the peak of a save, the model not included.
fn peak(count: usize, dtype: DType) -> usize {
    let module = layers(count);
    // Made now, as if it had been loaded.
    let made: usize = { module.layers.iter() }
        .map(|layer| layer.weight.val().shape().num_elements())
        .sum();
    assert_eq!(made, count * SHAPE[0] * SHAPE[1]);
    let described = layers(count);
    let scratch = tempfile::tempdir().unwrap();
    std::fs::create_dir(scratch.path().join("like")).unwrap();
    std::fs::write(scratch.path().join("like/config.json"), "{}").unwrap();
    let like = Folder::open(scratch.path().join("like")).unwrap();
    HEAP.reset_peak_usage();
    let before = HEAP.current_usage();
    let save = Save {
        module: &module,
        described: &described,
        table: &TABLE,
        file_name: &|path| TABLE.file_name(path),
        linear: Layout::AsStored,
        like: &like,
        codes: Default::default(),
        dtype,
        max_shard_bytes: 3 * TENSOR_BYTES as u64,
    };
    save.write::<Flex>(&scratch.path().join("to")).unwrap();
    HEAP.peak_usage() - before
}

#[test]
fn the_peak_is_less_than_one_tensor_beside_the_model() {
    for dtype in [DType::F32, DType::F16] {
        let (few, many) = (peak(1, dtype), peak(4, dtype));
        assert!(many < TENSOR_BYTES, "{many} bytes for {dtype:?}");
        let more = many.saturating_sub(few);
        assert!(more < TENSOR_BYTES / 100, "{few} → {many} bytes");
    }
}
