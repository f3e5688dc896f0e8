//! `reroute ground`: what an answer names is told and drawn, all of it, where it is in the picture as
//! given.

use reroute_zoo::grounding::iou;
use serde_json::{Value, json};
use vision_encoder::RgbImage;

use crate::program::{Scratch, read_image, refuses, report, reroute, scene, write_image};

const EXPRESSION: &str = "the large cyan square";

fn corners(found: &Value) -> [f64; 4] {
    serde_json::from_value(found["pixels"].clone()).expect("four numbers")
}

/// The scene in the middle of a wider or higher picture.
fn amid([width, height]: [usize; 2]) -> RgbImage {
    let scene = read_image(&scene("063"));
    let (left, top) = ((width - 112) / 2, (height - 112) / 2);
    let mut data = vec![90; width * height * 3];
    for (y, row) in scene.data().chunks_exact(112 * 3).enumerate() {
        let start = ((top + y) * width + left) * 3;
        data[start..start + row.len()].copy_from_slice(row);
    }
    RgbImage::new(width, height, data).expect("an image")
}

/// The crop shows the model nothing but the scene: what it finds lies where the scene lies.
#[test]
fn a_box_goes_back_through_the_crop() {
    let folder = Scratch::new();
    let square = scene("063");
    let ground = ["ground", "--expression", EXPRESSION, "--image"];
    let alone = report(&[&ground[..], &[&square]].concat());
    let found = corners(&alone["box"]);
    for (size, moved) in [
        ([448, 112], [168.0, 0.0]),
        ([112, 448], [0.0, 168.0]),
        ([200, 112], [44.0, 0.0]),
    ] {
        let image = write_image(&folder, "image.png", &amid(size));
        let report = report(&[&ground[..], &[&image]].concat());
        assert_eq!(report["tokens"], alone["tokens"]);
        let pixels = corners(&report["box"]);
        for (corner, (at, alone)) in pixels.iter().zip(found).enumerate() {
            let expected = alone + moved[corner % 2];
            assert!((at - expected).abs() < 1e-9, "{size:?}: {pixels:?}");
        }
        let normalized: [f64; 4] =
            serde_json::from_value(report["box"]["normalized"].clone()).expect("four numbers");
        assert!((normalized[0] - pixels[0] / size[0] as f64).abs() < 1e-9);
    }
}

/// The built-in model, which says this instead of the four numbers of a box, a piece for each.
fn saying(pieces: [&str; 4]) -> Scratch {
    saying_of(&[&scene("063")], pieces)
}

/// The same for another image, and flags.
fn saying_of(image: &[&str], pieces: [&str; 4]) -> Scratch {
    let model = Scratch::built_in();
    let flags = ["ground", "--expression", EXPRESSION, "--image"];
    let asked = report(&[&flags[..], image].concat());
    let tokens: Vec<u64> = serde_json::from_value(asked["tokens"].clone()).expect("ids");
    assert_eq!(tokens.len(), 5, "four numbers and the end");
    let mut file: Value = serde_json::from_slice(&model.read("tokenizer.json")).expect("JSON");
    let vocabulary = file["model"]["vocab"].as_object_mut().expect("a table");
    for (piece, id) in pieces.iter().zip(tokens) {
        vocabulary.retain(|_, known| *known != json!(id));
        vocabulary.insert((*piece).to_string(), json!(id));
    }
    model.write("tokenizer.json", file.to_string());
    model
}

const LIST: [&str; 4] = [
    "[{\"bbox_2d\": [0.25, 0.125, 0.5, 0.375], \"label\": \"cup\"},",
    " {\"bbox_2d\": [0.5, 0.5, 0.75, 1.0], \"label\": \"Tür\"},",
    " {\"point_2d\": [0.125, 0.875], \"label\": \"tip\"},",
    " {\"bbox_2d\": [1.5, 0.5, 2.0, 0.75], \"label\": \"beyond\"}]",
];

fn ground<'a>(model: &'a str, image: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let flags = [
        "ground",
        "--model",
        model,
        "--image",
        image,
        "--expression",
        EXPRESSION,
    ];
    [&flags[..], more].concat()
}

