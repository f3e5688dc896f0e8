//! `adapter_config.json` as PEFT writes it (`peft.LoraConfig`).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    AdapterConfig, AdapterError, SETTINGS, Targets, UNFINISHED_SETTINGS, UNFINISHED_TENSORS,
};
use crate::header::Entries;
use crate::{CONFIG_MAX_BYTES, Folder};

/// Settings that change no answer of an adapter whose tensors are there.
const WITHOUT_EFFECT: &[&str] = &[
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
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

#[derive(Deserialize)]
struct Kind {
    peft_type: String,
}

#[derive(Deserialize)]
struct Settings {
    r: usize,
    lora_alpha: f64,
    use_rslora: Option<bool>,
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

/// Reads the settings. Targets are only those that are known to be met; where that takes an expression
/// or an exception into account, there are none: the tensors say what is adapted.
pub(super) fn read(folder: &Folder) -> Result<AdapterConfig, AdapterError> {
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
    Ok(AdapterConfig {
        rank: settings.r,
        alpha: settings.lora_alpha,
        rank_stabilized: settings.use_rslora.unwrap_or(false),
        rank_pattern: settings.rank_pattern.map_or_else(Vec::new, |all| all.0),
        alpha_pattern: settings.alpha_pattern.map_or_else(Vec::new, |all| all.0),
        ..AdapterConfig::new(Targets::Named(targets), settings.r)
    })
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
        if let Some((setting, value)) = asked {
            return Err(unsupported(setting, value.clone()));
        }
        let ranks = self.rank_pattern.iter().flat_map(|all| &all.0);
        let ranks = ranks.map(|(name, _)| ("rank_pattern", name));
        let alphas = self.alpha_pattern.iter().flat_map(|all| &all.0);
        let alphas = alphas.map(|(name, _)| ("alpha_pattern", name));
        match ranks.chain(alphas).find(|(_, name)| name.contains(REGEX)) {
            Some((setting, name)) => Err(unsupported(setting, name.as_str().into())),
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
