//! Chat templates render as `transformers` renders them (`tests/fixtures/templates/make.py`).

use std::time::{Duration, UNIX_EPOCH};

use reroute_zoo::ChatTemplate;
use reroute_zoo::messages::{Content, Message, Role};
use serde::Deserialize;

use crate::golden::fixture;
use crate::program::Scratch;

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    rendered: String,
}

/// What `make.py` renders.
fn conversation() -> Vec<Message> {
    let text = "Größe <b>\"1\\2\"</b> & 😀\n\u{1}?";
    vec![
        Message::text(Role::System, "Be brief."),
        Message {
            role: Role::User,
            content: vec![Content::Image, Content::Text(text.into())],
        },
    ]
}

fn template(folder: &Scratch, source: &str) -> ChatTemplate {
    folder.write("chat_template.jinja", source);
    ChatTemplate::open(&folder.folder(), qwen_vl::QWEN2_DIALECT).unwrap()
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let cases = std::fs::read(fixture("templates/cases.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&cases).unwrap();
    assert!(cases.len() > 25);
    let folder = Scratch::new();
    let tokens = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false},
        "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": null, "add_bos_token": true}"#;
    folder.write("tokenizer_config.json", tokens);
    // 2026-03-07 05:04:09
    let now = UNIX_EPOCH + Duration::from_secs(1_772_859_849);
    for Case {
        name,
        template: source,
        rendered,
    } in cases
    {
        let template = template(&folder, &source).with_now(now);
        let found = template.render_conversation(&conversation(), true);
        assert_eq!(found.unwrap(), rendered, "{name}");
    }
}

/// Without a fixed time it is today's.
#[test]
fn templates_see_the_clock() {
    let folder = Scratch::new();
    let template = template(&folder, "{{ strftime_now('%Y') }}");
    let year = template.render_conversation(&conversation(), true).unwrap();
    assert!(year.parse::<u32>().unwrap() >= 2026, "{year}");
}

#[test]
fn what_templates_ask_of_json_and_time_in_vain_is_said() {
    let folder = Scratch::new();
    let deep = "{% set ns = namespace(x=1) %}{% for i in range(200) %}{% set ns.x = [ns.x] %}\
                {% endfor %}{{ ns.x | tojson }}";
    let long = "{% set ns = namespace(x='\"') %}{% for i in range(40) %}{% set ns.x = ns.x | tojson %}\
                {% endfor %}";
    for (source, expected) in [
        ("{{ nothing | tojson }}", "not JSON serializable"),
        ("{{ 1 | tojson(width=2) }}", "width"),
        ("{{ 1 | tojson(separators=['a']) }}", "separators"),
        ("{{ 1 | tojson(indent=[]) }}", "chat_template.jinja"),
        ("{{ 1 | tojson(1, 2, 3, 4, 5) }}", "arguments"),
        ("{{ '{' | fromjson }}", "no JSON"),
        ("{{ strftime_now('%!') }}", "strftime_now"),
        ("{% break %}", "break"),
        (deep, "nested too deeply"),
        (long, "too long"),
    ] {
        folder.write("chat_template.jinja", source);
        let opened = ChatTemplate::open(&folder.folder(), qwen_vl::QWEN2_DIALECT);
        let rendered = opened.and_then(|it| it.render_conversation(&conversation(), true));
        let error = rendered.expect_err(source);
        let mut said = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            said += &format!(" {error}");
            cause = error.source();
        }
        assert!(said.contains(expected), "{source}: {said}");
    }
}
