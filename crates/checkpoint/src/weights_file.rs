//! How one file of weights is laid out, known before the first tensor is written.

use std::collections::BTreeMap;

use burn::tensor::DType;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;

use crate::burnpack::{self, ALIGNMENT, HEADER_MAX_BYTES};
use crate::header;

/// Spaces that make a safetensors header a multiple of 8 bytes.
const SAFETENSORS_ALIGNMENT: usize = 8;

/// The kinds of files that weights are written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Burn's own: tensors are aligned, and can be mapped into memory instead of read.
    Burnpack,
    /// Hugging Face's.
    Safetensors,
}

/// A tensor that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTensor {
    /// Name in the file.
    pub name: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Length of every axis, slowest first.
    pub shape: Vec<usize>,
}

/// The layout of one file: the header, then every tensor at its offset, zeros between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightsFile {
    /// The first bytes of the file.
    pub header: Vec<u8>,
    /// Where every tensor begins, in bytes from the start of the file, ascending.
    pub offsets: Vec<u64>,
    /// Length of the file, in bytes.
    pub bytes: u64,
}

/// Why a file of weights cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The format has no such elements.
    #[error(
        "tensor {name:?} has elements of type {dtype}, which Burnpack does not have; convert to safetensors"
    )]
    Dtype {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: Dtype,
    },

    /// Sizes overflow.
    #[error(
        "tensor {name:?} of shape {shape:?} is larger than any file; the checkpoint is damaged"
    )]
    Size {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },

    /// There are too many tensors or their names are too long.
    #[error("the header would be longer than the format allows; write several files (--format hf)")]
    Header,
}

impl NewTensor {
    /// Size of the data, in bytes.
    pub fn bytes(&self) -> Result<u64, LayoutError> {
        let mut axes = self.shape.iter();
        // In bits, because some types have less than a byte.
        let bits = axes.try_fold(self.dtype.bitsize(), |bits, &axis| bits.checked_mul(axis));
        let too_large = || LayoutError::Size {
            name: self.name.clone(),
            shape: self.shape.clone(),
        };
        bits.map(|bits| bits as u64 / 8).ok_or_else(too_large)
    }
}

impl WeightsFile {
    /// Lays out tensors of different names in the order given.
    pub fn new(format: Format, tensors: &[NewTensor]) -> Result<Self, LayoutError> {
        Self::with_notes(format, tensors, &BTreeMap::new())
    }

    /// The same with notes in the header, for whoever reads it.
    pub fn with_notes(
        format: Format,
        tensors: &[NewTensor],
        notes: &BTreeMap<String, String>,
    ) -> Result<Self, LayoutError> {
        let alignment = match format {
            Format::Burnpack => ALIGNMENT,
            Format::Safetensors => 1,
        };
        let mut end = 0_u64;
        let mut extents = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let bytes = tensor.bytes()?;
            let start = end.next_multiple_of(alignment);
            end = start.checked_add(bytes).ok_or_else(|| LayoutError::Size {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
            })?;
            extents.push((start, end));
        }
        let header = match format {
            Format::Burnpack => burnpack_header(tensors, &extents, notes)?,
            Format::Safetensors => safetensors_header(tensors, &extents, notes)?,
        };
        let data_start = header.len() as u64;
        Ok(Self {
            offsets: extents
                .iter()
                .map(|(start, _)| data_start + start)
                .collect(),
            bytes: data_start.saturating_add(end),
            header,
        })
    }
}

#[derive(Serialize)]
struct BurnpackHeader<'a> {
    tensors: BTreeMap<&'a str, BurnpackTensor<'a>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct BurnpackTensor<'a> {
    dtype: DType,
    shape: &'a [usize],
    data_offsets: (u64, u64),
}

fn burnpack_header(
    tensors: &[NewTensor],
    extents: &[(u64, u64)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, LayoutError> {
    let entries = tensors.iter().zip(extents).map(|(tensor, &data_offsets)| {
        let dtype = burnpack::burn_dtype(tensor.dtype);
        let dtype = dtype.ok_or_else(|| LayoutError::Dtype {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
        })?;
        let shape = &tensor.shape;
        Ok((
            tensor.name.as_str(),
            BurnpackTensor {
                dtype,
                shape,
                data_offsets,
            },
        ))
    });
    let header = BurnpackHeader {
        tensors: entries.collect::<Result<_, LayoutError>>()?,
        metadata,
    };
    let mut cbor = Vec::new();
    ciborium::into_writer(&header, &mut cbor).map_err(|_| LayoutError::Header)?;
    let length = u32::try_from(cbor.len()).ok();
    let length = length.filter(|&length| u64::from(length) <= HEADER_MAX_BYTES);
    let length = length.ok_or(LayoutError::Header)?;
    let mut bytes = burnpack::prefix_start().to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(&cbor);
    bytes.resize(burnpack::data_start(cbor.len() as u64) as usize, 0);
    Ok(bytes)
}

fn safetensors_header(
    tensors: &[NewTensor],
    extents: &[(u64, u64)],
    notes: &BTreeMap<String, String>,
) -> Result<Vec<u8>, LayoutError> {
    let entries = tensors.iter().zip(extents).map(|(tensor, &(start, end))| {
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            data_offsets: (start as usize, end as usize),
        };
        (tensor.name.clone(), info)
    });
    let metadata = Metadata::new(None, entries.collect());
    let metadata = metadata.map_err(|_| LayoutError::Header)?;
    let tensors = serde_json::to_string(&metadata).map_err(|_| LayoutError::Header)?;
    // What transformers asks for before it loads a file.
    let format = ("format".to_owned(), "pt".to_owned());
    // In the same order whenever they are written.
    let notes: BTreeMap<_, _> = notes.clone().into_iter().chain([format]).collect();
    let notes = serde_json::to_string(&notes).map_err(|_| LayoutError::Header)?;
    let rest = tensors.strip_prefix('{').unwrap_or_default();
    let comma = if rest == "}" { "" } else { "," };
    let mut json = format!(r#"{{"__metadata__":{notes}{comma}{rest}"#).into_bytes();
    json.resize(json.len().next_multiple_of(SAFETENSORS_ALIGNMENT), b' ');
    if json.len() as u64 > header::HEADER_MAX_BYTES {
        return Err(LayoutError::Header);
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    Ok(bytes)
}
