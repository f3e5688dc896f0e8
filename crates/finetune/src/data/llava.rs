//! Conversations as LLaVA has them, and the scripts that fine-tune Qwen-VL.

use std::path::Path;

use serde_json::Value;

use super::Problem;
use super::conversation::{Part, Role, Turn, beginning};
use super::entry::{Fields, field, text};
use super::messages;

/// The turns of `conversations`: of `from` and `value`, or else of `role` and `content`.
pub(super) fn turns(fields: &Fields, below: &Path) -> Result<Vec<Turn>, Problem> {
    let Some(Value::Array(items)) = field(fields, "conversations") else {
        return Err(Problem::Shape {
            what: "conversations".into(),
            wanted: "a list of turns",
        });
    };
    let mut turns = beginning(fields)?;
    for item in items {
        let number = turns.len() + 1;
        turns.push(match item {
            Value::Object(fields) if field(fields, "from").is_some() => turn(fields, number)?,
            item => messages::message(item, number, below)?,
        });
    }
    Ok(turns)
}

fn turn(fields: &Fields, number: usize) -> Result<Turn, Problem> {
    let from = text(fields, "from")?.unwrap_or_default();
    let role = Role::named(from, number)?;
    messages::check(fields)?;
    match text(fields, "value")? {
        Some(value) => Ok(Turn::new(role, vec![Part::Text(value.into())])),
        None => Err(Problem::Shape {
            what: format!("value of turn {number}"),
            wanted: "text",
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{Folder, said, words};
    use super::super::{Exchange, Piece};
    use super::*;

    #[test]
    fn llava_conversations_are_read() {
        let folder = Folder::new();
        let example = folder.example(&json!({
            "id": "000",
            "image": "a.png",
            "model": "unknown keys mean nothing",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": "A cup."},
                {"from": "human", "value": "Which colour?"},
                {"from": "gpt", "value": "Red."},
            ],
        }));
        assert_eq!(example.images, [folder.file("a.png")]);
        assert_eq!(example.system, None);
        let [first, second] = &example.exchanges[..] else {
            panic!("{example:?}");
        };
        assert_eq!(first.question, [Piece::Image(0), said("What is this?")]);
        assert_eq!(first.answer, [said("A cup.")]);
        let (question, answer) = (vec![said("Which colour?")], vec![said("Red.")]);
        assert_eq!(*second, Exchange { question, answer });
    }

    #[test]
    fn several_images_stand_in_any_turn() {
        let example = Folder::new().example(&json!({
            "images": ["a.png", "b.png", "a.png"],
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": "<image>\n<image>\nCompare."},
                {"from": "assistant", "value": "Alike."},
                {"from": "user", "value": "And this?\n<image>"},
                {"from": "assistant", "value": "Not."},
            ],
        }));
        assert_eq!(example.system.as_deref(), Some("Be brief."));
        let questions: Vec<_> = example
            .exchanges
            .iter()
            .map(|exchange| &exchange.question)
            .collect();
        assert_eq!(
            *questions[0],
            [Piece::Image(0), Piece::Image(1), said("Compare.")]
        );
        assert_eq!(*questions[1], [said("And this?"), Piece::Image(2)]);
    }

    #[test]
    fn turns_may_have_roles_and_contents() {
        let example = Folder::new().example(&json!({"conversations": [
            {"from": "system", "value": ""},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "I."},
        ]}));
        assert_eq!(example.system.as_deref(), Some(""));
        assert_eq!(example.exchanges.len(), 1);
    }

    #[test]
    fn what_is_no_conversation_is_refused() {
        let with = |turns: Value| words(&json!({ "conversations": turns }));
        assert!(with(json!("text")).contains("conversations should be a list of turns"));
        assert!(with(json!([{"from": "human"}])).contains("value of turn 1 should be text"));
        assert!(with(json!([{"from": 7, "value": ""}])).contains("from should be text"));
        assert!(with(json!([{"value": "?"}])).contains("role of turn 1 should be"));
        assert!(with(json!(["?"])).contains("turn 1 should be an object"));
        let tool = json!([{"from": "function_call", "value": "{}"}]);
        assert!(with(tool).contains("turn 1 is of \"function_call\", who takes no part"));
    }
}
