//! Codes in the order of the weight, each times the scale of its cell in a grid.

use std::io::{self, BufReader, Read};
use std::ops::Range;

use burn::tensor::DType;
use reroute_kernels::Format;
use safetensors::Dtype;

use super::own::not_finite;
use super::rows::Decoder;
use super::{Cells, Coded, Tensors, matrix, put, stems, take, weight};
use crate::convert::BLOCK_BYTES;
use crate::shards::Shards;
use crate::{Layout, TensorError, TensorInfo};

const SCALES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];
/// Bytes of a scale of [`Format::Int8`].
const SCALE: usize = size_of::<f32>();

/// Codes and scales.
#[derive(Debug, Clone)]
pub(crate) struct Grid {
    codes: TensorInfo,
    kind: Codes,
    columns: usize,
    /// `[rows of cells, columns of cells]`
    scales: TensorInfo,
    /// Rows and columns of a cell.
    cell: [usize; 2],
}

/// What a code stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codes {
    /// A float of 8 bits, 4 of them exponent (`float8_e4m3fn`).
    E4m3,
    Int8,
    /// Eight in an i32, the first in its lowest bits, each 8 more than the number.
    Int4,
}

/// Weights whose elements are E4M3, with `weight_scale_inv` or `weight_scale` beside.
pub(super) fn fp8(tensors: &mut Tensors, cells: Cells) -> Result<(), String> {
    eight_bits(tensors, Dtype::F8_E4M3, Codes::E4m3, cells)
}

/// The same with integers.
pub(super) fn int8(tensors: &mut Tensors, cells: Cells) -> Result<(), String> {
    eight_bits(tensors, Dtype::I8, Codes::Int8, cells)
}

fn eight_bits(
    tensors: &mut Tensors,
    dtype: Dtype,
    kind: Codes,
    cells: Cells,
) -> Result<(), String> {
    for stem in stems(tensors, ".weight") {
        let name = format!("{stem}.weight");
        let Some(codes) = tensors.get(&name).filter(|info| info.dtype == dtype) else {
            continue;
        };
        let (codes, shape) = (codes.clone(), matrix(&name, codes, &[dtype])?);
        let suffix = [".weight_scale_inv", ".weight_scale"].into_iter();
        let mut suffix = suffix.filter(|suffix| tensors.contains_key(&format!("{stem}{suffix}")));
        let suffix = suffix.next().unwrap_or(".weight_scale_inv");
        let scales = take(tensors, &stem, suffix)?;
        // What activations are divided by, where they are quantised, too: here they are not.
        tensors.remove(&format!("{stem}.input_scale"));
        let grid = Grid::new(&name, codes, kind, shape, scales, cells)?;
        let shard = grid.codes.shard;
        tensors.insert(name, weight(shape, shard, Coded::Grid(grid))?);
    }
    Ok(())
}

/// Weights of 4 bits, packed along their rows.
pub(super) fn packed(tensors: &mut Tensors, cells: Cells) -> Result<(), String> {
    for stem in stems(tensors, ".weight_packed") {
        let name = format!("{stem}.weight_packed");
        let codes = take(tensors, &stem, ".weight_packed")?;
        let scales = take(tensors, &stem, ".weight_scale")?;
        tensors.remove(&format!("{stem}.weight_shape"));
        tensors.remove(&format!("{stem}.input_scale"));
        let [rows, words] = matrix(&name, &codes, &[Dtype::I32])?;
        // Rows that end within a word are nobody's.
        let shape = [
            rows,
            words
                .checked_mul(8)
                .ok_or("a row is larger than any memory")?,
        ];
        let grid = Grid::new(&name, codes, Codes::Int4, shape, scales, cells)?;
        let shard = grid.codes.shard;
        put(tensors, &stem, weight(shape, shard, Coded::Grid(grid))?)?;
    }
    Ok(())
}

impl Grid {
    fn new(
        name: &str,
        codes: TensorInfo,
        kind: Codes,
        shape: [usize; 2],
        scales: TensorInfo,
        cells: Cells,
    ) -> Result<Self, String> {
        let grid = match scales.shape.as_slice() {
            [] => [1, 1],
            &[cells] => [cells, 1],
            &[rows, columns] => [rows, columns],
            _ => [0, 0],
        };
        let cell = cells.of(shape);
        let fits = (0..2).all(|axis| shape[axis].div_ceil(cell[axis]) == grid[axis]);
        if !fits || !SCALES.contains(&scales.dtype) {
            return Err(format!(
                "{name} is {shape:?}, its scales are {:?} {:?}: in cells of {cell:?} they do not fit",
                scales.dtype, scales.shape
            ));
        }
        Ok(Self {
            codes,
            kind,
            columns: shape[1],
            scales,
            cell,
        })
    }

