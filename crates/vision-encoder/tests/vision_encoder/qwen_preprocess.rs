//! Qwen's preprocessing: equal to Hugging Face's processors, and what bounds, orders and refuses.

use std::path::Path;

use burn::tensor::Tensor;
use burn_flex::Flex;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use vision_encoder::Grid;
use vision_encoder::qwen::{
    DEFAULT_MAX_PIXELS, PatchPixels, QwenGeneration, QwenPreprocessor, QwenPreprocessorConfig,
    QwenTowerConfig, QwenVisionConfig, pack,
};
use vision_encoder::{DecodeLimits, RgbImage, VisionError, decode};

use QwenGeneration::{Qwen2, Qwen2_5, Qwen3};

fn config(config: &Value) -> QwenPreprocessorConfig {
    serde_json::from_value(config.clone()).expect("parses")
}

/// A tower that takes the patches of a preprocessor's configuration.
fn tower(generation: QwenGeneration, config: &Value) -> QwenTowerConfig {
    let tower: QwenVisionConfig = serde_json::from_value(json!({
        "patch_size": config["patch_size"],
        "temporal_patch_size": config["temporal_patch_size"],
        "spatial_merge_size": config["merge_size"],
    }))
    .expect("parses");
    tower.resolve(generation).expect("resolves")
}

fn preprocessor(generation: QwenGeneration, value: &Value) -> QwenPreprocessor {
    let resolved = config(value).resolve(None, &tower(generation, value));
    resolved.unwrap_or_else(|error| panic!("{value}: {error}"))
}

/// Visual tokens of `side` × `side` pixels, values that are the bytes, and bounds on the area.
fn plain(generation: QwenGeneration, side: usize, min: usize, max: usize) -> QwenPreprocessor {
    let value = json!({
        "patch_size": side / 2, "merge_size": 2, "temporal_patch_size": 2,
        "rescale_factor": 1.0, "image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0],
        "min_pixels": min, "max_pixels": max,
    });
    preprocessor(generation, &value)
}

/// As in `make_qwen_pixels.py`.
fn pattern(width: usize, height: usize, frame: usize) -> RgbImage {
    let mut data = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            data.extend((0..3).map(|c| {
                let sum = x * x * (3 + c) + y * y * 5 + x * y * 7 + c * 900 + frame * 640;
                (sum >> 4 & 255) as u8
            }));
        }
    }
    RgbImage::new(width, height, data).expect("an image")
}

// Against the library ---------------------------------------------------------------------------

