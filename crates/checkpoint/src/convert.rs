//! From the bytes of a file to the elements of a tensor, block by block.

use std::collections::TryReserveError;
use std::io::{self, Read};

use burn::tensor::{DType, TensorData};
use half::{bf16, f16};
use safetensors::Dtype;

use crate::TensorInfo;

/// Bytes that are read from a file at once; whole elements of every type.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;
/// Columns that a transposition writes side by side, so that both sides stay in the cache.
const TILE: usize = 8;

/// How the axes of a matrix lie in memory, compared with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// As in the file: linear weights are `[out, in]`.
    #[default]
    AsStored,
    /// Axes exchanged: linear weights are `[in, out]`, as in `burn::nn::Linear`.
    Transposed,
}

/// Why the elements of a tensor cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The file ended early, or reading failed.
    #[error("reading failed, or the file changed meanwhile: {0}")]
    Read(#[source] io::Error),

    /// The elements are not f32, f16 or bf16.
    #[error(
        "its elements are {dtype}; only F32, F16 and BF16 weights can be read: \
         dequantise the checkpoint or save it as one of these"
    )]
    Dtype {
        /// Type in the file.
        dtype: Dtype,
    },

    /// What it is made of makes no weight.
    #[error("{reason}: the checkpoint is damaged, download it again")]
    Quantised {
        /// What is wrong.
        reason: String,
    },

    /// Numbers that codes cannot stand for.
    #[error(
        "it holds numbers that are not finite, or too large for the scales of {format}: \
         open it with --dtype bf16 or f32"
    )]
    NotQuantised {
        /// What was asked for.
        format: &'static str,
    },

    /// Neither f32, f16 nor bf16 was asked for.
    #[error("weights can be loaded as F32, F16 or BF16, not as {dtype:?}")]
    Target {
        /// Type that was asked for.
        dtype: DType,
    },

    /// A finite value would become infinite.
    #[error(
        "it holds values beyond the range of the type asked for (f16 ends at ±65504): load the weights \
         as BF16 or F32, or make its largest value of them once and for all by reroute convert --clamp"
    )]
    Overflow,

    /// Only matrices can be transposed.
    #[error("it has {axes} axes; only a matrix can be transposed")]
    NotAMatrix {
        /// Number of axes in the file.
        axes: usize,
    },

    /// There is not enough memory.
    #[error("there is no memory for it: {0}")]
    Memory(#[from] TryReserveError),
}

/// What a reader of ours has found is told as that.
impl From<io::Error> for TensorError {
    fn from(error: io::Error) -> Self {
        error.downcast().unwrap_or_else(Self::Read)
    }
}

/// Reads a whole tensor; `reader` stands at its first byte. A finite value that would become infinite
/// is an error: one infinite weight makes every output NaN.
pub(crate) fn read(
    reader: &mut impl Read,
    info: &TensorInfo,
    dtype: DType,
    layout: Layout,
) -> Result<TensorData, TensorError> {
    let matrix = match (layout, info.shape.as_slice()) {
        (Layout::AsStored, _) => None,
        (Layout::Transposed, &[rows, columns]) => Some([rows, columns]),
        (Layout::Transposed, shape) => return Err(TensorError::NotAMatrix { axes: shape.len() }),
    };
    let mut shape = info.shape.clone();
    if layout == Layout::Transposed {
        shape.reverse();
    }
    let stored = Stored {
        dtype: info.dtype,
        elements: info.shape.iter().product(),
        transpose: matrix,
    };
    match dtype {
        DType::F32 => Ok(TensorData::new(stored.read::<f32>(reader)?, shape)),
        DType::F16 => Ok(TensorData::new(stored.read::<f16>(reader)?, shape)),
        DType::BF16 => Ok(TensorData::new(stored.read::<bf16>(reader)?, shape)),
        dtype => Err(TensorError::Target { dtype }),
    }
}

/// An element type that weights are loaded as.
trait Float: Copy + Default {
    fn from_f32(value: f32) -> Self;
    fn from_f16(value: f16) -> Self;
    fn is_infinite(self) -> bool;
}

impl Float for f32 {
    fn is_infinite(self) -> bool {
        self.is_infinite()
    }

    fn from_f32(value: f32) -> Self {
        value
    }

    fn from_f16(value: f16) -> Self {
        value.to_f32()
    }
}

