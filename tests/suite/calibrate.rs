//! `reroute calibrate` on the built-in model: what it writes is read, makes tokens drift less, and is refused where it does not
//! fit.

use serde_json::{Value, json};

use crate::program::{Scratch, refuses, report, scene};

/// Decisions at layers 1, 3 and 5, whose deferred tokens take shortcuts.
fn schedule(folder: &Scratch, name: &str, waiting: &str) -> String {
    let stage = |layer: usize| json!({"layer": layer, "keep_ratio": 0.3});
    let stages = [1, 3, 5].map(stage);
    let schedule = json!({"action": "reroute", "waiting": waiting, "stages": stages});
    folder.write(name, schedule.to_string())
}

fn picture(at: usize) -> String {
    let folder = env!("CARGO_MANIFEST_DIR");
    format!("{folder}/fixtures/scenes/{at:03}.webp")
}

fn scenes() -> Vec<String> {
    (0..20).map(picture).collect()
}

/// The mean drift of tokens at the second decision.
fn drift(folder: &Scratch, routing: &str) -> f64 {
    let (model, image, pictures) = (folder.path(), scene("063"), folder.at("pictures"));
    let flags = [
        "explain", "--model", &model, "--image", &image, "--prompt", "the ring",
    ];
    let report = report(&[&flags[..], &["--routing", routing, "--out", &pictures]].concat());
    report["drift"][0]["mean"].as_f64().expect("a number")
}

#[test]
fn tokens_that_take_a_fitted_shortcut_drift_less() {
    let folder = Scratch::built_in();
    let (model, scenes) = (folder.path(), scenes());
    let shortcut = schedule(&folder, "shortcut.json", "shortcut");
    let untouched = schedule(&folder, "untouched.json", "untouched");
    let asked = [
        "ask",
        "--model",
        &model,
        "--image",
        &scenes[0],
        "--prompt",
        "the ring",
        "--routing",
    ];
    // Nothing is known yet.
    refuses(
        &[&asked[..], &[&shortcut]].concat(),
        &["the shortcut from layer 1 to layer 3", "reroute calibrate"],
    );

    let flags = [
        "calibrate",
        "--model",
        &model,
        "--routing",
        &shortcut,
        "--rank",
        "12",
        "--image",
    ];
    let images: Vec<&str> = scenes.iter().map(String::as_str).collect();
    let flags = [&flags[..], &images].concat();
    let fitted = report(&flags);
    let stages = fitted["stages"].as_array().expect("a list");
    assert_eq!(stages.len(), 2);
    for (stage, layers) in stages.iter().zip([[1, 3], [3, 5]]) {
        assert_eq!(
            (&stage["layers"], &stage["rank"]),
            (&json!(layers), &json!(12))
        );
        // 16 of the 20 pictures, 64 tokens each.
        assert_eq!(stage["tokens"], 16 * 64);
        let share = |name: &str| stage[name].as_f64().expect("a number");
        assert!(
            share("explained") > share("explained_by_mean") + 0.05,
            "{stage}"
        );
        assert!(
            share("explained") > 0.2 && share("explained") < 1.0,
            "{stage}"
        );
        assert!(share("share_of_flops") < 0.05, "{stage}");
    }
    assert!(drift(&folder, &shortcut) < 0.95 * drift(&folder, &untouched));

    // Maps for other layers come beside them.
    let other = json!({"action": "reroute", "stages": [{"layer": 2, "keep_ratio": 0.5}, {"layer": 6, "keep_ratio": 0.5}]});
    let other = folder.write("other.json", other.to_string());
    let flags = [
        "calibrate",
        "--model",
        &model,
        "--routing",
        &other,
        "--image",
        images[0],
    ];
    report(&flags);
    let written: Value = serde_json::from_slice(&folder.read("shortcuts.json")).expect("JSON");
    let layers: Vec<&Value> = written["shortcuts"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|map| &map["layers"])
        .collect();
    let range = |start: usize, end: usize| json!({"start": start, "end": end});
    assert_eq!(layers, [&range(1, 3), &range(2, 6), &range(3, 5)]);

    // A folder of maps that are not this model's is refused, not misread.
    for (pointer, value, expected) in [
        ("/shortcuts/0/shift", json!([0.5]), "another model"),
        ("/shortcuts/0/up", json!([]), "numbers"),
        ("/shortcuts/0/layers/end", json!(99), "another model"),
        ("/shortcuts/0/layers/end", json!(0), "another model"),
        ("/shortcuts/0/down/3", json!(1e300), "out of range"),
        ("/shortcuts/0/down/3", json!("x"), "shortcuts.json"),
    ] {
        let mut wrong = written.clone();
        *wrong.pointer_mut(pointer).expect("it is there") = value;
        folder.write("shortcuts.json", wrong.to_string());
        refuses(&[&asked[..], &[&untouched]].concat(), &[expected]);
    }
}

#[test]
fn what_cannot_be_fitted_is_refused() {
    let folder = Scratch::built_in();
    let (model, image) = (folder.path(), picture(0));
    let routing = schedule(&folder, "untouched.json", "untouched");
    let flags = ["calibrate", "--model", &model, "--routing", &routing];
    refuses(&flags, &["--image"]);
    let flags = [&flags[..], &["--image", &image]].concat();
    for (flag, value) in [
        ("--rank", "0"),
        ("--rank", "1000"),
        ("--ridge", "0"),
        ("--ridge", "nan"),
    ] {
        refuses(&[&flags[..], &[flag, value]].concat(), &[flag]);
    }
    refuses(&["calibrate", "--image", &image], &["--to"]);
    let once = json!({"action": "reroute", "stages": [{"layer": 2, "keep_ratio": 0.5}]});
    let once = folder.write("once.json", once.to_string());
    let flags = [
        "calibrate",
        "--model",
        &model,
        "--routing",
        &once,
        "--image",
        &image,
    ];
    refuses(&flags, &["decides twice"]);
    assert!(!folder.entries().contains(&"shortcuts.json".to_owned()));
}
