//! What can be checked is checked before the weights are read, and what was generated is told whatever
//! fails afterwards.

use std::ffi::OsString;

use clap::Parser;
use reroute_cli::args::Args;
use serde_json::Value;
use vision_encoder::RgbImage;

use crate::golden;
use crate::program::{Scratch, i64s, refuses, report, reroute, safetensors, scene, write_image};

/// A checkpoint that is good but for its weights, which are none.
fn without_weights(family: &str) -> Scratch {
    let model = match family {
        "llava" => Scratch::built_in(),
        family => Scratch::copy(&golden::fixture(family).join("ckpt")),
    };
    let files = model.entries().into_iter();
    for weights in files.filter(|name| name.contains("safetensors")) {
        model.remove(&weights);
    }
    model.write("model.safetensors", "no weights");
    model
}

const WEIGHTS: &str = "not a safetensors file";

#[test]
fn flags_are_checked_before_weights_are_read() {
    let (llava, qwen) = (without_weights("llava"), without_weights("qwen25vl"));
    let scratch = Scratch::new();
    let (llava, qwen, image) = (llava.path(), qwen.path(), scene("063"));
    let (nowhere, missing) = (scratch.at("no/where.png"), scratch.at("none.png"));
    let (folder, file) = (scratch.path(), scratch.write("file", "x"));
    let thin = RgbImage::new(1000, 2, vec![7; 6000]).expect("an image");
    let thin = write_image(&scratch, "thin.png", &thin);
    let frames = Scratch::new();
    frames.write("0.png", std::fs::read(&image).expect("a scene"));
    let mixed = Scratch::new();
    mixed.write("0.png", std::fs::read(&image).expect("a scene"));
    mixed.write("1.png", std::fs::read(&thin).expect("an image"));
    let (frames, mixed) = (frames.path(), mixed.path());
    let input = scratch.write(
        "in.safetensors",
        safetensors(&[i64s("in.input_ids", [1, 2], [10, 11])]),
    );
    let weights = format!("{llava}/model.safetensors");
    let bad_input = scratch.write("bad.safetensors", "x");
    let cases: &[(&str, &[&str], &str)] = &[
        ("ask", &[], "--prompt is missing"),
        ("ask", &["--prompt", "x", "--image", &missing], "none.png"),
        (
            "ask",
            &["--prompt", "x", "--routing", "fastv@17"],
            "no preset",
        ),
        (
            "ask",
            &["--prompt", "x", "--temperature", "-1"],
            "temperature",
        ),
        ("ask", &["--prompt", "x", "--video", &frames], "no videos"),
        (
            "ask",
            &["--prompt", "x", "--max-pixels", "5000"],
            "max_pixels is not for this model, which sees every picture at one size",
        ),
        ("chat", &["--image", &missing], "none.png"),
        ("chat", &["--image", "-"], "from the standard input"),
        ("chat", &["--routing", "fastv@17"], "no preset"),
        ("ground", &["--image", &image], "--expression is missing"),
        ("ground", &["--expression", "x"], "--image is missing"),
        (
            "ground",
            &["--expression", "x", "--image", &missing],
            "none.png",
        ),
        (
            "ground",
            &[
                "--expression",
                "x",
                "--image",
                &image,
                "--overlay",
                &nowhere,
            ],
            "cannot write",
        ),
        (
            "ground",
            &["--expression", "x", "--image", &image, "--overlay", &folder],
            "it is a folder",
        ),
        (
            "ground",
            &["--expression", "x", "--image", &image, "--overlay", &image],
            "it is read here",
        ),
        (
            "trace",
            &["--inputs", &input, "--out", &input],
            "it is read here",
        ),
        (
            "trace",
            &["--inputs", &input, "--out", &weights],
            "it is read here",
        ),
        ("explain", &[], "--prompt is missing"),
        (
            "explain",
            &["--prompt", "x", "--out", &file],
            "cannot make the folder",
        ),
        (
            "explain",
            &["--prompt", "x", "--routing", "fastv@17"],
            "no preset",
        ),
        (
            "compare",
            &["--prompt", "x", "--out", &nowhere],
            "cannot write",
        ),
        (
            "compare",
            &["--prompt", "x", "--routing", "dense", "fastv@17"],
            "no preset",
        ),
        ("trace", &["--inputs", &missing, "--out", &file], "none.png"),
        (
            "trace",
            &[
                "--routing",
                "cdpruner@64",
                "--inputs",
                &input,
                "--out",
                &missing,
            ],
            "reads the question",
        ),
        (
            "trace",
            &["--inputs", &bad_input, "--out", &file],
            "bad.safetensors",
        ),
        (
            "trace",
            &["--inputs", &input, "--out", &nowhere],
            "cannot write",
        ),
    ];
    for (command, flags, expected) in cases {
        refuses(
            &[&[*command, "--model", &llava], *flags].concat(),
            &[expected],
        );
    }
    let cases: &[(&[&str], &str)] = &[
        (&["--image", &thin], "200"),
        (&["--video", &frames, "--fps", "0"], "no frame rate"),
        (&["--video", &mixed], "1000×2"),
        (
            &["--pad-to-square"],
            "pad_to_square is not for this model, which sees every picture whole",
        ),
    ];
    for (flags, expected) in cases {
        let ask = ["ask", "--model", &qwen, "--prompt", "x"];
        refuses(&[&ask[..], *flags].concat(), &[expected]);
    }
    // What is good comes to the weights.
    for (model, flags) in [
        (&llava, &["--image", &image][..]),
        (
            &qwen,
            &[
                "--image",
                &image,
                "--video",
                &frames,
                "--max-pixels",
                "50000",
            ],
        ),
    ] {
        let ask = ["ask", "--model", model, "--prompt", "x"];
        refuses(&[&ask[..], flags].concat(), &[WEIGHTS]);
    }
    assert_eq!(scratch.entries().len(), 4, "nothing is written");
}

