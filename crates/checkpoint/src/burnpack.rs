//! The header of one Burnpack file, Burn's own format, read without the data behind it.
//!
//! A file is: the magic number, a version and the length of the header (10 bytes, little-endian),
//! the header in CBOR, and the tensors, each at a multiple of [`ALIGNMENT`] bytes
//! (`burn-store` 0.21, module `burnpack`).

use std::collections::BTreeMap;
use std::io::Read;

use burn::tensor::{BoolStore, DType};
use safetensors::Dtype;
use serde::Deserialize;

use crate::folder::Source;
use crate::header::{Entries, check_length};
use crate::{CheckpointError, TensorInfo};

/// "BURN", which a little-endian file begins with backwards.
pub(crate) const MAGIC: u32 = 0x4255_524e;
pub(crate) const VERSION: u16 = 1;
/// Magic number, version and length of the header.
pub(crate) const PREFIX_BYTES: u64 = 10;
/// What the position of every tensor is a multiple of, in bytes: any element type may be mapped.
pub(crate) const ALIGNMENT: u64 = 256;
/// Limit of the format itself, in bytes.
pub(crate) const HEADER_MAX_BYTES: u64 = 100 << 20;
/// More levels than a header has are refused.
const MAX_DEPTH: usize = 16;

#[derive(Deserialize)]
struct Header {
    tensors: Entries<Descriptor>,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
}

/// What a header says.
pub(crate) struct Contents {
    pub(crate) tensors: Vec<(String, TensorInfo)>,
    /// Notes of whoever wrote the file.
    pub(crate) notes: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Descriptor {
    dtype: DType,
    shape: Vec<u64>,
    /// First byte and the one after the last, from the start of the data.
    data_offsets: (u64, u64),
}

/// Reads and checks a header: behind it, tensors lie as close as their alignment allows to the end
/// of the file, each as long as its shape and dtype say. `file` is the file's path, for messages.
pub(crate) fn read(source: &Source, file: &str) -> Result<Contents, CheckpointError> {
    let (cbor, file_bytes) = read_cbor(source, file)?;
    let header: Header = ciborium::de::from_reader_with_recursion_limit(&cbor[..], MAX_DEPTH)
        .map_err(|source| CheckpointError::BurnpackHeader {
            file: file.to_owned(),
            source,
        })?;
    if let Some(name) = header.tensors.first_duplicate() {
        return Err(CheckpointError::DuplicateKey {
            file: file.to_owned(),
            key: name.to_owned(),
        });
    }
    let data_start = data_start(cbor.len() as u64);
    let mut tensors = header.tensors.0;
    tensors.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let mut end = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let info = tensor.check(end, data_start);
        let info = info.map_err(|problem| CheckpointError::BurnpackTensor {
            file: file.to_owned(),
            name: name.clone(),
            problem,
        })?;
        end = tensor.data_offsets.1;
        infos.push((name, info));
    }
    check_length(file, data_start.saturating_add(end), file_bytes)?;
    Ok(Contents {
        tensors: infos,
        notes: header.metadata,
    })
}

/// Where the data begins behind a header of so many bytes.
pub(crate) fn data_start(header_bytes: u64) -> u64 {
    (PREFIX_BYTES + header_bytes).next_multiple_of(ALIGNMENT)
}

/// The header's CBOR, and the length of the file in bytes.
fn read_cbor(source: &Source, file: &str) -> Result<(Vec<u8>, u64), CheckpointError> {
    let failed = |source| CheckpointError::Read {
        file: file.to_owned(),
        source,
    };
    let (reader, file_bytes) = source.open().map_err(failed)?;
    // `take` instead of buffers of the claimed sizes: only bytes that exist are allocated.
    let mut prefix = Vec::new();
    let mut reader = reader.take(PREFIX_BYTES);
    reader.read_to_end(&mut prefix).map_err(failed)?;
    let header_bytes = match prefix.split_first_chunk::<6>() {
        Some((start, length)) if *start == prefix_start() => {
            length.try_into().map(u32::from_le_bytes).ok()
        }
        _ => None,
    };
    let header_bytes = header_bytes
        .map(u64::from)
        .filter(|&bytes| bytes <= HEADER_MAX_BYTES && PREFIX_BYTES + bytes <= file_bytes);
    let header_bytes = header_bytes.ok_or_else(|| CheckpointError::NotBurnpack {
        file: file.to_owned(),
    })?;
    let mut cbor = Vec::new();
    let mut reader = reader.into_inner().take(header_bytes);
    reader.read_to_end(&mut cbor).map_err(failed)?;
    Ok((cbor, file_bytes))
}

/// What every file begins with.
pub(crate) fn prefix_start() -> [u8; 6] {
    let mut start = [0; 6];
    start[..4].copy_from_slice(&MAGIC.to_le_bytes());
    start[4..].copy_from_slice(&VERSION.to_le_bytes());
    start
}

impl Descriptor {
    /// `end` is where the tensor before this one ends.
    fn check(&self, end: u64, data_start: u64) -> Result<TensorInfo, String> {
        let dtype = stored_dtype(self.dtype)
            .ok_or_else(|| format!("has elements of type {:?}, which is not read", self.dtype))?;
        let (start, stop) = self.data_offsets;
        let needed = self
            .shape
            .iter()
            .try_fold(dtype.bitsize() as u64 / 8, |bytes, &axis| {
                bytes.checked_mul(axis)
            });
        let shape = self.shape.iter().map(|&axis| usize::try_from(axis).ok());
        let shape: Option<Vec<usize>> = shape.collect();
        let offset = data_start.checked_add(start);
        let (Some(needed), Some(shape), Some(offset)) = (needed, shape, offset) else {
            return Err("is larger than any file".to_owned());
        };
        if end.checked_next_multiple_of(ALIGNMENT) != Some(start) {
            return Err(format!(
                "begins at {start}, the one before it ends at {end}"
            ));
        }
        if stop.checked_sub(start) != Some(needed) {
            return Err(format!("lies in {start}..{stop}, but needs {needed} bytes"));
        }
        Ok(TensorInfo {
            dtype,
            shape,
            bytes: needed,
            shard: 0,
            offset,
            coded: None,
        })
    }
}

/// The element types that both formats have.
const DTYPES: [(DType, Dtype); 13] = [
    (DType::F64, Dtype::F64),
    (DType::F32, Dtype::F32),
    (DType::F16, Dtype::F16),
    (DType::BF16, Dtype::BF16),
    (DType::I64, Dtype::I64),
    (DType::I32, Dtype::I32),
    (DType::I16, Dtype::I16),
    (DType::I8, Dtype::I8),
    (DType::U64, Dtype::U64),
    (DType::U32, Dtype::U32),
    (DType::U16, Dtype::U16),
    (DType::U8, Dtype::U8),
    (DType::Bool(BoolStore::Native), Dtype::BOOL),
];

pub(crate) fn stored_dtype(dtype: DType) -> Option<Dtype> {
    let found = DTYPES.iter().find(|(burn, _)| *burn == dtype);
    found.map(|(_, stored)| *stored)
}

pub(crate) fn burn_dtype(dtype: Dtype) -> Option<DType> {
    let found = DTYPES.iter().find(|(_, stored)| *stored == dtype);
    found.map(|(burn, _)| *burn)
}