#[test]
fn every_box_and_point_of_an_answer_is_told_and_drawn() {
    let (model, image, folder) = (saying(LIST), scene("063"), Scratch::new());
    let (model, overlay) = (model.path(), folder.at("overlay.png"));
    let found = report(&ground(&model, &image, &["--overlay", &overlay]));
    let boxes = found["boxes"].as_array().expect("a list");
    let of = |name: &str| -> Vec<Value> { boxes.iter().map(|found| found[name].clone()).collect() };
    assert_eq!(of("label"), ["cup", "Tür", "tip", "beyond"]);
    assert_eq!(of("kind"), ["box", "box", "point", "box"]);
    assert_eq!(of("outside"), [false, false, false, true]);
    let expected = [
        json!([28.0, 14.0, 56.0, 42.0]),
        json!([56.0, 56.0, 84.0, 112.0]),
        json!([14.0, 98.0]),
        json!([168.0, 56.0, 224.0, 84.0]),
    ];
    assert_eq!(of("pixels"), expected);
    assert_eq!(found["box"]["pixels"], expected[0]);
    assert_eq!(found["box"]["normalized"], json!([0.25, 0.125, 0.5, 0.375]));

    let printed = reroute(&ground(&model, &image, &[])).unwrap();
    for words in [
        "1. cup",
        "2. Tür",
        "3. tip",
        "(14.0, 98.0)",
        "4. beyond",
        "wholly outside",
    ] {
        assert!(printed.contains(words), "{words}: {printed}");
    }

    let (before, after) = (read_image(&image), read_image(&overlay));
    let pixel = |picture: &RgbImage, x: usize, y: usize| -> [u8; 3] {
        std::array::from_fn(|channel| picture.data()[(y * 112 + x) * 3 + channel])
    };
    let colour = [255, 45, 85];
    // An edge of each box, the point, and nothing else but labels, which are eight wide a letter.
    for (x, y) in [(28, 41), (55, 41), (56, 111), (83, 111), (14, 98)] {
        assert_eq!(pixel(&after, x, y), colour, "{x}, {y}");
    }
    for (x, y) in [(40, 30), (70, 80), (100, 100), (5, 5)] {
        assert_eq!(pixel(&after, x, y), pixel(&before, x, y), "{x}, {y}");
    }
    // Of the first label, the letters are white: it stands above the second box, too.
    let label = (56..80).flat_map(|x| (40..56).map(move |y| (x, y)));
    let white = label.filter(|&(x, y)| pixel(&after, x, y).iter().all(|&c| c > 200));
    assert!(white.count() > 10, "no letters");
}

#[test]
fn a_list_that_is_cut_off_has_its_complete_entries() {
    let (model, image) = (saying(LIST), scene("063"));
    let model = model.path();
    for (tokens, count) in [("1", 1), ("2", 2), ("3", 3)] {
        let found = report(&ground(&model, &image, &["--max-new-tokens", tokens]));
        assert_eq!(found["boxes"].as_array().map(Vec::len), Some(count));
        assert_eq!(found["finish"], "length");
    }
    let split = saying([
        "[{\"bbox_2d\": [0.25, 0.125, 0.5, 0.375], \"label\": \"cup\"}, {\"bbox",
        "_2d\": [0.5, 0.5,",
        " 0.75, 1.0], \"lab",
        "el\": \"door\"}]",
    ]);
    let model = split.path();
    for (tokens, count) in [("1", 1), ("2", 1), ("3", 1), ("4", 2)] {
        let found = report(&ground(&model, &image, &["--max-new-tokens", tokens]));
        let boxes = found["boxes"].as_array().expect("a list");
        assert_eq!(boxes.len(), count, "{boxes:?}");
    }
    let nothing = saying(["[{\"bbox", "_2d\": [0.5, 0.5,", " 0.75, 1.0]}", "]"]);
    refuses(
        &ground(&nothing.path(), &image, &["--max-new-tokens", "2"]),
        &["has no box in it", "cut off", "max_new_tokens"],
    );
}

