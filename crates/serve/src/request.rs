//! What a request says, as OpenAI's chat completions have it, and what of it is refused by name.

mod fields;
mod messages;

use reroute_zoo::reducers::Plan;
use serde_json::Value;

use crate::limits::Limits;
use crate::refusal::Refusal;
use fields::Fields;

pub(crate) use messages::{Picture, Piece, Said};

/// Most stop strings, and most bytes of one.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Most values in a body, whatever they are: each takes memory of its own.
const MAX_VALUES: usize = 1 << 17;
/// Most tokens that are biased.
const MAX_BIASES: usize = 1024;
/// Most alternatives of a token, as OpenAI has it.
const MAX_TOP_LOGPROBS: usize = 20;

/// A request for a chat completion.
#[derive(Debug)]
pub(crate) struct Chat {
    /// Which model; the first one if it does not say.
    pub(crate) model: Option<String>,
    pub(crate) messages: Vec<Said>,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<usize>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) logit_bias: Vec<(u32, f32)>,
    pub(crate) seed: Option<u64>,
    pub(crate) stop: Vec<String>,
    pub(crate) n: usize,
    /// How many alternatives of each token are told, if its probability is.
    pub(crate) logprobs: Option<usize>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) routing: Option<Routed>,
    pub(crate) trace: bool,
    pub(crate) grounding: bool,
}

/// A routing of the request's own.
#[derive(Debug)]
pub(crate) enum Routed {
    /// The name of a preset.
    Preset(String),
    /// A plan as routing files have it.
    Plan(Box<Plan>),
}

type IsNeutral = fn(&Value) -> bool;

/// Fields that others know, the values of them that change nothing, and why there are no others here.
const ELSEWHERE: &[(&str, IsNeutral, &str)] = &[
    ("audio", never, "there is no speech here"),
    ("function_call", is_no_choice, "there are no functions here"),
    ("functions", is_empty, "there are no functions here"),
    ("metadata", always, ""),
    ("modalities", is_text_alone, "answers are text"),
    (
        "parallel_tool_calls",
        Value::is_boolean,
        "there are no tools here",
    ),
    ("prediction", never, "answers are not predicted here"),
    ("prompt_cache_key", always, ""),
    ("prompt_cache_retention", always, ""),
    (
        "reasoning_effort",
        is_none,
        "these models answer without reasoning",
    ),
    (
        "response_format",
        is_text_format,
        "answers are plain text: leave it out, or say {\"type\": \"text\"}",
    ),
    ("safety_identifier", always, ""),
    (
        "service_tier",
        is_default_tier,
        "there is one tier here: leave it out",
    ),
    ("store", is_false, "nothing is stored here"),
    ("tool_choice", is_no_choice, "there are no tools here"),
    ("tools", is_empty, "there are no tools here"),
    ("user", always, ""),
    ("verbosity", is_medium, "limit max_tokens instead"),
    (
        "web_search_options",
        never,
        "nothing is searched for on the web",
    ),
];

impl Chat {
    /// Reads a body of JSON, and refuses what is beyond the limits as far as it tells.
    pub(crate) fn parse(body: &[u8], limits: &Limits) -> Result<Self, Refusal> {
        if values(body) > MAX_VALUES {
            let message = format_args!("the body has more than {MAX_VALUES} values: send less");
            return Err(Refusal::malformed(message));
        }
        let value: Value = serde_json::from_slice(body)
            .map_err(|error| Refusal::malformed(format_args!("the body is no JSON: {error}")))?;
        let mut fields = Fields::of(value, String::new())?;
        for (name, is_neutral, why) in ELSEWHERE {
            if fields.take(name).is_some_and(|value| !is_neutral(&value)) {
                let message = format_args!("{name} is not supported: {why}");
                return Err(Refusal::unsupported(*name, message));
            }
        }
        let messages = messages::read(fields.take("messages"), limits.text_bytes)?;
        let (stream, options) = (fields.flag("stream")?, fields.take("stream_options"));
        let chat = Self {
            model: fields.text("model")?,
            messages,
            max_tokens: max_tokens(&mut fields)?,
            temperature: fields.number("temperature")?,
            top_p: fields.number("top_p")?,
            top_k: fields.count("top_k", 0)?,
            repetition_penalty: fields.number("repetition_penalty")?,
            presence_penalty: fields.number("presence_penalty")?,
            frequency_penalty: fields.number("frequency_penalty")?,
            logit_bias: logit_bias(&mut fields)?,
            seed: seed(&mut fields)?,
            stop: stop(fields.take("stop"))?,
            n: fields.count("n", 1)?.unwrap_or(1),
            logprobs: logprobs(&mut fields)?,
            stream,
            include_usage: include_usage(options, stream)?,
            routing: routing(fields.take("routing"))?,
            trace: fields.flag("trace")?,
            grounding: fields.flag("grounding")?,
        };
        fields.end()?;
        chat.fits(limits)?;
        Ok(chat)
    }

    fn fits(&self, limits: &Limits) -> Result<(), Refusal> {
        let (answers, tokens) = (limits.choices.min(limits.answers), limits.tokens);
        if self.n > answers {
            let message = format_args!(
                "answers to a request at most: {answers} (--max-choices, --max-running)"
            );
            return Err(Refusal::bad("n", message));
        }
        if self.max_tokens.is_some_and(|asked| asked > tokens) {
            let message = format_args!("an answer has {tokens} tokens at most");
            return Err(Refusal::bad("max_tokens", message));
        }
        let (pictures, most) = (self.pictures().count(), limits.pictures);
        if pictures > most {
            let message = format_args!("a request has {most} pictures at most");
            return Err(Refusal::bad("messages", message));
        }
        Ok(())
    }