#[test]
fn a_bound_of_no_pixels_is_refused() {
    refuses(
        &["ask", "--max-pixels", "0"],
        &["invalid value '0'", "1 or more"],
    );
}

/// What the program prints, and whether it succeeds.
fn run(flags: &[OsString]) -> (String, bool) {
    let line = [&[OsString::from("reroute")], flags].concat();
    let args = Args::try_parse_from(line).expect("good flags");
    let mut out = Vec::new();
    let result = reroute_cli::run(&args.command, &mut out);
    (String::from_utf8(out).expect("UTF-8"), result.is_ok())
}

#[test]
fn what_was_generated_is_told_though_the_picture_cannot_be_written() {
    let folder = Scratch::new();
    // Wider than a WebP file can be.
    let wide = RgbImage::new(17_000, 112, vec![9; 17_000 * 112 * 3]).expect("an image");
    let (image, overlay) = (
        write_image(&folder, "wide.png", &wide),
        folder.at("box.webp"),
    );
    let flags = [
        "ground",
        "--image",
        &image,
        "--expression",
        "x",
        "--overlay",
        &overlay,
    ];
    let (printed, well) = run(&flags.map(OsString::from));
    assert!(!well);
    assert!(
        printed.contains("pixels") && !printed.contains("drawn in"),
        "{printed}"
    );
    let (printed, well) = run(&[&flags.map(OsString::from)[..], &["--json".into()]].concat());
    assert!(!well);
    let found: Value = serde_json::from_str(&printed).expect("one JSON object");
    assert!(found["box"]["pixels"].is_array() && found["overlay"].is_null());

    // A folder where a picture should be.
    let out = folder.at("pictures");
    let blocked = folder.at("pictures/stage-1-layer-1.png");
    std::fs::create_dir_all(&blocked).expect("a folder");
    let flags = ["explain", "--out", &out].map(OsString::from);
    let (printed, well) = run(&flags);
    assert!(!well);
    let answer = report(&["ask", "--routing", "reroute-pdrop@192"])["answer"].clone();
    assert!(
        printed.contains(answer.as_str().expect("a text")),
        "{printed}"
    );
}

