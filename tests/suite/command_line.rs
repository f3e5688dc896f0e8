//! The commands on the built-in model: what they print is what they promise.

use reducers::encoder::{EncoderShape, Tower};
use reducers::presets;
use reroute_zoo::grounding::{iou, parse_box};
use serde_json::{Value, json};

use crate::program::{
    Scratch, f32s, i64s, layers, read_image, read_tensors, report, reroute, safetensors, scene,
    schedule,
};

/// What the built-in model finds without any flags, in shares of the scene.
const TRUTH: [f64; 4] = [0.07143, 0.32143, 0.4375, 0.6875];

fn indices(value: &Value) -> Vec<usize> {
    serde_json::from_value(value.clone()).expect("a list of numbers")
}

#[test]
fn ask_prints_the_answer_and_json_says_how_it_came_about() {
    let flags = ["ask", "--routing", "reroute-pdrop@192"];
    let report = report(&flags);
    let answer = report["answer"].as_str().expect("a text");
    assert_eq!(reroute(&flags).unwrap().trim(), answer);
    assert!(iou(&parse_box(answer).expect("a box"), &TRUTH) > 0.5);

    assert_eq!(report["finish"], "stop");
    assert_eq!(report["visual_tokens"], 64);
    let text = report["prompt_rows"].as_u64().unwrap() as usize - 64;
    let schedule = schedule("reroute-pdrop@192");
    let visual = schedule.visual_tokens_per_layer(layers(), 64);
    let rows: Vec<usize> = visual.map(|visual| text + visual).collect();
    assert_eq!(indices(&report["rows_per_layer"]), rows);
    let counts = schedule.keep_counts(64);
    let decisions = report["decisions"].as_array().expect("a list");
    assert_eq!(decisions.len(), counts.len());
    for (decision, count) in decisions.iter().zip(counts) {
        let selected = indices(&decision["selected"]);
        assert_eq!(selected.len(), count);
        assert!(selected.is_sorted_by(|a, b| a < b), "{selected:?}");
    }
}

#[test]
fn ground_draws_the_box_and_nothing_else() {
    let folder = Scratch::new();
    let (overlay, path) = (folder.at("overlay.png"), scene("063"));
    let line = ["ground", "--image", &path, "--expression"];
    let flags = [&line[..], &["the large cyan square", "--overlay", &overlay]].concat();
    let printed = reroute(&flags).unwrap();
    let report = report(&flags);
    let corners: [f64; 4] = serde_json::from_value(report["box"]["pixels"].clone()).unwrap();
    let normalized: [f64; 4] = serde_json::from_value(report["box"]["normalized"].clone()).unwrap();
    assert!(iou(&normalized, &TRUTH) > 0.5, "{normalized:?}");
    for (pixels, share) in corners.iter().zip(normalized) {
        assert!((pixels - share * 112.0).abs() < 1e-9);
        assert!(printed.contains(&format!("{pixels:.1}")), "{printed}");
        assert!(printed.contains(&format!("{share:.4}")), "{printed}");
    }

    let (before, after) = (read_image(&path), read_image(&overlay));
    assert_eq!([after.width(), after.height()], [112, 112]);
    let [left, top, right, bottom] = corners.map(|corner| corner.round() as usize);
    let pixels = before.data().chunks(3).zip(after.data().chunks(3));
    for (at, (before, after)) in pixels.enumerate() {
        let (x, y) = (at % 112, at / 112);
        let within = (left..right).contains(&x) && (top..bottom).contains(&y);
        let outline = x == left || x == right - 1 || y == top || y == bottom - 1;
        let expected: &[u8] = if within && outline {
            &[255, 45, 85]
        } else {
            before
        };
        assert_eq!(after, expected, "pixel {x}, {y} of a box {corners:?}");
    }
}

