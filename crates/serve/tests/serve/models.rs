//! What is told beside answers: models, routings, traces, metrics, the page.

use std::collections::HashMap;

use reroute_zoo::{AdapterConfig, Folder};
use serde_json::json;

use super::*;

#[test]
fn adapters_are_models_that_share_the_weights() {
    let root = tempfile::tempdir().expect("a folder");
    // Random both ways, so that it changes answers.
    let config = AdapterConfig {
        alpha: 400.0,
        ..AdapterConfig::new(["q_proj", "v_proj"], 4)
    };
    let folder = root.path().join("adapter");
    VLM.model()
        .adapt(&config)
        .expect("an adapter")
        .save_adapter(&folder)
        .expect("saved");
    scramble(&folder.join("adapter_model.safetensors"));
    let model = VLM
        .model()
        .load_adapter(&Folder::open(&folder).expect("there"))
        .expect("it fits");
    let adapted = Arc::new(VLM.with_model(model));
    let server = Running::start_with(
        vec![
            ("built-in".into(), VLM.clone()),
            ("team/tuned".into(), adapted.clone()),
        ],
        Settings::default(),
    );
    let listed = server.get_json("/v1/models");
    let ids: Vec<&str> = { listed["data"].as_array().expect("a list").iter() }
        .map(|model| model["id"].as_str().expect("a text"))
        .collect();
    assert_eq!(ids, ["built-in", "team/tuned"]);
    assert_eq!(
        server.get_json("/v1/models/team/tuned")["parent"],
        "built-in"
    );
    let text = VLM.grounding().question("the large cyan square");
    let mut texts = Vec::new();
    for (name, vlm) in [("built-in", &VLM as &Vlm<Flex>), ("team/tuned", &adapted)] {
        let question = reroute_zoo::Question::about(vec![scene()], text.clone());
        let mut options = vlm.generation_defaults();
        options.max_new_tokens = 12;
        let plan = vlm.plan("reroute-pdrop@128").expect("a preset");
        let answer = vlm
            .ask(&question, &plan, &options, |_| {})
            .expect("an answer");
        let mut request = about(&text);
        request["model"] = name.into();
        request["routing"] = "reroute-pdrop@128".into();
        request["max_tokens"] = 12.into();
        let response = server.ask(&request);
        assert_eq!(text_of(&response), answer.text);
        assert_eq!(response["model"], name);
        texts.push(answer.text);
    }
    assert_ne!(texts[0], texts[1], "the adapter changes the answer");
}

/// Makes what maps up, which is zero in a fresh adapter, other than zero.
fn scramble(path: &std::path::Path) {
    let mut bytes = std::fs::read(path).expect("there");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    for (at, number) in bytes[8 + header..].chunks_exact_mut(4).enumerate() {
        let value = ((at as f32 * 0.7).sin()) * 0.1;
        number.copy_from_slice(&value.to_le_bytes());
    }
    std::fs::write(path, bytes).expect("written");
}

#[test]
fn routings_say_what_fits_the_model() {
    let settings = Settings {
        routing: ("pdrop@128".into(), VLM.plan("pdrop@128").expect("a preset")),
        ..Settings::default()
    };
    let server = Running::start(settings);
    let routings = server.get_json("/v1/routings");
    assert_eq!(routings["default"], "pdrop@128");
    let data = routings["data"].as_array().expect("a list");
    let of = |id: &str| {
        data.iter()
            .find(|one| one["id"] == id)
            .expect("a method")
            .clone()
    };
    for (id, action) in [
        ("dense", "none"),
        ("pdrop", "remove"),
        ("reroute-pdrop", "reroute"),
        ("visionzip", "reduce"),
    ] {
        assert_eq!(of(id)["action"], action);
    }
    assert_eq!(of("reroute-pdrop")["budgets"], json!([192, 128, 64]));
    assert_eq!(of("dense")["budgets"], json!([]));
    assert_eq!(of("random")["budgets"], json!([]));
    assert!(
        of("random")["exact"]
            .as_array()
            .is_some_and(|exact| !exact.is_empty())
    );
    // All that is offered is taken.
    for method in data {
        let id = method["id"].as_str().expect("a text");
        let first = |budgets: &str| method[budgets].as_array().expect("a list").first();
        let mut request = about("x");
        request["routing"] = match (first("budgets"), first("exact")) {
            (Some(budget), _) => format!("{id}@{budget}").into(),
            (None, Some(budget)) => format!("{id}@{budget}-exact").into(),
            (None, None) => id.into(),
        };
        (request["max_tokens"], request["trace"]) = (1.into(), true.into());
        assert_eq!(
            server.ask(&request)["reroute"]["routing"],
            request["routing"]
        );
    }
    let mut request = about("x");
    request["trace"] = true.into();
    assert_eq!(server.ask(&request)["reroute"]["routing"], "pdrop@128");
    request["routing"] = json!({"action": "reroute", "stages": [{"layer": 2, "keep_ratio": 0.25}]});
    let trace = server.ask(&request)["reroute"].clone();
    assert_eq!(trace["routing"], "custom");
    assert_eq!(trace["stages"].as_array().expect("a list").len(), 2);
}

