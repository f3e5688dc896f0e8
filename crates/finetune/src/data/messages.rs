//! Conversations as ms-swift, TRL and mlx-vlm have them: who speaks, and what.

use std::path::Path;

use serde_json::Value;

use super::conversation::{Part, Role, Turn, beginning};
use super::entry::{Fields, field, refuse, text};
use super::{Problem, images};

/// The turns of `messages`.
pub(super) fn messages(fields: &Fields, below: &Path) -> Result<Vec<Turn>, Problem> {
    let mut turns = beginning(fields)?;
    add(&mut turns, fields, "messages", below)?;
    Ok(turns)
}

/// The turns of `prompt`, and behind them those of `completion`.
pub(super) fn divided(fields: &Fields, below: &Path) -> Result<Vec<Turn>, Problem> {
    let mut turns = beginning(fields)?;
    add(&mut turns, fields, "prompt", below)?;
    add(&mut turns, fields, "completion", below)?;
    Ok(turns)
}

/// The turns of `history`, and behind them `query` and `response`.
pub(super) fn pairs(fields: &Fields) -> Result<Vec<Turn>, Problem> {
    let mut turns = beginning(fields)?;
    let mut say = |role, said: &str| {
        let parts = vec![Part::Text(said.into())];
        turns.push(Turn::new(role, parts));
    };
    let misshapen = || Problem::Shape {
        what: "history".into(),
        wanted: "a list of pairs, each a question and its answer",
    };
    let history = match field(fields, "history") {
        None => &[],
        Some(Value::Array(pairs)) => pairs.as_slice(),
        Some(_) => return Err(misshapen()),
    };
    for pair in history {
        let Some([Value::String(question), Value::String(answer)]) =
            pair.as_array().map(Vec::as_slice)
        else {
            return Err(misshapen());
        };
        say(Role::User, question);
        say(Role::Assistant, answer);
    }
    say(Role::User, text(fields, "query")?.unwrap_or_default());
    if let Some(response) = text(fields, "response")? {
        say(Role::Assistant, response);
    }
    Ok(turns)
}

/// Adds the messages under a key, of which there are none where the key is not there.
fn add(turns: &mut Vec<Turn>, fields: &Fields, key: &str, below: &Path) -> Result<(), Problem> {
    let items = match field(fields, key) {
        None => return Ok(()),
        Some(Value::Array(items)) => items,
        Some(_) => {
            return Err(Problem::Shape {
                what: key.into(),
                wanted: "a list of messages, each with role and content",
            });
        }
    };
    for item in items {
        turns.push(message(item, turns.len() + 1, below)?);
    }
    Ok(())
}

/// A message; `number` is said of it where it is wrong.
pub(super) fn message(item: &Value, number: usize, below: &Path) -> Result<Turn, Problem> {
    let Value::Object(fields) = item else {
        return Err(Problem::Shape {
            what: format!("turn {number}"),
            wanted: "an object with role and content",
        });
    };
    let Some(role) = text(fields, "role")? else {
        return Err(Problem::Shape {
            what: format!("role of turn {number}"),
            wanted: "system, user or assistant",
        });
    };
    let role = Role::named(role, number)?;
    check(fields)?;
    let parts = match field(fields, "content") {
        Some(Value::String(said)) => vec![Part::Text(said.clone())],
        Some(Value::Array(parts)) => {
            let parts = parts.iter().map(|item| part(item, number, below));
            parts.collect::<Result<_, _>>()?
        }
        _ => {
            return Err(Problem::Shape {
                what: format!("content of turn {number}"),
                wanted: "text, or a list of parts",
            });
        }
    };
    Ok(Turn::new(role, parts))
}

/// Refuses what makes more or less of a turn than something that is said.
pub(super) fn check(fields: &Fields) -> Result<(), Problem> {
    refuse(fields, &["tool_calls", "function_call"])?;
    // ms-swift and OpenAI: how much an answer is learned.
    for key in ["loss", "weight"] {
        let is_whole = match field(fields, key) {
            None => true,
            Some(Value::Bool(learned)) => *learned,
            Some(share) => share.as_f64() == Some(1.0),
        };
        if !is_whole {
            let key = key.to_owned();
            return Err(Problem::Refused { key });
        }
    }
    Ok(())
}