fn file(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn cases(kind: &str) -> Vec<Value> {
    let cases: Value =
        serde_json::from_slice(&file("tests/fixtures/qwen_pixels/cases.json")).expect("JSON");
    let cases = cases[kind].as_array().expect("a list").clone();
    assert!(!cases.is_empty());
    cases
}

fn numbers<const N: usize>(value: &Value) -> [usize; N] {
    serde_json::from_value::<Vec<usize>>(value.clone())
        .ok()
        .and_then(|numbers| numbers.try_into().ok())
        .unwrap_or_else(|| panic!("{value}"))
}

fn generation(case: &Value) -> QwenGeneration {
    match case["generation"].as_str() {
        Some("qwen2") => Qwen2,
        Some("qwen3") => Qwen3,
        other => panic!("{other:?}"),
    }
}

fn dimensions(grid: Grid) -> [usize; 3] {
    [grid.t, grid.h, grid.w]
}

#[test]
fn images_get_the_size_that_the_library_gives_them() {
    for case in cases("image_sizes") {
        let [height, width, factor, min, max, to_height, to_width] = numbers(&case);
        for generation in [Qwen2, Qwen2_5, Qwen3] {
            let preprocessor = plain(generation, factor, min, max).with_max_pixels(usize::MAX);
            let found = preprocessor.image_size([width, height]).expect("a size");
            assert_eq!(found, [to_width, to_height], "{case}");
        }
        // Each picture of a video of the older generations is an image.
        let preprocessor = plain(Qwen2_5, factor, min, max).with_max_pixels(usize::MAX);
        let found = preprocessor.video_size(9, [width, height]);
        assert_eq!(found.expect("a size"), [to_width, to_height], "{case}");
    }
}

#[test]
fn videos_of_qwen3_get_the_size_that_the_library_gives_them() {
    for case in cases("video_sizes") {
        let [frames, height, width, factor, min, max, to_height, to_width] = numbers(&case);
        let preprocessor = plain(Qwen3, factor, min, max).with_max_pixels(usize::MAX);
        let found = preprocessor.video_size(frames, [width, height]);
        assert_eq!(found.expect("a size"), [to_width, to_height], "{case}");
    }
}

/// FNV-1a, 64 bits.
fn digest(values: &[f32]) -> String {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[test]
fn pixel_values_of_images_equal_the_library_bit_for_bit() {
    for case in cases("images") {
        let source = match case["source"].as_str() {
            Some(_) => {
                let picture = file("../../tests/fixtures/llava/input.png");
                decode(&picture, &DecodeLimits::default()).expect("a picture")
            }
            None => {
                let [width, height] = numbers(&case["source"]);
                pattern(width, height, 0)
            }
        };
        let preprocessor = preprocessor(generation(&case), &case["config"]);
        let found = preprocessor.image(&source).expect("pixels");
        assert_eq!(dimensions(found.grid), numbers(&case["grid"]), "{case}");
        assert_eq!(digest(&found.data), case["digest"], "{case}");
        assert_eq!(found.original, [source.width(), source.height()]);
    }
}

/// The library subtracts and divides in another order here, so that the last bit differs.
#[test]
fn pixel_values_of_videos_equal_the_library() {
    let bytes = file("tests/fixtures/qwen_pixels/videos.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    for case in cases("videos") {
        let [width, height] = numbers(&case["source"]);
        let frames = case["frames"].as_u64().expect("a number") as usize;
        let frames: Vec<RgbImage> = (0..frames)
            .map(|frame| pattern(width, height, frame))
            .collect();
        let preprocessor = preprocessor(generation(&case), &case["config"]);
        let found = preprocessor.video(&frames).expect("pixels");
        assert_eq!(dimensions(found.grid), numbers(&case["grid"]), "{case}");
        let tensor = tensors.tensor(case["pixels"].as_str().expect("a name"));
        let tensor = tensor.expect("there");
        assert_eq!(found.data.len(), tensor.shape().iter().product::<usize>());
        let expected = tensor.data().chunks_exact(4);
        let expected = expected.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let differences = expected.zip(&found.data).map(|(a, b)| (a - b).abs());
        let most = differences.fold(0.0, f32::max);
        assert!(most <= 1e-6, "{most}: {case}");
    }
}

// Sizes -----------------------------------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn sizes_are_multiples_within_bounds_of_the_same_shape(
        short in 1usize..5000,
        aspect in 1f64..20.0,
        tall: bool,
        side in prop::sample::select(vec![8usize, 28, 32]),
        tokens in 64usize..1280,
        room in 4usize..20,
        frames in 1usize..20,
    ) {
        let long = (short as f64 * aspect) as usize;
        let original = if tall { [short, long] } else { [long, short] };
        let (min, max) = (tokens * side * side, tokens * room * side * side);
        let image = plain(Qwen3, side, min, max).with_max_pixels(usize::MAX);
        for (given, pictures, size) in [
            (1, 1, image.image_size(original)),
            (frames, frames.next_multiple_of(2), image.video_size(frames, original)),
        ] {
            let size = size.expect("a size");
            let area = pictures * size[0] * size[1];
            prop_assert!(size.iter().all(|&s| s > 0 && s % side == 0), "{size:?}");
            // The library spreads the bound over the frames without those that fill up, and makes
            // no picture thinner than a token for it.
            let (most, thin) = (max * pictures / given, size.contains(&side));
            prop_assert!(area <= most || thin, "{size:?}, {area} pixels of at most {most}");
            // One scale makes both sides, each within one token.
            let scales = [0, 1].map(|axis| {
                let (side, from, to) = (side as f64, original[axis] as f64, size[axis] as f64);
                ((to - side) / from, (to + side) / from)
            });
            let overlap = scales[0].0.max(scales[1].0) <= scales[0].1.min(scales[1].1);
            // Pictures of a video that are thinner than a token are enlarged to whole pixels first.
            let rounded = pictures > 1 && short < side;
            prop_assert!(overlap || rounded, "{original:?} → {size:?}");
        }
        let [width, height] = image.image_size(original).expect("a size");
        prop_assert!(width * height >= min);
    }
}

