//! Images, routings, flags and tensors that are wrong are refused with a message that says what to
//! do; no panic, nothing half-written.

use safetensors::tensor::Dtype;

use crate::program::{
    Scratch, f32s, fixture, i64s, read_image, refuses, reroute, safetensors, scene,
};

/// Flags written in one line.
fn flags(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

/// A PNG that announces a size and begins its data.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let chunk = |kind: &[u8; 4], data: &[u8]| {
        let checked = [&kind[..], data].concat();
        let bit = |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), bit);
        let crc = !checked.iter().fold(!0, byte);
        [
            &(data.len() as u32).to_be_bytes()[..],
            &checked,
            &crc.to_be_bytes(),
        ]
        .concat()
    };
    let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
    let header = chunk(b"IHDR", &[&size[..], &[8, 2, 0, 0, 0]].concat());
    [
        &b"\x89PNG\r\n\x1a\n"[..],
        &header,
        &chunk(b"IDAT", b"\x78\x01"),
    ]
    .concat()
}

#[test]
fn images_that_are_none() {
    let scratch = Scratch::new();
    let png = std::fs::read(scene("063")).unwrap();
    let mut flipped = png.clone();
    flipped[2000] ^= 0xff;
    let damaged = "the file is damaged or cut off";
    let other = "this is no PNG, JPEG or WebP image; convert it";
    for (content, expected) in [
        (
            png_header(30_000, 30_000),
            "30000×30000 pixels; at most 64000000 pixels are read, scale it down",
        ),
        (png_header(30_000, 30_000)[..33].to_vec(), damaged),
        (png_header(0, 7), damaged),
        (png_header(10, 10), damaged),
        (png[..1000].to_vec(), damaged),
        (flipped, damaged),
        (
            b"\xff\xd8\xff\xe0\0\x10JFIF\0 and then nothing of the kind".to_vec(),
            damaged,
        ),
        (b"\xff\xd8\xff".to_vec(), damaged),
        (b"RIFF\xff\0\0\0WEBPVP8 ".to_vec(), damaged),
        (b"GIF89a\x01\0\x01\0\0\0\0;".to_vec(), other),
        (b"a text file".to_vec(), other),
        (Vec::new(), other),
    ] {
        let path = scratch.write("image.png", content);
        refuses(&["ask", "--image", &path], &[&path, expected]);
    }
    refuses(
        &["ask", "--image", &scratch.at("none.png")],
        &["cannot open", "none.png"],
    );
    refuses(
        &["ask", "--image", &scratch.path()],
        &["cannot read", &scratch.path()],
    );
    let good = scene("063");
    refuses(
        &["ask", "--image", &good, "--image", &scratch.at("none.png")],
        &["none.png"],
    );
}

