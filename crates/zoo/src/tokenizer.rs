use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::Tokenizer as HfTokenizer;

use crate::ZooError;

/// The characters that stand in for special tokens typed by a user: a plane of private use, so that
/// no tokenizer gives them a meaning.
const STAND_INS: RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';

/// A checkpoint's `tokenizer.json`.
pub struct Tokenizer {
    inner: HfTokenizer,
    /// All special tokens, longest first.
    specials: Vec<Special>,
}

/// A token that means something to the model when a template writes it.
struct Special {
    text: String,
    /// Its text as ordinary tokens.
    spelled: Vec<u32>,
}

impl Tokenizer {
    /// Parses the contents of `tokenizer.json`. The reserved tokens are special even if the file
    /// does not say so.
    pub fn from_json(json: &[u8], reserved: &[u32]) -> Result<Self, ZooError> {
        let mut inner = guarded("it cannot be read", || HfTokenizer::from_bytes(json))?;
        // Prompts are never cut or padded behind the caller's back.
        inner.with_padding(None);
        let _ = inner.with_truncation(None);
        let added = inner.get_added_tokens_decoder();
        let mut texts: Vec<String> = added
            .into_iter()
            .filter(|(id, token)| token.special || reserved.contains(id))
            .map(|(_, token)| token.content)
            .filter(|content| !content.is_empty())
            .collect();
        if texts.len() > STAND_INS.count() {
            return Err(ZooError::Tokenizer {
                reason: format!("it has {} special tokens, too many to guard", texts.len()),
                source: None,
            });
        }
        texts.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        inner.set_encode_special_tokens(true);
        let specials = texts.into_iter().map(|text| Special::spell(text, &inner));
        let specials = specials.collect::<Result<_, _>>()?;
        inner.set_encode_special_tokens(false);
        Ok(Self { inner, specials })
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
    /// template and [`encode`](Self::encode) without forging an image placeholder or the end of a turn.
    pub fn disarm(&self, text: &str) -> String {
        // A stand-in typed by the user would be taken for one of ours.
        let mut text: String = text
            .chars()
            .filter(|&c| self.stands_for(c).is_none())
            .collect();
        for (special, stand_in) in self.specials.iter().zip(STAND_INS) {
            if text.contains(&special.text) {
                text = text.replace(&special.text, &stand_in.to_string());
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
            let (head, spelled, tail) = match stand_in {
                Some((at, c, special)) => {
                    let tail = &rest[at + c.len_utf8()..];
                    (&rest[..at], special.spelled.as_slice(), tail)
                }
                None => (rest, [].as_slice(), ""),
            };
            if first || !head.is_empty() {
                ids.extend(run(&self.inner, head, first && add_special_tokens)?);
            }
            ids.extend(spelled);
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

    /// The text of token ids, special tokens written out.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String, ZooError> {
        guarded("it cannot decode the answer", || {
            self.inner.decode(ids, false)
        })
    }

    /// Text as its tokens come. The pieces together are what [`decode`](Self::decode) makes of all tokens,
    /// and each is whole characters.
    pub fn stream(&self) -> TextStream<'_> {
        let mut stream = self.inner.decode_stream(true);
        // A token that cannot be decoded alone is still part of the complete answer.
        let step = move |id| guarded("it cannot decode a token", || stream.step(id)).ok()?;
        TextStream {
            tokenizer: self,
            step: Box::new(step),
            ids: Vec::new(),
            emitted: String::new(),
        }
    }

    fn stands_for(&self, c: char) -> Option<&Special> {
        let index = (c as u32).checked_sub(*STAND_INS.start() as u32)?;
        self.specials.get(index as usize)
    }
}

/// Text that grows token by token; see [`Tokenizer::stream`].
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    step: Box<dyn FnMut(u32) -> Option<String> + Send + 'a>,
    ids: Vec<u32>,
    emitted: String,
}

impl TextStream<'_> {
    /// What the next token adds: nothing where a character is not complete.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let piece = (self.step)(id).unwrap_or_default();
        self.emitted.push_str(&piece);
        piece
    }

    /// What is left when nothing follows: a character that was begun is the replacement character.
    pub fn rest(&mut self) -> String {
        let complete = self.tokenizer.decode(&self.ids).unwrap_or_default();
        let rest = complete.strip_prefix(&self.emitted).unwrap_or_default();
        let rest = rest.to_string();
        self.emitted.push_str(&rest);
        rest
    }
}

impl Special {
    /// Spells the text with a tokenizer for which special tokens are ordinary text.
    fn spell(text: String, literal: &HfTokenizer) -> Result<Self, ZooError> {
        let mut spelled = run(literal, &text, false)?;
        if literal
            .token_to_id(&text)
            .is_some_and(|id| spelled.contains(&id))
        {
            // Not marked as special, so it is matched all the same: take it apart.
            let first = text.chars().next().map_or(0, char::len_utf8);
            spelled = run(literal, &text[..first], false)?;
            spelled.extend(run(literal, &text[first..], false)?);
        }
        Ok(Self { text, spelled })
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Characters that stand for bytes, as byte-level tokenizers have them: `Ġ` for a space, `â`, `Ĥ`
    /// and `¬` for the bytes of `€`.
    fn bytes() -> Tokenizer {
        let json = r#"{"version": "1.0", "added_tokens": [
            {"id": 5, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true}],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {"type": "WordLevel", "unk_token": "a",
                      "vocab": {"a": 0, "Ġ": 1, "â": 2, "Ĥ": 3, "¬": 4}}}"#;
        Tokenizer::from_json(json.as_bytes(), &[]).expect("a tokenizer")
    }

    #[test]
    fn a_finished_stream_is_the_text() {
        let tokenizer = bytes();
        for (ids, expected) in [
            (&[0, 2, 3, 4, 0][..], "a€a"),
            (&[0, 2, 3], "a\u{FFFD}"),
            (&[0, 2, 3, 5], "a\u{FFFD}"),
            (&[2, 0, 1, 0, 2], "\u{FFFD}a a\u{FFFD}"),
            (&[0, 5], "a"),
            (&[1, 0, 1], " a "),
            (&[], ""),
        ] {
            let mut stream = tokenizer.stream();
            let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
            text.push_str(&stream.rest());
            assert_eq!(text, expected);
            assert_eq!(text, tokenizer.decode(ids).expect("known ids"));
        }
    }
}
