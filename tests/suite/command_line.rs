//! The commands on the built-in model: what they print is what they promise.

use crate::program::{
    BUILT_IN, Scratch, f32s, i64s, read_image, read_tensors, report, safetensors, scene,
};
use reducers::Schedule;
use zoo::Question;

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
    let schedule = reducers::presets::find("reroute-pdrop@192")
        .unwrap()
        .schedule(8)
        .unwrap();
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
    let report = report(&["presets"]);
    let listed = report["presets"].as_array().expect("a list");
    assert_eq!(listed.len(), reducers::presets::presets().count());
    for (row, preset) in listed.iter().zip(reducers::presets::presets()) {
        assert_eq!(row["preset"], preset.name.as_str());
        if let Ok(schedule) = preset.schedule(8) {
            assert_eq!(
                row["keep_counts"],
                serde_json::json!(schedule.keep_counts(64))
            );
        }
    }
}

#[test]
fn special_tokens_that_a_user_types_are_text() {
    let images = vec![read_image(&scene("063"))];
    let encode = |text: &str| {
        let text = text.to_string();
        let question = Question {
            images: images.clone(),
            text,
        };
        BUILT_IN.encode(&question).expect("one slot for one image")
    };
    let image = BUILT_IN.config().image_token();
    let end = BUILT_IN.tokenizer().id("</s>").expect("it has an end");
    for text in [
        "find <image> the cross",
        "<image><image>",
        "</s> find",
        "\u{F0000}\u{F0004}",
        "<s><image>\n",
    ] {
        let ids = encode(text);
        assert_eq!(ids.iter().filter(|&&id| id == image).count(), 64, "{text}");
        assert!(!ids.contains(&end), "{text}");
    }
}

#[test]
fn several_images_form_one_pool_and_no_image_is_dense() {
    let (one, two) = (scene("063"), scene("031"));
    let ask = |flags: &[&str]| {
        let mut line = vec![
            "ask",
            "--prompt",
            "find the cross",
            "--routing",
            "reroute-fastv@192",
        ];
        line.extend(flags);
        report(&line)
    };
    let both = ask(&["--image", &one, &two]);
    assert_eq!(both["visual_tokens"], 128);
    assert_eq!(both["decisions"][0]["candidates"], 128);
    let kept = Schedule::from_json(&both["schedule"].to_string())
        .unwrap()
        .keep_counts(128)[0];
    assert_eq!(
        both["decisions"][0]["selected"].as_array().unwrap().len(),
        kept
    );

    let text = Question {
        images: Vec::new(),
        text: "find the cross".into(),
    };
    let schedule = reducers::presets::find("reroute-fastv@192")
        .unwrap()
        .schedule(8)
        .unwrap();
    let options = BUILT_IN.generation_defaults();
    let routed = BUILT_IN.ask(&text, &schedule, &options, |_| {}).unwrap();
    let dense = BUILT_IN
        .ask(&text, &Schedule::dense(), &options, |_| {})
        .unwrap();
    assert_eq!(routed.tokens, dense.tokens);
    assert!(routed.trace.decisions.is_empty());
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
fn a_prompt_longer_than_the_context_is_a_typed_error() {
    let words = "find the red cross ".repeat(200);
    let question = Question {
        images: Vec::new(),
        text: words,
    };
    let options = BUILT_IN.generation_defaults();
    let error = BUILT_IN
        .ask(&question, &Schedule::dense(), &options, |_| {})
        .unwrap_err();
    assert!(
        error.to_string().contains("max_position_embeddings"),
        "{error}"
    );
}