fn part(item: &Value, number: usize, below: &Path) -> Result<Part, Problem> {
    let misshapen = || Problem::Shape {
        what: format!("a part of turn {number}"),
        wanted: "an object of type text, image or image_url, with what belongs to it",
    };
    let Value::Object(fields) = item else {
        return Err(misshapen());
    };
    match text(fields, "type")? {
        Some("text") => match text(fields, "text")? {
            Some(said) => Ok(Part::Text(said.into())),
            None => Err(misshapen()),
        },
        Some("image" | "image_url") => match images::brought(fields, below)? {
            Some(image) => Ok(Part::Image(image)),
            None => Ok(Part::Listed(field(fields, "index").cloned())),
        },
        _ => Err(misshapen()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{Folder, said, words};
    use super::super::{Example, ImageSource, Piece};
    use super::*;

    fn questions(example: &Example) -> Vec<&[Piece]> {
        let exchanges = example.exchanges.iter();
        exchanges.map(|exchange| &exchange.question[..]).collect()
    }

    #[test]
    fn texts_with_marks_are_read() {
        let folder = Folder::new();
        let example = folder.example(&json!({
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Is <image> like <image>?", "name": null},
                {"role": "assistant", "content": "Ja – 是的 🦀", "loss": true, "tool_calls": []},
            ],
            "images": ["a.png", {"path": "b.png"}],
            "videos": [], "tools": null, "rejected_response": "",
        }));
        assert_eq!(example.system.as_deref(), Some("Be brief."));
        assert_eq!(example.images, [folder.file("a.png"), folder.file("b.png")]);
        let question = [
            said("Is "),
            Piece::Image(0),
            said(" like "),
            Piece::Image(1),
            said("?"),
        ];
        assert_eq!(questions(&example), [&question[..]]);
        assert_eq!(example.exchanges[0].answer, [said("Ja – 是的 🦀")]);
    }

    #[test]
    fn parts_bring_images_or_take_the_next() {
        let folder = Folder::new();
        let example = folder.example(&json!({
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": [
                    {"type": "image", "text": null, "index": 0},
                    {"type": "text", "text": "This, ", "index": null},
                    {"type": "text", "text": "and this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}},
                ]},
                {"role": "assistant", "content": [{"type": "text", "text": "Alike."}]},
                {"role": "user", "content": [{"type": "image"}, {"type": "image", "path": "b.png"}]},
                {"role": "assistant", "content": "Not."},
            ],
            "images": ["a.png", {"bytes": "AAAA", "path": null}],
        }));
        let bytes = |bytes: &[u8]| ImageSource::Bytes(bytes.to_vec());
        let [first, second] = [bytes(&[0; 3]), bytes(b"\x89PN")];
        let images = [folder.file("a.png"), first, second, folder.file("b.png")];
        assert_eq!(example.images, images);
        let [first, second] = questions(&example)[..] else {
            panic!("{example:?}");
        };
        assert_eq!(
            first,
            [Piece::Image(0), said("This, and this?"), Piece::Image(2)]
        );
        assert_eq!(second, [Piece::Image(1), Piece::Image(3)]);
    }

    #[test]
    fn prompt_and_completion_are_one_conversation() {
        let folder = Folder::new();
        let mut entry = json!({
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
            "completion": [{"role": "assistant", "content": "A cup."}],
            "image": "a.png",
        });
        let example = folder.example(&entry);
        assert_eq!(questions(&example), [[Piece::Image(0), said("What?")]]);
        entry["completion"] = json!("A cup.");
        assert!(words(&entry).contains("completion should be a list of messages"));
        entry["completion"] = json!(null);
        assert!(words(&entry).contains("has no answer"));
    }

    #[test]
    fn queries_and_responses_are_read_with_their_history() {
        let folder = Folder::new();
        let mut entry = json!({
            "system": "Be brief.",
            "history": [["<image>What?", "A cup."], ["Which colour?", "Red."]],
            "query": "Sure?",
            "response": "Yes.",
            "images": ["a.png"],
        });
        let example = folder.example(&entry);
        assert_eq!(example.exchanges.len(), 3);
        assert_eq!(
            example.exchanges[0].question,
            [Piece::Image(0), said("What?")]
        );
        assert_eq!(example.exchanges[2].answer, [said("Yes.")]);
        entry["response"] = json!(null);
        assert!(words(&entry).contains("ends with a question"));
        for wrong in [
            json!("text"),
            json!([["alone"]]),
            json!([[1, 2]]),
            json!([{"a": "b"}]),
        ] {
            entry["history"] = wrong;
            assert!(words(&entry).contains("history should be a list of pairs"));
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let with = |message: Value| words(&json!({ "messages": [message] }));
        assert!(with(json!("Hi")).contains("turn 1 should be an object with role and content"));
        assert!(with(json!({"content": "Hi"})).contains("role of turn 1"));
        assert!(
            with(json!({"role": "tool", "content": "{}"})).contains("\"tool\", who takes no part")
        );
        for content in [json!(null), json!(7), json!({"type": "text"})] {
            let words = with(json!({"role": "user", "content": content}));
            assert!(
                words.contains("content of turn 1 should be text, or a list"),
                "{words}"
            );
        }
        for part in [
            json!("a"),
            json!({"type": "video"}),
            json!({"text": "a"}),
            json!({"type": "text"}),
        ] {
            let words = with(json!({"role": "user", "content": [part]}));
            assert!(words.contains("a part of turn 1 should be"), "{words}");
        }
        for (key, value) in [
            ("loss", json!(false)),
            ("loss", json!(0.5)),
            ("weight", json!(0)),
            ("tool_calls", json!([{}])),
        ] {
            let words = with(json!({"role": "assistant", "content": "Hi", key: value}));
            assert!(words.contains(&format!("this has \"{key}\"")), "{words}");
        }
        let part = json!({"type": "image", "index": 1});
        let words = words(&json!({"images": ["a.png", "b.png"], "messages": [
            {"role": "user", "content": [part]},
            {"role": "assistant", "content": "Hi"},
        ]}));
        assert!(
            words.contains("shows image 1, counted from 0, where 0 is the next"),
            "{words}"
        );
    }
}
