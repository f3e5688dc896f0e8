//! The commands on models of the Qwen family.

use reroute_zoo::grounding::{BoxUnits, Found, Named, Place};
use reroute_zoo::{FamilyError, ImageOptions, OpenOptions, Question, Visual, Vlm, ZooError};
use serde_json::Value;
use vision_encoder::RgbImage;

use crate::golden::{fixture, open};
use crate::program::{
    Scratch, f32s, i64s, read_image, read_tensors, refuses, report, safetensors, scene, write_image,
};

const FAMILIES: [&str; 3] = ["qwen2vl", "qwen25vl", "qwen3vl"];

fn model(family: &str) -> String {
    fixture(family).join("ckpt").display().to_string()
}

fn picture(name: &str) -> String {
    fixture("qwen_cases/pictures")
        .join(name)
        .display()
        .to_string()
}

/// A folder with the frames of the clip.
fn clip(frames: usize) -> Scratch {
    let folder = Scratch::new();
    for frame in 0..frames {
        let name = format!("clip{frame}.png");
        folder.write(&name, std::fs::read(picture(&name)).unwrap());
    }
    folder
}

#[test]
fn ask_says_how_images_and_videos_were_seen() {
    let frames = clip(3);
    let (small, wide) = (picture("small.png"), picture("wide.png"));
    for family in FAMILIES {
        let model = model(family);
        let report = report(&[
            "ask",
            "--model",
            &model,
            "--image",
            &small,
            &wide,
            "--video",
            &frames.path(),
            "--prompt",
            "What is this?",
            "--routing",
            "reroute-pdrop@192",
            "--max-new-tokens",
            "2",
        ]);
        let visuals = report["visuals"].as_array().unwrap();
        let of = |name: &str| -> Vec<&Value> { visuals.iter().map(|v| &v[name]).collect() };
        assert_eq!(of("kind"), ["image", "image", "video"]);
        assert_eq!(
            of("size"),
            [
                &serde_json::json!([90, 59]),
                &serde_json::json!([117, 83]),
                &serde_json::json!([62, 93])
            ]
        );
        // Three frames fill two pairs.
        assert_eq!(of("visual_tokens"), [6, 12, 12], "{family}");
        assert_eq!(report["visual_tokens"], 30);
        assert_eq!(report["decisions"][0]["candidates"], 30, "one pool");
    }
}

#[test]
fn explain_draws_every_image_and_every_step_of_a_video() {
    let (frames, out) = (clip(4), Scratch::new());
    let (model, small) = (model("qwen25vl"), picture("small.png"));
    let report = report(&[
        "explain",
        "--model",
        &model,
        "--image",
        &small,
        "--video",
        &frames.path(),
        "--prompt",
        "What is this?",
        "--routing",
        "reroute-pdrop@192",
        "--max-new-tokens",
        "1",
        "--out",
        &out.at("pictures"),
    ]);
    let pictures: Vec<&str> = report["pictures"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p.as_str().unwrap())
        .collect();
    let decisions = report["decisions"].as_array().unwrap();
    assert_eq!(pictures.len(), 3 * decisions.len());
    for (stage, pictures) in pictures.chunks(3).enumerate() {
        for (path, end) in
            pictures
                .iter()
                .zip(["image-1.png", "video-2-step-1.png", "video-2-step-2.png"])
        {
            assert!(
                path.contains(&format!("stage-{}-", stage + 1)) && path.ends_with(end),
                "{path}"
            );
        }
        // 84 × 56 pixels make 3 × 2 tokens; deferred ones are grey.
        let picture = read_image(pictures[0]);
        let scale = picture.width() / 84;
        assert_eq!(
            [picture.width(), picture.height()],
            [84 * scale, 56 * scale]
        );
        let selected: Vec<usize> =
            serde_json::from_value(decisions[stage]["selected"].clone()).unwrap();
        for token in 0..6 {
            let (x, y) = (token % 3 * 28 * scale, token / 3 * 28 * scale);
            let pixel = |x: usize, y: usize| &picture.data()[(y * picture.width() + x) * 3..][..3];
            let mut cell = (0..28 * scale).flat_map(|dy| (0..28 * scale).map(move |dx| (dx, dy)));
            let grey = cell.all(|(dx, dy)| {
                let pixel = pixel(x + dx, y + dy);
                pixel[0] == pixel[1] && pixel[1] == pixel[2]
            });
            assert_eq!(
                grey,
                !selected.contains(&token),
                "token {token} of stage {stage}"
            );
        }
    }
}