#[test]
fn routings_that_do_not_exist_or_do_not_fit() {
    let scratch = Scratch::new();
    let mut expected = vec![
        "did you mean \"reroute-pdrop@192\"?",
        "does not end in .json",
    ];
    expected.extend(reducers::presets::methods().map(|method| method.name));
    refuses(&["ask", "--routing", "reroute-pdrp@192"], &expected);
    refuses(&["explain", "--routing", ""], &["no preset"]);

    let not_json = "this is not the JSON of a schedule; write {\"action\"";
    let one_of = "stage 0: give exactly one of \"keep_ratio\"";
    for (stages, expected) in [
        (
            r#"{"layer": 5, "keep_ratio": 0.5}, {"layer": 2, "keep_ratio": 0.5}"#,
            "stage 1: layer 2 does not come after layer 5",
        ),
        (
            r#"{"layer": 5, "keep_ratio": 0.5}, {"layer": 5, "keep_ratio": 0.5}"#,
            "stage 1: layer 5 does not come after layer 5",
        ),
        (
            r#"{"layer": 16, "keep_ratio": 0.5}"#,
            "stage 0: layer 16 is beyond this model",
        ),
        (
            r#"{"layer": -1, "keep_ratio": 0.5}"#,
            "stage 0: layer -1 is not a layer number",
        ),
        (
            r#"{"layer": 1e300, "keep_ratio": 0.5}"#,
            "stage 0: layer 1e+300 is not a layer number",
        ),
        (
            r#"{"layer": 2, "keep_ratio": 0}"#,
            "keep ratio 0 is not a share; use a number above 0",
        ),
        (
            r#"{"layer": 2, "keep_ratio": 2}"#,
            "keep ratio 2 is not a share",
        ),
        (
            r#"{"layer": 2, "keep_ratio": -1}"#,
            "keep ratio -1 is not a share",
        ),
        (r#"{"layer": 2, "keep_ratio": "NaN"}"#, not_json),
        (r#"{"layer": 2, "keep_ratio": NaN}"#, not_json),
        (
            r#"{"layer": 2, "keep_count": 0}"#,
            "keep count 0 is not a number of tokens",
        ),
        (
            r#"{"layer": 2, "keep_count": 1.5}"#,
            "keep count 1.5 is not a number of tokens",
        ),
        (
            r#"{"layer": 2, "keep_ratio": 0.5, "keep_count": 3}"#,
            one_of,
        ),
        (r#"{"layer": 2}"#, one_of),
        (
            r#"{"layer": 2, "keep_ratio": 0.5, "keep": 1}"#,
            "unknown field `keep`",
        ),
        ("7", not_json),
    ] {
        let file = format!(r#"{{"action": "reroute", "stages": [{stages}]}}"#);
        let path = scratch.write("routing.json", file);
        refuses(&["ask", "--routing", &path], &["schedule", &path, expected]);
    }
    for content in [
        "",
        "\0",
        "[]",
        r#"{"stages": []}"#,
        r#"{"action": "drop", "stages": []}"#,
    ] {
        let path = scratch.write("routing.json", content);
        refuses(&["ask", "--routing", &path], &["schedule", &path, not_json]);
    }
    let path = scratch.write("routing.json", b"\xff");
    refuses(&["ask", "--routing", &path], &[&path, "not UTF-8"]);
    refuses(
        &["ask", "--routing", &scratch.at("none.json")],
        &["cannot open", "none.json"],
    );
    let elsewhere = scratch.write("routing.txt", r#"{"action": "remove", "stages": []}"#);
    refuses(
        &["ask", "--routing", &elsewhere],
        &["routing.txt", "does not end in .json"],
    );
}

#[test]
fn flags_that_are_out_of_range() {
    for (line, expected) in [
        (
            "ask --temperature -1",
            "temperature must be a number ≥ 0, but is -1",
        ),
        (
            "ask --temperature NaN",
            "temperature must be a number ≥ 0, but is NaN",
        ),
        (
            "ask --temperature inf",
            "temperature must be a number ≥ 0, but is inf",
        ),
        (
            "ask --temperature hot",
            "invalid value 'hot' for '--temperature",
        ),
        ("ask --top-p -0.5", "top_p must be in [0, 1], but is -0.5"),
        ("ask --top-p 1.5", "top_p must be in [0, 1], but is 1.5"),
        ("ask --top-p NaN", "top_p must be in [0, 1], but is NaN"),
        ("ask --top-k -1", "invalid value '-1' for '--top-k"),
        (
            "ask --repetition-penalty 0",
            "repetition_penalty must be a number > 0, but is 0",
        ),
        (
            "ask --repetition-penalty -2",
            "repetition_penalty must be a number > 0, but is -2",
        ),
        ("ask --seed -1", "invalid value '-1' for '--seed"),
        (
            "ask --max-new-tokens -1",
            "invalid value '-1' for '--max-new-tokens",
        ),
        (
            "ask --dtype f8",
            "possible values: auto, f32, f16, bf16, int8, q4",
        ),
        (
            "presets --visual-tokens -1",
            "invalid value '-1' for '--visual-tokens",
        ),
        (
            "presets --text-tokens 4294967296",
            "is not in 0..=4294967295",
        ),
        (
            "presets --visual-tokens 0 --text-tokens 0",
            "a prompt of no tokens",
        ),
        ("answer", "unrecognized subcommand 'answer'"),
        ("trace --out x", "--inputs"),
    ] {
        refuses(&flags(line), &[expected]);
    }
    let (fixture, scene) = (fixture(), scene("063"));
    let model = fixture.to_str().unwrap();
    refuses(&["ask", "--model", model], &["--prompt is missing"]);
    refuses(&["ground", "--image", &scene], &["--expression is missing"]);
    refuses(&["ground", "--model", model], &["--image is missing"]);
    refuses(
        &[
            "ground",
            "--model",
            model,
            "--image",
            &scene,
            "--expression",
            "x",
            "--max-new-tokens",
            "2",
        ],
        &["has no box in it"],
    );
}

/// 64 image slots and three words for the built-in model.
fn prompt_ids() -> Vec<i64> {
    [vec![0], vec![4; 64], vec![10, 11, 12]].concat()
}

#[test]
fn trace_inputs_that_are_missing_or_of_the_wrong_kind() {
    let ids = || i64s("in.input_ids", [1, 68], prompt_ids());
    let words = |values: [i64; 2]| i64s("in.input_ids", [1, 2], values);
    let pixels =
        |shape: [usize; 4]| f32s("in.pixel_values", shape, vec![0.5; shape.iter().product()]);
    let mask = |length: usize, value| i64s("in.attention_mask", [1, length], vec![value; length]);
    let good = || pixels([1, 3, 112, 112]);
    let empty = |shape: [usize; 2]| i64s("in.input_ids", shape, []);
    let no_tokens = "it holds no tokens";
    let slots = "the prompts have 64 image slots but the images give";
    let cases = [
        (vec![good()], "in.input_ids is missing"),
        (
            vec![f32s("in.input_ids", [1, 2], [1.0, 2.0])],
            "in.input_ids has type F32; write I64",
        ),
        (
            vec![i64s("in.input_ids", [2], [1, 2])],
            "in.input_ids must be [B, L], but is [2]",
        ),
        (
            vec![
                ids(),
                good(),
                f32s("in.pixel_values_videos", [1, 2], [0.0; 2]),
            ],
            "in.pixel_values_videos are patches",
        ),
        (
            vec![ids(), i64s("in.attention_maks", [1, 1], [1])],
            "in.attention_maks is no input; known are in.input_ids",
        ),
        (vec![empty([0, 4])], no_tokens),
        (vec![empty([1, 0])], no_tokens),
        (vec![empty([1 << 60, 0])], no_tokens),
        (vec![empty([0, 1 << 60])], no_tokens),
        (
            vec![words([10, 334])],
            "token id 334 is outside the vocabulary of 334",
        ),
        (
            vec![words([10, -1])],
            "in.input_ids has the id -1, which no vocabulary has",
        ),
        (
            vec![words([10, 1 << 40])],
            "in.input_ids has the id 1099511627776",
        ),
        (
            vec![i64s("in.input_ids", [1, 513], vec![10; 513])],
            "needs 513 positions but the model has 512",
        ),
        (vec![ids()], slots),
        (vec![ids(), pixels([0, 3, 112, 112])], slots),
        (
            vec![ids(), pixels([2, 3, 112, 112])],
            "64 image slots but the images give 128",
        ),
        (
            vec![words([10, 11]), good()],
            "0 image slots but the images give 64",
        ),
        (
            vec![ids(), pixels([1, 3, 112, 56])],
            "[3, 112, 56] (channels, height, width), the vision tower takes [3, 112, 112]",
        ),
        (
            vec![ids(), pixels([1, 1, 112, 112])],
            "the vision tower takes [3, 112, 112]",
        ),
        (
            vec![ids(), f32s("in.pixel_values", [2], [0.0, 0.0])],
            "in.pixel_values must be [N, 3, H, W] or [patches, features], but is [2]",
        ),
        (
            vec![ids(), f32s("in.pixel_values", [1, 2], [0.0, 0.0])],
            "in.pixel_values needs in.image_grid_thw [N, 3]",
        ),
        (
            vec![
                ids(),
                f32s("in.pixel_values", [1, 2], [0.0, 0.0]),
                i64s("in.image_grid_thw", [1, 3], [1, 1, 1]),
            ],
            "the pixels are patches [patches, features] with their grids, this model takes squares",
        ),
        (
            vec![
                ids(),
                good(),
                i64s("in.mm_token_type_ids", [1, 68], [0; 68]),
            ],
            "in.mm_token_type_ids gives token 4 the type 0, it is 1",
        ),
        (
            vec![ids(), good(), i64s("in.mm_token_type_ids", [1, 2], [0; 2])],
            "in.mm_token_type_ids is [1, 2], in.input_ids is [1, 68]",
        ),
        (
            vec![ids(), i64s("in.pixel_values", [1, 1, 1, 1], [5])],
            "in.pixel_values has type I64; write F32",
        ),
        (
            vec![ids(), good(), mask(67, 1)],
            "in.attention_mask is [1, 67], in.input_ids is [1, 68]",
        ),
        (
            vec![ids(), good(), f32s("in.attention_mask", [1, 1], [1.0])],
            "in.attention_mask has type F32",
        ),
        (
            vec![ids(), good(), mask(68, 0)],
            "0 image slots but the images give 64",
        ),
        (vec![words([10, 11]), mask(2, 0)], "it has no tokens"),
        (
            vec![i64s("in.input_ids", [1, 65], &prompt_ids()[..65]), good()],
            "ends with a visual row",
        ),
    ];
    let scratch = Scratch::new();
    let (input, out) = (scratch.at("in.safetensors"), scratch.at("out.safetensors"));
    let trace = ["trace", "--inputs", &input, "--out", &out];
    for (tensors, expected) in cases {
        scratch.write("in.safetensors", safetensors(&tensors));
        refuses(&trace, &[expected]);
    }
    for content in [
        &b""[..],
        b"no safetensors file",
        &safetensors(&[ids()])[..50],
    ] {
        scratch.write("in.safetensors", content);
        refuses(&trace, &["inputs", &input]);
    }
    assert_eq!(scratch.entries(), ["in.safetensors"]);

    let half = ("in.pixel_values", Dtype::F16, vec![1, 1, 1, 1], vec![0, 0]);
    scratch.write("in.safetensors", safetensors(&[ids(), half]));
    refuses(&trace, &["in.pixel_values has type F16; write F32"]);
    scratch.remove("in.safetensors");
    refuses(&trace, &["cannot open", &input]);
    assert!(scratch.entries().is_empty());
}

#[test]
fn outputs_that_cannot_be_written_leave_nothing_behind() {
    let scratch = Scratch::new();
    let input = scratch.write(
        "in.safetensors",
        safetensors(&[i64s("in.input_ids", [1, 2], [10, 11])]),
    );
    let (nowhere, folder) = (scratch.at("no/where"), scratch.path());
    for path in [&nowhere, &folder] {
        refuses(
            &["trace", "--inputs", &input, "--out", path],
            &["cannot write", path],
        );
        refuses(&["ground", "--overlay", path], &["cannot write", path]);
    }
    refuses(
        &["explain", "--out", &input],
        &["cannot make the folder", &input],
    );
    assert_eq!(scratch.entries(), ["in.safetensors"]);

    // What was there stays as it was.
    let overlay = scratch.write("overlay.png", "before");
    let broken = scratch.write("broken.png", "no image");
    let ground = [
        "ground",
        "--expression",
        "x",
        "--overlay",
        &overlay,
        "--image",
    ];
    refuses(&[&ground[..], &[&broken]].concat(), &[&broken]);
    assert_eq!(scratch.read("overlay.png"), b"before");
    reroute(&[&ground[..], &[&scene("063")]].concat()).unwrap();
    assert_eq!(read_image(&overlay).width(), 112);
}
