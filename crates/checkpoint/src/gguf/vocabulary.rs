//! Tokenizers: `tokenizer.json` and what stands beside it, of a file's vocabulary.

mod pieces;
mod words;

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::Refused;
use super::keys::{Keys, Kind};

/// What llama.cpp calls kinds of tokens (`llama_token_type`).
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;

/// Tokens that end a turn or a text whatever the file says of them, as llama.cpp has them (`special_eog_ids`).
const ENDS: [&str; 24] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];
/// What llama.cpp takes these tokens for in a vocabulary of pieces that does not say it.
const PIECES: [(&str, usize); 3] = [("bos", 1), ("eos", 2), ("unknown", 0)];

/// Tokens that become `<image>` before others where a vocabulary has none: they stand for nothing that a text
/// holds.
const SPARE: [&str; 4] = [
    "<|image_pad|>",
    "<|reserved_special_token_0|>",
    "<repo_name>",
    "<unk>",
];
/// Numbers that a file names tokens by that a text or an answer needs.
const NAMED: [&str; 4] = ["bos", "eos", "eot", "eom"];

/// What keys have to be that have a default.
const KINDS: [(&str, Kind); 7] = [
    ("tokenizer.ggml.pre", Kind::Text),
    ("tokenizer.ggml.token_type", Kind::Integers),
    ("tokenizer.ggml.scores", Kind::Numbers),
    ("tokenizer.ggml.merges", Kind::Texts),
    ("tokenizer.ggml.add_bos_token", Kind::Flag),
    ("tokenizer.ggml.add_eos_token", Kind::Flag),
    ("tokenizer.ggml.add_space_prefix", Kind::Flag),
];