#[test]
fn traces_tell_the_state_of_every_visual_token() {
    let server = Running::start(Settings::default());
    let layers = VLM.config().decoder().num_layers;
    for (routing, letters) in [
        ("dense", "a"),
        ("pdrop@64", "ar"),
        ("reroute-pdrop@64", "abd"),
        ("visionzip@64", "an"),
    ] {
        let text = VLM.grounding().question("the large cyan square");
        let mut request = about(&text);
        (request["routing"], request["trace"]) = (routing.into(), true.into());
        let response = server.ask(&request);
        let trace = &response["reroute"];
        let question = reroute_zoo::Question::about(vec![scene()], text);
        let plan = VLM.plan(routing).expect("a preset");
        let answer = VLM
            .ask(&question, &plan, &VLM.generation_defaults(), |_| {})
            .expect("an answer");
        let stages = trace["stages"].as_array().expect("a list");
        assert_eq!(stages.len(), answer.trace.decisions.len() + 1, "{routing}");
        let mut next = 0;
        let mut seen = std::collections::BTreeSet::new();
        for (index, stage) in stages.iter().enumerate() {
            assert_eq!(stage["first_layer"], next);
            next = stage["last_layer"].as_u64().expect("a number") + 1;
            let states = stage["states"][0].as_str().expect("a text");
            assert_eq!(states.len(), answer.views[0].token_count());
            let active = states.chars().filter(|state| "ab".contains(*state)).count();
            let expected = match index.checked_sub(1) {
                None => answer.visual_tokens,
                Some(decision) => answer.trace.decisions[decision].selected.len(),
            };
            // A token of several cells has none of its own.
            assert!(
                active <= expected && active > 0,
                "{routing}: {active} of {expected}"
            );
            let returned = states.chars().filter(|state| *state == 'b').count();
            let expected = index
                .checked_sub(1)
                .map_or(0, |at| answer.trace.decisions[at].returned.len());
            assert_eq!(returned, expected);
            seen.extend(states.chars());
        }
        assert_eq!(next, layers as u64);
        assert_eq!(seen.into_iter().collect::<String>(), letters, "{routing}");
        let image = &trace["images"][0];
        assert_eq!(image["width"], scene().width());
        assert_eq!(image["tokens"], answer.views[0].token_count());
        assert_eq!(
            image["area"],
            json!([0.0, 0.0, scene().width() as f64, scene().height() as f64])
        );
        assert_eq!(trace["kv_bytes"], answer.kv_bytes.iter().sum::<u64>());
        let share = trace["flops"]["share"].as_f64().expect("a number");
        assert!(if routing == "dense" {
            share == 1.0
        } else {
            share < 1.0
        });
        // In a stream it comes with the end.
        let chunks = server.stream(&request);
        let (last, before) = chunks.split_last().expect("chunks");
        assert_eq!(last["reroute"]["stages"], trace["stages"]);
        assert!(last["choices"][0]["finish_reason"].is_string());
        assert!(before.iter().all(|chunk| chunk.get("reroute").is_none()));
    }
}

#[test]
fn metrics_are_lines_that_prometheus_reads() {
    let server = Running::start(Settings::default());
    let mut request = about("find the cross");
    for routing in ["dense", "reroute-pdrop@64"] {
        request["routing"] = routing.into();
        server.ask(&request);
        server.stream(&request);
    }
    server.refuse(&json!({}));
    let (_, text) = server.get("/metrics");
    assert!(text.ends_with("# EOF\n"));
    let mut values: HashMap<&str, f64> = HashMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        assert!(name.starts_with("reroute_"), "{line}");
        values.insert(name, value.parse().expect("a number"));
    }
    for (name, expected) in [
        ("reroute_requests_total{outcome=\"answered\"}", 4.0),
        ("reroute_requests_total{outcome=\"refused\"}", 1.0),
        ("reroute_queue_length{model=\"built-in\"}", 0.0),
        ("reroute_requests_under_way", 0.0),
        ("reroute_vision_seconds_count", 4.0),
        ("reroute_prefill_seconds_count", 4.0),
        ("reroute_decode_seconds_count", 4.0),
        ("reroute_flops_share_sum{routing=\"dense\"}", 2.0),
        (
            "reroute_visual_tokens_per_layer_count{routing=\"reroute-pdrop@64\"}",
            2.0,
        ),
    ] {
        assert_eq!(values.get(name), Some(&expected), "{name}\n{text}");
    }
    assert!(values["reroute_flops_share_sum{routing=\"reroute-pdrop@64\"}"] < 2.0);
    assert!(values["reroute_prompt_tokens_total"] > 0.0);
    assert!(values["reroute_generated_tokens_total"] > 0.0);
    assert!(
        values["reroute_kv_bytes{model=\"built-in\"}"] > 0.0,
        "prompts are kept"
    );
}

#[test]
fn the_page_comes_with_a_strict_policy() {
    let server = Running::start(Settings {
        example: Some(embedded::SCENE.image),
        ..Settings::default()
    });
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/style.css", "text/css"),
        ("/example.png", "image/png"),
    ] {
        let response = server
            .agent
            .get(server.url(path))
            .call()
            .expect("a response");
        let header = |name: &str| response.headers()[name].to_str().expect("text").to_owned();
        assert!(header("content-type").starts_with(kind));
        let policy = header("content-security-policy");
        assert!(policy.contains("default-src 'self'; img-src 'self' data: blob:;"));
        assert!(!policy.contains("unsafe"));
        assert_eq!(header("x-content-type-options"), "nosniff");
    }
    assert_eq!(server.get_json("/health")["status"], "ok");
    assert_eq!(
        Running::start(Settings::default()).get("/example.png").0,
        404
    );
}
