//! Where tensors come from.

use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use reroute_checkpoint::{CheckpointError, Folder, NewTensor, Shards, TensorInfo};

use crate::ConvertError;
use crate::mean::MeanRow;
use crate::pickle::Pickles;

/// Bytes that are handed on at once; whole elements of every type.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;

/// The weights of one folder.
pub(crate) enum Weights {
    Shards(Shards),
    Pickles(Pickles),
}

/// A tensor of a source.
#[derive(Debug)]
pub(crate) struct SourceTensor {
    /// As it will be called, in the type that it is stored in.
    pub(crate) tensor: NewTensor,
    /// Position in the list of weights that it is from.
    pub(crate) weights: usize,
    /// As it is called there.
    pub(crate) stored_name: String,
    /// Whether it is of fewer bits there, and f32 only while it is read.
    pub(crate) is_widened: bool,
    /// How many of its last rows are not stored: they are the mean of the others.
    pub(crate) added_rows: usize,
}

/// A file of a source, as it was when the plan was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) path: PathBuf,
    bytes: u64,
    modified: SystemTime,
}

impl Stamp {
    pub(crate) fn of(path: PathBuf) -> Result<Self, ConvertError> {
        let metadata = path.metadata().map_err(ConvertError::io(&path))?;
        Ok(Self {
            bytes: metadata.len(),
            modified: metadata.modified().map_err(ConvertError::io(&path))?,
            path,
        })
    }

    /// The same however the path is spelled.
    pub(crate) fn hash_resolved(&self, hasher: &mut impl Hasher) {
        let path = self.path.canonicalize();
        (
            path.as_ref().unwrap_or(&self.path),
            self.bytes,
            self.modified,
        )
            .hash(hasher);
    }

    /// Refuses a file that has changed since.
    pub(crate) fn check(&self) -> Result<(), ConvertError> {
        match Self::of(self.path.clone())? == *self {
            true => Ok(()),
            false => Err(ConvertError::SourceChanged {
                path: self.path.clone(),
            }),
        }
    }
}

impl Weights {
    /// Opens the weights of a folder; pickles only if they are allowed and there is nothing else.
    pub(crate) fn open(
        folder: &Folder,
        path: &Path,
        allow_pickle: bool,
    ) -> Result<Self, ConvertError> {
        match Shards::open(folder) {
            Ok(shards) => Ok(Self::Shards(shards)),
            Err(CheckpointError::Pickle { .. }) if allow_pickle => {
                Ok(Self::Pickles(Pickles::open(path, folder)?))
            }
            Err(CheckpointError::Pickle { .. }) => Err(ConvertError::PickleNotAllowed {
                folder: path.to_path_buf(),
            }),
            Err(error) => Err(error.into()),
        }
    }

    /// Every tensor, by name.
    pub(crate) fn tensors(&self) -> Vec<NewTensor> {
        match self {
            Self::Shards(shards) => {
                let tensors = shards.names().filter_map(|name| {
                    let info = shards.info(name)?;
                    Some(NewTensor {
                        name: name.to_owned(),
                        dtype: info.dtype,
                        shape: info.shape.clone(),
                    })
                });
                tensors.collect()
            }
            Self::Pickles(pickles) => pickles.tensors().collect(),
        }
    }

    /// Whether a tensor is of fewer bits in its file.
    pub(crate) fn is_widened(&self, stored_name: &str) -> bool {
        match self {
            Self::Shards(shards) => {
                let info = shards.info(stored_name);
                info.is_some_and(TensorInfo::is_widened)
            }
            Self::Pickles(_) => false,
        }
    }

    /// The files, as they were before they were read; links resolved.
    pub(crate) fn stamps(&self) -> Result<Vec<Stamp>, ConvertError> {
        match self {
            Self::Shards(shards) => shards
                .files()
                .map(|file| Stamp::of(file.to_path_buf()))
                .collect(),
            Self::Pickles(pickles) => Ok(pickles.files.clone()),
        }
    }

    /// What a converted file shall say that it was converted from: files that can lie beside it.
    pub(crate) fn origin(&self) -> Result<Option<String>, ConvertError> {
        match self {
            Self::Shards(shards) => match shards.converted_from() {
                Some(origin) => Ok(Some(origin.to_owned())),
                None => Ok(Some(shards.fingerprint()?)),
            },
            Self::Pickles(_) => Ok(None),
        }
    }

    /// Hands on the bytes of a tensor, rows that are not stored included, in blocks of whole
    /// elements.
    pub(crate) fn stream(
        &self,
        tensor: &SourceTensor,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let columns = tensor.tensor.shape.last().copied().unwrap_or(1);
        let mut mean = (tensor.added_rows > 0 && columns > 0)
            .then(|| MeanRow::new(tensor.tensor.dtype, columns));
        self.stream_stored(&tensor.stored_name, &mut |block| {
            if let Some(mean) = &mut mean {
                mean.add(block);
            }
            sink(block)
        })?;
        if let Some(mean) = mean {
            let row = mean.bytes();
            for _ in 0..tensor.added_rows {
                sink(&row)?;
            }
        }
        Ok(())
    }

    fn stream_stored(
        &self,
        name: &str,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        match self {
            Self::Shards(shards) => shards.for_each_block(name, sink),
            Self::Pickles(pickles) => pickles.for_each_block(name, sink),
        }
    }
}
