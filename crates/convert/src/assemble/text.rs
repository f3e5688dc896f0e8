//! The small files of a decoder, changed so that they know images.

use std::collections::BTreeMap;
use std::path::Path;

use reroute_checkpoint::{
    CONFIG_MAX_BYTES, Folder, TEMPLATE_MAX_BYTES, TOKENIZER_MAX_BYTES, template_with_images,
};
use serde::Deserialize;
use serde_json::Value;

use super::refuse;
use crate::ConvertError;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const TEMPLATES: &str = "chat_template.json";

/// What a slot for an image is called.
pub(super) const IMAGE: &str = "<image>";
/// Tokens of published vocabularies that their models have no use for, or none in a chat.
const UNUSED: [&str; 6] = [
    "<|image_pad|>",
    "<|reserved_special_token_0|>",
    "<repo_name>",
    "<reponame>",
    "<|repo_name|>",
    "[control_8]",
];
/// Files in which tokens are spelled.
const SPELLINGS: [&str; 5] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
];
/// Others, which would call a token by its old name, or know no images.
pub(super) const OLD: [&str; 2] = ["tokenizer.model", TEMPLATES];

#[derive(Deserialize)]
struct Tokenizer {
    #[serde(default)]
    added_tokens: Vec<Token>,
}

#[derive(Deserialize)]
struct Token {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

/// The id of the token that stands for an image, and the files that say so. `wanted` is the token that it has
/// been, if that is asked for.
pub(super) fn files(
    folder: &Folder,
    path: &Path,
    wanted: Option<&str>,
) -> Result<(u32, BTreeMap<String, Vec<u8>>), ConvertError> {
    let mut files = BTreeMap::new();
    for name in SPELLINGS {
        if name == TOKENIZER || folder.has(name) {
            files.insert(name.to_owned(), folder.read(name, TOKENIZER_MAX_BYTES)?);
        }
    }
    let known = tokens(&files).map_err(|problem| refuse(path, problem))?;
    let template = template(folder)?;
    let needed = named(&files);
    let is_needed = |token: &Token| {
        let writes = |template: &String| template.contains(&token.content);
        needed.contains(&token.content) || template.as_ref().is_some_and(writes)
    };
    let find = |text: &str| {
        known
            .iter()
            .find(|token| token.special && token.content == text)
    };
    let token = match wanted {
        Some(text) if text != IMAGE && find(IMAGE).is_some() => {
            let problem = format!("its tokenizer has {IMAGE} already; leave out --image-token");
            return Err(refuse(path, problem));
        }
        Some(text) => find(text),
        None => [IMAGE].iter().chain(&UNUSED).find_map(|text| find(text)),
    };
    // `<image>` of one that writes it is what it is.
    let free = |token: &&Token| token.content == IMAGE || !is_needed(token);
    let Some(token) = token.filter(free) else {
        let some = known.iter().filter(|token| token.special);
        let some = some.filter(|token| !is_needed(token)).take(24);
        let some: Vec<&str> = some.map(|token| token.content.as_str()).collect();
        let problem = format!(
            "--image-token must name a special token of its tokenizer that neither its template nor its settings use, \
             which becomes {IMAGE}; it has {}",
            if some.is_empty() {
                "none".to_owned()
            } else {
                some.join(" ")
            }
        );
        return Err(refuse(path, problem));
    };
    if token.content != IMAGE {
        for content in files.values_mut() {
            *content = renamed(content, &token.content);
        }
        let renamed = tokens(&files).map_err(|problem| refuse(path, problem))?;
        let is_there = |new: &Token| new.content == IMAGE && new.id == token.id;
        if !renamed.iter().any(is_there) {
            let problem = format!("{:?} of its tokenizer cannot be renamed", token.content);
            return Err(refuse(path, problem));
        }
    }
    if let Some(template) = template {
        files.insert(TEMPLATE.to_owned(), template_with_images(&template).into());
    }
    Ok((token.id, files))
}

/// Tokens that the settings of the tokenizer name, but for the unknown one: bytes leave nothing unknown.
fn named(files: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let settings = files.get(TOKENIZER_CONFIG).map_or(&[][..], Vec::as_slice);
    let settings: Value = serde_json::from_slice(settings).unwrap_or_default();
    let named = ["bos_token", "eos_token", "pad_token"].into_iter();
    let text = |name| {
        let token = &settings[name];
        token
            .as_str()
            .or(token["content"].as_str())
            .map(str::to_owned)
    };
    named.filter_map(text).collect()
}

fn tokens(files: &BTreeMap<String, Vec<u8>>) -> Result<Vec<Token>, String> {
    let tokenizer = files.get(TOKENIZER).map_or(&[][..], Vec::as_slice);
    let tokenizer: Result<Tokenizer, _> = serde_json::from_slice(tokenizer);
    match tokenizer {
        Ok(tokenizer) => Ok(tokenizer.added_tokens),
        Err(error) => Err(format!("its {TOKENIZER} is not understood: {error}")),
    }
}

/// A JSON text with `<image>` for every string that is this token; longer ones stay as they are.
fn renamed(json: &[u8], token: &str) -> Vec<u8> {
    let [from, to] = [token, IMAGE].map(|text| Value::from(text).to_string().into_bytes());
    let mut out = Vec::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.windows(from.len()).position(|part| part == from) {
        let (before, behind) = rest.split_at(at);
        out.extend(before);
        // A quote behind a backslash begins no string.
        out.extend(if before.ends_with(b"\\") { &from } else { &to });
        rest = &behind[from.len()..];
    }
    out.extend(rest);
    out
}

/// The decoder's chat template.
fn template(folder: &Folder) -> Result<Option<String>, ConvertError> {
    if folder.has(TEMPLATE) {
        let source = folder.read(TEMPLATE, TEMPLATE_MAX_BYTES)?;
        return Ok(Some(String::from_utf8_lossy(&source).into_owned()));
    }
    for name in [TEMPLATES, TOKENIZER_CONFIG] {
        if !folder.has(name) {
            continue;
        }
        let config: Value = folder.read_json(name, CONFIG_MAX_BYTES)?;
        let template = match &config["chat_template"] {
            Value::Array(named) => {
                let default = named.iter().find(|one| one["name"] == "default");
                default.map_or(&Value::Null, |one| &one["template"])
            }
            one => one,
        };
        if let Some(template) = template.as_str() {
            return Ok(Some(template.to_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::renamed;

    #[test]
    fn strings_that_are_the_token_are_renamed_and_no_others() {
        for (json, expected) in [
            (r#"["<a>","<a> ","x<a>"]"#, r#"["<image>","<a> ","x<a>"]"#),
            (r#"{"<a>":1,"b":"<a>"}"#, r#"{"<image>":1,"b":"<image>"}"#),
            (r#"["say \"<a>\"","\"<a>"]"#, r#"["say \"<a>\"","\"<a>"]"#),
        ] {
            let found = String::from_utf8(renamed(json.as_bytes(), "<a>"));
            assert_eq!(found.expect("text"), expected);
        }
    }
}
