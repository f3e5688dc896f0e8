//! The small files beside the weights, without which nothing opens a checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use reroute_checkpoint::{CONFIG_MAX_BYTES, Dtype, Folder, TOKENIZER_MAX_BYTES};
use serde_json::Value;

use crate::ConvertError;

pub(crate) const CONFIG: &str = "config.json";
/// What tokenizers, templates and preprocessors are kept in.
const EXTENSIONS: [&str; 4] = ["jinja", "json", "model", "txt"];
/// Config keys that name the type of the weights, in old libraries and new.
const DTYPE_KEYS: [&str; 2] = ["torch_dtype", "dtype"];

/// Files that go into the target folder as they are.
#[derive(Debug, Default)]
pub(crate) struct Companions {
    /// Name → the folder it is copied from.
    copied: BTreeMap<String, PathBuf>,
    /// Name → content.
    pub(crate) made: BTreeMap<String, Vec<u8>>,
    /// Files that are longer than anything that opens a checkpoint reads.
    pub(crate) left_out: Vec<PathBuf>,
}

impl Companions {
    /// Takes over the small files of a folder that are wanted, but not its config; files of earlier
    /// folders stay.
    pub(crate) fn add(
        &mut self,
        path: &Path,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(), ConvertError> {
        let entries = path.read_dir().map_err(ConvertError::io(path))?;
        for entry in entries {
            let entry = entry.map_err(ConvertError::io(path))?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let extension = Path::new(&name).extension().and_then(|end| end.to_str());
            let is_companion = extension.is_some_and(|end| EXTENSIONS.contains(&end))
                && name != CONFIG
                && !name.ends_with(".index.json")
                && wanted(&name)
                && entry.path().is_file();
            let bytes = || entry.path().metadata().map_or(0, |metadata| metadata.len());
            if is_companion && bytes() > TOKENIZER_MAX_BYTES {
                self.left_out.push(entry.path());
            } else if is_companion {
                self.copied
                    .entry(name)
                    .or_insert_with(|| path.to_path_buf());
            }
        }
        Ok(())
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.copied
            .keys()
            .chain(self.made.keys())
            .map(String::as_str)
    }

    /// Paths of the files that are copied.
    pub(crate) fn sources(&self) -> impl Iterator<Item = PathBuf> {
        self.copied.iter().map(|(name, path)| path.join(name))
    }

    /// Name and content of every file, the config last: a folder with a config is complete.
    pub(crate) fn contents(&self) -> impl Iterator<Item = Result<(&str, Vec<u8>), ConvertError>> {
        let copied = self.copied.iter().map(|(name, path)| {
            let content = Folder::open(path)?.read(name, TOKENIZER_MAX_BYTES)?;
            Ok((name.as_str(), content))
        });
        let made = self
            .made
            .iter()
            .map(|(name, content)| Ok((name.as_str(), content.clone())));
        let (config, made): (Vec<_>, Vec<_>) =
            made.partition(|file: &Result<(&str, _), _>| matches!(file, Ok((CONFIG, _))));
        copied.chain(made).chain(config)
    }
}

/// Reads `config.json`.
pub(crate) fn read_config(folder: &Folder) -> Result<Value, ConvertError> {
    Ok(folder.read_json(CONFIG, CONFIG_MAX_BYTES)?)
}

/// Says the new type of the weights, wherever a config names it.
pub(crate) fn set_dtype(config: &mut Value, dtype: Dtype) {
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
