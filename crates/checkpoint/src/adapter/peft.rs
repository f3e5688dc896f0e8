//! `adapter_config.json` as PEFT writes it (`peft.LoraConfig`).

use std::collections::BTreeMap;

use fancy_regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    AdapterConfig, AdapterError, LinearMap, SETTINGS, UNFINISHED_SETTINGS, UNFINISHED_TENSORS, fits,
};
use crate::header::Entries;
use crate::mismatch::quoted;
use crate::{CONFIG_MAX_BYTES, Folder};

/// Settings that change no answer of an adapter whose tensors are there.
const WITHOUT_EFFECT: &[&str] = &[
    "arrow_config",
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Ways to begin training that leave the weights of the model as they are. Others (PiSSA, OLoRA) take
/// something off them.
const BEGINNINGS: &[&str] = &["gaussian", "eva", "orthogonal"];

/// What makes a name in `rank_pattern` a regular expression.
const REGEX: &[char] = &[
    '^', '$', '*', '+', '?', '(', ')', '[', ']', '{', '}', '|', '\\',
];

/// Most of such, and how far one may search: they are untrusted input.
const MAX_EXPRESSIONS: usize = 64;
const MAX_STEPS: usize = 10_000;
const MAX_COMPILED_BYTES: usize = 1 << 20;

/// What an adapter says of itself, as far as its tensors do not.
pub(super) struct Stored {
    /// Where it is, and what it is for.
    pub(super) name: String,
    rank: usize,
    alpha: f64,
    pub(super) rank_stabilized: bool,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
    /// Ends of names that are known to be met. Where that takes an expression or an exception into account,
    /// there are none: the tensors say what is adapted.
    pub(super) targets: Vec<String>,
    /// Whether there are magnitudes (DoRA, arXiv 2402.09353).
    pub(super) has_magnitudes: bool,
    /// Ends of names of modules that are there as a whole.
    pub(super) whole: Vec<String>,
}

/// Which maps a setting is for.
enum Pattern {
    /// The end of a name behind a dot.
    End(String),
    /// The same as a regular expression, with what it was written as and where.
    Expression {
        regex: Box<Regex>,
        setting: &'static str,
        text: String,
    },
}

impl Pattern {
    /// As `peft.utils.other.get_pattern_key` has it.
    fn new(setting: &'static str, text: &str) -> Result<Self, AdapterError> {
        if !text.contains(REGEX) {
            return Ok(Self::End(text.to_owned()));
        }
        let regex = RegexBuilder::new(&format!("^(?:.*\\.)?(?:{text})$"))
            .backtrack_limit(MAX_STEPS)
            .delegate_size_limit(MAX_COMPILED_BYTES)
            .build();
        Ok(Self::Expression {
            regex: Box::new(regex.map_err(|_| unsupported(setting, text.into()))?),
            setting,
            text: text.to_owned(),
        })
    }

    /// Whether it means a map; one that would search for too long is refused.
    fn means(&self, map: &LinearMap) -> Result<bool, AdapterError> {
        let names = [&map.name, &map.module].into_iter();
        match self {
            Self::End(end) => Ok({ names }.any(|name| fits(end, name))),
            Self::Expression {
                regex,
                setting,
                text,
            } => {
                for name in names {
                    let found = regex.is_match(name);
                    if found.map_err(|_| unsupported(setting, text.as_str().into()))? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }
}

impl Stored {
    /// Rank and alpha of a map.
    pub(super) fn strength(&self, map: &LinearMap) -> Result<(usize, f64), AdapterError> {
        Ok((
            first(&self.ranks, map)?.unwrap_or(self.rank),
            first(&self.alphas, map)?.unwrap_or(self.alpha),
        ))
    }
}

/// Of the patterns that mean a map, the first counts.
fn first<T: Copy>(patterns: &[(Pattern, T)], map: &LinearMap) -> Result<Option<T>, AdapterError> {
    for (pattern, value) in patterns {
        if pattern.means(map)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

#[derive(Deserialize)]
struct Kind {
    peft_type: String,
}

#[derive(Deserialize)]
struct Settings {
    r: usize,
    lora_alpha: f64,
    base_model_name_or_path: Option<String>,
    use_rslora: Option<bool>,
    use_dora: Option<bool>,
    modules_to_save: Option<Vec<String>>,
    target_modules: Option<Modules>,
    /// Narrow the targets down.
    exclude_modules: Option<Value>,
    layers_to_transform: Option<Value>,
    rank_pattern: Option<Entries<usize>>,
    alpha_pattern: Option<Entries<f64>>,
    init_lora_weights: Option<Value>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Modules {
    /// Ends of names.
    Names(Vec<String>),
    /// A regular expression, or `all-linear`.
    Expression(#[allow(dead_code, reason = "the tensors say what it means")] String),
}

/// Reads the settings.
pub(super) fn read(folder: &Folder) -> Result<Stored, AdapterError> {
    // A save that was stopped between its last two steps.
    let is_renamed = folder.has(UNFINISHED_SETTINGS) && !folder.has(UNFINISHED_TENSORS);
    let file = match is_renamed {
        true => UNFINISHED_SETTINGS,
        false => SETTINGS,
    };
    let Kind { peft_type } = folder.read_json(file, CONFIG_MAX_BYTES)?;
    if peft_type != "LORA" {
        return Err(unsupported("peft_type", peft_type.into()));
    }
    let settings: Settings = folder.read_json(file, CONFIG_MAX_BYTES)?;
    settings.check()?;
    let is_narrowed = |value: &Option<Value>| !value.as_ref().is_none_or(is_off);
    let targets = match settings.target_modules {
        _ if is_narrowed(&settings.exclude_modules) => Vec::new(),
        _ if is_narrowed(&settings.layers_to_transform) => Vec::new(),
        Some(Modules::Names(names)) => names,
        _ => Vec::new(),
    };
    let base = settings.base_model_name_or_path.as_deref();
    let base = base.map_or_else(String::new, |base| format!(" (for {})", quoted(base)));
    Ok(Stored {
        name: folder.describe() + &base,
        rank: settings.r,
        alpha: settings.lora_alpha,
        rank_stabilized: settings.use_rslora.unwrap_or(false),
        ranks: patterns("rank_pattern", settings.rank_pattern)?,
        alphas: patterns("alpha_pattern", settings.alpha_pattern)?,
        targets,
        has_magnitudes: settings.use_dora.unwrap_or(false),
        whole: settings.modules_to_save.unwrap_or_default(),
    })
}

fn patterns<T>(
    setting: &'static str,
    entries: Option<Entries<T>>,
) -> Result<Vec<(Pattern, T)>, AdapterError> {
    let entries = entries.map_or_else(Vec::new, |entries| entries.0);
    let expressions = entries.iter().filter(|(name, _)| name.contains(REGEX));
    let count = expressions.count();
    if count > MAX_EXPRESSIONS {
        let value = format!("{count} regular expressions, where {MAX_EXPRESSIONS} are allowed");
        return Err(unsupported(setting, value.into()));
    }
    let pattern = |(name, value): (String, T)| Ok((Pattern::new(setting, &name)?, value));
    entries.into_iter().map(pattern).collect()
}

impl Settings {
    /// Refuses whatever would change numbers in a way that is not there.
    fn check(&self) -> Result<(), AdapterError> {
        let is_plain = match &self.init_lora_weights {
            Some(Value::String(beginning)) => BEGINNINGS.contains(&beginning.as_str()),
            _ => true,
        };
        if let (false, Some(value)) = (is_plain, &self.init_lora_weights) {
            return Err(unsupported("init_lora_weights", value.clone()));
        }
        let asked = self.others.iter().find(|(setting, value)| {
            let known = setting.as_str() == "peft_type";
            !known && !WITHOUT_EFFECT.contains(&setting.as_str()) && !is_off(value)
        });
        match asked {
            Some((setting, value)) => Err(unsupported(setting, value.clone())),
            None => Ok(()),
        }
    }
}

/// Whether a value asks for nothing.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(asked) => !asked,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::String(text) => text == "none",
        Value::Number(_) => false,
    }
}

fn unsupported(setting: &str, value: Value) -> AdapterError {
    AdapterError::Unsupported {
        setting: setting.to_owned(),
        value: value.to_string(),
    }
}

/// The text of the file.
pub(super) fn written(
    config: &AdapterConfig,
    targets: &[String],
) -> Result<Vec<u8>, serde_json::Error> {
    let ranks: BTreeMap<_, _> = config.rank_pattern.iter().cloned().collect();
    let alphas: BTreeMap<_, _> = config.alpha_pattern.iter().cloned().collect();
    let mut text = serde_json::to_vec_pretty(&json!({
        "alpha_pattern": alphas,
        "base_model_name_or_path": null,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": ranks,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": config.rank_stabilized,
    }))?;
    text.push(b'\n');
    Ok(text)
}