#[test]
fn explain_darkens_deferred_tokens_and_frames_those_that_came_back() {
    let folder = Scratch::new();
    let (one, two) = (scene("063"), scene("031"));
    let line = ["explain", "--image", &one, &two, "--out"];
    let report = report(&[&line[..], &[&folder.at("pictures")]].concat());
    let decisions = report["decisions"].as_array().expect("a list");
    let mut pictures = report["pictures"].as_array().expect("a list").iter();
    let mut returned_tokens = 0;
    for (stage, decision) in decisions.iter().enumerate() {
        let selected = indices(&decision["selected"]);
        let returned = indices(&decision["returned"]);
        returned_tokens += returned.len();
        for image in 0..2 {
            let path = pictures.next().and_then(Value::as_str).expect("a picture");
            let name = format!("stage-{}-layer-{}", stage + 1, decision["layer"]);
            assert!(path.ends_with(&format!("{name}-image-{}.png", image + 1)));
            let picture = read_image(path);
            for token in 0..64 {
                let (x, y) = (token % 8 * 56, token / 8 * 56);
                let pixel = |x: usize, y: usize| &picture.data()[(y * 448 + x) * 3..][..3];
                let mut cell = (0..56 * 56).map(|at| pixel(x + at % 56, y + at / 56));
                let token = image * 64 + token;
                let grey = cell.all(|pixel| pixel[0] == pixel[1] && pixel[1] == pixel[2]);
                assert_eq!(grey, !selected.contains(&token), "{path}, token {token}");
                let framed = pixel(x, y) == [52, 199, 89];
                assert_eq!(framed, returned.contains(&token), "{path}, token {token}");
            }
        }
    }
    assert_eq!(pictures.next(), None);
    assert!(returned_tokens > 0, "the preset shows what it is for");
}

#[test]
fn explain_predicts_what_it_measures() {
    let folder = Scratch::new();
    for routing in ["dense", "fastv@128", "pdrop@192", "reroute-pdrop@192"] {
        let report = report(&[
            "explain",
            "--routing",
            routing,
            "--out",
            &folder.at("pictures"),
        ]);
        for layer in report["layers"].as_array().expect("layers") {
            for quantity in ["rows", "flops", "kv_bytes"] {
                let quantity = &layer[quantity];
                assert_eq!(
                    quantity["predicted"], quantity["measured"],
                    "{routing}: {layer}"
                );
            }
        }
        for path in report["pictures"].as_array().expect("pictures") {
            let picture = read_image(path.as_str().expect("a path"));
            assert_eq!([picture.width(), picture.height()], [448, 448]);
        }
    }
}

#[test]
fn a_schedule_file_equals_its_preset() {
    let folder = Scratch::new();
    let schedule = schedule("reroute-pdrop@192");
    let path = folder.at("schedule.json");
    std::fs::write(&path, serde_json::to_string(&schedule).unwrap()).unwrap();
    let by_file = report(&["ask", "--routing", &path]);
    assert_eq!(by_file, report(&["ask", "--routing", "reroute-pdrop@192"]));
    assert_ne!(by_file["decisions"], report(&["ask"])["decisions"]);
}

#[test]
fn a_seed_fixes_a_sampled_answer() {
    let sampled = |seed: &str| report(&["ask", "--temperature", "2", "--seed", seed]);
    assert_eq!(sampled("7"), sampled("7"));
    let answers: Vec<_> = (0..8)
        .map(|seed| sampled(&seed.to_string())["tokens"].clone())
        .collect();
    assert!(
        answers.iter().any(|answer| *answer != answers[0]),
        "{answers:?}"
    );
}

#[test]
fn presets_lists_every_preset_with_the_counts_of_its_schedule() {
    let table = reroute(&["presets"]).unwrap();
    let report = report(&["presets"]);
    let listed = report["presets"].as_array().expect("a list");
    assert_eq!(listed.len(), presets::presets().count());
    for (row, preset) in listed.iter().zip(presets::presets()) {
        assert_eq!(row["preset"], preset.name.as_str());
        let name = format!("{} ", preset.name);
        let line = table.lines().find(|line| line.starts_with(&name));
        let line = line.unwrap_or_else(|| panic!("{name} is in the table"));
        let encoder = EncoderShape {
            num_layers: 4,
            feature_layer: 3,
            num_heads: 4,
            class_token: true,
            position_axes: 1,
            tower: Tower::Clip,
        };
        match preset.plan(layers(), &encoder) {
            Ok(plan) => {
                let entering = plan.entering(64);
                assert_eq!(row["entering_tokens"], entering);
                let counts = plan.schedule.keep_counts(entering);
                assert_eq!(row["keep_counts"], json!(counts));
                let average = row["average_visual_tokens"].as_f64().expect("a number");
                assert!(line.contains(&format!(" {average:.2} ")), "{line}");
                let counts: Vec<String> = counts.iter().map(ToString::to_string).collect();
                assert!(line.ends_with(&counts.join(" ")), "{line}");
            }
            // Not every budget can be met with so many layers.
            Err(error) => {
                assert_eq!(row["error"], error.to_string());
                assert!(line.ends_with(&error.to_string()), "{line}");
            }
        }
    }
}

