//! Resizing and preprocessing to one size: equal to Pillow and to Hugging Face's image processors to
//! the bit.
use std::ops::Range;

use burn::tensor::Tensor;
use burn_flex::Flex;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use vision_encoder::{
    Canvas, Pixels, RgbImage, VisionError, VitPreprocessor, VitPreprocessorConfig, Window,
    resize_bicubic, to_tensor,
};

use crate::support;

fn preprocessor(config: &Value) -> VitPreprocessor {
    let config: VitPreprocessorConfig = serde_json::from_value(config.clone()).expect("parses");
    config.resolve().expect("resolves")
}

fn sized(edge: usize, crop: [usize; 2]) -> VitPreprocessor {
    preprocessor(&json!({
        "size": {"shortest_edge": edge},
        "crop_size": {"height": crop[0], "width": crop[1]},
    }))
}

fn whole(canvas: &Canvas, width: usize, height: usize) -> RgbImage {
    let window = Window {
        x: 0..width,
        y: 0..height,
    };
    resize_bicubic(canvas, width, height, &window).expect("resizes")
}

/// An image whose bytes follow from a seed.
fn noise(width: usize, height: usize, seed: u64) -> RgbImage {
    let mut state = seed;
    let data = (0..width * height * 3).map(|_| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    });
    RgbImage::new(width, height, data.collect()).expect("an image")
}

fn flat(width: usize, height: usize, colour: [u8; 3]) -> RgbImage {
    RgbImage::new(width, height, colour.repeat(width * height)).expect("an image")
}

#[test]
fn a_resize_that_cannot_be_done_is_an_error() {
    let image = flat(4, 3, [1, 2, 3]);
    let most = usize::MAX;
    let refused = |canvas: &Canvas, [width, height]: [usize; 2], window: [Range<usize>; 2]| {
        let [x, y] = window;
        let found = resize_bicubic(canvas, width, height, &Window { x, y });
        assert!(matches!(found, Err(VisionError::Resize(_))), "{found:?}");
    };
    let whole = Canvas::of(&image);
    refused(&whole, [most, most], [0..most, 0..most]);
    for canvas in [
        Canvas {
            left: 1,
            ..Canvas::of(&image)
        },
        Canvas {
            top: most,
            ..Canvas::of(&image)
        },
        Canvas {
            height: 0,
            ..Canvas::of(&image)
        },
        Canvas {
            width: most,
            ..Canvas::of(&image)
        },
    ] {
        refused(&canvas, [8, 8], [0..8, 0..8]);
    }
}

/// The part of an image that a window names.
fn cut(image: &RgbImage, window: &Window) -> RgbImage {
    let columns = window.x.start * 3..window.x.end * 3;
    let rows = image.data().chunks_exact(image.width() * 3);
    let rows = rows.skip(window.y.start).take(window.y.len());
    let data = rows.flat_map(|row| &row[columns.clone()]).copied();
    RgbImage::new(window.x.len(), window.y.len(), data.collect()).expect("an image")
}

// Against the references ------------------------------------------------------------------------

struct Case {
    source: RgbImage,
    case: Value,
    result: String,
}

fn each_case(kind: &str, check: impl Fn(Case, &SafeTensors)) {
    each_case_of(["cases.json", "preprocess.safetensors"], kind, check);
}

fn each_case_of([cases, tensors]: [&str; 2], kind: &str, check: impl Fn(Case, &SafeTensors)) {
    let cases: Value = serde_json::from_slice(&support::bytes(cases)).expect("JSON");
    let bytes = support::bytes(tensors);
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let cases = cases[kind].as_array().expect("a list");
    assert!(!cases.is_empty());
    for case in cases {
        let name = |key: &str| case[key].as_str().expect("a name").to_owned();
        let case = Case {
            source: support::image(&tensors, &name("source")),
            case: case.clone(),
            result: name("result"),
        };
        check(case, &tensors);
    }
}

#[test]
fn resizing_equals_pillow_byte_for_byte() {
    each_case("resizes", |case, tensors| {
        let side = |key: &str| case.case[key].as_u64().expect("a number") as usize;
        let found = whole(&Canvas::of(&case.source), side("width"), side("height"));
        assert!(
            found == support::image(tensors, &case.result),
            "{}",
            case.case
        );
    });
}

#[test]
fn resize_and_crop_equal_hugging_face_byte_for_byte() {
    each_case("views", |case, tensors| {
        let found = preprocessor(&case.case["config"]).view(&case.source);
        assert!(
            found.expect("a view") == support::image(tensors, &case.result),
            "{}",
            case.case
        );
    });
}

