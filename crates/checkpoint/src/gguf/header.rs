//! The header of a GGUF file, which may claim anything: nothing is allocated that the file has not room for.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read};

use safetensors::Dtype;

use super::GgufValue;
use crate::folder::Source;
use crate::quantised::{BlockKind, Blocks, Coded};
use crate::{CheckpointError, TensorInfo};

/// How a file begins.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Most bytes of a header: vocabularies of 150,000 tokens and their merges take 8 MiB.
const MAX_BYTES: u64 = 64 << 20;
/// Most items of a list, and most tensors and keys.
const MAX_ITEMS: u64 = 1 << 22;
const MAX_TENSORS: u64 = 1 << 16;
const MAX_AXES: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// What a header says.
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, GgufValue>,
    pub(super) tensors: Vec<(String, TensorInfo)>,
}

/// Reads and checks a header.
pub(super) fn read(source: &Source, file: &str) -> Result<Header, CheckpointError> {
    let failed = |source| CheckpointError::Read {
        file: file.to_owned(),
        source,
    };
    let (reader, bytes) = source.open().map_err(failed)?;
    let mut reader = Reader {
        reader: BufReader::new(reader),
        left: bytes.min(MAX_BYTES),
        read: 0,
    };
    reader.header(bytes).map_err(|error| match error {
        Fault::Io(source) => failed(source),
        Fault::Format(reason) => CheckpointError::Gguf {
            file: file.to_owned(),
            reason,
        },
    })
}

/// Why a header cannot be had.
enum Fault {
    Io(io::Error),
    Format(String),
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Self::Format(reason)
    }
}

fn fault<T>(reason: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Format(reason.into()))
}

struct Reader<R> {
    reader: BufReader<R>,
    /// Bytes that the header may still have.
    left: u64,
    read: u64,
}

