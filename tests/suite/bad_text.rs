//! Tokenizers and chat templates that are wrong are refused with a message that says which file and
//! what to do; no panic, no endless loop.

use serde_json::json;

use crate::bad_checkpoint::{MAX_CONFIG_BYTES, ask};
use crate::program::{Scratch, fixture, refuses};

#[test]
fn tokenizers_that_are_broken_or_belong_to_another_model() {
    let good = std::fs::read_to_string(fixture().join("tokenizer.json")).unwrap();
    let remedy = "take the tokenizer that belongs to this checkpoint";
    for (content, expected) in [
        (&good[..500], "tokenizer.json: it cannot be read"),
        ("{}", "tokenizer.json: it cannot be read"),
        (
            r#"{"model": {"type": "Abacus"}}"#,
            "tokenizer.json: it cannot be read",
        ),
    ] {
        let folder = Scratch::checkpoint();
        folder.write("tokenizer.json", content);
        refuses(&ask(&folder), &[expected, remedy]);
    }
    let panics = "panics on it";
    for (pointer, value, expected) in [
        (
            "/model/vocab/strange",
            json!(500),
            "ids up to 500, the model's vocabulary has 448",
        ),
        (
            "/model/vocab/strange",
            json!(u32::MAX),
            "ids up to 4294967295",
        ),
        ("/model/vocab/strange", json!(-1), "integer `-1`"),
        (
            "/model/merges/0",
            json!(["strange", "pair"]),
            "out of vocabulary",
        ),
        (
            "/model/continuing_subword_prefix",
            json!("longer than tokens"),
            panics,
        ),
        (
            "/post_processor/single/0/SpecialToken/id",
            json!("<nobody>"),
            panics,
        ),
        (
            "/normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            panics,
        ),
    ] {
        let folder = Scratch::checkpoint();
        folder.set("tokenizer.json", pointer, value);
        refuses(&ask(&folder), &["tokenizer.json: ", expected, remedy]);
    }
    let (place, text) = ("/added_tokens/3/content", json!("<picture>"));
    let folder = Scratch::checkpoint();
    folder.set("tokenizer.json", place, text);
    refuses(&ask(&folder), &["makes 0 image placeholders for 1 images"]);
}

/// Asserts that the fixture with this chat template is refused.
fn refuses_template(source: &str, expected: &str) {
    let folder = Scratch::checkpoint();
    folder.write("chat_template.jinja", source);
    refuses(&ask(&folder), &["chat_template.jinja", expected]);
}

#[test]
fn chat_templates_that_are_broken_or_without_a_slot() {
    for (source, expected) in [
        ("{% for m in", "syntax error"),
        ("{% include '/etc/passwd' %}", "non-existing template"),
        ("{{ messages[7].content }}", "undefined value"),
        ("{{ raise_exception('only text') }}", "only text"),
        ("", "the image token of config.json is 407"),
        (
            "{{ messages[0].content[-1].text }}",
            "makes 0 image placeholders for 1 images",
        ),
        (
            "<image><image>{{ messages[0].content[-1].text }}",
            "makes 2 image placeholders for 1 images",
        ),
    ] {
        refuses_template(source, expected);
    }
    let folder = Scratch::checkpoint();
    folder.write("chat_template.jinja", "<image>");
    refuses(&ask(&folder), &["ends with a visual row", "must be text"]);
}

#[test]
fn chat_templates_that_are_endless_or_huge() {
    let (fuel, long) = ("ran out of fuel", "a text is longer than 8388608 bytes");
    let range = |body: &str| format!("{{% for i in range(99999) %}}{body}{{% endfor %}}");
    let double = "{% set n.x = n.x ~ n.x %}";
    for (source, expected) in [
        (range(&range("")), fuel),
        (
            "{% set n = namespace(x='ab') %}".to_string() + &range(double),
            fuel,
        ),
        ("{{ 'a' * 1000000000000 }}".into(), fuel),
        (
            "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}".into(),
            fuel,
        ),
        ("{{ 'x'.join(['y' * 1000] * 1000000) }}".into(), fuel),
        ("{{ (['y' * 100000] * 100000)|join }}".into(), long),
        ("{{ ([['y' * 10000] * 10000] * 1000)|string }}".into(), long),
        (
            "{{ ([{'a': 'y' * 100000}] * 100000)|map(attribute='a')|join }}".into(),
            long,
        ),
        (
            "{{ (['y' * 100000] * 100000)|sum(start='') }}".into(),
            "sum adds no strings",
        ),
        (range("{{ 'a' * 9999 }}"), "the rendered prompt is too long"),
        (
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
            "recursion limit exceeded",
        ),
        ("a".repeat(70_000), "has 70000 bytes, 65536 are allowed"),
        ("a".repeat(MAX_CONFIG_BYTES + 1), "1048576 are allowed"),
    ] {
        refuses_template(&source, expected);
    }
}

/// The template compiler recurses into such chains without a limit.
#[test]
fn chat_templates_that_would_overflow_the_stack() {
    for (first, link, count, expected) in [
        ("(", "(", 60_000, "recursion limits"),
        ("-", "-", 60_000, "syntax error"),
        ("1", "|nobody", 9_000, "unknown filter"),
        ("1", "|string", 9_000, "makes 0 image placeholders"),
        ("1", "+nothing", 7_000, "unsupported types"),
        ("messages", ".a", 30_000, "undefined value"),
    ] {
        let source = format!("{{{{ {first}{} }}}}", link.repeat(count));
        refuses_template(&source, expected);
    }
}