/// A file's vocabulary.
pub(super) struct Vocabulary<'a> {
    keys: Keys<'a>,
    tokens: Vec<&'a str>,
    kinds: &'a [i64],
    /// The token that is called otherwise here than in the file.
    renamed: Option<usize>,
    is_pieces: bool,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn new(keys: Keys<'a>) -> Result<Self, Refused> {
        let model = keys.text("tokenizer.ggml.model").unwrap_or("none");
        let is_pieces = match model {
            "llama" => true,
            "gpt2" => false,
            other => {
                return Err(format!(
                    "its tokenizer is of the kind {other:?}; gpt2 (byte-level BPE) and llama (SentencePiece) are \
                     supported: put the model's tokenizer.json beside it"
                ));
            }
        };
        let tokens = keys.texts("tokenizer.ggml.tokens");
        let tokens = tokens.ok_or("it has no tokenizer.ggml.tokens")?;
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        for key in ["bos", "eos", "eot", "eom", "padding", "unknown"] {
            let key = format!("tokenizer.ggml.{key}_token_id");
            keys.check(&[(key.as_str(), Kind::Count)])?;
        }
        keys.check(&KINDS)?;
        let kinds = keys.integers("tokenizer.ggml.token_type").unwrap_or(&[]);
        if !kinds.is_empty() && kinds.len() != tokens.len() {
            return Err("its tokenizer.ggml.token_type is not as long as its tokens".into());
        }
        Ok(Self {
            keys,
            tokens,
            kinds,
            renamed: None,
            is_pieces,
        })
    }

    /// The token of a text.
    pub(super) fn id(&self, text: &str) -> Option<usize> {
        self.tokens.iter().position(|token| *token == text)
    }

    /// The token that stands for a picture: `<image>`, or one that nothing else needs and is called so now.
    pub(super) fn image(&mut self) -> Result<usize, Refused> {
        const IMAGE: &str = "<image>";
        if let Some(id) = self.id(IMAGE) {
            return Ok(id);
        }
        let template = self.keys.text("tokenizer.chat_template").unwrap_or("");
        let named: Vec<usize> = NAMED
            .iter()
            .filter_map(|key| Some(self.named(key)?.0))
            .collect();
        let is_needed = |id: &usize| {
            let text = self.tokens[*id];
            named.contains(id) || ENDS.contains(&text) || template.contains(text)
        };
        let free = || (0..self.tokens.len()).filter(|id| !is_needed(id));
        let known = SPARE.iter().filter_map(|text| self.id(text));
        let known = { known }.find(|id| !is_needed(id));
        let spare = || {
            [CONTROL, UNUSED]
                .into_iter()
                .find_map(|kind| free().find(|&id| self.kind(id) == kind))
        };
        let id = known.or_else(spare).ok_or(
            "its vocabulary has no <image>, and no token that could stand for it: put a tokenizer.json that has \
             one beside it",
        )?;
        self.tokens[id] = IMAGE;
        self.renamed = Some(id);
        Ok(id)
    }

    fn kind(&self, id: usize) -> i64 {
        match self.renamed == Some(id) {
            true => CONTROL,
            false => self.kinds.get(id).copied().unwrap_or(NORMAL),
        }
    }

    /// A token that the file names by its number.
    fn named(&self, key: &str) -> Option<(usize, &'a str)> {
        let said = self.keys.count(&format!("tokenizer.ggml.{key}_token_id"));
        let usual = PIECES
            .iter()
            .find(|(usual, _)| self.is_pieces && *usual == key);
        let id = said.ok()?.or(usual.map(|(_, id)| *id))?;
        // That of a picture is no longer what it was.
        Some((id, *self.tokens.get(id)?)).filter(|_| self.renamed != Some(id))
    }

    /// Tokens that end an answer.
    pub(super) fn ends(&self) -> Vec<usize> {
        let named = ["eos", "eot", "eom"]
            .iter()
            .filter_map(|key| self.named(key));
        let mut ends: Vec<usize> = named.map(|(id, _)| id).collect();
        for id in ENDS.iter().filter_map(|text| self.id(text)) {
            if matches!(self.kind(id), CONTROL | USER_DEFINED) && !ends.contains(&id) {
                ends.push(id);
            }
        }
        ends
    }

    /// `tokenizer.json`.
    pub(super) fn tokenizer(&self) -> Result<Value, Refused> {
        let mut tokenizer = match self.is_pieces {
            true => self.of_pieces()?,
            false => self.of_words()?,
        };
        tokenizer["version"] = "1.0".into();
        tokenizer["truncation"] = Value::Null;
        tokenizer["padding"] = Value::Null;
        tokenizer["added_tokens"] = self.added();
        tokenizer["post_processor"] = self.frame();
        Ok(tokenizer)
    }

    /// Every token and its number; of equal ones the first.
    fn numbers(&self) -> Map<String, Value> {
        let mut numbers = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            numbers.entry(*token).or_insert(id.into());
        }
        numbers
    }

    /// Tokens that are found in a text before it is divided into others.
    fn added(&self) -> Value {
        let mut seen = HashSet::new();
        let all = self.tokens.iter().enumerate();
        let added = all.filter(|(id, token)| {
            let is_added = matches!(self.kind(*id), UNKNOWN | CONTROL | USER_DEFINED);
            is_added && !token.is_empty() && seen.insert(**token)
        });
        let added = added.map(|(id, token)| {
            json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": self.kind(id) != USER_DEFINED,
            })
        });
        added.collect()
    }

    /// What stands before and behind every text.
    fn frame(&self) -> Value {
        let starts = self.is_pieces || self.is_llama3();
        let flag = |key| self.keys.flag(key);
        let first = flag("tokenizer.ggml.add_bos_token").unwrap_or(starts);
        let last = flag("tokenizer.ggml.add_eos_token").unwrap_or(false);
        let [first, last] =
            [(first, "bos"), (last, "eos")].map(|(is, key)| self.named(key).filter(|_| is));
        let special =
            |(_, token): (usize, &str)| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let sequence = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
        if first.is_none() && last.is_none() {
            return match self.is_pieces {
                true => Value::Null,
                false => json!({
                    "type": "ByteLevel",
                    "add_prefix_space": false,
                    "trim_offsets": false,
                    "use_regex": false,
                }),
            };
        }
        let around = |name: &str| {
            let parts = [first.map(special), Some(sequence(name)), last.map(special)];
            parts.into_iter().flatten().collect::<Vec<_>>()
        };
        let special: Map<String, Value> = [first, last]
            .into_iter()
            .flatten()
            .map(|(id, token)| {
                let entry = json!({ "id": token, "ids": [id], "tokens": [token] });
                (token.to_owned(), entry)
            })
            .collect();
        json!({
            "type": "TemplateProcessing",
            "single": around("A"),
            "pair": ([around("A"), around("B")].concat()),
            "special_tokens": special,
        })
    }

    /// `tokenizer_config.json`.
    pub(super) fn settings(&self) -> Value {
        let mut settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
        });
        for (key, name) in [
            ("bos", "bos_token"),
            ("eos", "eos_token"),
            ("unknown", "unk_token"),
            ("padding", "pad_token"),
        ] {
            if let Some((_, token)) = self.named(key) {
                settings[name] = token.into();
            }
        }
        settings
    }
}