#[test]
fn boxes_are_in_pixels_of_the_image_as_given() {
    // 90 × 59 pixels are seen as 84 × 56 (Qwen3-VL: 96 × 64).
    let image = read_image(&picture("small.png"));
    for (family, units, answered) in [
        (
            "qwen2vl",
            BoxUnits::Thousandths,
            [500.0, 250.0, 1000.0, 500.0],
        ),
        (
            "qwen25vl",
            BoxUnits::ResizedPixels,
            [42.0, 14.0, 84.0, 28.0],
        ),
        (
            "qwen3vl",
            BoxUnits::Thousandths,
            [500.0, 250.0, 1000.0, 500.0],
        ),
    ] {
        let vlm = open(family);
        assert_eq!(vlm.grounding().units, units, "{family}");
        let visual = Visual::Image(image.clone());
        let (view, _) = vlm.preprocessor().prepare(&visual).unwrap();
        let named = Named {
            label: None,
            place: Place::Box(answered),
        };
        let resized = view.resized.map(|side| side as f64);
        let geometry = vlm.preprocessor().geometry(&view);
        let found = Found::of(named, units, resized, &geometry);
        assert_eq!(
            found.pixels,
            Place::Box([45.0, 14.75, 90.0, 29.5]),
            "{family}"
        );
    }
}

/// These models answer noise; that it has no box is a typed error with the answer in it.
#[test]
fn an_answer_without_a_box_is_refused() {
    for family in FAMILIES {
        let (model, image) = (model(family), picture("small.png"));
        let ground = [
            "ground",
            "--model",
            &model,
            "--image",
            &image,
            "--expression",
            "the cup",
        ];
        refuses(
            &[&ground[..], &["--max-new-tokens", "4"]].concat(),
            &["has no box in it"],
        );
    }
}

#[test]
fn presets_are_rescaled_to_the_depth_and_counted_for_any_size() {
    let model = model("qwen3vl");
    let report = report(&["presets", "--model", &model, "--visual-tokens", "1280"]);
    assert_eq!(report["num_layers"], 8);
    assert_eq!(report["visual_tokens"], 1280);
    let presets = report["presets"].as_array().unwrap();
    let preset = presets
        .iter()
        .find(|p| p["preset"] == "reroute-pdrop@192")
        .unwrap();
    assert_eq!(preset["layers"], serde_json::json!([1, 2, 4, 6]));
    assert_eq!(
        preset["keep_counts"],
        serde_json::json!([576, 576, 288, 144])
    );
}

#[test]
fn visuals_that_cannot_be_seen_are_refused() {
    let (model, frames, empty) = (model("qwen25vl"), clip(2), Scratch::new());
    let mixed = clip(1);
    mixed.write("other.png", std::fs::read(picture("small.png")).unwrap());
    let broken = clip(1);
    broken.write("zz.png", "no picture");
    let thin = Scratch::new();
    let strip = RgbImage::new(1000, 2, vec![7; 6000]).unwrap();
    write_image(&thin, "thin.png", &strip);
    let ask = [
        "ask",
        "--model",
        &model,
        "--prompt",
        "x",
        "--max-new-tokens",
        "1",
    ];
    let cases: [(&[&str], &[&str]); 8] = [
        (&["--video", &empty.path()], &["has no frames in it"]),
        (
            &["--video", "nowhere"],
            &["cannot read the folder of frames nowhere"],
        ),
        (&["--video", &mixed.path()], &["62×93", "90×59"]),
        (
            &["--video", &broken.path()],
            &["zz.png", "PNG, JPEG or WebP"],
        ),
        (
            &["--video", &frames.path(), "--fps", "0"],
            &["0 is no frame rate"],
        ),
        (
            &["--video", &frames.path(), "--fps", "nan"],
            &["NaN is no frame rate"],
        ),
        (
            &["--video", &frames.path(), "--fps", "-2"],
            &["-2 is no frame rate"],
        ),
        (&["--image", &thin.at("thin.png")], &["1000", "200"]),
    ];
    for (flags, expected) in cases {
        refuses(&[&ask[..], flags].concat(), expected);
    }
    refuses(
        &["ask", "--video", &frames.path()],
        &["images only, no videos"],
    );
}

