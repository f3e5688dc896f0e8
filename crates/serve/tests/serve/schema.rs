//! Requests of all kinds, good and bad: none harms the server or whoever asks besides.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use reroute_serve::{Limits, check};

use super::*;

/// Fields that mean something, here or in OpenAI's API, and one that means nothing.
const FIELDS: [&str; 24] = [
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "n",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "routing",
    "trace",
    "grounding",
    "tools",
    "response_format",
    "nonsense",
];

/// Any JSON that is not large, with what requests have in it more often than chance would.
fn any_json() -> impl Strategy<Value = Value> {
    let known = [
        json!(null),
        json!("built-in"),
        json!("reroute-pdrop@64"),
        json!({"stages": [{"layer": 2, "keep_ratio": 0.5}]}),
        json!({"include_usage": true}),
        json!({"role": "assistant", "content": "x"}),
        json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]),
        json!({"5": 1.5}),
    ];
    let leaf = prop_oneof![
        prop::sample::select(known.to_vec()),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..9).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0.0..2.0).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        let name = prop_oneof![
            prop::sample::select(FIELDS.to_vec()).prop_map(str::to_owned),
            ".{0,6}"
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((name, inner), 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// A good request of which some fields are anything, and perhaps something within it.
fn requests() -> impl Strategy<Value = Value> {
    let fields = prop::collection::vec((prop::sample::select(FIELDS.to_vec()), any_json()), 0..4);
    let within = prop::option::of((0usize..4, any_json()));
    (any::<bool>(), fields, within).prop_map(|(with_picture, fields, within)| {
        let mut request = match with_picture {
            true => about("find the cross"),
            false => json!({"messages": [{"role": "user", "content": "x"}]}),
        };
        request["max_tokens"] = 2.into();
        let paths = [
            "/messages/0",
            "/messages/0/role",
            "/messages/0/content",
            "/messages/0/content/0",
        ];
        if let Some((at, value)) = within
            && let Some(place) = request.pointer_mut(paths[at])
        {
            *place = value;
        }
        for (field, value) in fields {
            request[field] = value;
        }
        request
    })
}

#[test]
fn no_request_does_harm() {
    // So that what is good is short.
    let limits = Limits {
        tokens: 3,
        ..Limits::default()
    };
    let server = Running::start(Settings {
        limits: limits.clone(),
        ..Settings::default()
    });
    let canary = json!({"messages": about("find the cross")["messages"], "max_tokens": 3});
    let expected = server.ask(&canary)["choices"].clone();
    let taken = Cell::new(0);
    let config = Config {
        failure_persistence: None,
        ..Config::with_cases(300)
    };
    let same = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, same);
    let tried = runner.run(&requests(), |request| {
        let (status, text) = server.send(request.to_string().as_bytes());
        match status {
            200 => taken.set(taken.get() + 1),
            _ => {
                prop_assert!((400..500).contains(&status), "{status}: {text}");
                let (_, error) = refused(status, &text);
                let message = error["message"].as_str().unwrap_or_default();
                prop_assert!(!message.is_empty(), "{error}");
            }
        }
        // What no model is needed for is said without one, too; where a model is asked, that speaks first.
        let checked = check(request.to_string().as_bytes(), &limits);
        let of_model = !request["model"].is_null() || !request["routing"].is_null();
        match checked {
            Err(said) if !of_model => prop_assert_eq!(said, (status, text)),
            Err(_) => prop_assert_ne!(status, 200),
            Ok(()) => {}
        }
        Ok(())
    });
    tried.unwrap_or_else(|error| panic!("{error}"));
    assert!(taken.get() > 10, "{taken:?} of 300 were good");
    // Nobody else has a trace of them.
    assert_eq!(server.ask(&canary)["choices"], expected);
    server.wait_for("reroute_requests_under_way", |count| count == 0.0);
    let (_, metrics) = server.get("/metrics");
    assert!(metrics.contains("\nreroute_inbox_bytes 0\n"), "{metrics}");
}
