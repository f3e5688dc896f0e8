//! Answers as OpenAI's clients read them, whole and in chunks.

use std::time::{SystemTime, UNIX_EPOCH};

use burn::tensor::backend::Backend;
use rand::RngExt;
use reroute_zoo::{Answer, FinishReason, TokenLogprobs, Vlm};
use serde_json::{Value, json};

/// What all parts of a response have in common.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    id: String,
    created: u64,
    pub(crate) model: String,
    /// Whether chunks say that they tell no usage.
    pub(crate) include_usage: bool,
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

impl Head {
    pub(crate) fn new(model: &str, include_usage: bool) -> Self {
        Self {
            id: format!("chatcmpl-{:032x}", rand::rng().random::<u128>()),
            created: now(),
            model: model.to_owned(),
            include_usage,
        }
    }

    /// The whole response.
    pub(crate) fn completion(
        &self,
        choices: Vec<Value>,
        usage: Value,
        reroute: Option<Value>,
    ) -> Value {
        let mut response = json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        });
        if let Some(reroute) = reroute {
            response["reroute"] = reroute;
        }
        response
    }

    fn chunk(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let mut chunk = json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if self.include_usage {
            chunk["usage"] = usage.unwrap_or_default();
        }
        chunk
    }

    /// The first chunk of an answer.
    pub(crate) fn first(&self, index: usize) -> Value {
        let delta = json!({"role": "assistant", "content": ""});
        self.chunk(vec![self.part(index, delta, Value::Null, None)], None)
    }

    /// A piece of text, and what is told of its tokens.
    pub(crate) fn piece(&self, index: usize, text: &str, logprobs: Option<Vec<Value>>) -> Value {
        let logprobs = logprobs.map_or(Value::Null, |content| told(&content));
        let delta = json!({"content": text});
        self.chunk(vec![self.part(index, delta, logprobs, None)], None)
    }

    /// The last chunk of an answer.
    pub(crate) fn last(&self, index: usize, answer: &Answer, reroute: Option<Value>) -> Value {
        let finish = Some(finish_reason(answer.finish));
        let part = self.part(index, json!({}), Value::Null, finish);
        let mut chunk = self.chunk(vec![part], None);
        if let Some(reroute) = reroute {
            chunk["reroute"] = reroute;
        }
        chunk
    }

    /// The chunk behind all answers.
    pub(crate) fn usage(&self, usage: Value) -> Value {
        self.chunk(Vec::new(), Some(usage))
    }

    fn part(&self, index: usize, delta: Value, logprobs: Value, finish: Option<&str>) -> Value {
        json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
    }
}

/// An answer of a whole response.
pub(crate) fn choice<B: Backend>(
    vlm: &Vlm<B>,
    index: usize,
    answer: &Answer,
    logprobs: bool,
) -> Value {
    let content = || {
        let pairs = answer.tokens.iter().zip(&answer.logprobs);
        let entries = pairs.filter_map(|(&token, logprobs)| entry(vlm, token, logprobs));
        told(&entries.collect::<Vec<_>>())
    };
    json!({
        "index": index,
        "message": {"role": "assistant", "content": answer.text, "refusal": null},
        "logprobs": logprobs.then(content),
        "finish_reason": finish_reason(answer.finish),
    })
}

/// Tokens of a prompt and of all its answers.
pub(crate) fn usage(prompt: usize, completion: usize) -> Value {
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    })
}

/// How likely a token was; nothing of the token that ends an answer.
pub(crate) fn entry<B: Backend>(
    vlm: &Vlm<B>,
    token: u32,
    logprobs: &TokenLogprobs,
) -> Option<Value> {
    if vlm.generation_defaults().stop_tokens.contains(&token) {
        return None;
    }
    let of = |token: u32, logprob: f32| {
        let text = token_text(vlm, token);
        // A part of a character has bytes that nobody knows here.
        let bytes = (!text.contains('\u{FFFD}')).then(|| text.as_bytes().to_vec());
        // What JSON has no number for.
        let logprob = logprob.max(-9999.0);
        json!({"token": text, "logprob": logprob, "bytes": bytes})
    };
    let mut told = of(token, logprobs.logprob);
    let top = logprobs
        .top
        .iter()
        .map(|&(token, logprob)| of(token, logprob));
    told["top_logprobs"] = top.collect();
    Some(told)
}

/// A token as it stands between others: what begins a word has the space before it.
fn token_text<B: Backend>(vlm: &Vlm<B>, token: u32) -> String {
    let decode = |ids: &[u32]| vlm.tokenizer().decode_all(ids).unwrap_or_default();
    let (once, twice) = (decode(&[token]), decode(&[token, token]));
    match twice.strip_prefix(&once) {
        Some(second) if !second.is_empty() => second.to_owned(),
        _ => once,
    }
}

fn told(content: &[Value]) -> Value {
    json!({"content": content, "refusal": null})
}

fn finish_reason(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "stop",
        _ => "length",
    }
}
