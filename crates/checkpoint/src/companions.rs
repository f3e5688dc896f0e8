//! The small files beside the weights, without which nothing opens a checkpoint.

use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use crate::{CheckpointError, Folder, TOKENIZER_MAX_BYTES};

/// Name of the file that says what model a checkpoint is of.
pub const CONFIG: &str = "config.json";
/// What tokenizers, templates and preprocessors are kept in.
const EXTENSIONS: [&str; 4] = ["jinja", "json", "model", "txt"];
/// Config keys that name the type of the weights, in old libraries and new.
const DTYPE_KEYS: [&str; 2] = ["torch_dtype", "dtype"];

/// Names of small files, sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Companions {
    /// Those that go wherever the weights go, as they are.
    pub names: Vec<String>,
    /// Those that are longer than anything that opens a checkpoint reads.
    pub too_large: Vec<String>,
}

impl Folder {
    /// The small files of this folder, but for `config.json`.
    ///
    /// # Errors
    /// [`CheckpointError::OpenFolder`] of a folder that cannot be listed.
    pub fn companions(&self) -> Result<Companions, CheckpointError> {
        let mut found = Companions::default();
        for (name, bytes) in self.files()? {
            let extension = Path::new(&name).extension().and_then(|end| end.to_str());
            let is_companion = extension.is_some_and(|end| EXTENSIONS.contains(&end))
                && name != CONFIG
                && !name.ends_with(".index.json");
            match is_companion {
                true if bytes > TOKENIZER_MAX_BYTES => found.too_large.push(name),
                true => found.names.push(name),
                false => {}
            }
        }
        found.names.sort();
        found.too_large.sort();
        Ok(found)
    }
}

/// Says the new type of the weights, F32, F16 or BF16, wherever a config names it.
pub fn set_dtype(config: &mut Value, dtype: Dtype) {
    let name = match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    };
    let Value::Object(object) = config else {
        return;
    };
    for (key, value) in object {
        if DTYPE_KEYS.contains(&key.as_str()) {
            *value = name.into();
        } else {
            set_dtype(value, dtype);
        }
    }
}

/// The type of the weights that a config names, at the top or for its text model.
pub fn dtype_of(config: &Value) -> Option<Dtype> {
    let places = [config, &config["text_config"]].into_iter();
    let mut said = places.flat_map(|place| DTYPE_KEYS.map(|key| place[key].as_str()));
    match said.find_map(|name| name)? {
        "float16" => Some(Dtype::F16),
        "bfloat16" => Some(Dtype::BF16),
        "float32" => Some(Dtype::F32),
        _ => None,
    }
}

/// Takes out how weights are quantised: those that are written are not.
pub fn forget_quantization(config: &mut Value) {
    if let Value::Object(object) = config {
        object.remove("quantization_config");
    }
}

/// A JSON file, as people read it.
pub fn json_bytes(value: &Value) -> Vec<u8> {
    let mut text = format!("{value:#}").into_bytes();
    text.push(b'\n');
    text
}
