//! Who speaks when.

use super::entry::{Fields, text};
use super::marks::{IMAGE, Marks};
use super::{Exchange, ImageSource, Piece, Problem};

/// One turn as the data have it.
#[derive(Debug)]
pub(super) struct Turn {
    role: Role,
    parts: Vec<Part>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Who gives instructions.
    System,
    /// Who asks.
    User,
    /// Who answers.
    Assistant,
}

/// A part of a turn.
#[derive(Debug)]
pub(super) enum Part {
    /// Text with marks in it.
    Text(String),
    /// The next of the images that the entry lists, perhaps with its index there.
    Listed(Option<serde_json::Value>),
    /// An image of its own.
    Image(ImageSource),
}

impl Role {
    /// The role of a name.
    pub(super) fn named(name: &str, turn: usize) -> Result<Self, Problem> {
        match name {
            "system" => Ok(Self::System),
            "user" | "human" => Ok(Self::User),
            "assistant" | "gpt" => Ok(Self::Assistant),
            role => Err(Problem::Role {
                turn,
                role: role.into(),
            }),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

impl Turn {
    pub(super) fn new(role: Role, parts: Vec<Part>) -> Self {
        Self { role, parts }
    }

    /// The turn, number `turn`, if it is of whom it should be.
    fn of(self, wanted: Role, turn: usize) -> Result<Vec<Part>, Problem> {
        match self.role {
            role if role == wanted => Ok(self.parts),
            Role::System => Err(Problem::System { turn }),
            role => Err(Problem::Order {
                turn,
                found: role.name(),
                wanted: wanted.name(),
            }),
        }
    }
}

/// The system prompt that an entry has beside its turns, as a turn.
pub(super) fn beginning(fields: &Fields) -> Result<Vec<Turn>, Problem> {
    let system = text(fields, "system")?;
    let turn = |said: &str| Turn::new(Role::System, vec![Part::Text(said.into())]);
    Ok(system.map(turn).into_iter().collect())
}

/// The system prompt and the exchanges that turns are.
pub(super) fn arrange(
    turns: Vec<Turn>,
    marks: &mut Marks,
) -> Result<(Option<String>, Vec<Exchange>), Problem> {
    if !turns.iter().any(|turn| turn.role == Role::Assistant) {
        return Err(Problem::NoAnswer);
    }
    let mut turns = turns.into_iter().zip(1..).peekable();
    let system = turns.next_if(|(turn, _)| turn.role == Role::System);
    let system = system.map(|(turn, _)| said(turn.parts)).transpose()?;
    let (mut exchanges, mut numbers) = (Vec::new(), Vec::new());
    while let Some((question, number)) = turns.next() {
        let question = marks.pieces(question.of(Role::User, number)?)?;
        let Some((answer, answered)) = turns.next() else {
            return Err(Problem::Unanswered);
        };
        let answer = marks.pieces(answer.of(Role::Assistant, answered)?)?;
        if answer.iter().all(is_silent) {
            return Err(Problem::EmptyAnswer { turn: answered });
        }
        exchanges.push(Exchange { question, answer });
        numbers.push(number);
    }
    marks.finish(&mut exchanges)?;
    let is_empty = |exchange: &Exchange| {
        let shows = |piece: &Piece| matches!(piece, Piece::Image(_));
        exchange
            .question
            .iter()
            .all(|piece| is_silent(piece) && !shows(piece))
    };
    match exchanges.iter().position(is_empty) {
        None => Ok((system, exchanges)),
        Some(at) => Err(Problem::EmptyQuestion { turn: numbers[at] }),
    }
}

/// Whether a piece says nothing.
fn is_silent(piece: &Piece) -> bool {
    match piece {
        Piece::Text(text) => text.trim().is_empty(),
        Piece::Image(_) => true,
        Piece::Label(_) | Piece::Box { .. } => false,
    }
}

/// The text of a system prompt.
fn said(parts: Vec<Part>) -> Result<String, Problem> {
    let text = |part| match part {
        Part::Text(text) if !text.contains(IMAGE) => Ok(text),
        _ => Err(Problem::SystemImage),
    };
    parts.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::testing::Folder;
    use super::*;

    fn entry(turns: &[(&str, &str)], images: &Value) -> Value {
        let turns = turns
            .iter()
            .map(|(role, content)| json!({"role": role, "content": content}));
        json!({"messages": turns.collect::<Value>(), "images": images})
    }

    #[test]
    fn questions_and_answers_alternate() {
        let none = json!(null);
        let (user, assistant) = (("user", "?"), ("assistant", "!"));
        let order = |turn, found, wanted| Problem::Order {
            turn,
            found,
            wanted,
        };
        for (turns, wanted) in [
            (vec![], Problem::NoAnswer),
            (vec![user], Problem::NoAnswer),
            (vec![("system", "x")], Problem::NoAnswer),
            (vec![assistant], order(1, "assistant", "user")),
            (vec![user, user, assistant], order(2, "user", "assistant")),
            (
                vec![("system", "x"), user, assistant, assistant],
                order(4, "assistant", "user"),
            ),
            (vec![user, assistant, user], Problem::Unanswered),
            (
                vec![user, assistant, ("system", "x")],
                Problem::System { turn: 3 },
            ),
            (
                vec![("system", "x"), ("system", "y"), user, assistant],
                Problem::System { turn: 2 },
            ),
            (
                vec![user, ("assistant", " \n")],
                Problem::EmptyAnswer { turn: 2 },
            ),
            (
                vec![user, assistant, (" ", ""), assistant],
                Problem::Role {
                    turn: 3,
                    role: " ".into(),
                },
            ),
            (
                vec![user, assistant, ("user", " "), assistant],
                Problem::EmptyQuestion { turn: 3 },
            ),
        ] {
            let problem = Folder::new().problem(&entry(&turns, &none));
            assert_eq!(problem, wanted);
        }
        let only_shown = [("user", "?"), ("assistant", "<image>")];
        assert_eq!(
            Folder::new().problem(&entry(&only_shown, &json!("a.png"))),
            Problem::EmptyAnswer { turn: 2 }
        );
        let twice = json!({"system": "x", "messages": [{"role": "system", "content": "y"}, {"role": "assistant", "content": "!"}]});
        assert_eq!(Folder::new().problem(&twice), Problem::System { turn: 2 });
    }
}