    /// All pictures and videos, in order.
    pub(crate) fn pictures(&self) -> impl Iterator<Item = &Picture> {
        let pieces = self.messages.iter().flat_map(|said| &said.pieces);
        pieces.filter_map(|piece| match piece {
            Piece::Picture(picture) => Some(picture),
            Piece::Text(_) => None,
        })
    }
}

/// About as many as there are values in JSON: what is listed, named or opened outside of texts.
fn values(json: &[u8]) -> usize {
    let (mut count, mut in_text, mut escaped) = (0, false, false);
    for &byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            b',' | b':' | b'[' | b'{' if !in_text => count += 1,
            _ => {}
        }
    }
    count
}

/// Token ids as texts, and what is added to their logits.
fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, Refusal> {
    let what = "an object of at most 1024 token ids as texts, each with a number from -100 to 100";
    let bias = fields.read("logit_bias", what, |value| {
        let Value::Object(map) = value else {
            return None;
        };
        let entry = |(id, bias): (String, Value)| {
            let bias = bias.as_f64().filter(|bias| bias.abs() <= 100.0)?;
            // One spelling, so that no token is named twice.
            let number: u32 = id.parse().ok()?;
            (number.to_string() == id).then_some((number, bias as f32))
        };
        let fits = map.len() <= MAX_BIASES;
        fits.then(|| map.into_iter().map(entry).collect())?
    })?;
    Ok(bias.unwrap_or_default())
}

fn max_tokens(fields: &mut Fields) -> Result<Option<usize>, Refusal> {
    let old = fields.count("max_tokens", 1)?;
    let new = fields.count("max_completion_tokens", 1)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(Refusal::bad(
            "max_tokens",
            "max_tokens and max_completion_tokens mean the same, and differ: say one",
        )),
        (old, new) => Ok(new.or(old)),
    }
}

/// Any whole number; those below 0 count as two's complement.
fn seed(fields: &mut Fields) -> Result<Option<u64>, Refusal> {
    let read = |value: Value| value.as_u64().or_else(|| Some(value.as_i64()? as u64));
    fields.read("seed", "a whole number", read)
}

fn stop(value: Option<Value>) -> Result<Vec<String>, Refusal> {
    let bad = || {
        let what = format_args!(
            "stop is a text or a list of at most {MAX_STOPS} of them, each of 1 to {MAX_STOP_BYTES} bytes"
        );
        Refusal::bad("stop", what)
    };
    let texts = match value {
        None => Vec::new(),
        Some(Value::Array(texts)) => texts,
        Some(text) => vec![text],
    };
    if texts.len() > MAX_STOPS {
        return Err(bad());
    }
    let texts = texts.into_iter().map(|text| match text {
        Value::String(text) if !text.is_empty() && text.len() <= MAX_STOP_BYTES => Ok(text),
        _ => Err(bad()),
    });
    texts.collect()
}

fn logprobs(fields: &mut Fields) -> Result<Option<usize>, Refusal> {
    let (asked, top) = (fields.flag("logprobs")?, fields.count("top_logprobs", 0)?);
    match (asked, top) {
        (_, Some(top)) if top > MAX_TOP_LOGPROBS => Err(Refusal::bad(
            "top_logprobs",
            format_args!("top_logprobs is a number from 0 to {MAX_TOP_LOGPROBS}"),
        )),
        (false, Some(top)) if top > 0 => Err(Refusal::bad(
            "top_logprobs",
            "top_logprobs needs \"logprobs\": true",
        )),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

fn include_usage(options: Option<Value>, stream: bool) -> Result<bool, Refusal> {
    let Some(options) = options else {
        return Ok(false);
    };
    if !stream {
        return Err(Refusal::bad(
            "stream_options",
            "stream_options needs \"stream\": true",
        ));
    }
    let mut options = Fields::of(options, "stream_options".into())?;
    let usage = options.flag("include_usage")?;
    // Padding against those who count bytes: there is none here.
    if options.flag("include_obfuscation")? {
        return Err(Refusal::unsupported(
            "stream_options.include_obfuscation",
            "include_obfuscation is not supported: leave it out",
        ));
    }
    options.end()?;
    Ok(usage)
}

fn routing(value: Option<Value>) -> Result<Option<Routed>, Refusal> {
    match value {
        None => Ok(None),
        Some(Value::String(name)) => Ok(Some(Routed::Preset(name))),
        Some(plan @ Value::Object(_)) => match Plan::from_json(&plan.to_string()) {
            Ok(plan) => Ok(Some(Routed::Plan(Box::new(plan)))),
            Err(error) => Err(Refusal::bad("routing", error)),
        },
        Some(_) => Err(Refusal::bad(
            "routing",
            "routing is the name of a preset (GET /v1/routings lists them), or a plan",
        )),
    }
}

fn never(_: &Value) -> bool {
    false
}

fn always(_: &Value) -> bool {
    true
}

fn is_false(value: &Value) -> bool {
    value.as_bool() == Some(false)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn is_none(value: &Value) -> bool {
    value.as_str() == Some("none")
}

fn is_medium(value: &Value) -> bool {
    value.as_str() == Some("medium")
}

fn is_no_choice(value: &Value) -> bool {
    matches!(value.as_str(), Some("none" | "auto"))
}

fn is_default_tier(value: &Value) -> bool {
    matches!(value.as_str(), Some("auto" | "default"))
}

fn is_text_alone(value: &Value) -> bool {
    { value.as_array() }.is_some_and(|list| list.iter().all(|one| one.as_str() == Some("text")))
}

fn is_text_format(value: &Value) -> bool {
    { value.as_object() }.is_some_and(|format| {
        format.len() == 1 && format.get("type").and_then(Value::as_str) == Some("text")
    })
}