/// Every generation, as published: a photo costs 1280 tokens of the older generations at most.
#[test]
fn a_photo_is_capped_by_default_and_says_so() {
    let published = json!({"min_pixels": 3136, "max_pixels": 12845056});
    let photo = pattern(4000, 3000, 0);
    let found = preprocessor(Qwen2_5, &published)
        .image(&photo)
        .expect("pixels");
    assert_eq!(found.original, [4000, 3000]);
    assert_eq!(found.resized, [1148, 840]);
    assert_eq!(found.unbounded, [4004, 2996]);
    assert!(found.grid.tokens(2) <= 1280);

    let small = preprocessor(Qwen2_5, &published).image(&pattern(640, 427, 0));
    let small = small.expect("pixels");
    assert_eq!([small.resized, small.unbounded], [[644, 420]; 2]);
}

#[test]
fn bounds_of_the_caller_stay_within_those_of_the_checkpoint() {
    let size = |preprocessor: &QwenPreprocessor, width: usize, height: usize| {
        preprocessor.image_size([width, height]).expect("a size")
    };
    let small = plain(Qwen2, 28, 3136, 50_176);
    for wider in [
        small.clone(),
        small.clone().with_max_pixels(usize::MAX),
        small.clone().with_max_pixels(50_177),
    ] {
        assert_eq!(size(&wider, 900, 900), [224, 224]);
    }
    assert_eq!(
        size(&small.clone().with_max_pixels(3136), 900, 900),
        [56, 56]
    );
    assert_eq!(size(&small.clone().with_max_pixels(0), 900, 900), [28, 28]);

    // Small pictures are enlarged; the upper bound goes before, whichever was set first.
    assert_eq!(size(&small, 56, 28), [84, 56]);
    assert_eq!(size(&small.clone().with_min_pixels(1), 56, 28), [56, 28]);
    assert_eq!(size(&small.clone().with_min_pixels(0), 5, 5), [28, 28]);
    assert_eq!(
        size(&small.clone().with_min_pixels(12_544), 56, 56),
        [112, 112]
    );
    let both = small
        .clone()
        .with_min_pixels(40_000)
        .with_max_pixels(12_544);
    assert_eq!(both, small.with_max_pixels(12_544).with_min_pixels(40_000));
    assert_eq!(size(&both, 56, 56), [112, 112]);

    let found = size(&plain(Qwen3, 28, 3136, 1 << 28), 9000, 9000);
    assert_eq!(found, [980, 980]);
    assert!(found[0] * found[1] <= DEFAULT_MAX_PIXELS);
}

/// Bounds of the caller are on one picture, those of Qwen3-VL's videos on all together.
#[test]
fn pictures_of_a_video_are_capped_one_by_one() {
    for (generation, own) in [(Qwen2, 1 << 24), (Qwen3, 16 << 24)] {
        let video = plain(generation, 32, 4096, own);
        let size = |video: &QwenPreprocessor, frames| video.video_size(frames, [4096, 4096]);
        assert_eq!(size(&video, 16).expect("a size"), [992, 992]);
        let video = video.with_max_pixels(1 << 16);
        assert_eq!(size(&video, 16).expect("a size"), [256, 256]);
        assert_eq!(size(&video, 2).expect("a size"), [256, 256]);
    }
    // The checkpoint's own bound, spread over more and more pictures.
    let video = plain(Qwen3, 32, 4096, 1 << 20);
    for (frames, side) in [(1, 992), (4, 512), (16, 256), (64, 128), (60_000, 32)] {
        let found = video.video_size(frames, [4096, 4096]).expect("a size");
        assert_eq!(found, [side, side], "{frames} frames");
    }
}

/// Version 5.23 of the library counts five frames as four, 5.4 as the six that they become.
#[test]
fn frames_that_fill_up_the_last_pair_count() {
    let video = plain(Qwen3, 32, 4096, 20_380);
    assert_eq!(video.video_size(4, [79, 79]).expect("a size"), [64, 64]);
    assert_eq!(video.video_size(5, [79, 79]).expect("a size"), [32, 32]);
}