#[test]
fn a_batch_padded_on_either_side_equals_the_single_runs() {
    let folder = Scratch::new();
    let size = 3 * 112 * 112;
    let picture = |seed: usize| -> Vec<f32> {
        (0..size)
            .map(|i| ((i * 37 + seed * 101) % 255) as f32 / 127.5 - 1.0)
            .collect()
    };
    let prompt = |words: &[i64]| {
        let ids = [0, 5]
            .into_iter()
            .chain([4; 64])
            .chain(words.iter().copied())
            .chain([6]);
        ids.collect::<Vec<i64>>()
    };
    let (long, short) = (prompt(&[7, 8, 11, 14, 22]), prompt(&[7, 25]));
    let run = |name: &str, ids: &[i64], mask: &[i64], pixels: &[f32]| {
        let (samples, images) = (ids.len() / long.len().min(ids.len()), pixels.len() / size);
        let samples = if images == 2 { 2 } else { samples };
        let shape = [samples, ids.len() / samples];
        let file = folder.at(&format!("{name}.in"));
        let tensors = [
            i64s("in.input_ids", shape, ids),
            i64s("in.attention_mask", shape, mask),
            f32s("in.pixel_values", [images, 3, 112, 112], pixels),
        ];
        std::fs::write(&file, safetensors(&tensors)).unwrap();
        let out = folder.at(&format!("{name}.out"));
        report(&[
            "trace",
            "--inputs",
            &file,
            "--out",
            &out,
            "--new-tokens",
            "4",
            "--routing",
            "reroute-pdrop@192",
            "--dtype",
            "f32",
        ]);
        read_tensors(&out)
    };
    let alone = [
        run("long", &long, &vec![1; long.len()], &picture(1)),
        run("short", &short, &vec![1; short.len()], &picture(2)),
    ];
    let missing = long.len() - short.len();
    let (pad, ones) = (vec![3i64; missing], vec![1i64; short.len()]);
    let zeros = vec![0i64; missing];
    let sides = [
        (
            "left",
            [&pad[..], &short[..]].concat(),
            [&zeros[..], &ones[..]].concat(),
        ),
        (
            "right",
            [&short[..], &pad[..]].concat(),
            [&ones[..], &zeros[..]].concat(),
        ),
    ];
    for (side, ids, mask) in sides {
        let mask = [vec![1; long.len()], mask].concat();
        let pixels = [picture(1), picture(2)].concat();
        let both = run(side, &[long.clone(), ids].concat(), &mask, &pixels);
        for (row, single) in alone.iter().enumerate() {
            for (name, values) in single {
                let batch = &both[name];
                if name == "decode.ids" || name.ends_with("selected") {
                    let width = values.integers().len();
                    let part = &batch.integers()[row * width..(row + 1) * width];
                    assert_eq!(part, values.integers(), "{side} {name} of sample {row}");
                } else if name == "logits" || name.ends_with("scores") {
                    let width = values.floats().len();
                    let part = &batch.floats()[row * width..(row + 1) * width];
                    let apart = part.iter().zip(values.floats()).map(|(a, b)| (a - b).abs());
                    let worst = apart.fold(0.0, f32::max);
                    assert!(worst <= 1e-4, "{side} {name} of sample {row}: {worst}");
                }
            }
            let lengths = alone[row]["kv_lengths"].integers();
            let layers = lengths.len();
            let part = &both["kv_lengths"].integers()[row * layers..(row + 1) * layers];
            assert_eq!(part, lengths, "{side}");
        }
    }
    assert_eq!(alone[0]["logits"].shape(), [1, 334]);
    assert_eq!(alone[0]["decode.logits"].shape(), [1, 4, 334]);
    assert_eq!(alone[0]["routing.1.scores"].shape(), [1, 64]);
}

