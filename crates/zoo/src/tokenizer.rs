use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::Tokenizer as HfTokenizer;

use crate::ZooError;

/// First of the characters that stand in for special tokens typed by a user; private use, so that
/// no tokenizer gives them a meaning.
const STAND_IN: u32 = 0xF0000;

/// A checkpoint's `tokenizer.json`.
pub struct Tokenizer {
    inner: HfTokenizer,
    /// The same tokenizer, for which special tokens are ordinary text.
    literal: HfTokenizer,
    /// Texts of all special tokens, longest first.
    specials: Vec<String>,
}

impl Tokenizer {
    /// Parses the contents of `tokenizer.json`. The image token is special even if the file does
    /// not say so.
    pub fn from_json(json: &[u8], image_token: u32) -> Result<Self, ZooError> {
        let mut inner = guarded("it cannot be read", || HfTokenizer::from_bytes(json))?;
        // Prompts are never cut or padded behind the caller's back.
        inner.with_padding(None);
        let _ = inner.with_truncation(None);
        let mut literal = inner.clone();
        literal.set_encode_special_tokens(true);
        let added = inner.get_added_tokens_decoder();
        let mut specials: Vec<String> = added
            .iter()
            .filter(|(id, token)| token.special || **id == image_token)
            .map(|(_, token)| token.content.clone())
            .filter(|content| !content.is_empty())
            .collect();
        specials.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        Ok(Self {
            inner,
            literal,
            specials,
        })
    }

    /// The id of a token, if the vocabulary has it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Largest token id plus one.
    pub fn vocab_size(&self) -> usize {
        let ids = self.inner.get_vocab(true);
        ids.values().max().map_or(0, |&id| id as usize + 1)
    }

    /// Replaces special tokens in a user's text by stand-ins, so that the text can go through a chat
    /// template and [`encode`](Self::encode) without forging an image slot or the end of a turn.
    pub fn disarm(&self, text: &str) -> String {
        // A stand-in typed by the user would be taken for one of ours.
        let mut text: String = text
            .chars()
            .filter(|&c| self.stands_for(c).is_none())
            .collect();
        for (special, stand_in) in self.specials.iter().zip(STAND_IN..) {
            if let Some(stand_in) = char::from_u32(stand_in) {
                text = text.replace(special, &stand_in.to_string());
            }
        }
        text
    }

    /// Token ids of a rendered prompt. Special tokens written by the template become themselves;
    /// stand-ins become the ordinary text that the user typed.
    pub fn encode(&self, rendered: &str, add_special_tokens: bool) -> Result<Vec<u32>, ZooError> {
        let mut ids = Vec::new();
        let mut rest = rendered;
        let mut first = true;
        while first || !rest.is_empty() {
            let stand_in = rest
                .char_indices()
                .find_map(|(at, c)| Some((at, c, self.stands_for(c)?)));
            let (head, literal, tail) = match stand_in {
                Some((at, c, special)) => (&rest[..at], Some(special), &rest[at + c.len_utf8()..]),
                None => (rest, None, ""),
            };
            if first || !head.is_empty() {
                ids.extend(run(&self.inner, head, first && add_special_tokens)?);
            }
            if let Some(literal) = literal {
                ids.extend(self.spell(literal)?);
            }
            first = false;
            rest = tail;
        }
        Ok(ids)
    }

    /// The text of token ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ZooError> {
        guarded("it cannot decode the answer", || {
            self.inner.decode(ids, true)
        })
    }

    /// Calls `emit` with each piece of text as soon as its tokens are complete.
    pub fn stream<'a>(&'a self, mut emit: impl FnMut(&str) + 'a) -> impl FnMut(u32) + 'a {
        let mut stream = self.inner.decode_stream(true);
        move |id| {
            // A token that cannot be decoded alone is still part of the complete answer.
            if let Ok(Some(piece)) = guarded("it cannot decode a token", || stream.step(id)) {
                emit(&piece);
            }
        }
    }

    /// The tokens of a special token's text, taken as ordinary text.
    fn spell(&self, literal: &str) -> Result<Vec<u32>, ZooError> {
        let ids = run(&self.literal, literal, false)?;
        if self.id(literal).is_some_and(|id| ids.contains(&id)) {
            // Not marked as special, so it is matched all the same: take it apart.
            let mut pieces = literal.chars();
            let first: String = pieces.by_ref().take(1).collect();
            let mut ids = run(&self.literal, &first, false)?;
            ids.extend(run(&self.literal, pieces.as_str(), false)?);
            return Ok(ids);
        }
        Ok(ids)
    }

    fn stands_for(&self, c: char) -> Option<&str> {
        let index = (c as u32).checked_sub(STAND_IN)? as usize;
        self.specials.get(index).map(String::as_str)
    }
}

fn run(
    tokenizer: &HfTokenizer,
    text: &str,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ZooError> {
    let encoding = guarded("it cannot encode the prompt", || {
        tokenizer.encode_fast(text, add_special_tokens)
    })?;
    Ok(encoding.get_ids().to_vec())
}

/// Calls the tokenizer library, which panics on some broken files instead of refusing them.
fn guarded<T>(reason: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, ZooError> {
    let panicked = |_| Err("the tokenizer library panics on it".into());
    let outcome = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(panicked);
    outcome.map_err(|source| ZooError::Tokenizer {
        reason: reason.into(),
        source: Some(source),
    })
}
