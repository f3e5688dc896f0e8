//! Language models: what `config.json` would say of one, and its tensors under the names of Hugging Face.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use burn::tensor::DType;
use serde_json::{Map, Value, json};

use super::keys::{Keys, Kind};
use super::names::LANGUAGE;
use super::{Gguf, Refused};
use crate::arranged::Arranged;
use crate::{Layout, TensorInfo};

/// Frequencies of Llama 3.1, which the file keeps as divisors of every frequency.
const ROPE_FREQS: &str = "rope_freqs.weight";
/// What Llama's publications have used; the other settings were the same in all.
const LLAMA3_FACTORS: [f64; 2] = [8.0, 32.0];
const LLAMA3: (f64, f64, f64) = (1.0, 4.0, 8192.0);
/// How far numbers in f32 may be from them.
const CLOSE: f64 = 1e-4;

/// Keys that change what a model computes in a way that is not known here, and what does not.
const UNKNOWN: [(&str, f64); 7] = [
    (".logit_scale", 1.0),
    (".residual_scale", 1.0),
    (".embedding_scale", 1.0),
    (".attention.scale", 1.0),
    (".attn_logit_softcapping", 0.0),
    (".final_logit_softcapping", 0.0),
    (".rope.scaling.attn_factor", 1.0),
];

/// What keys have to be that have a default, or that are seldom there.
const KINDS: [(&str, Kind); 16] = [
    (".attention.layer_norm_rms_epsilon", Kind::Number),
    (".attention.causal", Kind::Flag),
    (".rope.freq_base", Kind::Number),
    (".rope.scaling.type", Kind::Text),
    (".rope.scaling.factor", Kind::Number),
    (".rope.scale_linear", Kind::Number),
    (".rope.dimension_sections", Kind::Integers),
    (".n_deepstack_layers", Kind::Count),
    ("tokenizer.chat_template", Kind::Text),
    (".expert_count", Kind::Count),
    (".logit_scale", Kind::Number),
    (".residual_scale", Kind::Number),
    (".embedding_scale", Kind::Number),
    (".attention.scale", Kind::Number),
    (".attn_logit_softcapping", Kind::Number),
    (".final_logit_softcapping", Kind::Number),
];

/// Architectures that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    /// Qwen2-VL and Qwen2.5-VL.
    Qwen2Vl,
    Qwen3Vl,
}

/// A language model.
pub(super) struct Language<'a> {
    pub(super) keys: Keys<'a>,
    pub(super) architecture: Architecture,
    file: &'a Gguf,
}

impl<'a> Language<'a> {
    pub(super) fn new(file: &'a Gguf) -> Result<Self, Refused> {
        let keys = Keys::new(&file.metadata);
        let architecture = match keys.architecture {
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            "qwen2vl" => Architecture::Qwen2Vl,
            "qwen3vl" => Architecture::Qwen3Vl,
            "qwen3vlmoe" => {
                return Err(
                    "it is a mixture of experts (qwen3vlmoe), which is not supported; nearest is \
                            a dense Qwen3-VL"
                        .into(),
                );
            }
            other => {
                return Err(format!(
                    "its architecture is {other:?}; language models of llama, qwen2, qwen2vl and qwen3vl are \
                     supported"
                ));
            }
        };
        keys.check(&KINDS)?;
        if keys
            .count(".expert_count")?
            .is_some_and(|experts| experts > 0)
        {
            return Err("it is a mixture of experts, which is not supported".into());
        }
        if keys.flag(".attention.causal") == Some(false) {
            return Err("its attention is not causal, which is not supported".into());
        }
        for (key, harmless) in UNKNOWN {
            if let Some(number) = keys.number(key).filter(|number| *number != harmless) {
                return Err(format!(
                    "{}{key} is {number}, which is not supported",
                    keys.architecture
                ));
            }
        }
        Ok(Self {
            keys,
            architecture,
            file,
        })
    }

    /// Whether it sees pictures by itself, so that it comes with a certain kind of tower.
    pub(super) fn is_qwen_vl(&self) -> bool {
        matches!(
            self.architecture,
            Architecture::Qwen2Vl | Architecture::Qwen3Vl
        )
    }

    /// The number of a token, by the file's own list.
    pub(super) fn token(&self, text: &str) -> Option<usize> {
        let tokens = self.keys.texts("tokenizer.ggml.tokens")?;
        tokens.iter().position(|token| token == text)
    }

