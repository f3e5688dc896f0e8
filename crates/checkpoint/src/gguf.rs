//! GGUF files (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3): what one says of
//! itself, and its tensors, whose blocks of fewer bits are widened row by row while they are read.
//!
//! A language model and its tower (`mmproj`) are shown as the folder that they would be on Hugging Face
//! (`model.rs`), so that nothing else needs to know of GGUF: configuration and tokenizer are made of what the
//! files say, tensors have the names of Hugging Face, rows that llama.cpp has in an order of its own are put
//! back while they are read.
//!
//! The reader is our own: those of other crates read a header without a limit on what it may claim, or bring a
//! second library of tensors along.

mod header;
mod keys;
mod language;
mod model;
mod names;
mod template;
mod tower;
mod vocabulary;

use std::collections::BTreeMap;

use crate::shards::Shards;
use crate::{CheckpointError, Folder, json_bytes};
use keys::Keys;
use vocabulary::Vocabulary;

pub(crate) use model::is_gguf;
pub use template::template_with_images;

/// Why a file is refused.
type Refused = String;

/// A value of a GGUF file's metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// Any integer; booleans are 0 and 1.
    Integer(i128),
    /// A number with a fraction.
    Float(f64),
    /// A text.
    Text(String),
    /// Integers.
    Integers(Vec<i64>),
    /// Numbers with fractions.
    Floats(Vec<f64>),
    /// Texts.
    Texts(Vec<String>),
}

/// A GGUF file, or the parts that one was split into.
#[derive(Debug)]
pub struct Gguf {
    /// What it says of itself: `general.architecture`, `tokenizer.ggml.tokens`, … Of a split one, the first
    /// part says it.
    pub metadata: BTreeMap<String, GgufValue>,
    /// Its tensors, under its names (`blk.0.attn_q.weight`); shapes are slowest axis first, `[out, in]`.
    pub tensors: Shards,
    /// Where it is, for messages.
    file: String,
}

impl Gguf {
    /// Opens a file of a folder. Of a split one, `name` is that of the first part
    /// (`…-00001-of-00003.gguf`); the others must lie beside it.
    ///
    /// # Errors
    /// [`CheckpointError::Gguf`] if it is broken or of a kind that is not read,
    /// [`CheckpointError::MissingFile`] for a part that is not there.
    pub fn open(folder: &Folder, name: &str) -> Result<Self, CheckpointError> {
        let refuse = |reason: String| CheckpointError::Gguf {
            file: folder.path_of(name),
            reason,
        };
        let mut tensors = Shards::empty();
        let metadata = tensors.add_gguf(folder, name)?;
        let number = |key: &str| match metadata.get(key) {
            Some(GgufValue::Integer(number)) => usize::try_from(*number).ok(),
            _ => None,
        };
        let parts = number("split.count").unwrap_or(1);
        if parts > 1 {
            let names = part_names(name, parts).map_err(refuse)?;
            for part in names {
                tensors.add_gguf(folder, &part)?;
            }
            let count = tensors.names().count();
            if number("split.tensors.count").is_some_and(|said| said != count) {
                let reason = format!("its parts have {count} tensors, not as many as it says");
                return Err(refuse(reason));
            }
        }
        Ok(Self {
            metadata,
            tensors,
            file: folder.path_of(name),
        })
    }

    /// The `tokenizer.json` that its vocabulary would be on Hugging Face.
    ///
    /// # Errors
    /// [`CheckpointError::Gguf`] if it has none, or one of a kind that is not read.
    pub fn tokenizer(&self) -> Result<Vec<u8>, CheckpointError> {
        let vocabulary = Vocabulary::new(Keys::new(&self.metadata));
        let tokenizer = vocabulary.and_then(|vocabulary| vocabulary.tokenizer());
        let tokenizer = tokenizer.map_err(|reason| self.refuse(reason))?;
        Ok(json_bytes(&tokenizer))
    }

    fn refuse(&self, reason: Refused) -> CheckpointError {
        CheckpointError::Gguf {
            file: self.file.clone(),
            reason,
        }
    }
}

/// Most parts of a file.
const MAX_PARTS: usize = 1000;

/// Names of the parts behind the first.
fn part_names(first: &str, parts: usize) -> Result<impl Iterator<Item = String> + use<>, String> {
    let stem = first.strip_suffix(&format!("-00001-of-{parts:05}.gguf"));
    match stem {
        Some(stem) if parts <= MAX_PARTS => {
            let stem = stem.to_owned();
            Ok((2..=parts).map(move |part| format!("{stem}-{part:05}-of-{parts:05}.gguf")))
        }
        _ => Err(format!(
            "it is one of {parts} parts, which have to be called as they were published: give the first, whose name \
             ends with -00001-of-{parts:05}.gguf"
        )),
    }
}

impl Shards {
    /// Adds the tensors of a file; returns what it says of itself.
    fn add_gguf(
        &mut self,
        folder: &Folder,
        name: &str,
    ) -> Result<BTreeMap<String, GgufValue>, CheckpointError> {
        let file = folder.path_of(name);
        let source = folder.locate(name)?;
        let header = header::read(&source, &file)?;
        let shard = self.push("GGUF", file.clone(), source);
        for (tensor, mut info) in header.tensors {
            info.shard = shard;
            if self.insert(tensor.clone(), info).is_some() {
                return Err(CheckpointError::DuplicateKey { file, key: tensor });
            }
        }
        Ok(header.metadata)
    }
}
