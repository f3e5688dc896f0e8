//! The header of one safetensors file, read without the data behind it.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::Read;
use std::marker::PhantomData;

use safetensors::tensor::{self, Metadata};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::burnpack::Contents;
use crate::folder::Source;
use crate::{CheckpointError, TensorInfo};

/// Limit of the format itself, in bytes.
pub(crate) const HEADER_MAX_BYTES: u64 = 100_000_000;
/// The header follows its own length, a little-endian u64.
const PREFIX_BYTES: u64 = 8;

/// Reads and checks a header: tensors lie back to back behind it to the end of the file, each as
/// long as its shape and dtype say. `file` is the file's path, for messages.
pub(crate) fn read(source: &Source, file: &str) -> Result<Contents, CheckpointError> {
    let (json, file_bytes) = read_json(source, file)?;
    let metadata = parse(&json, file)?;
    let data_start = PREFIX_BYTES + json.len() as u64;
    check_length(
        file,
        data_start.saturating_add(metadata.data_len() as u64),
        file_bytes,
    )?;
    let tensors = metadata.tensors().into_iter().map(|(name, info)| {
        let (start, end) = info.data_offsets;
        let info = TensorInfo {
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes: (end - start) as u64,
            shard: 0,
            offset: data_start + start as u64,
            coded: None,
        };
        (name, info)
    });
    let notes = metadata.metadata().clone().unwrap_or_default();
    Ok(Contents {
        tensors: tensors.collect(),
        notes: notes.into_iter().collect(),
    })
}

/// A file must be exactly as long as its header says.
pub(crate) fn check_length(
    file: &str,
    expected_bytes: u64,
    file_bytes: u64,
) -> Result<(), CheckpointError> {
    if expected_bytes == file_bytes {
        return Ok(());
    }
    Err(CheckpointError::FileLength {
        file: file.to_owned(),
        expected_bytes,
        file_bytes,
    })
}

/// The header's JSON text, and the length of the file in bytes.
fn read_json(source: &Source, file: &str) -> Result<(Vec<u8>, u64), CheckpointError> {
    let failed = |source| CheckpointError::Read {
        file: file.to_owned(),
        source,
    };
    let (mut reader, file_bytes) = source.open().map_err(failed)?;
    let mut prefix = [0; PREFIX_BYTES as usize];
    if file_bytes >= PREFIX_BYTES {
        reader.read_exact(&mut prefix).map_err(failed)?;
    }
    let header_bytes = u64::from_le_bytes(prefix);
    let available_bytes = file_bytes.saturating_sub(PREFIX_BYTES);
    if header_bytes == 0 || header_bytes > available_bytes.min(HEADER_MAX_BYTES) {
        return Err(CheckpointError::HeaderLength {
            file: file.to_owned(),
            header_bytes,
            available_bytes,
        });
    }
    // `take` instead of a buffer of the claimed size: only bytes that exist are allocated.
    let mut json = Vec::new();
    let mut header = reader.take(header_bytes);
    header.read_to_end(&mut json).map_err(failed)?;
    Ok((json, file_bytes))
}

/// Parses the JSON and lets [`Metadata::new`] check offsets, shapes and dtypes.
fn parse(json: &[u8], file: &str) -> Result<Metadata, CheckpointError> {
    let not_json = |source| CheckpointError::HeaderJson {
        file: file.to_owned(),
        source,
    };
    let entries: Entries<&RawValue> = serde_json::from_slice(json).map_err(not_json)?;
    if let Some(name) = entries.first_duplicate() {
        return Err(CheckpointError::DuplicateKey {
            file: file.to_owned(),
            key: name.to_owned(),
        });
    }
    let mut notes: Option<HashMap<String, String>> = None;
    let mut tensors = Vec::with_capacity(entries.0.len());
    for (name, value) in entries.0 {
        if name == "__metadata__" {
            notes = Some(serde_json::from_str(value.get()).map_err(not_json)?);
        } else {
            let info: tensor::TensorInfo = serde_json::from_str(value.get()).map_err(not_json)?;
            tensors.push((name, info));
        }
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Metadata::new(notes, tensors).map_err(|source| CheckpointError::Header {
        file: file.to_owned(),
        source,
    })
}

/// A JSON object as written, where a map would silently keep the last of equal keys.
#[derive(Debug)]
pub(crate) struct Entries<V>(pub(crate) Vec<(String, V)>);

impl<V> Entries<V> {
    /// The first key that occurs a second time.
    pub(crate) fn first_duplicate(&self) -> Option<&str> {
        let mut seen = HashSet::with_capacity(self.0.len());
        let mut keys = self.0.iter().map(|(key, _)| key.as_str());
        keys.find(|key| !seen.insert(*key))
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Collect<V> {
            type Value = Entries<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Collect(PhantomData))
    }
}