// Patches ---------------------------------------------------------------------------------------

/// Every value is where the order (t, h / merge, w / merge, merge, merge | channel, picture, row,
/// column) says.
#[test]
fn patches_are_in_merge_order() {
    let (width, height, frames) = (32, 24, 3);
    let preprocessor = plain(Qwen2, 8, 64, 4096);
    let video: Vec<RgbImage> = (0..frames).map(|n| pattern(width, height, n)).collect();
    let found = preprocessor.video(&video).expect("pixels");
    assert_eq!(dimensions(found.grid), [2, 6, 8]);
    assert_eq!([found.original, found.resized], [[width, height]; 2]);

    let mut values = found.data.iter();
    for t in 0..2 {
        for (block_y, block_x) in (0..3).flat_map(|y| (0..4).map(move |x| (y, x))) {
            for (patch_y, patch_x) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                for (channel, picture) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)] {
                    let frame = &video[(t * 2 + picture).min(frames - 1)];
                    for (row, column) in (0..4).flat_map(|y| (0..4).map(move |x| (y, x))) {
                        let y = block_y * 8 + patch_y * 4 + row;
                        let x = block_x * 8 + patch_x * 4 + column;
                        let expected = frame.data()[(y * width + x) * 3 + channel];
                        assert_eq!(values.next(), Some(&f32::from(expected)));
                    }
                }
            }
        }
    }
    assert_eq!(values.next(), None);

    let image = preprocessor.image(&video[0]).expect("pixels");
    let twice = preprocessor.video(&[video[0].clone(), video[0].clone()]);
    assert_eq!(image, twice.expect("pixels"));
}

#[test]
fn images_and_videos_are_packed_side_by_side() {
    let preprocessor = plain(Qwen2, 8, 64, 4096);
    let image = preprocessor.image(&pattern(16, 8, 0)).expect("pixels");
    let video = [1, 2, 3].map(|frame| pattern(8, 24, frame));
    let video = preprocessor.video(&video).expect("pixels");
    for parts in [vec![image.clone()], vec![image, video.clone(), video]] {
        let expected: Vec<f32> = parts.iter().flat_map(|part| part.data.clone()).collect();
        let expected_grids: Vec<Grid> = parts.iter().map(|part| part.grid).collect();
        let (patches, grids): (Tensor<Flex, 2>, _) =
            pack(parts, &Default::default()).expect("patches");
        assert_eq!(grids, expected_grids);
        let count: usize = grids.iter().map(Grid::patches).sum();
        assert_eq!(patches.dims(), [3 * 2 * 4 * 4, count]);
        let found: Vec<f32> = patches.transpose().into_data().to_vec().expect("f32");
        assert_eq!(found, expected);
    }
}

#[test]
fn patches_of_different_preprocessors_or_none_are_not_packed() {
    let pixels = |side| {
        let preprocessor = plain(Qwen2, side, 64, 4096);
        preprocessor.image(&pattern(24, 24, 0)).expect("pixels")
    };
    let huge = PatchPixels {
        grid: Grid {
            t: usize::MAX,
            h: usize::MAX,
            w: 1,
        },
        ..pixels(8)
    };
    for parts in [
        vec![],
        vec![pixels(8), pixels(12)],
        vec![pixels(8), huge.clone(), huge],
    ] {
        let found = pack::<Flex>(parts, &Default::default());
        assert!(matches!(found, Err(VisionError::Patches(_))));
    }
}

// What is refused -------------------------------------------------------------------------------

