//! What is refused, by name, in OpenAI's shape; everybody else is answered meanwhile.

use serde_json::json;

use super::*;

/// A good request with a field more.
fn with(field: &str, value: Value) -> Value {
    let mut request = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2});
    request[field] = value;
    request
}

/// A request of one message.
fn message(message: Value) -> Value {
    json!({"messages": [message], "max_tokens": 2})
}

fn part(part: Value) -> Value {
    message(json!({"role": "user", "content": [part]}))
}

#[test]
fn what_others_support_is_refused_by_name_and_neutral_values_are_not() {
    let server = Running::start(Settings::default());
    for (field, value) in [
        ("tools", json!([{"type": "function"}])),
        ("tool_choice", json!("required")),
        ("functions", json!([{"name": "f"}])),
        ("function_call", json!({"name": "f"})),
        ("parallel_tool_calls", json!(1)),
        ("response_format", json!({"type": "json_object"})),
        (
            "response_format",
            json!({"type": "json_schema", "json_schema": {}}),
        ),
        ("audio", json!({"voice": "x"})),
        ("modalities", json!(["text", "audio"])),
        ("prediction", json!({"type": "content"})),
        ("logit_bias", json!({"50256": -100})),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"5": 101})),
        ("logit_bias", json!([5])),
        ("logit_bias", json!({"5": 60, "05": 60})),
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!("much")),
        ("reasoning_effort", json!("high")),
        ("verbosity", json!("low")),
        ("web_search_options", json!({})),
        ("store", json!(true)),
        ("service_tier", json!("flex")),
        ("stream_options", json!({"include_usage": true})),
        ("min_p", json!(0.1)),
        ("best_of", json!(2)),
        ("n", json!(0)),
        ("n", json!(9)),
        ("n", json!("1")),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(4097)),
        ("max_tokens", json!(1.5)),
        ("max_completion_tokens", json!(-1)),
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_p", json!(-0.1)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-1)),
        ("repetition_penalty", json!(0)),
        ("seed", json!(1.5)),
        ("stop", json!(7)),
        ("stop", json!([""])),
        ("stop", json!(vec!["x"; 17])),
        ("logprobs", json!(1)),
        ("top_logprobs", json!(2)),
        ("top_logprobs", json!(21)),
        ("stream", json!("yes")),
        ("routing", json!("reroute-pdorp@64")),
        ("routing", json!(7)),
        (
            "routing",
            json!({"stages": [{"layer": 99, "keep_ratio": 0.5}]}),
        ),
        ("routing", json!({"stages": 1})),
        ("trace", json!("yes")),
        ("grounding", json!(1)),
        ("messages", json!([])),
        ("messages", json!("x")),
        ("model", json!(7)),
    ] {
        let (status, error) = server.refuse(&with(field, value.clone()));
        assert_eq!(status, 400, "{field} {value}: {error}");
        let named = error["param"].as_str().expect("a param");
        let same = ["max_tokens", "max_completion_tokens"];
        assert!(
            named == field || same.contains(&named) && same.contains(&field),
            "{field} {value}: {error}"
        );
    }
    let mut neutral = with("tools", json!([]));
    for (field, value) in [
        ("tool_choice", json!("none")),
        ("functions", json!(null)),
        ("response_format", json!({"type": "text"})),
        ("modalities", json!(["text"])),
        ("logit_bias", json!({})),
        ("presence_penalty", json!(0)),
        ("frequency_penalty", json!(0.0)),
        ("n", json!(1)),
        ("user", json!("somebody")),
        ("metadata", json!({"a": "b"})),
        ("store", json!(false)),
        ("parallel_tool_calls", json!(true)),
        ("service_tier", json!("auto")),
        ("stop", json!(null)),
        ("seed", json!(-3)),
        ("max_completion_tokens", json!(2)),
        ("stream", json!(false)),
        ("anything", json!(null)),
    ] {
        neutral[field] = value;
    }
    server.ask(&neutral);
    let mut both = with("max_tokens", json!(2));
    both["max_completion_tokens"] = 3.into();
    assert_eq!(server.refuse(&both).1["param"], "max_tokens");
}

