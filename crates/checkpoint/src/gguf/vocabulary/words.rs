//! Byte-level BPE: the file has the merges, and names the rule by which a text is divided before.

use serde_json::{Value, json};

use super::Vocabulary;
use crate::gguf::Refused;

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Names that llama.cpp has for rules (`tokenizer.ggml.pre`).
const AS_LLAMA3: [&str; 4] = ["llama-bpe", "llama3", "llama-v3", "smaug-bpe"];
/// The only one of these that is not Llama's own.
const SMAUG: &str = "smaug-bpe";
const AS_QWEN2: [&str; 2] = ["qwen2", "deepseek-r1-qwen"];
const AS_GPT2: [&str; 2] = ["gpt-2", "phi-2"];
const AS_SMOLLM: [&str; 4] = ["smollm", "refact", "command-r", "starcoder"];

impl Vocabulary<'_> {
    /// The rule's name; old files of Qwen have none.
    fn rule(&self) -> &str {
        let missing = match self.keys.architecture.starts_with("qwen") {
            true => "qwen2",
            false => "default",
        };
        self.keys.text("tokenizer.ggml.pre").unwrap_or(missing)
    }

    /// Texts begin with a token then, and words that are tokens are not taken apart.
    pub(super) fn is_llama3(&self) -> bool {
        !self.is_pieces && AS_LLAMA3.contains(&self.rule()) && self.rule() != SMAUG
    }

    /// As transformers writes byte-level tokenizers.
    pub(super) fn of_words(&self) -> Result<Value, Refused> {
        let bytes = |regex: bool| {
            json!({
                "type": "ByteLevel",
                "add_prefix_space": false,
                "trim_offsets": true,
                "use_regex": regex,
            })
        };
        let split = |regex: &str| {
            let by = json!({
                "type": "Split",
                "pattern": { "Regex": regex },
                "behavior": "Isolated",
                "invert": false,
            });
            json!({ "type": "Sequence", "pretokenizers": [by, bytes(false)] })
        };
        let digits = json!({ "type": "Digits", "individual_digits": true });
        let mut normalizer = Value::Null;
        let divided = match self.rule() {
            rule if AS_LLAMA3.contains(&rule) => split(LLAMA3),
            rule if AS_QWEN2.contains(&rule) => {
                normalizer = json!({ "type": "NFC" });
                split(QWEN2)
            }
            rule if AS_GPT2.contains(&rule) => bytes(true),
            rule if AS_SMOLLM.contains(&rule) => {
                json!({ "type": "Sequence", "pretokenizers": [digits, bytes(true)] })
            }
            rule => {
                return Err(format!(
                    "its texts are divided by the rule {rule:?} (tokenizer.ggml.pre); llama-bpe, qwen2, gpt-2 and \
                     smollm are supported: put the model's tokenizer.json beside it"
                ));
            }
        };
        let merges = self.keys.texts("tokenizer.ggml.merges");
        let merges = merges.ok_or("it has no tokenizer.ggml.merges")?;
        let pairs = merges.iter().map(|merge| {
            // A token may begin with a space, which bytes never do.
            let pair = merge
                .split_once(' ')
                .filter(|(_, right)| !right.contains(' '));
            pair.map(|(left, right)| [left, right])
                .ok_or_else(|| format!("its merge {merge:?} is not of two tokens"))
        });
        Ok(json!({
            "normalizer": normalizer,
            "pre_tokenizer": divided,
            "decoder": bytes(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.is_llama3(),
                "vocab": self.numbers(),
                "merges": pairs.collect::<Result<Vec<_>, _>>()?,
            },
        }))
    }
}
