//! Everything that does not fit, collected and told at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use safetensors::Dtype;

/// Items of one kind that a message lists; the rest is counted.
const SHOWN: usize = 20;
/// Characters of a name from outside that a message shows.
const NAME_CHARS: usize = 120;

/// How the weights of a checkpoint and the parameters of a module differ.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModuleMismatch {
    /// Names in the files that no parameter answers to.
    pub unknown: Vec<String>,
    /// Paths of parameters for which no tensor was found.
    pub missing: Vec<String>,
    /// Parameters for which several tensors were found.
    pub duplicate: Vec<Duplicate>,
    /// Tensors whose shape is not the parameter's.
    pub misshapen: Vec<Misshapen>,
    /// Tensors whose elements are not f32, f16 or bf16.
    pub unreadable: Vec<Unreadable>,
}

/// A parameter that is in the files more than once, under different names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Duplicate {
    /// Path of the parameter.
    pub path: String,
    /// Names of the tensors.
    pub names: Vec<String>,
}

/// A tensor that has another shape than its parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misshapen {
    /// Name of the tensor.
    pub name: String,
    /// Shape in the file.
    pub found: Vec<usize>,
    /// Shape that the parameter needs in the file.
    pub expected: Vec<usize>,
}

/// A tensor of a type that cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Name of the tensor.
    pub name: String,
    /// Type in the file.
    pub dtype: Dtype,
}

impl ModuleMismatch {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl ModuleMismatch {
    /// Tells everything, under these headings: that of the whole, and one for each kind.
    pub(crate) fn describe(&self, f: &mut fmt::Formatter<'_>, headings: &[&str; 6]) -> fmt::Result {
        let [whole, unknown, missing, duplicate, misshapen, unreadable] = headings;
        f.write_str(whole)?;
        list(f, unknown, &self.unknown, |name| quoted(name))?;
        list(f, missing, &self.missing, Clone::clone)?;
        list(f, duplicate, &self.duplicate, |found| {
            let names: Vec<_> = found.names.iter().map(|name| quoted(name)).collect();
            format!("{}: {}", found.path, names.join(" and "))
        })?;
        list(f, misshapen, &self.misshapen, |found| {
            let name = quoted(&found.name);
            format!("{name} is {:?}, not {:?}", found.found, found.expected)
        })?;
        list(f, unreadable, &self.unreadable, |found| {
            format!("{} is {}", quoted(&found.name), found.dtype)
        })
    }
}

impl fmt::Display for ModuleMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.describe(
            f,
            &[
                "the weights do not fit the model that config.json describes",
                "tensors the model does not know (is the checkpoint of another family, or does it hold \
                 adapters or quantisation data? merge or dequantise it first)",
                "parameters without a tensor (is the download complete?)",
                "parameters with more than one tensor (save the checkpoint again, with each weight once)",
                "tensors of the wrong shape (config.json and the weights disagree: take both from the \
                 same download)",
                "tensors that are not F32, F16 or BF16 (dequantise the checkpoint, or save it as one of \
                 these)",
            ],
        )
    }
}

/// How a shard index and the files it lists differ.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexMismatch {
    /// Path of the index.
    pub index: String,
    /// Tensors that are not in the file in which the index puts them.
    pub not_stored: Vec<Disagreement>,
    /// Tensors that are in a file though the index does not say so.
    pub not_listed: Vec<Disagreement>,
    /// Tensors that are in a second file, besides the one in which the index puts them.
    pub duplicate: Vec<Disagreement>,
}

/// A tensor and a file that do not belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disagreement {
    /// Name of the tensor.
    pub tensor: String,
    /// Name of the file.
    pub shard: String,
}

impl IndexMismatch {
    /// Compares where an index puts tensors with where they are, tensor before file. `index` is its
    /// path.
    pub fn check<'a>(
        index: String,
        listed: &BTreeMap<&'a str, &'a str>,
        stored: &BTreeSet<(&'a str, &'a str)>,
    ) -> Result<(), Box<Self>> {
        let mut mismatch = Self {
            index,
            ..Self::default()
        };
        for (&tensor, &shard) in listed {
            if !stored.contains(&(tensor, shard)) {
                mismatch.not_stored.push(Disagreement::new(tensor, shard));
            }
        }
        for &(tensor, shard) in stored {
            let found = Disagreement::new(tensor, shard);
            match listed.get(tensor) {
                Some(&home) if home == shard => {}
                Some(&home) if stored.contains(&(tensor, home)) => mismatch.duplicate.push(found),
                _ => mismatch.not_listed.push(found),
            }
        }
        match mismatch.not_stored.is_empty()
            && mismatch.not_listed.is_empty()
            && mismatch.duplicate.is_empty()
        {
            true => Ok(()),
            false => Err(Box::new(mismatch)),
        }
    }
}

impl Disagreement {
    fn new(tensor: impl Into<String>, shard: impl Into<String>) -> Self {
        Self {
            tensor: tensor.into(),
            shard: shard.into(),
        }
    }
}

impl fmt::Display for IndexMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} and the files it lists disagree: download the checkpoint again, all files from one \
             revision",
            self.index
        )?;
        let item = |found: &Disagreement| {
            let (tensor, shard) = (quoted(&found.tensor), quoted(&found.shard));
            format!("{tensor} in {shard}")
        };
        list(f, "listed, but not in the file", &self.not_stored, item)?;
        list(f, "in the file, but not listed", &self.not_listed, item)?;
        list(f, "in a second file", &self.duplicate, item)
    }
}

/// Writes a count, a heading and the first items.
fn list<T>(
    f: &mut fmt::Formatter<'_>,
    heading: &str,
    items: &[T],
    show: impl Fn(&T) -> String,
) -> fmt::Result {
    if items.is_empty() {
        return Ok(());
    }
    write!(f, "\n{} {heading}:", items.len())?;
    for item in items.iter().take(SHOWN) {
        write!(f, "\n  {}", show(item))?;
    }
    match items.len().checked_sub(SHOWN) {
        None | Some(0) => Ok(()),
        Some(more) => write!(f, "\n  and {more} more"),
    }
}

/// A name from outside, harmless to a terminal and of bounded length.
pub(crate) fn quoted(name: &str) -> String {
    let end = name.char_indices().nth(NAME_CHARS).map(|(end, _)| end);
    match end.and_then(|end| name.get(..end)) {
        Some(start) => format!("{:?}", format!("{start}…")),
        None => format!("{name:?}"),
    }
}

/// A value from outside that is JSON, and so without control characters, as far as it is shown.
pub(crate) fn shortened(value: &str) -> String {
    match value.char_indices().nth(NAME_CHARS) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

/// Names from outside, side by side.
pub(crate) fn list_of(names: &[String]) -> String {
    let quoted: Vec<String> = names.iter().take(SHOWN).map(|name| quoted(name)).collect();
    quoted.join(", ")
}
