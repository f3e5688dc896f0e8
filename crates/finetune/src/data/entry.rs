//! Which form an entry has, and what it must not have.

use std::path::Path;

use serde_json::{Map, Value};

use super::conversation;
use super::marks::Marks;
use super::objects::Objects;
use super::{Example, Place, Problem, images, llava, located, messages};

/// What an object has, by key.
pub(super) type Fields = Map<String, Value>;

/// Keys that change what is learned.
const REFUSED: &[&str] = &[
    "audio",
    "audios",
    "chosen",
    "functions",
    "rejected",
    "rejected_images",
    "rejected_messages",
    "rejected_response",
    "tools",
    "video",
    "videos",
];

/// The value of a key; null is as good as none.
pub(super) fn field<'v>(fields: &'v Fields, key: &str) -> Option<&'v Value> {
    fields.get(key).filter(|value| !value.is_null())
}

/// The text under a key.
pub(super) fn text<'v>(fields: &'v Fields, key: &str) -> Result<Option<&'v str>, Problem> {
    match field(fields, key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Problem::Shape {
            what: key.into(),
            wanted: "text",
        }),
    }
}

/// Fails if one of the keys has a value that asks for something.
pub(super) fn refuse(fields: &Fields, keys: &[&str]) -> Result<(), Problem> {
    let asks = |key: &&&str| fields.get(**key).is_some_and(|value| !is_off(value));
    match keys.iter().find(asks) {
        None => Ok(()),
        Some(&key) => Err(Problem::Refused { key: key.into() }),
    }
}

/// Whether a value asks for nothing.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(asked) => !asked,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Number(_) => false,
    }
}

/// The example that an entry is.
pub(super) fn example(source: &Place, value: &Value, below: &Path) -> Result<Example, Problem> {
    let fields = match value {
        Value::Object(fields) => fields,
        other => {
            let found = kind(other);
            return Err(Problem::NotObject { found });
        }
    };
    refuse(fields, REFUSED)?;
    // An answer that is not wanted, as KTO has them.
    if fields.get("label") == Some(&Value::Bool(false)) {
        let key = "label".to_owned();
        return Err(Problem::Refused { key });
    }
    let has = |key| field(fields, key).is_some();
    let turns = if has("messages") {
        messages::messages(fields, below)?
    } else if has("conversations") {
        llava::turns(fields, below)?
    } else if (has("box") || has("bbox")) && (has("expression") || has("question")) {
        let images = images::listed(fields, below)?;
        return Ok(Example {
            source: source.clone(),
            exchanges: vec![located::located(fields, images.len())?],
            system: text(fields, "system")?.map(str::to_owned),
            images,
        });
    } else if has("prompt") {
        messages::divided(fields, below)?
    } else if has("query") {
        messages::pairs(fields)?
    } else {
        return Err(unknown(fields));
    };
    let mut marks = Marks::new(images::listed(fields, below)?, Objects::read(fields)?);
    let (system, exchanges) = conversation::arrange(turns, &mut marks)?;
    Ok(Example {
        source: source.clone(),
        images: marks.images,
        system,
        exchanges,
    })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// No form that is known; perhaps the examples are inside.
fn unknown(fields: &Fields) -> Problem {
    let is_examples = |value: &Value| {
        let items = value.as_array().into_iter().flatten();
        { items }.next().is_some_and(Value::is_object)
    };
    let mut inside = fields.iter().filter(|(_, value)| is_examples(value));
    match (inside.next(), inside.next()) {
        (Some((key, _)), None) => Problem::Wrapped { key: key.clone() },
        _ => Problem::UnknownForm {
            keys: fields.keys().cloned().collect(),
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{Folder, words};
    use super::*;

    #[test]
    fn forms_are_told_apart_entry_by_entry() {
        let folder = Folder::new();
        let turns =
            json!([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]);
        let lines = [
            json!({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}),
            json!({"messages": turns, "conversations": null, "bbox": [1], "question": "unused"}),
            json!({"prompt": [turns[0]], "completion": [turns[1]], "label": true}),
            json!({"query": "?", "response": "!"}),
            json!({"image": "a.png", "expression": "cup", "box": [0, 0, 1, 1], "prompt": "unused"}),
        ];
        let text = lines.map(|line| line.to_string()).join("\n");
        let data = folder
            .read(text, super::super::OnBadLine::Stop)
            .expect("data");
        let exchanges: Vec<_> = data
            .examples
            .iter()
            .map(|example| &example.exchanges)
            .collect();
        assert_eq!(exchanges.len(), 5);
        assert!(
            exchanges[1..4]
                .iter()
                .all(|exchange| *exchange == exchanges[0])
        );
    }

    #[test]
    fn what_changes_the_meaning_is_refused_by_name() {
        let turns =
            json!([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]);
        for &key in REFUSED {
            for value in [
                json!("x"),
                json!(["x"]),
                json!({"x": 1}),
                json!(1),
                json!(true),
            ] {
                let entry = json!({"messages": turns, key: value});
                assert_eq!(
                    Folder::new().problem(&entry),
                    Problem::Refused { key: key.into() }
                );
            }
            for value in [json!(""), json!([]), json!({}), json!(null), json!(false)] {
                Folder::new().example(&json!({"messages": turns, key: value}));
            }
        }
        let entry = json!({"messages": turns, "label": false});
        assert!(words(&entry).contains("this has \"label\", which would change what is learned"));
    }

    #[test]
    fn what_is_no_example_is_refused() {
        let wrapped = words(&json!({"version": 1, "data": [{"messages": []}], "names": ["x"]}));
        assert!(wrapped.contains("a list under \"data\""), "{wrapped}");
        let unknown = words(&json!({"text": "?", "caption": "!"}));
        assert!(
            unknown.contains("its keys are \"caption\", \"text\""),
            "{unknown}"
        );
        assert!(words(&json!({})).contains("its keys are none"));
        let many: Fields = (0..40).map(|key| (key.to_string(), Value::Null)).collect();
        assert!(words(&many.into()).contains("and more"));
        for (entry, kind) in [
            (json!(null), "null"),
            (json!("a"), "text"),
            (json!(true), "true or false"),
        ] {
            assert!(words(&entry).starts_with(&format!("this is {kind}; an example is an object")));
        }
    }
}
