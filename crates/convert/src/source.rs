//! Where tensors come from.

use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use reroute_checkpoint::{
    CheckpointError, CodeFormat, Folder, NewTensor, Shards, TensorInfo, coded_tensor, is_weight,
};

use crate::mean::MeanRow;
use crate::pickle::Pickles;
use crate::random;
use crate::{ConvertError, Job};

/// Bytes that are handed on at once; whole elements of every type.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;

/// Rows of codes that are handed on at once: a MiB of long ones.
const CODED_ROWS: usize = 64;

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
    /// How it is made of what is stored there.
    pub(crate) made: Made,
    /// The codes that it is written in, if it is.
    pub(crate) codes: Option<Recoded>,
}

/// Codes of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recoded {
    /// As the source has them.
    Kept(CodeFormat),
    /// Made of its numbers.
    Made(CodeFormat),
}

impl Recoded {
    pub(crate) fn format(self) -> CodeFormat {
        match self {
            Self::Kept(format) | Self::Made(format) => format,
        }
    }
}

impl SourceTensor {
    /// Decides in which codes it is written.
    pub(crate) fn find_codes(&mut self, job: &Job, weights: &[Weights]) {
        let fits = |format: &CodeFormat| match self.tensor.shape[..] {
            [rows, columns] => coded_tensor(&self.tensor.name, *format, [rows, columns]).is_some(),
            _ => false,
        };
        let stored = match (&weights[self.weights], &self.made) {
            (Weights::Shards(shards), Made::Stored(0)) => shards.info(&self.stored_name),
            _ => None,
        };
        let format = stored.and_then(TensorInfo::code_format);
        let is_own = stored.is_some_and(TensorInfo::is_in_own_codes);
        let asked = job.codes.as_ref();
        let asked = asked.and_then(|codes| codes.of(&self.tensor.name));
        self.codes = match asked {
            Some(_) if asked == format => format.map(Recoded::Kept),
            Some(_) if is_weight(self.tensor.dtype) => asked.filter(fits).map(Recoded::Made),
            None if is_own && job.dtype.is_none() => format.map(Recoded::Kept),
            _ => None,
        };
    }
}

/// How a tensor is made of what is stored.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Made {
    /// It is as it is; so many rows behind it are not stored, but the mean of the others.
    Stored(usize),
    /// Of so many rows of it.
    Rows(Range<usize>),
    /// Of so many of its columns, each of which becomes a row.
    Columns(Range<usize>),
    /// With another behind it, whose columns become rows if that is said.
    Joined(String, bool),
    /// Of nothing but this number.
    Filled(f32),
    /// Of numbers drawn by this seed.
    Random(u64),
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
    /// elements, or of rows of codes that are kept.
    pub(crate) fn stream(
        &self,
        tensor: &SourceTensor,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let SourceTensor {
            stored_name: name,
            tensor: NewTensor { shape, dtype, .. },
            ..
        } = tensor;
        if let Some(Recoded::Kept(_)) = tensor.codes {
            return self.stream_codes(name, shape[0], sink);
        }
        let elements = shape.iter().product();
        let columns = shape.last().copied().unwrap_or(1);
        let bytes = dtype.bitsize() / 8;
        match &tensor.made {
            Made::Stored(0) => self.stream_stored(name, sink),
            Made::Stored(added_rows) => {
                let mut mean = (columns > 0).then(|| MeanRow::new(*dtype, columns));
                self.stream_stored(name, &mut |block| {
                    if let Some(mean) = &mut mean {
                        mean.add(block);
                    }
                    sink(block)
                })?;
                let row = mean.map(|mean| mean.bytes()).unwrap_or_default();
                (0..*added_rows).try_for_each(|_| sink(&row))
            }
            Made::Rows(rows) => {
                let row_bytes = bytes * shape.iter().skip(1).product::<usize>();
                let (start, end) = (rows.start * row_bytes, rows.end * row_bytes);
                let mut at = 0;
                self.stream_stored(name, &mut |block| {
                    let within = |place: usize| place.clamp(at, at + block.len()) - at;
                    let part = &block[within(start)..within(end)];
                    at += block.len();
                    if part.is_empty() { Ok(()) } else { sink(part) }
                })
            }
            Made::Columns(range) => self.stream_columns(name, bytes, columns, range, sink),
            Made::Joined(next, is_transposed) => {
                self.stream_stored(name, sink)?;
                match is_transposed {
                    true => self.stream_columns(next, bytes, columns, &(0..usize::MAX), sink),
                    false => self.stream_stored(next, sink),
                }
            }
            Made::Filled(number) => random::stream(elements, |_| *number, sink),
            Made::Random(seed) => {
                random::stream(elements, random::normal(*seed, &tensor.tensor.name), sink)
            }
        }
    }

    /// Some columns of a matrix of `rows` rows, whose elements have so many bytes, one after another. It is held
    /// in memory for that.
    fn stream_columns(
        &self,
        name: &str,
        bytes: usize,
        rows: usize,
        columns: &Range<usize>,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let mut matrix = Vec::new();
        self.stream_stored(name, &mut |block| {
            matrix.extend_from_slice(block);
            Ok(())
        })?;
        let width = matrix.len() / (rows * bytes).max(1);
        if width == 0 {
            return Ok(());
        }
        let mut block = Vec::new();
        for column in columns.start..columns.end.min(width) {
            let cells = matrix.chunks_exact(bytes).skip(column).step_by(width);
            cells.for_each(|cell| block.extend_from_slice(cell));
            if block.len() >= BLOCK_BYTES {
                sink(&block)?;
                block.clear();
            }
        }
        sink(&block)
    }

    /// Rows of codes as they are.
    fn stream_codes(
        &self,
        name: &str,
        rows: usize,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let Self::Shards(shards) = self else {
            return Ok(());
        };
        for first in (0..rows).step_by(CODED_ROWS) {
            let part = first..rows.min(first + CODED_ROWS);
            if let Some(codes) = shards.stored_codes(name, part)? {
                sink(codes.bytes())?;
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