#[test]
fn explain_removes_the_pictures_of_an_earlier_run_and_nothing_else() {
    let (folder, one, two) = (Scratch::new(), scene("063"), scene("031"));
    let out = folder.path();
    folder.write("photo.png", "mine");
    reroute(&["explain", "--out", &out, "--image", &one, &two]).unwrap();
    assert!(folder.entries().len() > 5);
    let flags = ["explain", "--out", &out, "--routing", "fastv@192"];
    let second = report(&flags);
    let mut expected: Vec<String> = second["pictures"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|path| {
            path.as_str()
                .expect("a path")
                .rsplit('/')
                .next()
                .unwrap()
                .to_string()
        })
        .chain(["photo.png".to_string()])
        .collect();
    expected.sort();
    assert_eq!(folder.entries(), expected);
    // Even if this run draws none.
    reroute(&["explain", "--out", &out, "--routing", "dense"]).unwrap();
    assert_eq!(folder.entries(), ["photo.png"]);
}

#[cfg(unix)]
#[test]
fn names_that_are_no_text_are_escaped_in_json() {
    use std::os::unix::ffi::OsStringExt;
    let folder = Scratch::new();
    let named = |end: &[u8]| {
        let name = [b"b\xff", end].concat();
        std::path::Path::new(&folder.path()).join(OsString::from_vec(name))
    };
    let input = folder.write(
        "in.safetensors",
        safetensors(&[i64s("in.input_ids", [1, 2], [10, 11])]),
    );
    let cases: [(&[&str], &str, &[u8], &str); 4] = [
        (&["ground"], "--overlay", b".png", "/overlay"),
        (&["explain"], "--out", b"", "/pictures/0"),
        (
            &["compare", "--rounds", "1", "--routing", "dense"],
            "--out",
            b".png",
            "/picture",
        ),
        (
            &["trace", "--inputs", &input],
            "--out",
            b".safetensors",
            "/out",
        ),
    ];
    for (line, flag, end, pointer) in cases {
        let mut flags: Vec<OsString> = line.iter().map(OsString::from).collect();
        flags.extend([flag.into(), named(end).into(), "--json".into()]);
        let (printed, well) = run(&flags);
        assert!(well, "{line:?}");
        let report: Value = serde_json::from_str(&printed).expect("one JSON object");
        let path = report.pointer(pointer).and_then(Value::as_str);
        assert!(path.expect("a path").contains("b\\xff"), "{report}");
    }
}

/// What a link leads to is written, and the link stays one.
#[cfg(unix)]
#[test]
fn a_picture_is_written_through_a_link() {
    let scratch = Scratch::new();
    let (file, link) = (scratch.write("file.png", "x"), scratch.at("link.png"));
    std::os::unix::fs::symlink(&file, &link).expect("a link");
    reroute(&["ground", "--overlay", &link]).expect("a box is found");
    assert!(std::path::Path::new(&link).is_symlink());
    let written = std::fs::read(&file).expect("it is there");
    assert!(written.starts_with(b"\x89PNG"));

    // Unless it is one of the files of the model, which may all be links.
    let model = without_weights("llava");
    let weights = model.at("model.safetensors");
    model.remove("model.safetensors");
    std::os::unix::fs::symlink(&file, &weights).expect("a link");
    let input = scratch.write(
        "in.safetensors",
        safetensors(&[i64s("in.input_ids", [1, 2], [10, 11])]),
    );
    let model = model.path();
    let flags = [
        "trace", "--model", &model, "--inputs", &input, "--out", &weights,
    ];
    refuses(&flags, &["it is read here"]);
    assert_eq!(std::fs::read(&file).expect("it is there"), written);
}
