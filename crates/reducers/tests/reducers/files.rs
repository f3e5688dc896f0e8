//! Routing files: what may be left out, what is refused, and under which name.

use std::error::Error;

use reducers::encoder::{EncoderMethod, EncoderShape};
use reducers::presets::{self, TOWERS};
use reducers::{Action, Plan, ReducerError, Schedule, Support};

fn refused(text: &str) -> (ReducerError, String) {
    let error = Plan::from_json(text).expect_err(text);
    let mut said = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        said.push_str(&format!(": {error}"));
        source = error.source();
    }
    (error, said)
}

#[test]
fn what_may_be_left_out() {
    let plan = Plan::from_json(r#"{"stages":[{"layer":2,"keep_ratio":0.5}]}"#).unwrap();
    assert_eq!(plan.schedule.action(), Action::Remove);
    assert_eq!(plan.schedule.keep_counts(10), [5]);
    let plan = Plan::from_json(
        r#"{"action":"remove","encoder":{"method":{"vision-zip":{}},"keep_ratio":0.5}}"#,
    )
    .unwrap();
    assert!(plan.schedule.is_dense());
    assert_eq!(plan.entering(10), 5);
    // But not both: a file that says nothing is a mistake.
    for text in [r#"{"action": "remove"}"#, r#"{"stages": []}"#, "{}"] {
        let (error, said) = refused(text);
        assert!(matches!(error, ReducerError::Json { .. }));
        assert!(
            said.contains("`stages`") && said.contains("`encoder`"),
            "{said}"
        );
    }
    assert!(Schedule::from_json(r#"{"stages": []}"#).unwrap().is_dense());
}

#[test]
fn keys_that_stand_twice_or_are_unknown_are_refused_by_name() {
    for (text, name) in [
        (r#"{"stages": [], "stages": []}"#, "stages"),
        (
            r#"{"action": "remove", "action": "reroute", "stages": []}"#,
            "action",
        ),
        (
            r#"{"stages": [{"layer": 2, "layer": 3, "keep_count": 4}]}"#,
            "layer",
        ),
        (
            r#"{"encoder": {"method": {"nuwa": {}}, "keep_count": 4, "keep_count": 5}}"#,
            "keep_count",
        ),
        (
            r#"{"encoder": {"method": {"hiprune": {"alpha": 0.1, "alpha": 0.2}}, "keep_count": 4}}"#,
            "alpha",
        ),
        (
            r#"{"encoder": {"method": {"nuwa": {}}, "keep_count": 4},
                "encoder": {"method": {"nuwa": {}}, "keep_count": 4}}"#,
            "encoder",
        ),
        (
            r#"{"stages": [{"layer": 2, "keep_count": 4,
                "score": {"random": {"seed": 1, "seed": 2}}}]}"#,
            "seed",
        ),
        (r#"{"stages": [], "note": 1}"#, "note"),
        (r#"{"stages": [{"layer": 2, "keep": 4}]}"#, "keep"),
        (
            r#"{"encoder": {"method": {"nuwa": {}}, "keep": 4}}"#,
            "keep",
        ),
        (
            r#"{"encoder": {"method": {"nuwa": {"nearness": 1}}, "keep_count": 4}}"#,
            "nearness",
        ),
    ] {
        let (_, said) = refused(text);
        assert!(said.contains(&format!("`{name}`")), "{text}: {said}");
    }
}

/// Settings without sense are refused when the file is read, and the setting is named.
#[test]
fn settings_without_sense_are_refused_before_anything_runs() {
    for (method, name) in [
        (r#"{"nuwa": {"near": -1}}"#, "near"),
        (r#"{"nuwa": {"near": 0}}"#, "near"),
        (r#"{"nuwa": {"quantile": 1.5}}"#, "quantile"),
        (r#"{"nuwa": {"candidates": 0}}"#, "candidates"),
        (r#"{"nuwa": {"candidates": 5}}"#, "candidates"),
        (r#"{"hiprune": {"alpha": -0.1}}"#, "alpha"),
        (r#"{"hiprune": {"alpha": 1.1}}"#, "alpha"),
        (r#"{"vispruner": {"important": 2}}"#, "important"),
    ] {
        let text = format!(r#"{{"encoder": {{"method": {method}, "keep_ratio": 0.5}}}}"#);
        let (error, said) = refused(&text);
        assert!(matches!(error, ReducerError::Unsupported { .. }), "{said}");
        assert!(said.contains(name), "{said}");
    }
    for (stage, expected) in [
        (
            r#""score": {"duplication": {"visual_pivots": 0, "text_pivots": 0}}"#,
            "without a pivot",
        ),
        (
            r#""score": {"attention": {"query": {"last-mean": 0}}}"#,
            "last 0 rows",
        ),
        (r#""score": "encoder""#, "was not reduced"),
        (r#""stride": 0"#, "stride of 0"),
    ] {
        let text = format!(r#"{{"stages": [{{"layer": 2, "keep_count": 4, {stage}}}]}}"#);
        let (_, said) = refused(&text);
        assert!(said.contains(expected), "{said}");
    }
    // The largest numbers that a file can say are only large.
    let most = usize::MAX;
    let text = format!(
        r#"{{"stages": [{{"layer": 2, "keep_count": {most}, "stride": {most}, "score":
            {{"duplication": {{"visual_pivots": {most}, "text_pivots": {most}}}}}}}]}}"#
    );
    let plan = Plan::from_json(&text).unwrap();
    assert_eq!(plan.schedule.keep_counts(576), [576]);
    assert_eq!(plan.average_tokens(4, most), most as f64);
}

/// What files called them once is read, and written as it is called now.
#[test]
fn old_names_of_methods_are_read() {
    for (old, new) in [
        ("random", "random-tokens"),
        ("vision-zip", "visionzip"),
        ("faster-vlm", "fastervlm"),
        ("vis-pruner", "vispruner"),
        ("div-prune", "divprune"),
        ("cd-pruner", "cdpruner"),
        ("pru-merge", "prumerge"),
        ("hi-prune", "hiprune"),
    ] {
        let read = |name: &str| {
            let text =
                format!(r#"{{"encoder": {{"method": {{"{name}": {{}}}}, "keep_count": 4}}}}"#);
            Plan::from_json(&text).unwrap()
        };
        assert_eq!(read(old), read(new));
        assert!(EncoderMethod::NAMES.contains(&new));
        let written = &read(old).to_json()["encoder"]["method"];
        assert!(written.get(new).is_some(), "{written}");
    }
}

/// Presets, files and errors call a method the same.
#[test]
fn a_method_has_one_name() {
    for preset in presets::presets() {
        for (_, encoder) in TOWERS {
            let Ok(plan) = preset.plan(32, encoder) else {
                continue;
            };
            let Some(before) = plan.encoder else {
                continue;
            };
            let name = preset.method.name.trim_start_matches("reroute-");
            assert!(name.starts_with(before.method.name()), "{name}");
        }
    }
}

/// Whatever an error points to, `--routing` takes.
#[test]
fn errors_recommend_what_exists() {
    let mut said = Vec::new();
    for (_, encoder) in TOWERS {
        for preset in presets::presets() {
            said.extend(
                preset
                    .plan(32, encoder)
                    .err()
                    .map(|error| error.to_string()),
            );
            said.extend(preset.plan(3, encoder).err().map(|error| error.to_string()));
            said.extend(preset.schedule(32).err().map(|error| error.to_string()));
        }
        for name in EncoderMethod::NAMES {
            let method =
                format!(r#"{{"encoder": {{"method": {{"{name}": {{}}}}, "keep_count": 4}}}}"#);
            let method = Plan::from_json(&method).unwrap().encoder.unwrap().method;
            said.extend(
                method
                    .works_behind(encoder)
                    .err()
                    .map(|error| error.to_string()),
            );
        }
    }
    said.extend(
        presets::find("vision-zip@64")
            .err()
            .map(|error| error.to_string()),
    );
    assert!(said.iter().any(|said| said.contains("visionzip@192")));
    assert!(said.iter().any(|said| said.contains("pdrop@192")));
    for said in &said {
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '@' || c == '-';
        let words = said.split(|c| !is_part(c));
        for word in words.filter(|word| word.contains('@') && *word != "vision-zip@64") {
            assert!(presets::find(word).is_ok(), "{word:?} in {said}");
        }
        // Nothing is recommended by a name without a budget.
        let recommended = said.split("use ").skip(1);
        for after in recommended {
            let first = after.split(|c| !is_part(c)).next().unwrap_or("");
            let is_method = presets::methods().any(|method| method.name == first);
            assert!(!is_method, "{first:?} in {said}");
        }
    }
}

/// What a method published for CLIP means behind a tower that nothing was published for.
#[test]
fn support_follows_from_what_a_tower_has() {
    let method = |name: &str| presets::find(&format!("{name}@192")).unwrap().method;
    let of = |name: &str, tower: &str| {
        let tower = TOWERS.iter().find(|(kind, _)| kind.starts_with(tower));
        method(name).support(&tower.unwrap().1)
    };
    for name in ["visionzip", "hiprune", "vscan", "nuwa", "reroute-nuwa"] {
        assert_eq!(of(name, "CLIP"), Support::Yes);
        assert_eq!(of(name, "Qwen"), Support::Yes);
        assert_eq!(of(name, "SigLIP"), Support::Adapted);
        assert_eq!(of(name, "DINOv2"), Support::Adapted);
    }
    for name in [
        "fastervlm",
        "vispruner",
        "prumerge-plus",
        "reroute-fastervlm",
    ] {
        assert_eq!(of(name, "CLIP"), Support::Yes);
        assert_eq!(of(name, "DINOv2"), Support::Adapted);
        for tower in ["SigLIP", "Qwen"] {
            assert!(
                matches!(of(name, tower), Support::No(reason) if reason.contains("visionzip@"))
            );
        }
    }
    for name in [
        "divprune",
        "cdpruner",
        "uniform-grid",
        "pdrop",
        "reroute-pdrop",
    ] {
        for (_, tower) in TOWERS {
            assert_eq!(method(name).support(tower), Support::Yes);
        }
    }
    // It is the positions that renumbering cannot do without, not a tower.
    let original = presets::find("pdrop-original@270").unwrap();
    let plan = |axes| {
        let encoder = EncoderShape {
            position_axes: axes,
            ..TOWERS[0].1
        };
        original.plan(32, &encoder)
    };
    assert!(plan(1).is_ok());
    assert!(plan(3).unwrap_err().to_string().contains("several axes"));
}