    /// Channels of a head.
    fn head_dim(&self) -> Result<usize, Refused> {
        let keys = self.keys;
        let (hidden, heads) = (
            keys.needed(".embedding_length")?,
            keys.needed(".attention.head_count")?,
        );
        let length = keys.count(".attention.key_length")?;
        let divided = hidden.checked_div(heads);
        if self.architecture == Architecture::Qwen2Vl && length.is_some() && length != divided {
            return Err("qwen2vl.attention.key_length is not what its heads are wide".into());
        }
        let head_dim = length.or(divided);
        let head_dim = head_dim.ok_or("it has no heads of attention")?;
        for key in [".attention.value_length", ".rope.dimension_count"] {
            if let Some(other) = keys.count(key)?.filter(|other| *other != head_dim) {
                return Err(format!(
                    "{}{key} is {other} where a head has {head_dim} channels, which is not supported",
                    keys.architecture
                ));
            }
        }
        Ok(head_dim)
    }

    /// What `config.json` says of the language model, under the names of its class.
    pub(super) fn config(&self) -> Result<Map<String, Value>, Refused> {
        let keys = self.keys;
        let table = self.file.tensors.info("token_embd.weight");
        let vocab_size = table.and_then(|table| table.shape.first().copied());
        let vocab_size = vocab_size.ok_or("it has no token_embd.weight")?;
        let heads = keys.needed(".attention.head_count")?;
        let head_dim = self.head_dim()?;
        let sections = keys.integers(".rope.dimension_sections");
        let sections = sections.and_then(|all| all.get(..3));
        let epsilon = keys.number(".attention.layer_norm_rms_epsilon");
        let epsilon = epsilon.ok_or("it does not say attention.layer_norm_rms_epsilon")?;
        let window = keys
            .count(".attention.sliding_window")?
            .filter(|rows| *rows > 0);
        let (model_type, class) = match self.architecture {
            Architecture::Llama if window.is_some() => ("mistral", "MistralForCausalLM"),
            Architecture::Llama => ("llama", "LlamaForCausalLM"),
            Architecture::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            // The class is that of the whole model.
            Architecture::Qwen2Vl => ("qwen2_vl_text", ""),
            Architecture::Qwen3Vl => ("qwen3_vl_text", ""),
        };
        let mut config = json!({
            "model_type": model_type,
            "hidden_size": keys.needed(".embedding_length")?,
            "intermediate_size": keys.needed(".feed_forward_length")?,
            "num_hidden_layers": keys.needed(".block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": keys.count(".attention.head_count_kv")?.unwrap_or(heads),
            "max_position_embeddings": keys.needed(".context_length")?,
            "rms_norm_eps": epsilon,
            "rope_theta": keys.number(".rope.freq_base").unwrap_or(10_000.0),
            "hidden_act": "silu",
            "vocab_size": vocab_size,
            "tie_word_embeddings": self.file.tensors.info("output.weight").is_none(),
            "torch_dtype": self.dtype(),
        });
        let Value::Object(config) = &mut config else {
            return Ok(Map::new());
        };
        if !class.is_empty() {
            config.insert("architectures".into(), json!([class]));
        }
        if self.architecture != Architecture::Qwen2Vl {
            config.insert("head_dim".into(), head_dim.into());
        }
        match (self.architecture, window) {
            (Architecture::Llama, Some(window)) => {
                config.insert("sliding_window".into(), window.into());
            }
            _ => {
                config.insert("use_sliding_window".into(), false.into());
            }
        }
        for (key, name) in [("bos", "bos_token_id"), ("eos", "eos_token_id")] {
            if let Some(id) = keys.count(&format!("tokenizer.ggml.{key}_token_id"))? {
                config.insert(name.into(), id.into());
            }
        }
        let scaling = match (self.scaling(head_dim)?, self.architecture, sections) {
            (Some(scaling), ..) => Some(scaling),
            (None, Architecture::Qwen2Vl, Some(sections)) => {
                Some(json!({ "type": "mrope", "mrope_section": sections }))
            }
            (None, Architecture::Qwen3Vl, Some(sections)) => Some(json!({
                "rope_type": "default",
                "mrope_interleaved": true,
                "mrope_section": sections,
            })),
            (None, Architecture::Qwen2Vl | Architecture::Qwen3Vl, None) => {
                return Err("it does not say rope.dimension_sections".into());
            }
            (None, ..) => None,
        };
        if let Some(scaling) = scaling {
            config.insert("rope_scaling".into(), scaling);
        }
        Ok(std::mem::take(config))
    }

    /// What the weights become where nobody asks for a type: that of most numbers, f16 for blocks.
    fn dtype(&self) -> &'static str {
        let mut sizes = BTreeMap::new();
        for info in self.file.tensors.tensors().values() {
            let name = match (info.is_widened(), info.dtype) {
                (true, _) | (false, safetensors::Dtype::F16) => "float16",
                (false, safetensors::Dtype::BF16) => "bfloat16",
                (false, _) => "float32",
            };
            *sizes.entry(name).or_insert(0_u128) += u128::from(info.bytes);
        }
        let most = sizes.into_iter().max_by_key(|(_, bytes)| *bytes);
        most.map_or("float32", |(name, _)| name)
    }