/// Special tokens around labels are no part of the text, but they tell labels from boxes.
#[test]
fn labels_between_special_tokens_are_read() {
    let model = saying([
        "<|object_ref_start|>",
        "a cup",
        "<|object_ref_end|>",
        "(0.25,0.125),(0.5,0.375)",
    ]);
    let mut file: Value = serde_json::from_slice(&model.read("tokenizer.json")).expect("JSON");
    let vocabulary = file["model"]["vocab"].clone();
    for mark in ["<|object_ref_start|>", "<|object_ref_end|>"] {
        let mut token = file["added_tokens"][0].clone();
        token["content"] = json!(mark);
        token["id"] = vocabulary[mark].clone();
        file["added_tokens"]
            .as_array_mut()
            .expect("a list")
            .push(token);
    }
    model.write("tokenizer.json", file.to_string());
    let image = scene("063");
    let found = report(&ground(&model.path(), &image, &[]));
    assert!(
        !found["answer"]
            .as_str()
            .expect("a text")
            .contains("object_ref")
    );
    assert_eq!(found["boxes"][0]["label"], "a cup");
    assert_eq!(found["boxes"][0]["pixels"], json!([28.0, 14.0, 56.0, 42.0]));
}

/// With padding, models speak of the square, of which the picture is a part.
#[test]
fn what_lies_in_the_padding_is_said_to_lie_outside() {
    let folder = Scratch::new();
    let image = write_image(&folder, "wide.png", &amid([448, 112]));
    let pieces = [
        "[0.25, 0.0, 0.5, 0.125]",
        " and",
        " [0.25,",
        " 0.5, 0.5, 0.625]",
    ];
    let model = saying_of(&[&image, "--pad-to-square"], pieces);
    let model = model.path();
    let flags = ground(&model, &image, &["--pad-to-square"]);
    let found = report(&flags);
    assert_eq!(found["box"]["outside"], true);
    assert_eq!(corners(&found["box"]), [112.0, -168.0, 224.0, -112.0]);
    assert_eq!(found["boxes"][1]["outside"], false);
    assert_eq!(corners(&found["boxes"][1]), [112.0, 56.0, 224.0, 112.0]);
    assert!(reroute(&flags).unwrap().contains("wholly outside"));
}

#[test]
fn an_overlay_is_what_its_name_says() {
    let (folder, image) = (Scratch::new(), scene("063"));
    let ground = [
        "ground",
        "--image",
        &image,
        "--expression",
        EXPRESSION,
        "--overlay",
    ];
    let mut found = Vec::new();
    for (name, magic) in [
        ("box.png", &b"\x89PNG"[..]),
        ("box", b"\x89PNG"),
        ("box.JPG", b"\xff\xd8\xff"),
        ("box.jpeg", b"\xff\xd8\xff"),
        ("box.webp", b"RIFF"),
    ] {
        let overlay = folder.at(name);
        let report = report(&[&ground[..], &[&overlay]].concat());
        assert!(folder.read(name).starts_with(magic), "{name}");
        assert_eq!(read_image(&overlay).width(), 112, "{name}");
        found.push(corners(&report["box"]));
    }
    assert!(found.iter().all(|corners| iou(corners, &found[0]) == 1.0));
    for name in ["box.gif", "box.txt", "box."] {
        let overlay = folder.at(name);
        refuses(
            &[&ground[..], &[&overlay]].concat(),
            &[".png, .jpg or .webp"],
        );
        let compare = ["compare", "--out", &overlay];
        refuses(&compare, &[".png, .jpg or .webp"]);
    }
    assert_eq!(folder.entries().len(), 5);
}

#[test]
fn a_prompt_without_the_expression_is_refused() {
    let model = Scratch::built_in();
    model.write(
        "grounding.json",
        r#"{"prompt": "find it", "box": "normalized"}"#,
    );
    let (path, image) = (model.path(), scene("063"));
    refuses(
        &ground(&path, &image, &[]),
        &["grounding.json", "{expression}"],
    );
}