#[test]
fn trace_writes_what_it_documents() {
    let folder = Scratch::new();
    let ids = [vec![0, 5], vec![4; 128], vec![7, 8, 6]].concat();
    let pixels: Vec<f32> = (0..2 * 3 * 112 * 112)
        .map(|i| (i % 41) as f32 / 20.0 - 1.0)
        .collect();
    let tensors = [
        i64s("in.input_ids", [1, 133], ids),
        f32s("in.pixel_values", [2, 3, 112, 112], pixels),
    ];
    let input = folder.write("in.safetensors", safetensors(&tensors));
    let out = folder.at("out.safetensors");
    let line = [
        "trace",
        "--inputs",
        &input,
        "--out",
        &out,
        "--routing",
        "pdrop@192",
    ];
    let schedule = schedule("pdrop@192");
    let counts = schedule.keep_counts(128);

    let mut expected = vec![
        ("logits".to_string(), vec![1, 334]),
        ("kv_lengths".into(), vec![layers()]),
        ("rope.position_ids".into(), vec![1, 1, 133]),
        ("rope_deltas".into(), vec![1, 1]),
    ];
    let mut candidates = 128;
    for (stage, &count) in schedule.stages().iter().zip(&counts) {
        let name = |what: &str| format!("routing.{}.{what}", stage.layer);
        expected.push((name("scores"), vec![1, candidates]));
        expected.push((name("candidates"), vec![1, candidates]));
        expected.push((name("selected"), vec![1, count]));
        candidates = count;
    }
    let shapes = |flags: &[&str]| -> Vec<(String, Vec<usize>)> {
        let listed = report(&[&line[..], flags].concat())["tensors"].clone();
        let tensors = read_tensors(&out);
        assert_eq!(json!(tensors.keys().collect::<Vec<_>>()), listed);
        tensors
            .into_iter()
            .map(|(name, values)| (name, values.shape().to_vec()))
            .collect()
    };
    expected.sort();
    assert_eq!(shapes(&[]), expected);

    expected.push(("decode.ids".into(), vec![1, 3]));
    expected.push(("decode.logits".into(), vec![1, 3, 334]));
    expected.push(("vision_features".into(), vec![1, 128, 128]));
    expected.push(("image_embeds".into(), vec![1, 128, 128]));
    expected.push(("inputs_embeds".into(), vec![1, 133, 128]));
    for (layer, visual) in schedule.visual_tokens_per_layer(layers(), 128).enumerate() {
        expected.push((format!("hidden.{layer}"), vec![1, visual + 5, 128]));
        expected.push((format!("hidden.{layer}.rows"), vec![visual + 5]));
    }
    expected.sort();
    assert_eq!(shapes(&["--new-tokens", "3", "--hidden-states"]), expected);
    let tensors = read_tensors(&out);
    let lengths = tensors["kv_lengths"].integers();
    for (layer, &length) in lengths.iter().enumerate() {
        let rows = tensors[&format!("hidden.{layer}.rows")].integers();
        assert_eq!(rows.len() as i64, length, "layer {layer}");
    }
}

#[test]
fn one_pixel_is_an_image() {
    const ONE_PIXEL: &[u8] =
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x02\0\0\0\x90wS\xde\
        \0\0\0\x0cIDATx\x9cc\xc8\xf6\xe2\0\0\x01\xe1\0\xbe\x13F\x85?\0\0\0\0IEND\xaeB`\x82";
    let folder = Scratch::new();
    let image = folder.write("one.png", ONE_PIXEL);
    let (overlay, pictures) = (folder.at("overlay.png"), folder.at("pictures"));
    assert_eq!(report(&["ask", "--image", &image])["visual_tokens"], 64);
    report(&["explain", "--image", &image, "--out", &pictures]);
    let ground = ["ground", "--expression", "the cross", "--image", &image];
    for more in [&[][..], &["--pad-to-square"], &["--overlay", &overlay]] {
        let corners = &report(&[&ground[..], more].concat())["box"]["pixels"];
        let corners: [f64; 4] = serde_json::from_value(corners.clone()).unwrap();
        assert!(corners.iter().all(|corner| (0.0..=1.0).contains(corner)));
    }
    assert_eq!(read_image(&overlay).width(), 1);
}
