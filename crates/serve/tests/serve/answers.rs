//! Answers are those of the library, streamed or not.

use reroute_zoo::messages::Role;
use reroute_zoo::session::{Event, Request, Session, SessionOptions, Turn};
use reroute_zoo::{Answer, GenerationOptions, Plan, Question};
use serde_json::{Value, json};

use super::*;

const ROUTINGS: [&str; 5] = [
    "dense",
    "pdrop@64",
    "reroute-pdrop@64",
    "reroute-pdrop@192",
    "visionzip@64",
];

fn plan(routing: &str) -> Plan {
    VLM.plan(routing).expect("a preset")
}

/// The answers to turns by a session.
fn expected(turns: Vec<Turn>, options: GenerationOptions, n: usize, stop: &[&str]) -> Vec<Answer> {
    let mut session = Session::new(&VLM, SessionOptions::default()).expect("a session");
    let mut request = Request::new(turns, plan("dense"), options);
    request.answers = n;
    request.stop = stop.iter().map(ToString::to_string).collect();
    session.admit(request).expect("a good request");
    let mut answers = vec![None; n];
    while !session.is_idle() {
        for event in session.step() {
            if let Event::Finished { index, answer, .. } = event {
                answers[index] = Some(*answer);
            }
        }
    }
    answers
        .into_iter()
        .map(|answer| answer.expect("it ends"))
        .collect()
}

/// The texts of the chunks of an answer, put together.
fn streamed(chunks: &[Value], index: usize) -> String {
    let choices = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"].as_array().expect("a list"));
    let of = choices.filter(|choice| choice["index"] == index);
    of.filter_map(|choice| choice["delta"]["content"].as_str())
        .collect()
}

#[test]
fn answers_are_those_of_the_library_streamed_or_not() {
    let server = Running::start(Settings::default());
    let text = VLM.grounding().question(embedded::SCENE.expression);
    for routing in ROUTINGS {
        let question = Question::about(vec![scene()], text.clone());
        let defaults = VLM.generation_defaults();
        let answer = VLM
            .ask(&question, plan(routing), &defaults, |_| {})
            .expect("an answer");
        let mut request = about(&text);
        request["routing"] = routing.into();
        request["stream_options"] = Value::Null;
        let whole = server.ask(&request);
        assert_eq!(text_of(&whole), answer.text, "{routing}");
        assert_eq!(whole["object"], "chat.completion");
        assert_eq!(whole["model"], "built-in");
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        assert_eq!(whole["usage"]["prompt_tokens"], answer.prompt_rows);
        assert_eq!(whole["usage"]["completion_tokens"], answer.tokens.len());
        assert!(whole.get("reroute").is_none());
        request["stream_options"] = json!({"include_usage": true});
        let chunks = server.stream(&request);
        assert_eq!(streamed(&chunks, 0), answer.text, "{routing}");
        assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
        let usage = chunks.last().expect("chunks");
        assert_eq!(usage["usage"], whole["usage"]);
        assert_eq!(usage["choices"], json!([]));
        let last = &chunks[chunks.len() - 2];
        assert_eq!(last["choices"][0]["finish_reason"], "stop");
        assert!(last["usage"].is_null());
        request["stream_options"] = Value::Null;
        assert!(
            server
                .stream(&request)
                .iter()
                .all(|chunk| chunk.get("usage").is_none())
        );
    }
}

#[test]
fn grounding_asks_in_the_words_of_the_model() {
    let server = Running::start(Settings::default());
    let found = VLM.ground(
        &scene(),
        "the large cyan square",
        plan("dense"),
        &VLM.generation_defaults(),
    );
    let found = found.expect("a box");
    let mut request = about("the large cyan square");
    (request["grounding"], request["trace"]) = (true.into(), true.into());
    let response = server.ask(&request);
    assert_eq!(text_of(&response), found.answer.text);
    let corners = found
        .first_box()
        .and_then(|found| found.pixels.as_box())
        .expect("a box");
    assert_eq!(response["reroute"]["boxes"][0]["box"], json!(corners));
}

#[test]
fn conversations_have_system_prompts_and_several_pictures_with_text_between() {
    let server = Running::start(Settings::default());
    let mirrored = RgbImage::new(
        scene().width(),
        scene().height(),
        scene().data().chunks(3).rev().flatten().copied().collect(),
    );
    let mirrored = mirrored.expect("a picture");
    let png = png(mirrored.data(), mirrored.width(), mirrored.height());
    let turns = vec![
        Turn::text(Role::System, "short"),
        Turn::user([
            "one ".into(),
            scene().into(),
            " two ".into(),
            mirrored.into(),
            "?".into(),
        ]),
        Turn::text(Role::Assistant, "both"),
        Turn::text(Role::User, "find the cross"),
    ];
    let options = GenerationOptions {
        max_new_tokens: 12,
        ..VLM.generation_defaults()
    };
    let answer = expected(turns, options, 1, &[]).remove(0);
    let request = json!({
        "messages": [
            {"role": "developer", "content": "short"},
            {"role": "user", "content": [
                {"type": "text", "text": "one "},
                image_part(&data_url(embedded::SCENE.image)),
                {"type": "text", "text": " two "},
                {"type": "image_url", "image_url": data_url(&png)},
                {"type": "text", "text": "?"},
            ]},
            {"role": "assistant", "content": "both", "refusal": null, "tool_calls": []},
            {"role": "user", "content": "find the cross"},
        ],
        "max_tokens": 12,
    });
    let response = server.ask(&request);
    assert_eq!(text_of(&response), answer.text);
    assert_eq!(response["usage"]["prompt_tokens"], answer.prompt_rows);
}

