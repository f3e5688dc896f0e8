//! Checkpoints as releases of transformers save them, against what these answer (`make_releases.py`): files of
//! other names, keys in other places, and tensors of other names, with the same weights in them.

use burn::tensor::DType;
use reducers::Schedule;
use reroute_cli::backend::Backend;
use reroute_zoo::{Pictures, PixelTensors, Question, Visual, Vlm};

use serde_json::json;

use crate::golden::{Reference, assert_close, open_at, picture, rows, values};
use crate::program::{Scratch, report, scene};

const RELEASES: [&str; 4] = ["4.57.6", "5.0.0", "5.4.0", "5.24.0"];
const FAMILIES: [&str; 4] = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"];
const QUESTION: &str = "where is it?";

/// As that of the families' parity.
const TOLERANCE: f32 = 2e-4;

/// Found: at most 2.4e-7, a rounding in f32 of numbers up to 2.6. A level of 255 would be 0.015.
const PIXELS: f32 = 1e-6;

/// One folder, and what its release answers.
struct Saved {
    name: String,
    vlm: Vlm<Backend>,
    golden: Reference,
}

fn all() -> impl Iterator<Item = Saved> {
    let names = RELEASES.into_iter().flat_map(|release| {
        let name = move |family| format!("releases/{release}/{family}");
        FAMILIES.into_iter().map(name)
    });
    names.map(|name| Saved {
        vlm: open_at(&name, DType::F32),
        golden: Reference::open(&format!("{name}/golden")),
        name,
    })
}

#[test]
fn prompts_pixels_logits_and_tokens_are_those_of_the_release() {
    for Saved { name, vlm, golden } in all() {
        let image = picture("releases/picture.png");
        let question = Question::about(vec![image.clone()], QUESTION);
        let ids = vlm.encode(&question).expect("a good question");
        assert_eq!(ids, golden.ids("in.input_ids"), "{name}");

        let prepared = vlm.preprocessor().prepare(&Visual::Image(image));
        let (_, prepared) = prepared.expect("a good picture");
        let pixels = PixelTensors::<Backend>::of(vec![prepared], vlm.device());
        let pixels = pixels.expect("one image");
        let found = match pixels.images.expect("it is one") {
            Pictures::Fixed(pixels) => values(pixels),
            Pictures::Patches(pixels, _) => rows(&pixels),
        };
        let expected = golden.floats("in.pixel_values");
        assert_eq!(found.len(), expected.len(), "{name}");
        let pairs = found.iter().zip(&expected);
        let off = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < PIXELS, "{name}: {off}");

        let out = vlm.run_tensors(golden.inputs(), Schedule::dense(), 8, true);
        let out = out.unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = values(out.logits);
        assert_close(&name, &found, &golden.floats("logits"), TOLERANCE);
        assert_eq!(out.generations[0].tokens, golden.ids("greedy"), "{name}");
    }
}

/// The end is what generation_config.json says, else config.json, else its text model's part, else the
/// tokenizer's settings; an id that the vocabulary does not have is nobody's.
#[test]
fn an_answer_ends_with_the_token_that_some_file_says() {
    let ask = |folder: &Scratch| {
        let (path, picture) = (folder.path(), scene("063"));
        let flags = [
            "ask", "--model", &path, "--image", &picture, "--prompt", "x",
        ];
        let tokens = report(&[&flags[..], &["--max-new-tokens", "4"]].concat())["tokens"].clone();
        serde_json::from_value::<Vec<u32>>(tokens).expect("ids")
    };
    let bare = Scratch::checkpoint();
    for name in ["generation_config.json", "tokenizer_config.json"] {
        bare.remove(name);
    }
    let long = ask(&bare);
    assert_eq!(long.len(), 4);
    let warnings = |folder: &Scratch| {
        let (report, well) = crate::doctor::doctor(&["--model", &folder.path()]);
        assert!(well, "{report}");
        report["warnings"].as_array().expect("a list").len()
    };
    assert_eq!(warnings(&bare), 1);

    // From the last source to the first, each of which goes before the others.
    let ends = |count: usize| assert_eq!(ask(&bare), long[..count]);
    let third = json!({"eos_token": "</s>"}).to_string();
    bare.write("tokenizer_config.json", third);
    assert_eq!(warnings(&bare), 0);
    bare.set("config.json", "/text_config/eos_token_id", json!(long[2]));
    ends(3);
    bare.set("config.json", "/eos_token_id", json!([u32::MAX, long[1]]));
    ends(2);
    bare.write(
        "generation_config.json",
        json!({"eos_token_id": u32::MAX}).to_string(),
    );
    ends(2);
    bare.write(
        "generation_config.json",
        json!({"eos_token_id": long[0]}).to_string(),
    );
    ends(1);
}