/// 46 megapixels become at most as many visual tokens as the cap allows, and it is said.
#[test]
fn a_46_megapixel_photo_is_answered_within_the_pixel_cap() {
    let folder = fixture("qwen25vl").join("ckpt");
    let scratch = Scratch::new();
    for file in folder.read_dir().unwrap() {
        let file = file.unwrap();
        scratch.write(
            &file.file_name().to_string_lossy(),
            std::fs::read(file.path()).unwrap(),
        );
    }
    // The published limits; the fixture's own are tiny.
    scratch.set(
        "preprocessor_config.json",
        "/max_pixels",
        serde_json::json!(12_845_056),
    );
    let photo = RgbImage::new(8256, 5504, vec![100; 8256 * 5504 * 3]).unwrap();
    let question = Question::about(vec![photo], "What is this?");
    for (max_pixels, tokens) in [(None, 1247), (Some(100_352), 117)] {
        let options = OpenOptions {
            images: ImageOptions {
                max_pixels,
                ..Default::default()
            },
            ..OpenOptions::default()
        };
        let vlm: Vlm<reroute_cli::backend::Backend> =
            Vlm::open(&scratch.folder(), &options, &Default::default()).unwrap();
        let options = reroute::GenerationOptions {
            max_new_tokens: 1,
            ..vlm.generation_defaults()
        };
        let schedule = reducers::presets::find("reroute-pdrop@64")
            .unwrap()
            .schedule(8)
            .unwrap();
        let answer = vlm.ask(&question, &schedule, &options, |_| {}).unwrap();
        assert_eq!(answer.visual_tokens, tokens);
        let [width, height] = answer.views[0].resized;
        assert!(width * height <= max_pixels.unwrap_or(1_003_520));
        let notice = answer.views[0].notice().expect("it was scaled down");
        assert!(
            notice.contains("8256×5504") && notice.contains(&format!("{tokens} visual tokens")),
            "{notice}"
        );
    }
}

#[test]
fn trace_writes_positions_and_visual_tokens() {
    let folder = Scratch::new();
    let model = model("qwen3vl");
    let vlm = open("qwen3vl");
    let image = vlm.config().slots().image as i64;
    // Two text rows, 2 × 3 visual tokens, two text rows.
    let ids = [&[5, 6][..], &[image; 6], &[7, 8]].concat();
    let types = ids
        .iter()
        .map(|&id| i64::from(id == image))
        .collect::<Vec<_>>();
    let patches: Vec<f32> = (0..24 * 1536)
        .map(|i| (i % 37) as f32 / 18.0 - 1.0)
        .collect();
    let inputs = |grid: [i64; 3]| {
        safetensors(&[
            i64s("in.input_ids", [1, 10], ids.clone()),
            i64s("in.mm_token_type_ids", [1, 10], types.clone()),
            f32s("in.pixel_values", [24, 1536], patches.clone()),
            i64s("in.image_grid_thw", [1, 3], grid),
        ])
    };
    let (input, out) = (folder.at("in.safetensors"), folder.at("out.safetensors"));
    let line = [
        "trace",
        "--model",
        &model,
        "--inputs",
        &input,
        "--out",
        &out,
        "--hidden-states",
    ];
    folder.write("in.safetensors", inputs([1, 4, 6]));
    report(&line);
    let tensors = read_tensors(&out);
    let positions = tensors["rope.position_ids"].integers();
    let expected = [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ];
    assert_eq!(positions, expected.concat());
    assert_eq!(tensors["rope_deltas"].integers(), [-3]);
    assert_eq!(tensors["image_embeds"].shape(), [1, 6, 96]);
    assert_eq!(tensors["deepstack.2"].shape(), [1, 6, 96]);

    for (grid, expected) in [
        ([1, 4, 4], "24 patches were given for 1 grids of 16"),
        ([1, 3, 8], "multiples of spatial_merge_size 2"),
        ([1, -4, 6], "in.image_grid_thw has a negative size"),
        ([i64::MAX, i64::MAX, 2], "spatial_merge_size"),
    ] {
        folder.write("in.safetensors", inputs(grid));
        refuses(&line, &[expected]);
    }
}

#[test]
fn a_model_without_video_says_so() {
    let vlm = &crate::program::BUILT_IN;
    let frame = read_image(&scene("063"));
    let question = Question {
        visuals: vec![Visual::Video(reroute_zoo::Video {
            frames: vec![frame],
            fps: 1.0,
        })],
        text: "x".into(),
    };
    let options = vlm.generation_defaults();
    let error = vlm.ask(&question, reducers::Schedule::dense(), &options, |_| {});
    assert!(matches!(
        error,
        Err(ZooError::Family(FamilyError::NoVideos))
    ));
}