#[test]
fn several_answers_draw_what_the_seed_says() {
    let server = Running::start(Settings::default());
    let mut options = GenerationOptions {
        max_new_tokens: 9,
        ..VLM.generation_defaults()
    };
    (options.sampling.temperature, options.sampling.seed) = (1.5, 7);
    (options.sampling.top_k, options.sampling.top_p) = (20, 0.9);
    options.sampling.repetition_penalty = 1.1;
    options.sampling.presence_penalty = 0.5;
    options.sampling.frequency_penalty = -0.25;
    options.sampling.logit_bias = vec![(40, 3.5), (41, -100.0)];
    let answers = expected(vec![Turn::text(Role::User, "x")], options, 3, &[]);
    let request = json!({
        "messages": [{"role": "user", "content": "x"}],
        "max_completion_tokens": 9, "temperature": 1.5, "seed": 7, "top_k": 20, "top_p": 0.9,
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.25,
        "logit_bias": {"41": -100, "40": 3.5}, "n": 3,
    });
    let response = server.ask(&request);
    let chunks = server.stream(&request);
    let mut tokens = 0;
    for (index, answer) in answers.iter().enumerate() {
        let choice = &response["choices"][index];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["message"]["content"], answer.text);
        assert_eq!(streamed(&chunks, index), answer.text);
        tokens += answer.tokens.len();
    }
    assert_eq!(response["usage"]["completion_tokens"], tokens);
    // Without a seed no two are the same, as far as chance goes.
    let mut free = request.clone();
    free["seed"] = Value::Null;
    let texts: std::collections::HashSet<String> = (0..8)
        .map(|_| text_of(&server.ask(&free)).to_owned())
        .collect();
    assert!(texts.len() > 1, "{texts:?}");
}

#[test]
fn stop_strings_end_answers() {
    let server = Running::start(Settings::default());
    let text = VLM.grounding().question(embedded::SCENE.expression);
    let whole = server.ask(&about(&text));
    let whole = text_of(&whole);
    let (before, _) = whole.split_once(", ").expect("a box");
    for stop in [json!(", "), json!(["never", ", "])] {
        let mut request = about(&text);
        request["stop"] = stop;
        let response = server.ask(&request);
        assert_eq!(text_of(&response), before);
        assert_eq!(response["choices"][0]["finish_reason"], "stop");
        assert_eq!(streamed(&server.stream(&request), 0), before);
    }
    let mut request = about(&text);
    request["max_tokens"] = 2.into();
    assert_eq!(
        server.ask(&request)["choices"][0]["finish_reason"],
        "length"
    );
}

#[test]
fn probabilities_are_told_whole_and_in_chunks() {
    // Behind a prompt that is kept, the last digits may be others.
    let server = Running::start(Settings {
        cache_bytes: 0,
        ..Settings::default()
    });
    let mut request = about("find the cross");
    (request["logprobs"], request["top_logprobs"]) = (true.into(), 3.into());
    let response = server.ask(&request);
    let content = response["choices"][0]["logprobs"]["content"]
        .as_array()
        .expect("a list");
    // All but the one that ends the answer.
    assert_eq!(
        content.len() as u64,
        response["usage"]["completion_tokens"]
            .as_u64()
            .expect("a number")
            - 1
    );
    let mut text = String::new();
    for entry in content {
        assert_eq!(entry["top_logprobs"].as_array().expect("a list").len(), 3);
        // Greedy: the likeliest is what was chosen.
        assert_eq!(entry["top_logprobs"][0]["token"], entry["token"]);
        assert!(entry["logprob"].as_f64().expect("a number") <= 0.0);
        text += entry["token"].as_str().expect("a text");
        assert_eq!(
            entry["bytes"],
            json!(entry["token"].as_str().map(str::as_bytes))
        );
    }
    // Spaces are part of tokens.
    let answer = text_of(&response);
    assert!(answer.contains(' '));
    assert_eq!(text.trim(), answer);
    let chunks = server.stream(&request);
    let told = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
    let told: Vec<Value> = told.flatten().cloned().collect();
    assert_eq!(&told, content);
    request["logprobs"] = false.into();
    request["top_logprobs"] = Value::Null;
    assert!(server.ask(&request)["choices"][0]["logprobs"].is_null());
}
