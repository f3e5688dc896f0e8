//! SentencePiece: merges are found in the order of scores.

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;

use serde_json::{Value, json};

use super::{NORMAL, UNKNOWN, Vocabulary};
use crate::gguf::Refused;

/// Longest piece that is looked at in two halves, in bytes: SentencePiece makes none above 16 characters.
const MAX_BYTES: usize = 256;
/// Most merges for each token; published vocabularies have two or three.
const MAX_MERGES: usize = 16;
/// What stands for a space.
const SPACE: &str = "▁";

/// A score, in the order of numbers.
#[derive(PartialEq)]
struct Score(f64);

impl Eq for Score {}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Vocabulary<'_> {
    /// As transformers' `LlamaConverter` writes it.
    pub(super) fn of_pieces(&self) -> Result<Value, Refused> {
        let scores = self.keys.floats("tokenizer.ggml.scores").unwrap_or(&[]);
        if scores.len() != self.tokens.len() {
            return Err("its tokenizer.ggml.scores are not as many as its tokens".into());
        }
        let prefix = self
            .keys
            .flag("tokenizer.ggml.add_space_prefix")
            .unwrap_or(true);
        let prepend = json!({ "type": "Prepend", "prepend": SPACE });
        let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
        let mut before = vec![prepend, replace(" ", SPACE)];
        let mut behind = vec![
            replace(SPACE, " "),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
            json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }),
        ];
        if !prefix {
            before.remove(0);
            behind.pop();
        }
        let unknown = (0..self.tokens.len()).find(|&id| self.kind(id) == UNKNOWN);
        let unknown = unknown.map(|id| self.tokens[id]);
        Ok(json!({
            "normalizer": { "type": "Sequence", "normalizers": before },
            "pre_tokenizer": null,
            "decoder": { "type": "Sequence", "decoders": behind },
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": unknown,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": true,
                "ignore_merges": false,
                "vocab": self.numbers(),
                "merges": self.merges(scores)?,
            },
        }))
    }

    /// Every two tokens that are one together: first those of the highest score.
    fn merges(&self, scores: &[f64]) -> Result<Vec<[&str; 2]>, Refused> {
        let is_piece = |id: &usize| self.kind(*id) == NORMAL;
        let mut ids = HashMap::new();
        for id in (0..self.tokens.len()).filter(is_piece) {
            ids.entry(self.tokens[id]).or_insert(id);
        }
        let mut merges = Vec::new();
        for (&token, &id) in &ids {
            if token.len() > MAX_BYTES {
                continue;
            }
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                    merges.push((id, left, right));
                }
            }
            if merges.len() / MAX_MERGES > self.tokens.len() {
                return Err(
                    "its tokens are made of each other in more ways than any vocabulary's".into(),
                );
            }
        }
        // Of equal scores, as transformers' `generate_merges` has them: a longer left half first.
        let length = |id: usize| self.tokens[id].chars().count();
        merges.sort_by_cached_key(|&(id, left, right)| {
            let score = Reverse(Score(scores[id]));
            (score, Reverse((length(left), length(right))), id, left)
        });
        let texts = merges.iter().map(|&(_, left, right)| [left, right]);
        Ok(texts.map(|pair| pair.map(|id| self.tokens[id])).collect())
    }
}
