//! What the Qwen towers take for a configuration or a grid, and what they refuse.

use burn::tensor::{DType, Tensor};
use burn_flex::Flex;
use serde_json::{Value, json};
use vision_encoder::Grid;
use vision_encoder::VisionError;
use vision_encoder::qwen::{
    QwenGeneration, QwenPreprocessorConfig, QwenTowerConfig, QwenVisionConfig, QwenVisionTower,
    WindowConfig,
};

use QwenGeneration::{Qwen2, Qwen2_5, Qwen3};

fn resolve(generation: QwenGeneration, config: Value) -> Result<QwenTowerConfig, VisionError> {
    let config: QwenVisionConfig = serde_json::from_value(config).expect("parses");
    config.resolve(generation)
}

/// As published with Qwen2-VL-7B-Instruct.
#[test]
fn the_published_qwen2_vl_resolves() {
    let config = json!({
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
        "hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    });
    let config = resolve(Qwen2, config).expect("resolves");
    assert_eq!(config, resolve(Qwen2, json!({})).expect("resolves"));
    let widths = (
        config.hidden_size,
        config.intermediate_size,
        config.output_size,
    );
    assert_eq!(widths, (1280, 5120, 3584));
    assert_eq!((config.num_layers, config.num_heads), (32, 16));
    assert_eq!(config.patch_features(), 1176);
    let absent = (
        config.windows,
        config.tokens_per_second,
        config.position_embeddings,
    );
    assert_eq!(absent, (None, None, None));
    assert!(config.deepstack_layers.is_empty());
}

/// As published with Qwen2.5-VL-7B-Instruct.
#[test]
fn the_published_qwen2_5_vl_resolves() {
    let config = json!({
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    });
    let config = resolve(Qwen2_5, config).expect("resolves");
    let widths = (
        config.hidden_size,
        config.intermediate_size,
        config.output_size,
    );
    assert_eq!(widths, (1280, 3420, 3584));
    assert_eq!(config.tokens_per_second, Some(2));
    let windows = WindowConfig {
        side: 4,
        full_attention_layers: vec![7, 15, 23, 31],
    };
    assert_eq!(config.windows, Some(windows));
    assert_eq!(config.position_embeddings, None);
}

/// As published with Qwen3-VL-8B-Instruct.
#[test]
fn the_published_qwen3_vl_resolves() {
    let config = json!({
        "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152, "in_channels": 3, "initializer_range": 0.02,
        "intermediate_size": 4304, "model_type": "qwen3_vl", "num_heads": 16,
        "num_position_embeddings": 2304, "out_hidden_size": 4096, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    });
    let config = resolve(Qwen3, config).expect("resolves");
    let widths = (
        config.hidden_size,
        config.intermediate_size,
        config.output_size,
    );
    assert_eq!(widths, (1152, 4304, 4096));
    assert_eq!(config.patch_features(), 1536);
    assert_eq!(config.position_embeddings, Some(2304));
    assert_eq!(config.deepstack_layers, [8, 16, 24]);
    assert_eq!((config.windows, config.tokens_per_second), (None, None));
}

#[test]
fn impossible_configurations_are_refused_by_name() {
    let most = usize::MAX;
    for (generation, config, named) in [
        (Qwen2, json!({"embed_dim": 0}), "residual stream is 0"),
        (Qwen2, json!({"embed_dim": most}), "residual stream"),
        (Qwen2, json!({"mlp_ratio": most}), "MLP"),
        (Qwen2, json!({"hidden_size": 0}), "output is 0"),
        (Qwen2_5, json!({"hidden_size": most}), "residual stream"),
        (Qwen2_5, json!({"intermediate_size": 0}), "MLP is 0"),
        (Qwen2_5, json!({"out_hidden_size": most}), "output"),
        (
            Qwen2_5,
            json!({"window_size": 27}),
            "window_size, in visual tokens, is 0",
        ),
        (Qwen2_5, json!({"window_size": most}), "window_size"),
        (
            Qwen2_5,
            json!({"tokens_per_second": 0}),
            "tokens_per_second is 0",
        ),
        (
            Qwen2_5,
            json!({"spatial_merge_size": 0}),
            "spatial_merge_size is 0",
        ),
        (Qwen2_5, json!({"patch_size": 0}), "patch_size is 0"),
        (
            Qwen3,
            json!({"depth": 0, "deepstack_visual_indexes": []}),
            "depth is 0",
        ),
        (Qwen3, json!({"depth": most}), "depth"),
        (
            Qwen3,
            json!({"depth": 24}),
            "[8, 16, 24] must ascend and be below the depth 24",
        ),
        (
            Qwen3,
            json!({"deepstack_visual_indexes": [3, 2]}),
            "[3, 2] must ascend",
        ),
        (
            Qwen3,
            json!({"deepstack_visual_indexes": [2, 2]}),
            "[2, 2] must ascend",
        ),
        (
            Qwen3,
            json!({"num_position_embeddings": 0}),
            "num_position_embeddings is 0",
        ),
        (
            Qwen3,
            json!({"temporal_patch_size": most}),
            "temporal_patch_size",
        ),
        (Qwen3, json!({"patch_size": 1 << 11}), "patch_size"),
        (
            Qwen3,
            json!({"spatial_merge_size": 17}),
            "spatial_merge_size",
        ),
        (Qwen3, json!({"num_heads": 0}), "num_heads is 0"),
        (
            Qwen3,
            json!({"num_heads": 10}),
            "multiple of 4 times num_heads 10",
        ),
        (Qwen3, json!({"in_channels": 4}), "in_channels is 4"),
        (Qwen3, json!({"hidden_act": "relu"}), "\"relu\""),
        (
            Qwen3,
            json!({"rope_parameters": {"rope_theta": 0.0}}),
            "rope_theta is 0",
        ),
        (
            Qwen3,
            json!({"rope_parameters": {"rope_type": "yarn"}}),
            "\"yarn\"",
        ),
    ] {
        let error = resolve(generation, config.clone())
            .expect_err("refused")
            .to_string();
        assert!(
            error.starts_with("config.json: vision_config: "),
            "{config}: {error}"
        );
        assert!(error.contains(named), "{config}: {error}");
    }
}

/// One patch has 3 numbers, one visual token 4 patches.
fn forward(features: usize, patches: usize, grids: &[Grid]) -> Result<[usize; 2], VisionError> {
    let config = json!({
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "out_hidden_size": 6, "num_heads": 2,
        "patch_size": 1, "temporal_patch_size": 1, "window_size": 8,
    });
    let tower: QwenVisionTower<Flex> = resolve(Qwen2_5, config)
        .expect("resolves")
        .init(&Default::default());
    let device = Default::default();
    let patches = Tensor::ones([features, patches], (&device, DType::F32));
    Ok(tower.forward(patches, grids)?.tokens.dims())
}

#[test]
fn grids_that_do_not_fit_the_patches_are_refused() {
    let grid = |t, h, w| Grid { t, h, w };
    assert_eq!(
        forward(3, 32, &[grid(2, 2, 4), grid(1, 4, 4)]).expect("fits"),
        [6, 8]
    );
    let huge = usize::MAX - 1;
    for (features, patches, grids, named) in [
        (
            4,
            8,
            vec![grid(1, 2, 4)],
            "a patch has 4 numbers, the vision tower takes 3",
        ),
        (
            3,
            8,
            vec![grid(1, 2, 2)],
            "8 patches were given for 1 grids of 4 patches",
        ),
        (3, 8, vec![], "for 0 grids"),
        (3, 0, vec![], "for 0 grids"),
        (3, 8, vec![grid(1, 2, 4), grid(0, 2, 2)], "0×2×2"),
        (3, 8, vec![grid(1, 0, 4)], "1×0×4"),
        (
            3,
            9,
            vec![grid(1, 3, 3)],
            "multiples of spatial_merge_size 2",
        ),
        (
            3,
            8,
            vec![grid(1, 8, 1)],
            "multiples of spatial_merge_size 2",
        ),
        (3, 8, vec![grid(huge, huge, huge)], "8 patches were given"),
        (
            3,
            8,
            vec![grid(1, 2, 4), grid(huge, 2, 2)],
            "8 patches were given",
        ),
        // The product of the sides would wrap around to 0.
        (
            3,
            0,
            vec![grid(1 << 32, 1 << 31, 2)],
            "0 patches were given",
        ),
    ] {
        let error = forward(features, patches, &grids)
            .expect_err("refused")
            .to_string();
        assert!(error.contains(named), "{grids:?}: {error}");
    }
}

/// What the library writes beside what matters is left alone; what might change pixels is not.
#[test]
fn a_key_that_is_not_known_is_refused_unless_it_is_off() {
    let tower = QwenVisionConfig::default().resolve(QwenGeneration::Qwen2_5);
    let tower = tower.expect("a tower");
    let resolve = |key: &str, value: Value| {
        let config = Value::Object([(key.to_string(), value)].into_iter().collect());
        let config: QwenPreprocessorConfig = serde_json::from_value(config).expect("parses");
        config.resolve(None, &tower)
    };
    for key in ["do_pad", "do_center_crop", "do_sharpen"] {
        let error = resolve(key, true.into()).expect_err("refused");
        assert!(error.to_string().contains(key), "{error}");
        for off in [false.into(), Value::Null] {
            assert!(resolve(key, off).is_ok(), "{key}");
        }
    }
    for (key, value) in [
        ("image_processor_type", "CLIPImageProcessor".into()),
        ("size", serde_json::json!({"height": 112, "width": 112})),
    ] {
        assert!(resolve(key, value).is_err(), "{key}");
    }
    for (key, value) in [
        ("image_processor_type", "Qwen2VLImageProcessorFast".into()),
        ("default_to_square", true.into()),
        ("do_convert_rgb", true.into()),
        ("fps", 2.into()),
        ("data_format", "channels_first".into()),
    ] {
        assert!(resolve(key, value).is_ok(), "{key}");
    }
}

/// `cap_pixels_per_frame`: the sizes that transformers 5.24 gives pictures of 600 × 400 pixels.
#[test]
fn pictures_of_a_video_share_its_tokens_where_they_are_capped() {
    for (generation, tokens, expected) in [
        (Qwen2, None, [[588, 392], [588, 392], [588, 392]]),
        (Qwen2, Some(500), [[588, 392], [392, 252], [392, 252]]),
        (Qwen3, None, [[608, 384], [448, 288], [448, 288]]),
        (Qwen3, Some(20), [[448, 288], [448, 288], [448, 288]]),
    ] {
        let patch = json!({"patch_size": if generation == Qwen3 { 16 } else { 14 }});
        let tower = resolve(generation, patch).expect("resolves");
        let settings = json!({"cap_pixels_per_frame": true, "max_video_tokens": tokens});
        let settings: QwenPreprocessorConfig = serde_json::from_value(settings).expect("parses");
        let preprocessor = settings.resolve(Some(&settings), &tower).expect("resolves");
        let preprocessor = preprocessor.with_max_pixels(usize::MAX);
        let sizes = [2, 8, 40].map(|frames| preprocessor.video_size(frames, [600, 400]));
        assert_eq!(
            sizes.map(|size| size.expect("a size")),
            expected,
            "{generation:?} {tokens:?}"
        );
    }
}