impl<R: Read> Reader<R> {
    fn header(&mut self, file_bytes: u64) -> Result<Header, Fault> {
        let magic: [u8; 4] = self.bytes()?;
        if &magic == b"vers" {
            return fault("it is a Git LFS pointer and not the file: git lfs pull");
        }
        if &magic != MAGIC {
            return fault("it does not begin as a GGUF file does");
        }
        match u32::from_le_bytes(self.bytes()?) {
            2 | 3 => {}
            version if version.swap_bytes() <= 3 => {
                return fault("it is big-endian, which is not supported");
            }
            version => return fault(format!("its version is {version}; 2 and 3 are supported")),
        }
        let tensors = self.count(MAX_TENSORS, "tensors")?;
        let keys = self.count(MAX_ITEMS, "keys")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let key = self.text()?;
            let kind = u32::from_le_bytes(self.bytes()?);
            let value = self.value(kind)?;
            if metadata.insert(key.clone(), value).is_some() {
                return fault(format!("it has the key {key:?} twice"));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(GgufValue::Integer(n)) => u64::try_from(*n).unwrap_or(0),
            Some(_) => 0,
        };
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return fault("general.alignment is no power of two that is possible");
        }
        let mut found = Vec::new();
        for _ in 0..tensors {
            found.push(self.tensor(alignment)?);
        }
        let start = self.read.next_multiple_of(alignment);
        for (name, info) in &mut found {
            info.shift(start);
            let stored = info.stored();
            let end = stored.offset.checked_add(stored.bytes);
            if end.is_none_or(|end| end > file_bytes) {
                return fault(format!(
                    "its tensor {name:?} ends behind the file: is the download complete?"
                ));
            }
        }
        Ok(Header {
            metadata,
            tensors: found,
        })
    }

    fn tensor(&mut self, alignment: u64) -> Result<(String, TensorInfo), Fault> {
        let name = self.text()?;
        let axes = u32::from_le_bytes(self.bytes()?);
        if axes > MAX_AXES {
            return fault(format!(
                "its tensor {name:?} has {axes} axes, {MAX_AXES} are possible"
            ));
        }
        let mut shape = Vec::new();
        for _ in 0..axes {
            let side = u64::from_le_bytes(self.bytes()?);
            let side = usize::try_from(side).ok().filter(|&side| side > 0);
            let Some(side) = side else {
                return fault(format!(
                    "its tensor {name:?} has an axis of no possible length"
                ));
            };
            shape.push(side);
        }
        // Fastest first in the file.
        shape.reverse();
        let kind = u32::from_le_bytes(self.bytes()?);
        let offset = u64::from_le_bytes(self.bytes()?);
        if offset % alignment != 0 {
            return fault(format!("its tensor {name:?} is not aligned"));
        }
        let info = tensor(kind, shape, offset);
        let info = info.map_err(|reason| format!("its tensor {name:?} {reason}"))?;
        Ok((name, info))
    }

    fn value(&mut self, kind: u32) -> Result<GgufValue, Fault> {
        Ok(match kind {
            6 => GgufValue::Float(f32::from_le_bytes(self.bytes()?).into()),
            12 => GgufValue::Float(f64::from_le_bytes(self.bytes()?)),
            8 => GgufValue::Text(self.text()?),
            9 => {
                let kind = u32::from_le_bytes(self.bytes()?);
                let count = self.count(MAX_ITEMS, "items of a list")?;
                self.list(kind, count)?
            }
            _ => GgufValue::Integer(self.integer(kind)?),
        })
    }

    fn list(&mut self, kind: u32, count: u64) -> Result<GgufValue, Fault> {
        let mut integers = Vec::new();
        let mut floats = Vec::new();
        let mut texts = Vec::new();
        for _ in 0..count {
            match kind {
                6 => floats.push(f32::from_le_bytes(self.bytes()?).into()),
                12 => floats.push(f64::from_le_bytes(self.bytes()?)),
                8 => texts.push(self.text()?),
                9 => return fault("it has lists of lists, which are not supported"),
                _ => match i64::try_from(self.integer(kind)?) {
                    Ok(integer) => integers.push(integer),
                    Err(_) => return fault("a list has integers that are too large"),
                },
            }
        }
        Ok(match kind {
            6 | 12 => GgufValue::Floats(floats),
            8 => GgufValue::Texts(texts),
            _ => GgufValue::Integers(integers),
        })
    }

    fn integer(&mut self, kind: u32) -> Result<i128, Fault> {
        Ok(match kind {
            0 | 7 => u8::from_le_bytes(self.bytes()?).into(),
            1 => i8::from_le_bytes(self.bytes()?).into(),
            2 => u16::from_le_bytes(self.bytes()?).into(),
            3 => i16::from_le_bytes(self.bytes()?).into(),
            4 => u32::from_le_bytes(self.bytes()?).into(),
            5 => i32::from_le_bytes(self.bytes()?).into(),
            10 => u64::from_le_bytes(self.bytes()?).into(),
            11 => i64::from_le_bytes(self.bytes()?).into(),
            _ => {
                return fault(format!(
                    "it has values of a kind ({kind}) that is not known"
                ));
            }
        })
    }

    fn text(&mut self) -> Result<String, Fault> {
        let length = u64::from_le_bytes(self.bytes()?);
        self.take(length)?;
        let mut text = vec![0; length as usize];
        self.reader.read_exact(&mut text).map_err(Fault::Io)?;
        // Tokens of some vocabularies are bytes that are no text.
        Ok(String::from_utf8(text)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    /// How many of something follow: no more than there is room for.
    fn count(&mut self, most: u64, what: &str) -> Result<u64, Fault> {
        let count = u64::from_le_bytes(self.bytes()?);
        match count <= most.min(self.left) {
            true => Ok(count),
            false => fault(format!(
                "it claims to have {count} {what}, more than are possible"
            )),
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        self.take(N as u64)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(Fault::Io)?;
        Ok(bytes)
    }

    fn take(&mut self, bytes: u64) -> Result<(), Fault> {
        let Some(left) = self.left.checked_sub(bytes) else {
            return fault(
                "its header ends behind the file, or is too long: is the download complete?",
            );
        };
        self.left = left;
        self.read += bytes;
        Ok(())
    }
}

/// A tensor of `ggml_type` `kind`, at an offset from the start of the data.
fn tensor(kind: u32, shape: Vec<usize>, offset: u64) -> Result<TensorInfo, String> {
    let elements = shape
        .iter()
        .try_fold(1_u64, |all, &side| all.checked_mul(side as u64));
    let too_large = || "is larger than any file".to_owned();
    let elements = elements.ok_or_else(too_large)?;
    let plain = match kind {
        0 => Some(Dtype::F32),
        1 => Some(Dtype::F16),
        30 => Some(Dtype::BF16),
        _ => None,
    };
    let dtype = plain.unwrap_or(Dtype::F32);
    let bytes = elements
        .checked_mul(dtype.bitsize() as u64 / 8)
        .ok_or_else(too_large)?;
    let coded = match plain {
        Some(_) => None,
        None => {
            let kind = BlockKind::of(kind)?;
            let columns = shape.last().copied().unwrap_or(1);
            Some(Box::new(Coded::Blocks(Blocks::new(
                kind, columns, elements, offset,
            )?)))
        }
    };
    Ok(TensorInfo {
        dtype,
        shape,
        bytes,
        shard: 0,
        // A tensor that is made while it is read begins at its own start.
        offset: if plain.is_some() { offset } else { 0 },
        coded,
    })
}

impl TensorInfo {
    /// Moves it on in its file.
    fn shift(&mut self, bytes: u64) {
        match self.coded.as_deref_mut() {
            Some(Coded::Blocks(blocks)) => {
                let stored = blocks.stored_mut();
                stored.offset = stored.offset.saturating_add(bytes);
            }
            _ => self.offset = self.offset.saturating_add(bytes),
        }
    }

    /// What lies in the file.
    fn stored(&self) -> &TensorInfo {
        match self.coded.as_deref() {
            Some(Coded::Blocks(blocks)) => blocks.stored(),
            _ => self,
        }
    }
}
