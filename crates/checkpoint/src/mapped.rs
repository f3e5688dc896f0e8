//! The tensors of a Burnpack file, mapped into memory.

use std::collections::BTreeMap;

use burn::tensor::{Bytes, DType, TensorData};
use burn_store::{BurnpackStore, ModuleStore};
use safetensors::Dtype;

use crate::folder::Source;
use crate::{CheckpointError, TensorInfo};

/// Bytes of every tensor, by name. They share one read-only mapping of the file, which lives as
/// long as any of them.
#[derive(Debug)]
pub(crate) struct Mapped(BTreeMap<String, Bytes>);

impl Mapped {
    /// Maps a file whose header has been checked. Embedded files are not mapped: nothing says that
    /// they are aligned.
    pub(crate) fn open(source: &Source, file: &str) -> Result<Option<Self>, CheckpointError> {
        let Source::Disk(path) = source else {
            return Ok(None);
        };
        let failed = |problem: String| CheckpointError::Map {
            file: file.to_owned(),
            problem,
        };
        let mut store = BurnpackStore::from_file(path)
            .auto_extension(false)
            .zero_copy(true);
        let snapshots = store.get_all_snapshots();
        let snapshots = snapshots.map_err(|error| failed(error.to_string()))?;
        let bytes = snapshots.iter().map(|(name, snapshot)| {
            let data = snapshot.to_data();
            let data = data.map_err(|error| failed(format!("{error:?}")))?;
            Ok((name.clone(), data.bytes))
        });
        bytes
            .collect::<Result<_, _>>()
            .map(|bytes| Some(Self(bytes)))
    }

    /// `part` of the tensor `whole`, if the file has it in this type, F32, F16 or BF16.
    pub(crate) fn tensor(
        &self,
        name: &str,
        whole: &TensorInfo,
        part: &TensorInfo,
        dtype: DType,
    ) -> Option<TensorData> {
        if !matches!(
            (whole.dtype, dtype),
            (Dtype::F32, DType::F32) | (Dtype::F16, DType::F16) | (Dtype::BF16, DType::BF16)
        ) {
            return None;
        }
        let bytes = self.0.get(name)?;
        let start = usize::try_from(part.offset - whole.offset).ok()?;
        let length = usize::try_from(part.bytes).ok()?;
        // `split` panics beyond the end.
        if bytes.len() < start.checked_add(length)? {
            return None;
        }
        let (_, tail) = bytes.clone().split(start).ok()?;
        let (bytes, _) = tail.split(length).ok()?;
        Some(TensorData::from_bytes(bytes, part.shape.clone(), dtype))
    }
}
