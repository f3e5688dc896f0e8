//! Which tokens end an answer.

use reroute_checkpoint::{CONFIG, CONFIG_MAX_BYTES, Folder};
use serde::Deserialize;
use serde_json::Value;

use crate::{ChatTemplate, Tokenizer, ZooError};

/// One token, or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum TokenIds {
    One(u32),
    Several(Vec<u32>),
}

/// What `config.json` says of them; the text model's own part may say it, too.
#[derive(Default, Deserialize)]
struct Config {
    /// Anything: a configuration that says nothing usable is no worse than one that says nothing.
    #[serde(default)]
    eos_token_id: Value,
    #[serde(default)]
    text_config: Option<Box<Config>>,
}

impl Config {
    fn ends(&self) -> Option<TokenIds> {
        TokenIds::deserialize(&self.eos_token_id).ok()
    }
}

impl TokenIds {
    /// Those of a vocabulary: a library's defaults may be ids of another.
    fn of(&self, vocab_size: usize) -> Vec<u32> {
        let ids = match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Several(ids) => ids,
        };
        let known = ids.iter().copied();
        known.filter(|&id| (id as usize) < vocab_size).collect()
    }
}

/// The tokens that end an answer: what `generation_config.json` says (`generation`), else `config.json`, else
/// the settings of the tokenizer; none if nothing does.
pub(crate) fn end_tokens(
    folder: &Folder,
    generation: Option<&TokenIds>,
    vocab_size: usize,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> Result<Vec<u32>, ZooError> {
    let config: Config = folder.read_json(CONFIG, CONFIG_MAX_BYTES)?;
    let text = config.text_config.as_ref().and_then(|text| text.ends());
    let config = config.ends();
    let sources = [generation, config.as_ref(), text.as_ref()];
    let said = sources.into_iter().flatten().map(|ids| ids.of(vocab_size));
    let said = said.into_iter().find(|ids| !ids.is_empty());
    Ok(said.unwrap_or_else(|| {
        let token = template.eos_token().and_then(|token| tokenizer.id(token));
        token.into_iter().collect()
    }))
}