impl Float for f16 {
    fn is_infinite(self) -> bool {
        self.is_infinite()
    }

    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    fn from_f16(value: f16) -> Self {
        value
    }
}

impl Float for bf16 {
    fn is_infinite(self) -> bool {
        self.is_infinite()
    }

    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    fn from_f16(value: f16) -> Self {
        bf16::from_f32(value.to_f32())
    }
}

/// What a reader is about to deliver.
struct Stored {
    dtype: Dtype,
    elements: usize,
    /// `[rows, columns]`, if they are to be exchanged.
    transpose: Option<[usize; 2]>,
}

impl Stored {
    fn read<T: Float>(&self, reader: &mut impl Read) -> Result<Vec<T>, TensorError> {
        // Infinite values less those that were infinite in the file.
        let mut lost = 0_isize;
        let mut narrow = |wide: f32| {
            let value = T::from_f32(wide);
            lost += isize::from(value.is_infinite()) - isize::from(wide.is_infinite());
            value
        };
        let values = match self.dtype {
            Dtype::F32 => self.decode(reader, |raw| narrow(f32::from_le_bytes(raw))),
            Dtype::F16 => self.decode(reader, |raw| T::from_f16(f16::from_le_bytes(raw))),
            Dtype::BF16 => self.decode(reader, |raw| narrow(bf16::from_le_bytes(raw).to_f32())),
            dtype => Err(TensorError::Dtype { dtype }),
        }?;
        match lost {
            0 => Ok(values),
            _ => Err(TensorError::Overflow),
        }
    }

    fn decode<T: Float, const BYTES: usize>(
        &self,
        reader: &mut impl Read,
        element: impl FnMut([u8; BYTES]) -> T,
    ) -> Result<Vec<T>, TensorError> {
        let mut values = Vec::new();
        values.try_reserve_exact(self.elements)?;
        match self.transpose {
            None => copy(reader, &mut values, self.elements, element)?,
            Some([rows, columns]) => {
                values.resize(self.elements, T::default());
                transpose(reader, &mut values, rows, columns, element)?;
            }
        }
        Ok(values)
    }
}

/// Appends elements in the order of the file.
fn copy<T, const BYTES: usize>(
    reader: &mut impl Read,
    values: &mut Vec<T>,
    elements: usize,
    mut element: impl FnMut([u8; BYTES]) -> T,
) -> io::Result<()> {
    let mut block = Block::default();
    while values.len() < elements {
        let wanted = (elements - values.len()).min(BLOCK_BYTES / BYTES);
        values.extend(
            block
                .read(reader, wanted)?
                .iter()
                .copied()
                .map(&mut element),
        );
    }
    Ok(())
}

/// Writes the `[rows, columns]` of the file as `[columns, rows]`.
///
/// A block is a few whole rows, or a part of one row that is longer than a block.
fn transpose<T, const BYTES: usize>(
    reader: &mut impl Read,
    values: &mut [T],
    rows: usize,
    columns: usize,
    mut element: impl FnMut([u8; BYTES]) -> T,
) -> io::Result<()> {
    if values.is_empty() {
        return Ok(()); // However many rows of nothing there are.
    }
    let block_elements = BLOCK_BYTES / BYTES;
    let block_columns = columns.clamp(1, block_elements);
    let block_rows = block_elements / block_columns;
    let mut block = Block::default();
    for row in (0..rows).step_by(block_rows) {
        let height = block_rows.min(rows - row);
        for column in (0..columns).step_by(block_columns) {
            let width = block_columns.min(columns - column);
            let cells = block.read(reader, height * width)?;
            for tile in (0..width).step_by(TILE) {
                for (y, cells) in cells.chunks_exact(width).enumerate() {
                    let cells = cells.iter().enumerate().skip(tile).take(TILE);
                    for (x, cell) in cells {
                        values[(column + x) * rows + row + y] = element(*cell);
                    }
                }
            }
        }
    }
    Ok(())
}

/// A reusable buffer of at most [`BLOCK_BYTES`].
#[derive(Default)]
struct Block(Vec<u8>);

impl Block {
    fn read<const BYTES: usize>(
        &mut self,
        reader: &mut impl Read,
        elements: usize,
    ) -> io::Result<&[[u8; BYTES]]> {
        self.0.resize(elements * BYTES, 0);
        reader.read_exact(&mut self.0)?;
        Ok(self.0.as_chunks().0)
    }
}
