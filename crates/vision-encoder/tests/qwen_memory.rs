//! Memory of the Qwen towers. Alone in its program, because it measures the heap.

use burn::tensor::{DType, Tensor};
use burn_flex::Flex;
use peak_alloc::PeakAlloc;
use serde_json::json;
use vision_encoder::Grid;
use vision_encoder::qwen::{QwenGeneration, QwenVisionConfig, QwenVisionTower};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Bytes that a call with `side · side` patches takes at its peak, its input and weights excluded:
/// the least of five calls, because a thread that gets its first work in one of them makes the
/// buffer there that it keeps for all later ones.
fn peak(tower: &QwenVisionTower<Flex>, side: usize) -> usize {
    let device = Default::default();
    let size = [tower.config().patch_features(), side * side];
    let patches = Tensor::<Flex, 2>::ones(size, (&device, DType::F32));
    let grid = Grid {
        t: 1,
        h: side,
        w: side,
    };
    let call = || {
        HEAP.reset_peak_usage();
        let before = HEAP.current_usage();
        tower.forward(patches.clone(), &[grid]).expect("forward");
        HEAP.peak_usage() - before
    };
    (0..5).map(|_| call()).min().expect("five calls")
}

/// An attention matrix of 16384 patches alone would take 1 GiB per head.
#[test]
fn memory_grows_linearly_with_the_number_of_patches() {
    for generation in [
        QwenGeneration::Qwen2,
        QwenGeneration::Qwen2_5,
        QwenGeneration::Qwen3,
    ] {
        let config = json!({
            "depth": 2, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": 32,
            "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 1, "patch_size": 2,
            "window_size": 16, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0],
        });
        let config: QwenVisionConfig = serde_json::from_value(config).expect("parses");
        let config = config.resolve(generation).expect("resolves");
        let tower = config.init(&Default::default());
        let [small, medium, large] = [32, 64, 128].map(|side| peak(&tower, side));
        let case = format!("{generation:?}: {small}, {medium} and {large} bytes");
        assert!(medium < 9 * small / 2, "{case}");
        assert!(large < 9 * medium / 2, "{case}");
    }
}