#[test]
fn pixel_values_equal_hugging_face_bit_for_bit() {
    each_case("pixels", assert_pixels);
}

/// `fixtures/make_processors.py`: SigLIP's, DINOv2's, LLaVA's with padding, other filters.
#[test]
fn every_processor_of_one_size_is_the_library_s() {
    let files = [
        "../processors/cases.json",
        "../processors/processors.safetensors",
    ];
    each_case_of(files, "pixels", assert_pixels);
}

fn assert_pixels(case: Case, tensors: &SafeTensors) {
    let tensor = tensors.tensor(&case.result).expect("there");
    let expected = tensor.data().chunks_exact(4);
    let expected: Vec<u32> = expected
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let found = preprocessor(&case.case["config"]).preprocess(&case.source);
    let found = found.expect("pixels");
    assert_eq!([3, found.height, found.width], tensor.shape());
    let bits: Vec<u32> = found.data.iter().map(|v| v.to_bits()).collect();
    assert!(bits == expected, "{}", case.case);
}

// Properties of resizing ------------------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_window_is_the_part_of_the_whole(
        (width, height) in (1usize..40, 1usize..40),
        (to_width, to_height) in (1usize..60, 1usize..60),
        square: bool,
        (from_x, from_y, share_x, share_y) in (0f64..1.0, 0f64..1.0, 0f64..1.0, 0f64..1.0),
        seed: u64,
    ) {
        let image = noise(width, height, seed);
        let canvas = match square {
            true => Canvas::square(&image, [122, 116, 104]),
            false => Canvas::of(&image),
        };
        let span = |size: usize, from: f64, share: f64| {
            let start = (from * size as f64) as usize;
            start..start + 1 + (share * (size - start - 1) as f64) as usize
        };
        let window = Window { x: span(to_width, from_x, share_x), y: span(to_height, from_y, share_y) };
        let part = resize_bicubic(&canvas, to_width, to_height, &window).expect("resizes");
        prop_assert!(part == cut(&whole(&canvas, to_width, to_height), &window));
    }

    #[test]
    fn a_canvas_is_the_padded_image(
        (width, height) in (1usize..40, 1usize..40),
        (to_width, to_height) in (1usize..50, 1usize..50),
        (left, right, top, bottom) in (0usize..30, 0usize..30, 0usize..30, 0usize..30),
        fill: [u8; 3],
        seed: u64,
    ) {
        let image = noise(width, height, seed);
        let canvas = Canvas {
            image: &image,
            left,
            top,
            width: left + width + right,
            height: top + height + bottom,
            fill,
        };
        let mut padded = flat(canvas.width, canvas.height, fill);
        for (y, row) in image.data().chunks_exact(width * 3).enumerate() {
            let start = ((top + y) * canvas.width + left) * 3;
            padded.data_mut()[start..start + row.len()].copy_from_slice(row);
        }
        let expected = whole(&Canvas::of(&padded), to_width, to_height);
        prop_assert!(whole(&canvas, to_width, to_height) == expected);
    }

    #[test]
    fn one_colour_stays_that_colour(
        (width, height) in (1usize..300, 1usize..300),
        (to_width, to_height) in (1usize..80, 1usize..80),
        colour: [u8; 3],
    ) {
        let found = whole(&Canvas::of(&flat(width, height, colour)), to_width, to_height);
        prop_assert!(found == flat(to_width, to_height, colour));
    }

    #[test]
    fn any_size_of_image_and_configuration_gives_the_configured_size(
        (width, height) in (1usize..70, 1usize..70),
        edge in 1usize..40,
        crop in [1usize..60, 1usize..60],
        pad: bool,
        seed: u64,
    ) {
        let preprocessor = sized(edge, crop).with_pad_to_square(pad);
        let found = preprocessor.preprocess(&noise(width, height, seed)).expect("pixels");
        prop_assert_eq!([found.height, found.width], crop);
        prop_assert_eq!(preprocessor.output_size(), crop);
        prop_assert_eq!(found.data.len(), 3 * crop[0] * crop[1]);
        prop_assert!(found.data.iter().all(|value| value.is_finite()));
    }
}

#[test]
fn the_same_size_is_the_same_image() {
    let image = noise(31, 17, 5);
    assert!(whole(&Canvas::of(&image), 31, 17) == image);
}

#[test]
fn a_window_outside_the_result_is_an_error() {
    let image = noise(4, 4, 1);
    let backwards = Range { start: 5, end: 2 };
    for (x, y) in [(0..9, 0..8), (0..8, 1..9), (3..3, 0..8), (backwards, 0..8)] {
        let window = Window { x, y };
        let found = resize_bicubic(&Canvas::of(&image), 8, 8, &window);
        assert!(
            matches!(found, Err(VisionError::ImageData { .. })),
            "{window:?}"
        );
    }
}