    pub(super) fn name(&self) -> &'static str {
        match self.kind {
            Codes::E4m3 => "FP8",
            Codes::Int8 => "int8",
            Codes::Int4 => "int4",
        }
    }

    /// Bytes with a scale for each row are those of [`Format::Int8`].
    pub(super) fn format(&self) -> Option<Format> {
        let by_row = self.kind == Codes::Int8 && self.cell == [1, self.columns];
        by_row.then_some(Format::Int8)
    }

    /// Hands on some rows in that format, but for what fills them up.
    pub(crate) fn int8_rows(
        &self,
        shards: &Shards,
        rows: Range<usize>,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), TensorError> {
        let scales = shards.scales(&self.scales)?;
        let mut codes =
            BufReader::with_capacity(BLOCK_BYTES, shards.stored(&self.codes.rows(rows.clone()))?);
        let mut row = vec![0; SCALE + self.columns];
        for scale in scales.get(rows).unwrap_or_default() {
            row[..SCALE].copy_from_slice(&scale.to_le_bytes());
            codes.read_exact(&mut row[SCALE..])?;
            each(&row);
        }
        Ok(())
    }

    /// From this row on.
    pub(super) fn open<'a>(
        &self,
        shards: &'a Shards,
        first: usize,
    ) -> Result<impl Decoder + use<'a>, TensorError> {
        let rows = self.codes.shape.first().copied().unwrap_or(0);
        let codes = self.codes.rows(first.min(rows)..rows);
        Ok(GridRows {
            codes: shards.stored(&codes)?,
            kind: self.kind,
            scales: shards.scales(&self.scales)?,
            cell: self.cell,
            columns: self.columns,
            row: first,
            bytes: Vec::new(),
            floats: std::array::from_fn(|code| e4m3(code as u8)),
        })
    }
}

struct GridRows<R> {
    codes: R,
    kind: Codes,
    scales: Vec<f32>,
    cell: [usize; 2],
    columns: usize,
    row: usize,
    bytes: Vec<u8>,
    /// What each code of 8 bits is as a float.
    floats: [f32; 256],
}

impl<R: Read> Decoder for GridRows<R> {
    fn columns(&self) -> usize {
        self.columns
    }

    fn next(&mut self, row: &mut [f32]) -> io::Result<()> {
        let bytes = match self.kind {
            Codes::E4m3 | Codes::Int8 => self.columns,
            Codes::Int4 => self.columns / 2,
        };
        self.bytes.resize(bytes, 0);
        self.codes.read_exact(&mut self.bytes)?;
        match self.kind {
            Codes::E4m3 => fill(row, &self.bytes, |byte| self.floats[byte as usize]),
            Codes::Int8 => fill(row, &self.bytes, |byte| f32::from(byte as i8)),
            Codes::Int4 => {
                // Little-endian words: the first number is in the lower half of the first byte.
                for (pair, &byte) in row.chunks_exact_mut(2).zip(&self.bytes) {
                    pair[0] = f32::from(byte & 15) - 8.0;
                    pair[1] = f32::from(byte >> 4) - 8.0;
                }
            }
        }
        let cells = self.columns.div_ceil(self.cell[1]);
        let scales = (self.row / self.cell[0]) * cells;
        let scales = self.scales.get(scales..scales + cells).unwrap_or(&[]);
        for (numbers, scale) in row.chunks_mut(self.cell[1]).zip(scales) {
            numbers.iter_mut().for_each(|number| *number *= scale);
        }
        self.row += 1;
        Ok(())
    }
}

fn fill(row: &mut [f32], codes: &[u8], number: impl Fn(u8) -> f32) {
    row.iter_mut()
        .zip(codes)
        .for_each(|(x, &code)| *x = number(code));
}

/// A float of a sign, 4 bits of exponent (bias 7) and 3 of fraction; without infinities (`float8_e4m3fn`).
fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction / 512.0,
        _ => (1.0 + fraction / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if code & 128 == 0 { size } else { -size }
}

impl Shards {
    /// All scales of a weight.
    pub(super) fn scales(&self, info: &TensorInfo) -> Result<Vec<f32>, TensorError> {
        let mut reader = self.stored(info)?;
        let data = crate::convert::read(&mut reader, info, DType::F32, Layout::AsStored)?;
        let scales: Vec<f32> = data.iter().collect();
        match scales.iter().all(|scale| scale.is_finite()) {
            true => Ok(scales),
            false => Err(not_finite()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::e4m3;

    #[test]
    fn floats_of_eight_bits() {
        for (code, number) in [
            (0x00, 0.0),
            (0x01, 0.001953125),
            (0x07, 0.013671875),
            (0x08, 0.015625),
            (0x38, 1.0),
            (0x3f, 1.875),
            (0x7e, 448.0),
            (0xfe, -448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(e4m3(code), number, "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert!(e4m3(0x80) == 0.0 && e4m3(0x80).is_sign_negative());
    }
}
