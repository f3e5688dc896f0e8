//! Conversations: who said what, and how many slots each image and video becomes.

use minijinja::{Value, context};

use crate::{Dialect, Modality, Tokenizer};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said and shown, in order.
    pub content: Vec<Content>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions that come before the conversation.
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
}

/// A part of a message.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// An image.
    Image,
    /// A video.
    Video {
        /// The time of each temporal patch, see [`VideoTime`](reroute_family::VideoTime); written into the prompt by models
        /// that read it there.
        seconds: Vec<f64>,
    },
    /// Text.
    Text(String),
}

/// The placeholders that one kind of media has in a prompt.
#[derive(Debug, Clone, Copy)]
pub struct Placeholders<'a> {
    /// What is shown.
    pub modality: Modality,
    /// The token that stands for a visual token.
    pub token: u32,
    /// Visual tokens of each, in order.
    pub lengths: &'a [usize],
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

impl Message {
    /// A message of one text.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        let content = vec![Content::Text(text.into())];
        Self { role, content }
    }

    /// The message with special tokens in its texts made harmless, see [`Tokenizer::disarm`]: no
    /// more than a user may a system prompt or an earlier answer forge a placeholder or end a turn.
    pub fn disarmed(&self, tokenizer: &Tokenizer) -> Self {
        let disarm = |part: &Content| match part {
            Content::Text(text) => Content::Text(tokenizer.disarm(text)),
            other => other.clone(),
        };
        Self {
            role: self.role,
            content: self.content.iter().map(disarm).collect(),
        }
    }

    /// The message as templates of vision-language models take it.
    pub(crate) fn with_parts(&self) -> Value {
        let part = |part: &Content| match part {
            Content::Image => context!(type => "image"),
            Content::Video { .. } => context!(type => "video"),
            Content::Text(text) => context!(type => "text", text),
        };
        let parts: Value = self.content.iter().map(part).collect();
        context!(role => self.role.name(), content => parts)
    }

    /// The message as templates of language models take it: one string.
    pub(crate) fn with_string(&self, dialect: &Dialect) -> Value {
        let part = |part: &Content| match part {
            Content::Image => dialect.image.to_string(),
            Content::Video { .. } => dialect.video.to_string(),
            Content::Text(text) => text.clone(),
        };
        let content: String = self.content.iter().map(part).collect();
        context!(role => self.role.name(), content)
    }
}

/// Makes as many slots of each placeholder as it has visual tokens. Fails with what is wrong, as the end of
/// a sentence about the template, unless there are as many placeholders as lengths.
pub(crate) fn expand(ids: &[u32], placeholders: &[Placeholders]) -> Result<Vec<u32>, String> {
    for Placeholders {
        modality,
        token,
        lengths,
    } in placeholders
    {
        let made = ids.iter().filter(|&id| id == token).count();
        if made != lengths.len() {
            return Err(format!(
                "makes {made} {modality} placeholders for {} {modality}s (the {modality} token of config.json is {token})",
                lengths.len()
            ));
        }
    }
    let mut lengths: Vec<_> = placeholders
        .iter()
        .map(|kind| kind.lengths.iter())
        .collect();
    let mut length = |id: u32| {
        let kind = placeholders.iter().position(|kind| kind.token == id);
        kind.and_then(|kind| lengths[kind].next()).map_or(1, |&n| n)
    };
    let repeated = ids
        .iter()
        .flat_map(|&id| std::iter::repeat_n(id, length(id)));
    Ok(repeated.collect())
}