#[test]
fn an_image_is_made_of_as_many_bytes_as_it_has() {
    for (width, height, bytes) in [
        (0, 0, 0),
        (0, 3, 0),
        (2, 2, 11),
        (2, 2, 13),
        (usize::MAX, 2, 6),
        (usize::MAX / 3, 4, 12),
    ] {
        let found = RgbImage::new(width, height, vec![0; bytes]);
        assert!(
            matches!(found, Err(VisionError::ImageData { .. })),
            "{width}×{height}"
        );
    }
}

/// A model sees the mean colour as zeros, nearly: the colour is cut to a whole number.
#[test]
fn padding_is_the_mean_colour_and_a_small_crop_is_surrounded_by_black() {
    let white = flat(2, 6, [255; 3]);
    let padded = sized(12, [12, 12]).with_pad_to_square(true);
    let view = padded.view(&white).expect("a view");
    assert_eq!(view.data()[..3], [122, 116, 104]);
    let middle = (6 * 12 + 6) * 3;
    assert_eq!(view.data()[middle..middle + 3], [255; 3]);

    let view = sized(12, [12, 40]).view(&white).expect("a view");
    let row = &view.data()[..40 * 3];
    let black = |pixels: &[u8]| pixels.iter().all(|&v| v == 0);
    assert!(black(&row[..14 * 3]) && black(&row[26 * 3..]));
    assert!(row[14 * 3..26 * 3].iter().all(|&v| v == 255));
}

// Boxes -----------------------------------------------------------------------------------------

/// What a box in shares of what the model sees is in the picture as given, in pixels.
fn box_to_pixels(
    preprocessor: &VitPreprocessor,
    image: &RgbImage,
    [x1, y1, x2, y2]: [f64; 4],
) -> Option<[f64; 4]> {
    let geometry = preprocessor.geometry([image.width(), image.height()]);
    let ([x1, y1], [x2, y2]) = (
        geometry.to_original([x1, y1]),
        geometry.to_original([x2, y2]),
    );
    geometry.within([x1.min(x2), y1.min(y2), x1.max(x2), y1.max(y2)])
}

#[test]
fn a_box_in_shares_becomes_pixels_of_the_original() {
    let image = flat(100, 60, [0; 3]);
    let plain = sized(24, [24, 24]);
    // The crop hides 20 columns on either side.
    let found = box_to_pixels(&plain, &image, [0.1, 0.25, 0.5, 1.0]);
    assert_eq!(found, Some([26.0, 15.0, 50.0, 60.0]));

    // The square has 20 rows above and below the image.
    let padded = plain.with_pad_to_square(true);
    let found = box_to_pixels(&padded, &image, [0.1, 0.25, 0.5, 0.75]);
    assert_eq!(found, Some([10.0, 5.0, 50.0, 55.0]));
    // What lies in the padding ends at the image's edge.
    let found = box_to_pixels(&padded, &image, [-0.5, 0.0, 1.5, 1.0]);
    assert_eq!(found, Some([0.0, 0.0, 100.0, 60.0]));
    let found = box_to_pixels(&padded, &image, [0.1, 0.0, 0.5, 0.2]);
    assert_eq!(found, None, "a box in the padding is not in the image");

    let tall = flat(3, 8, [0; 3]);
    let found = box_to_pixels(&padded, &tall, [0.5, 0.5, 1.0, 1.0]);
    // Of five free columns, two are on the left.
    assert_eq!(found, Some([2.0, 4.0, 3.0, 8.0]));

    // Of a picture that is smaller than the crop, there is nothing around it.
    let found = box_to_pixels(
        &sized(12, [12, 24]),
        &flat(6, 6, [0; 3]),
        [0.25, 0.0, 0.5, 1.0],
    );
    assert_eq!(found, Some([0.0, 0.0, 3.0, 6.0]));
}