    /// How frequencies are changed for long contexts.
    fn scaling(&self, head_dim: usize) -> Result<Option<Value>, Refused> {
        let keys = self.keys;
        let factor = keys.number(".rope.scaling.factor");
        let factor = factor.or(keys.number(".rope.scale_linear"));
        let factor = factor.filter(|factor| *factor != 0.0 && *factor != 1.0);
        // As llama.cpp has it, a factor without a type is linear.
        let kind = keys.text(".rope.scaling.type").unwrap_or("linear");
        let divisors = match self.file.tensors.info(ROPE_FREQS).is_some() {
            true => {
                let read = self
                    .file
                    .tensors
                    .read(ROPE_FREQS, DType::F32, Layout::AsStored);
                let divisors = read.map_err(|error| error.to_string())?;
                divisors.into_vec::<f32>().unwrap_or_default()
            }
            false => Vec::new(),
        };
        let has_divisors = divisors.iter().any(|divisor| *divisor != 1.0);
        let linear = match (kind, factor) {
            ("none", _) | ("linear", None) => None,
            ("linear", Some(factor)) if !has_divisors && !self.is_qwen_vl() => Some(factor),
            _ => {
                return Err(format!(
                    "its positions are scaled by the rule {kind:?} (rope.scaling), which is not supported{}",
                    if has_divisors {
                        " beside rope_freqs"
                    } else {
                        ""
                    }
                ));
            }
        };
        if let Some(factor) = linear {
            return Ok(Some(json!({ "rope_type": "linear", "factor": factor })));
        }
        if !has_divisors {
            return Ok(None);
        }
        let theta = keys.number(".rope.freq_base").unwrap_or(10_000.0);
        let fits = |factor: &f64| {
            let expected = llama3_divisors(theta, head_dim, *factor);
            divisors.len() == expected.len()
                && (divisors.iter().zip(expected))
                    .all(|(&found, wanted)| (f64::from(found) - wanted).abs() <= CLOSE * wanted)
        };
        let (low, high, trained) = LLAMA3;
        match LLAMA3_FACTORS.iter().find(|factor| fits(factor)) {
            Some(factor) => Ok(Some(json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained as usize,
            }))),
            None => Err(format!(
                "its {ROPE_FREQS} is not that of Llama 3.1 or 3.2, which is not supported"
            )),
        }
    }

    /// The tensors under the names of Hugging Face; `model` is what `model` at their start becomes, `head`
    /// what `lm_head` does.
    pub(super) fn rename(
        &self,
        tensors: BTreeMap<String, TensorInfo>,
        (model, head): (&str, &str),
    ) -> Result<BTreeMap<String, TensorInfo>, Refused> {
        let head_dim = self.head_dim()?;
        let mut renamed = BTreeMap::new();
        for (name, mut info) in tensors {
            if name == ROPE_FREQS || name.ends_with(".attn_rot_embd") {
                continue;
            }
            let turned = name.contains(".attn_q.") || name.contains(".attn_k.");
            if self.architecture == Architecture::Llama && turned {
                let arranged = Arranged::even_then_odd(info, head_dim);
                info = arranged.map_err(|reason| format!("its tensor {name:?} {reason}"))?;
            }
            let path = match LANGUAGE.module_path(&name) {
                Some(path) => match path.strip_prefix("model.") {
                    Some(rest) => format!("{model}.{rest}"),
                    None => path.replacen("lm_head", head, 1),
                },
                // It is reported with all that does not fit.
                None => unknown(&name),
            };
            renamed.insert(path, info);
        }
        Ok(renamed)
    }
}

/// What a tensor is called that no table knows: like none of Hugging Face.
pub(super) fn unknown(name: &str) -> String {
    format!("{name} (GGUF)")
}

/// What Llama 3.1 divides each frequency by (transformers, `_compute_llama3_parameters`).
fn llama3_divisors(theta: f64, head_dim: usize, factor: f64) -> Vec<f64> {
    let (low, high, trained) = LLAMA3;
    let divisor = |pair: usize| {
        let length = 2.0 * PI * theta.powf(2.0 * pair as f64 / head_dim as f64);
        if length < trained / high {
            return 1.0;
        }
        if length > trained / low {
            return factor;
        }
        let kept = (trained / length - low) / (high - low);
        1.0 / ((1.0 - kept) / factor + kept)
    };
    // Of a wider head, no memory is asked for.
    (0..head_dim.min(1 << 16) / 2).map(divisor).collect()
}