#[test]
fn messages_that_are_none_are_refused_where_they_are() {
    let server = Running::start(Settings::default());
    let scene = data_url(embedded::SCENE.image);
    for (request, place) in [
        (message(json!("x")), "messages[0]"),
        (message(json!({"role": "user"})), "messages[0].content"),
        (
            message(json!({"role": "user", "content": 7})),
            "messages[0].content",
        ),
        (message(json!({"content": "x"})), "messages[0].role"),
        (
            message(json!({"role": "tool", "content": "x"})),
            "messages[0].role",
        ),
        (
            message(json!({"role": "wizard", "content": "x"})),
            "messages[0].role",
        ),
        (
            message(json!({"role": "assistant", "content": "x"})),
            "messages",
        ),
        (
            message(json!({"role": "system", "content": "x"})),
            "messages",
        ),
        (
            message(json!({"role": "user", "content": "x", "name": "y"})),
            "messages[0].name",
        ),
        (
            message(json!({"role": "user", "content": "x", "tool_calls": [{}]})),
            "messages[0].tool_calls",
        ),
        (
            message(json!({"role": "user", "content": "x", "mood": "y"})),
            "messages[0].mood",
        ),
        (
            message(json!({"role": "system", "content": [image_part(&scene)]})),
            "messages[0].content[0].type",
        ),
        (part(json!(7)), "messages[0].content[0]"),
        (part(json!({"type": "text"})), "messages[0].content[0].text"),
        (
            part(json!({"type": "input_audio"})),
            "messages[0].content[0].type",
        ),
        (part(json!({"type": "file"})), "messages[0].content[0].type"),
        (
            part(json!({"type": "smell"})),
            "messages[0].content[0].type",
        ),
        (
            part(json!({"type": "image_url"})),
            "messages[0].content[0].image_url",
        ),
        (
            part(json!({"type": "image_url", "image_url": {}})),
            "messages[0].content[0].image_url.url",
        ),
        (
            part(json!({"type": "image_url", "image_url": {"url": scene, "detail": "low"}})),
            "messages[0].content[0].image_url.detail",
        ),
        (
            part(json!({"type": "image_url", "image_url": {"url": scene, "size": 1}})),
            "messages[0].content[0].image_url.size",
        ),
        (
            part(json!({"type": "text", "text": "x", "cache": 1})),
            "messages[0].content[0].cache",
        ),
        (
            part(json!({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}})),
            "messages[0].content[0].video_url.url",
        ),
        (
            part(json!({"type": "video_url", "video_url": {"url": "https://example.com/x.mp4"}})),
            "messages[0].content[0].video_url.url",
        ),
        (
            part(image_part("https://example.com/x.png")),
            "messages[0].content[0].image_url.url",
        ),
        (
            part(image_part("file:///etc/passwd")),
            "messages[0].content[0].image_url.url",
        ),
        (
            part(image_part("ftp://example.com/x.png")),
            "messages[0].content[0].image_url.url",
        ),
        (
            part(image_part("x.png")),
            "messages[0].content[0].image_url.url",
        ),
        (
            part(image_part("data:image/png;base64")),
            "messages[0].content[0].image_url.url",
        ),
        (
            part(image_part("data:image/png;base64,!!")),
            "messages[0].content[0].image_url.url",
        ),
        (
            part(image_part("data:image/png;base64,AAAA")),
            "messages[0].content[0].image_url.url",
        ),
    ] {
        let (status, error) = server.refuse(&request);
        assert_eq!(status, 400, "{request}: {error}");
        assert_eq!(error["param"], place, "{error}");
    }
    let mut nothing_to_find = part(image_part(&scene));
    nothing_to_find["grounding"] = true.into();
    assert_eq!(server.refuse(&nothing_to_find).1["param"], "grounding");
    // Everybody else was answered meanwhile, and the server still answers.
    server.ask(&with("max_tokens", json!(1)));
}

#[test]
fn bodies_that_are_no_requests() {
    let server = Running::start(Settings::default());
    let deep = "[".repeat(200_000);
    for body in [
        "",
        "{",
        "[]",
        "7",
        "\u{0}",
        "{\"messages\": [}",
        &deep,
        "{\"a\": 1} x",
    ] {
        let (status, text) = server.send(body.as_bytes());
        let (status, error) = refused(status, &text);
        assert_eq!(status, 400, "{error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    assert_eq!(server.send(b"\xff\xfe{}").0, 400);
    // Good but for what nobody looks at, which would take a hundred times its size.
    let of = |values: usize| {
        let mut request = with("metadata", json!(vec![0; values]));
        request["user"] = "[,:{\\\"".repeat(1 << 16).into();
        request
    };
    let error = server.refuse(&of(1 << 17)).1;
    let message = error["message"].as_str().expect("a text");
    assert!(message.contains("131072 values"), "{error}");
    server.ask(&of(1 << 16));
    let request = server.agent.post(server.url("/v1/chat/completions"));
    let mut response = request
        .content_type("text/plain")
        .send("{}")
        .expect("a response");
    assert_eq!(response.status(), 415);
    refused(415, &response.body_mut().read_to_string().expect("text"));
    let request = server.agent.post(server.url("/v1/chat/completions"));
    let mut response = request
        .header("content-encoding", "gzip")
        .content_type("application/json")
        .send("{}")
        .expect("a response");
    assert_eq!(response.status(), 415);
    refused(415, &response.body_mut().read_to_string().expect("text"));
    // Half a body, and no more.
    let mut connection = std::net::TcpStream::connect(server.address).expect("a connection");
    let half = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{";
    std::io::Write::write_all(&mut connection, half.as_bytes()).expect("it is sent");
    drop(connection);
    server.wait_for("reroute_requests_under_way", |count| count == 0.0);
}

#[test]
fn other_places_methods_and_models() {
    let server = Running::start(Settings::default());
    for (path, expected) in [
        ("/v2", 404),
        ("/v1/models/nobody", 404),
        ("/v1/models/%ff", 404),
        ("/v1/chat/completions", 405),
    ] {
        let (status, text) = server.get(path);
        assert_eq!(status, expected, "{path}");
        refused(status, &text);
    }
    let (status, error) = server.refuse(&with("model", json!("gpt-4o")));
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    assert!(
        error["message"]
            .as_str()
            .expect("a text")
            .contains("built-in")
    );
    server.ask(&with("model", json!("built-in")));
}

#[test]
fn a_prompt_beyond_the_context_is_refused_before_it_streams() {
    let server = Running::start(Settings::default());
    let mut request = message(json!({"role": "user", "content": "x ".repeat(9000)}));
    for stream in [false, true] {
        request["stream"] = stream.into();
        let (status, error) = server.refuse(&request);
        assert_eq!(
            (status, &error["code"]),
            (400, &json!("context_length_exceeded")),
            "{error}"
        );
    }
}