proptest! {
    #[test]
    fn a_box_never_leaves_the_image(
        (width, height) in (1usize..50, 1usize..50),
        pad: bool,
        corners: [f64; 4],
    ) {
        let image = flat(width, height, [0; 3]);
        let preprocessor = sized(8, [8, 8]).with_pad_to_square(pad);
        if let Some(found) = box_to_pixels(&preprocessor, &image, corners) {
            for (at, side) in found.into_iter().zip([width, height, width, height]) {
                prop_assert!((0.0..=side as f64).contains(&at));
            }
        }
    }

    /// A colour stands where the geometry says that it does.
    #[test]
    fn what_is_seen_is_where_the_geometry_says(
        (width, height) in (20usize..60, 20usize..60),
        pad: bool,
        (x, y) in (0.0..1.0, 0.0..1.0),
    ) {
        // Red grows to the right, green downwards.
        let pixel = |at: usize| {
            let (x, y) = (at % width, at / width);
            [(4 * x) as u8, (4 * y) as u8, 255]
        };
        let data = (0..width * height).flat_map(pixel).collect();
        let image = RgbImage::new(width, height, data).expect("an image");
        let preprocessor = sized(40, [40, 40]).with_pad_to_square(pad);
        let view = preprocessor.view(&image).expect("a view");
        let [original_x, original_y] = preprocessor.geometry([width, height]).to_original([x, y]);
        let at = ((y * 40.0) as usize * 40 + (x * 40.0) as usize) * 3;
        let inside = |at: f64, side: usize| (2.0..side as f64 - 2.0).contains(&at);
        if inside(original_x, width) && inside(original_y, height) {
            let near = |seen: u8, expected: f64| (f64::from(seen) - 4.0 * expected).abs() <= 10.0;
            prop_assert!(near(view.data()[at], original_x - 0.5), "{original_x}");
            prop_assert!(near(view.data()[at + 1], original_y - 0.5), "{original_y}");
        }
    }
}

// Configuration ---------------------------------------------------------------------------------

fn resolved(config: &str) -> Result<VitPreprocessor, VisionError> {
    let config: VitPreprocessorConfig = serde_json::from_str(config).expect(config);
    config.resolve()
}

#[test]
fn every_spelling_of_a_size_is_read() {
    let expected = preprocessor(&json!({
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    }));
    for config in [
        r#"{"size": 28, "crop_size": 28}"#,
        r#"{"size": {"shortest_edge": 28}, "crop_size": 28}"#,
        r#"{"size": 28, "crop_size": {"width": 28, "height": 28, "longest_edge": null}}"#,
    ] {
        assert_eq!(resolved(config).expect(config), expected);
    }
    let published = resolved("{}").expect("CLIP's defaults");
    assert_eq!(published.output_size(), [224, 224]);
}

#[test]
fn fields_of_other_libraries_and_nulls_are_ignored() {
    let config = r#"{"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": true,
        "processor_class": "LlavaProcessor", "_valid_processor_keys": ["images", {"deep": [1]}],
        "image_aspect_ratio": null, "data_format": "channels_first", "image_std": null,
        "do_normalize": null}"#;
    assert_eq!(
        resolved(config).expect("resolves"),
        resolved("{}").expect("CLIP")
    );
}