#[test]
fn long_and_thin_pictures_are_refused() {
    for generation in [Qwen2, Qwen2_5, Qwen3] {
        let preprocessor = plain(generation, 28, 3136, 1 << 20);
        let image = |width, height| preprocessor.image_size([width, height]);
        assert!(image(200, 1).is_ok() && image(3, 600).is_ok());
        let video = |width, height| preprocessor.video_size(2, [width, height]);
        assert!(video(199, 1).is_ok() && video(3, 597).is_ok());
        for (width, height) in [
            (201, 1),
            (3, 601),
            (0, 0),
            (0, 5),
            (usize::MAX, 1),
            (1, usize::MAX),
        ] {
            for found in [image(width, height), video(width, height)] {
                let error = found.expect_err("refused");
                assert!(
                    matches!(error, VisionError::AspectRatio { .. }),
                    "{width}×{height}: {error}"
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn any_size_is_a_size_or_an_error(
        original: [usize; 2],
        frames: usize,
        min_pixels in prop::option::of(any::<usize>()),
        max_pixels: usize,
    ) {
        for generation in [Qwen2, Qwen3] {
            let mut preprocessor = plain(generation, 28, 3136, 1 << 20).with_max_pixels(max_pixels);
            if let Some(min) = min_pixels {
                preprocessor = preprocessor.with_min_pixels(min);
            }
            let _ = (preprocessor.image_size(original), preprocessor.video_size(frames, original));
        }
    }
}

#[test]
fn videos_that_are_none_are_refused() {
    let preprocessor = plain(Qwen2, 28, 3136, 1 << 20);
    let found = preprocessor.video(&[]).expect_err("refused");
    assert!(matches!(found, VisionError::NoFrames), "{found}");
    let found = preprocessor.video_size(0, [64, 64]).expect_err("refused");
    assert!(matches!(found, VisionError::NoFrames), "{found}");

    let frames = [pattern(20, 10, 0), pattern(20, 10, 1), pattern(10, 20, 2)];
    let found = preprocessor.video(&frames).expect_err("refused");
    assert_eq!(
        found.to_string(),
        "frame 2 is 10×20 pixels, the frames before it 20×10; the frames of a video must have one size"
    );
}

/// Refused before any frame is resized.
#[test]
fn a_video_that_does_not_fit_is_refused() {
    let large = plain(Qwen2, 28, 1 << 27, 1 << 28).with_max_pixels(usize::MAX);
    let found = large
        .video(&vec![pattern(1, 1, 0); 8])
        .expect_err("refused");
    let text = found.to_string();
    assert!(matches!(found, VisionError::TooManyFrames { .. }), "{text}");
    assert!(
        text.contains("8 frames") && text.contains("max_pixels"),
        "{text}"
    );
}

// Configuration ---------------------------------------------------------------------------------

/// `preprocessor_config.json` of Qwen2.5-VL as published, as saved since, and in between.
#[test]
fn every_layout_of_the_bounds_is_read() {
    let mean = json!([0.48145466, 0.4578275, 0.40821073]);
    let published = json!({
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": mean, "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    });
    let expected = preprocessor(Qwen2_5, &published);
    for value in [
        json!({"min_pixels": 3136, "max_pixels": 12845056}),
        json!({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}),
        json!({"size": {"min_pixels": 3136, "max_pixels": 12845056}}),
        json!({"min_pixels": 3136, "max_pixels": 12845056, "size": {"shortest_edge": 7}}),
        json!({
            "size": {"shortest_edge": 3136, "longest_edge": 12845056, "height": null, "width": null},
            "min_pixels": null, "max_pixels": null, "crop_size": null, "do_center_crop": null,
            "do_resize": true, "do_rescale": null, "do_normalize": true, "resample": 3,
            "rescale_factor": 0.00392156862745098, "image_mean": null, "image_std": null,
            "patch_size": null, "data_format": "channels_first", "device": null,
        }),
    ] {
        assert_eq!(preprocessor(Qwen2_5, &value), expected, "{value}");
    }
}

#[test]
fn a_default_bound_gives_way_to_the_one_that_is_there() {
    for (value, side) in [
        (json!({"max_pixels": 784}), 28),
        (json!({"min_pixels": 1999 * 1999}), 2016),
    ] {
        let preprocessor = preprocessor(Qwen2_5, &value).with_max_pixels(usize::MAX);
        let found = preprocessor.image_size([40, 40]).expect("a size");
        assert_eq!(found, [side, side], "{value}");
    }
}

/// Without a file of their own, videos follow the one there is; what it leaves open is the default
/// of the library's class for videos.
#[test]
fn videos_have_their_own_configuration_and_defaults() {
    let of = |generation, image: Value, video: Option<Value>| {
        let video = video.map(|video| config(&video));
        let tower = tower(generation, &json!({}));
        let preprocessor = config(&image).resolve(video.as_ref(), &tower);
        preprocessor.expect("resolves").with_max_pixels(usize::MAX)
    };
    let sides = |preprocessor: &QwenPreprocessor, frames| {
        let video = preprocessor.video_size(frames, [4000, 4000]);
        let image = preprocessor.image_size([4000, 4000]);
        [image.expect("a size")[0], video.expect("a size")[0]]
    };
    let wide = json!({"min_pixels": 3136, "max_pixels": 12845056});
    let narrow = json!({"size": {"shortest_edge": 4096, "longest_edge": 65536}});
    assert_eq!(sides(&of(Qwen2, wide.clone(), None), 8), [3584, 3584]);
    let both = of(Qwen2, wide.clone(), Some(narrow.clone()));
    assert_eq!(sides(&both, 8), [3584, 252]);
    let both = of(Qwen3, wide, Some(narrow));
    assert_eq!(sides(&both, 8), [3584, 64]);

    // 768 tokens: of one picture, or of all.
    assert_eq!(sides(&of(Qwen2_5, json!({}), None), 8), [980, 756]);
    assert_eq!(sides(&of(Qwen3, json!({}), None), 2), [992, 608]);

    // Qwen3-VL's videos are values from −1 to 1.
    let video = of(Qwen3, json!({}), None).video(&vec![pattern(64, 64, 0); 4]);
    let data = video.expect("pixels").data;
    assert!(data.iter().all(|value| (-1.0..=1.0).contains(value)));
}

#[test]
fn impossible_configurations_are_errors_that_name_the_field() {
    let refused = |image: &Value, video: Option<&Value>, reason: &str| {
        let video = video.map(config);
        let found = config(image).resolve(video.as_ref(), &tower(Qwen2, &json!({})));
        match found {
            Err(VisionError::Preprocessor { reason: text, .. }) => {
                assert!(text.contains(reason), "{image}: {text}");
            }
            other => panic!("{image}: {other:?}"),
        }
    };
    for (value, field) in [
        (json!({"min_pixels": 0}), "min_pixels"),
        (json!({"max_pixels": 0}), "max_pixels"),
        (json!({"min_pixels": 100, "max_pixels": 99}), "max_pixels"),
        (json!({"max_pixels": 1_u64 << 40}), "max_pixels"),
        (json!({"size": {"longest_edge": u64::MAX}}), "longest_edge"),
        (json!({"patch_size": 16}), "patch_size is 16, but 14"),
        (json!({"patch_size": 0}), "patch_size"),
        (json!({"temporal_patch_size": 1}), "temporal_patch_size"),
        (json!({"merge_size": 4}), "merge_size"),
        (json!({"resample": 2}), "resample"),
        (json!({"do_resize": false}), "do_resize"),
        (json!({"do_rescale": false}), "do_rescale"),
        (json!({"do_normalize": false}), "do_normalize"),
        (json!({"image_mean": [0.5]}), "image_mean"),
        (json!({"image_std": [0.5, 0.0, 0.5]}), "image_std"),
        (json!({"rescale_factor": 1e300}), "rescale_factor"),
    ] {
        refused(&value, None, field);
        refused(&json!({}), Some(&value), field);
        refused(&json!({}), Some(&value), "for videos");
    }
    for text in [
        r#"{"min_pixels": -1}"#,
        r#"{"max_pixels": 1.5}"#,
        r#"{"size": 448}"#,
        r#"{"size": {"longest_edge": "1"}}"#,
        r#"{"image_std": [NaN, 0.5, 0.5]}"#,
        r#"{"patch_size": 18446744073709551616}"#,
    ] {
        let found: Result<QwenPreprocessorConfig, _> = serde_json::from_str(text);
        assert!(found.is_err(), "{text}");
    }
}

#[test]
fn patches_without_end_are_refused() {
    for patches in [
        json!({"patch_size": 512}),
        json!({"temporal_patch_size": 17}),
    ] {
        let found = QwenPreprocessorConfig::default().resolve(None, &tower(Qwen2, &patches));
        let error = found.expect_err("refused").to_string();
        assert!(error.contains("visual token"), "{patches}: {error}");
    }
}
