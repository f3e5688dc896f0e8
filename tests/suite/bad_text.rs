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
    let folder = Scratch::checkpoint();
    folder.set(
        "tokenizer.json",
        "/post_processor/special_tokens/~1s",
        json!({}),
    );
    folder.set(
        "tokenizer.json",
        "/added_tokens/3/content",
        json!("<picture>"),
    );
    refuses(&ask(&folder), &["tokenizer"]);
}

#[test]
fn chat_templates_that_are_broken_or_endless_or_without_a_slot() {
    let chain = |link: &str| format!("{{{{ 1{} }}}}", link.repeat(50_000));
    let remedy = "replace it by the one published with the model";
    let fuel = "ran out of fuel";
    let slots = |count: usize| format!("makes {count} image slots for 1 images");
    for (source, expected) in [
        ("{% for m in".to_string(), ["syntax error", remedy]),
        (format!("{}1{}", "{{ (", "(".repeat(10_000)), ["recursion limits", remedy]),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}".into(), [fuel, remedy]),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}".into(), [fuel, remedy]),
        ("{{ 'a' * 1000000000000 }}".into(), [fuel, remedy]),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}".into(), ["too long", remedy]),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(), ["recursion limit", remedy]),
        ("{% include '/etc/passwd' %}".into(), ["non-existing template", remedy]),
        ("{{ messages[7].content }}".into(), ["undefined value", remedy]),
        ("{{ raise_exception('only text') }}".into(), ["only text", remedy]),
        (chain("|nobody"), ["unknown filter", remedy]),
        (chain("+x"), ["chat_template.jinja fails", remedy]),
        (format!("{{{{ {}1 }}}}", "-".repeat(100_000)), [&slots(0), "image token of config.json is 407"]),
        (String::new(), [&slots(0), "chat_template.jinja"]),
        ("{{ messages[0].content[-1].text }}".into(), [&slots(0), "chat_template.jinja"]),
        ("<image><image>{{ messages[0].content[-1].text }}".into(), [&slots(2), "chat_template.jinja"]),
        ("<image>".into(), ["ends with a visual row", "must be text"]),
        ("a".repeat(MAX_CONFIG_BYTES + 1), ["1048576 are allowed", "chat_template.jinja"]),
    ] {
        let folder = Scratch::checkpoint();
        folder.write("chat_template.jinja", &source);
        refuses(&ask(&folder), &expected);
    }
}