/// Case 04: `LlavaImageProcessor` pads before it resizes.
#[test]
fn llava_s_processor_pads_where_it_says_so() {
    let padded = resolved(r#"{"image_processor_type": "LlavaImageProcessor", "do_pad": true}"#);
    let plain = resolved(r#"{"image_processor_type": "LlavaImageProcessor", "do_pad": false}"#);
    let plain = plain.expect("resolves");
    assert_eq!(
        padded.expect("resolves"),
        plain.clone().with_pad_to_square(true)
    );
    assert_eq!(plain, resolved("{}").expect("CLIP"));
}

#[test]
fn a_key_that_is_not_known_may_be_switched_off() {
    let config = r#"{"do_thumbnail": false, "reducing_gap": null, "_name": "x",
        "image_processor_type": "SiglipImageProcessorFast", "device": "cpu"}"#;
    let siglip = resolved(config).expect("resolves");
    assert_eq!(siglip.output_size(), [224, 224]);
}

#[test]
fn original_llava_pads_by_configuration() {
    let padded = resolved(r#"{"image_aspect_ratio": "pad"}"#).expect("resolves");
    let plain = resolved("{}").expect("resolves");
    assert_eq!(padded, plain.clone().with_pad_to_square(true));
    assert_ne!(padded, plain);
}

/// A refused configuration names the field to change.
#[test]
fn impossible_configurations_are_errors_that_name_the_field() {
    for (config, field) in [
        (r#"{"resample": 1}"#, "resample 1"),
        (r#"{"resample": 7}"#, "resample 7"),
        (r#"{"do_resize": false}"#, "do_resize"),
        (r#"{"do_center_crop": false}"#, "do_center_crop"),
        (r#"{"do_rescale": false}"#, "do_rescale"),
        (r#"{"do_normalize": false}"#, "do_normalize"),
        (r#"{"image_mean": [0.5, 0.5]}"#, "image_mean"),
        (r#"{"image_mean": []}"#, "image_mean"),
        (r#"{"image_std": [0.5, 0.5, 0.5, 0.5]}"#, "image_std"),
        (r#"{"image_std": [0.5, 0, 0.5]}"#, "image_std"),
        (r#"{"image_std": [0.5, -0.0, 0.5]}"#, "image_std"),
        (r#"{"size": {"height": 24, "width": 0}}"#, "size"),
        (
            r#"{"size": {"shortest_edge": 24, "longest_edge": 60}}"#,
            "longest_edge",
        ),
        (r#"{"size": 0}"#, "size"),
        (r#"{"size": {"shortest_edge": 99999999999}}"#, "size"),
        (r#"{"crop_size": 0}"#, "crop_size"),
        (r#"{"crop_size": {"height": 24, "width": 0}}"#, "crop_size"),
        (
            r#"{"crop_size": {"height": 70000, "width": 24}}"#,
            "crop_size",
        ),
        (r#"{"crop_size": {"shortest_edge": 24}}"#, "crop_size"),
        // Finite as JSON, infinite or zero as f32: no pixel would stay a number.
        (r#"{"image_mean": [0.5, 1e300, 0.5]}"#, "image_mean"),
        (r#"{"image_std": [0.5, 0.5, 1e-300]}"#, "image_std"),
        (r#"{"image_std": [0.5, 0.5, 1e-42]}"#, "image_std"),
        (r#"{"rescale_factor": 1e300}"#, "rescale_factor"),
        (
            r#"{"image_processor_type": "PixtralImageProcessor"}"#,
            "PixtralImageProcessor",
        ),
        (
            r#"{"image_processor_type": "SiglipImageProcessor", "size": {"shortest_edge": 24}}"#,
            "do_center_crop",
        ),
        (
            r#"{"image_processor_type": "CLIPImageProcessor", "do_pad": true}"#,
            "do_pad",
        ),
        // Not known, and they change pixels.
        (
            r#"{"image_grid_pinpoints": [[336, 672]]}"#,
            "image_grid_pinpoints",
        ),
        (r#"{"use_square_size": true}"#, "use_square_size"),
        (r#"{"do_thumbnail": true}"#, "do_thumbnail"),
    ] {
        match resolved(config) {
            Err(VisionError::Preprocessor { reason: text, .. }) => {
                assert!(text.contains(field), "{config}: {text}");
            }
            other => panic!("{config}: {other:?}"),
        }
    }
}

#[test]
fn what_is_no_number_does_not_parse() {
    for config in [
        r#"{"image_mean": [NaN, 0.5, 0.5]}"#,
        r#"{"image_mean": [1e400, 0.5, 0.5]}"#,
        r#"{"image_mean": ["0.5", 0.5, 0.5]}"#,
        r#"{"image_std": [null, 0.5, 0.5]}"#,
        r#"{"crop_size": -24}"#,
        r#"{"crop_size": 24.5}"#,
        r#"{"crop_size": {"height": 24}}"#,
        r#"{"size": "24"}"#,
        r#"{"resample": -1}"#,
    ] {
        let found: Result<VitPreprocessorConfig, _> = serde_json::from_str(config);
        assert!(found.is_err(), "{config}");
    }
}

#[test]
fn a_size_that_does_not_parse_says_what_does() {
    let found: Result<VitPreprocessorConfig, _> = serde_json::from_str(r#"{"crop_size": -24}"#);
    let text = found.expect_err("refused").to_string();
    assert!(
        text.contains("shortest_edge") && text.contains("height"),
        "{text}"
    );
}

// Stacking --------------------------------------------------------------------------------------

#[test]
fn images_are_stacked_in_order() {
    let preprocessor = sized(5, [4, 6]);
    let images = [3, 4].map(|seed| preprocessor.preprocess(&noise(9, 7, seed)).expect("pixels"));
    let tensor: Tensor<Flex, 4> = to_tensor(&images, &Default::default()).expect("a tensor");
    assert_eq!(tensor.dims(), [2, 3, 4, 6]);
    let found: Vec<f32> = tensor.into_data().to_vec().expect("f32");
    assert_eq!(found, [&images[0].data[..], &images[1].data].concat());
}

#[test]
fn images_of_different_sizes_or_none_are_an_error() {
    let pixels = |height, width| Pixels {
        height,
        width,
        data: vec![0.0; 3 * height * width],
    };
    for images in [
        vec![],
        vec![pixels(4, 6), pixels(6, 4)],
        vec![pixels(2, 2), pixels(2, 2), pixels(2, 3)],
    ] {
        let found = to_tensor::<Flex>(&images, &Default::default());
        assert!(matches!(found, Err(VisionError::MixedSizes)));
    }
}
