//! The blocks of ggml (`ggml-quants.c`, `dequantize_row_*`): a few dozen numbers of a row, with scales.

use std::io::{self, Read};

use half::f16;
use reroute_kernels::Format;
use safetensors::Dtype;

use super::rows::Decoder;
use crate::shards::Shards;
use crate::{TensorError, TensorInfo};

/// Numbers in a block of the kinds whose names end with K.
const SUPER: usize = 256;
/// Numbers in a block of the others.
const SMALL: usize = 32;

/// How a block is arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockKind {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// A tensor of such blocks.
#[derive(Debug, Clone)]
pub(crate) struct Blocks {
    kind: BlockKind,
    columns: usize,
    /// `[rows, bytes of a row]`
    stored: TensorInfo,
}

/// What `ggml_type` calls those that are not read.
const OTHERS: [(u32, &str); 16] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl BlockKind {
    /// Of a `ggml_type`.
    pub(crate) fn of(kind: u32) -> Result<Self, String> {
        Ok(match kind {
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            other => {
                let name = OTHERS.iter().find(|(kind, _)| *kind == other);
                let name = name.map_or_else(|| format!("type {other}"), |(_, name)| (*name).into());
                return Err(format!(
                    "is {name}, which is not supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, \
                     Q5_K and Q6_K are; nearest is a file of Q4_K_M"
                ));
            }
        })
    }

    /// Numbers in a block, and its bytes.
    fn size(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (SMALL, 2 + 16),
            Self::Q4_1 => (SMALL, 4 + 16),
            Self::Q5_0 => (SMALL, 2 + 4 + 16),
            Self::Q5_1 => (SMALL, 4 + 4 + 16),
            Self::Q8_0 => (SMALL, 2 + 32),
            Self::Q4K => (SUPER, 4 + 12 + 128),
            Self::Q5K => (SUPER, 4 + 12 + 32 + 128),
            Self::Q6K => (SUPER, 128 + 64 + 16 + 2),
        }
    }

    /// The numbers of a block.
    fn widen(self, block: &[u8], numbers: &mut [f32]) {
        match self {
            Self::Q4_0 => halves(&block[2..18], 0, numbers, {
                let scale = float(block, 0);
                move |code, high| scale * (f32::from(code | high) - 8.0)
            }),
            Self::Q4_1 => halves(&block[4..20], 0, numbers, {
                let (scale, least) = (float(block, 0), float(block, 2));
                move |code, high| scale * f32::from(code | high) + least
            }),
            Self::Q5_0 => halves(&block[6..22], word(block, 2), numbers, {
                let scale = float(block, 0);
                move |code, high| scale * (f32::from(code | high) - 16.0)
            }),
            Self::Q5_1 => halves(&block[8..24], word(block, 4), numbers, {
                let (scale, least) = (float(block, 0), float(block, 2));
                move |code, high| scale * f32::from(code | high) + least
            }),
            Self::Q8_0 => {
                let scale = float(block, 0);
                for (number, &code) in numbers.iter_mut().zip(&block[2..]) {
                    *number = f32::from(code as i8) * scale;
                }
            }
            Self::Q4K => groups(block, &[], &block[16..], numbers),
            Self::Q5K => groups(block, &block[16..48], &block[48..], numbers),
            Self::Q6K => six_bits(block, numbers),
        }
    }
}

/// A float of 16 bits.
fn float(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Codes of 4 bits: the lower halves of all bytes, then the upper ones; a fifth bit of each is in `high`.
fn halves(codes: &[u8], high: u32, numbers: &mut [f32], number: impl Fn(u8, u8) -> f32) {
    let fifth = |at: usize| ((high >> at & 1) as u8) << 4;
    for (at, &code) in codes.iter().enumerate() {
        numbers[at] = number(code & 15, fifth(at));
        numbers[at + codes.len()] = number(code >> 4, fifth(at + codes.len()));
    }
}

/// Q4_K and Q5_K: eight groups of 32 with a scale and a least value of 6 bits each, in units that the block has.
fn groups(block: &[u8], high: &[u8], codes: &[u8], numbers: &mut [f32]) {
    let (scale, least) = (float(block, 0), float(block, 2));
    let packed = &block[4..16];
    for (group, numbers) in numbers.chunks_exact_mut(SMALL).enumerate() {
        let (unit, low) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => (
                packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                packed[group + 4] >> 4 | packed[group] >> 6 << 4,
            ),
        };
        let (unit, low) = (scale * f32::from(unit), least * f32::from(low));
        // Two groups share their bytes.
        let codes = &codes[group / 2 * SMALL..][..SMALL];
        for (at, (number, &code)) in numbers.iter_mut().zip(codes).enumerate() {
            let code = code >> (4 * (group % 2)) & 15;
            let fifth = high.get(at).map_or(0, |high| (high >> group & 1) << 4);
            *number = unit * f32::from(code | fifth) - low;
        }
    }
}

/// Q6_K: two halves of 128; of each, 4 bits of two numbers in a byte and 2 of four, and a scale for 16.
fn six_bits(block: &[u8], numbers: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (units, scale) = (&rest[..16], float(rest, 16));
    for (at, number) in numbers.iter_mut().enumerate() {
        let (half, at_half) = (at / 128, at % 128);
        let (quarter, column) = (at_half / 32, at_half % 32);
        let low = low[half * 64 + (quarter % 2) * 32 + column] >> (4 * (quarter / 2)) & 15;
        let high = high[half * 32 + column] >> (2 * quarter) & 3;
        let code = f32::from(low | high << 4) - 32.0;
        *number = scale * f32::from(units[at / 16] as i8) * code;
    }
}

impl Blocks {
    pub(crate) fn new(
        kind: BlockKind,
        columns: usize,
        elements: u64,
        offset: u64,
    ) -> Result<Self, String> {
        let (numbers, bytes) = kind.size();
        if columns == 0 || !columns.is_multiple_of(numbers) {
            return Err(format!(
                "has rows of {columns}, which are no blocks of {numbers}"
            ));
        }
        let rows = (elements / columns as u64) as usize;
        let row = columns / numbers * bytes;
        let all = (rows as u64).checked_mul(row as u64);
        Ok(Self {
            kind,
            columns,
            stored: TensorInfo {
                dtype: Dtype::U8,
                shape: vec![rows, row],
                bytes: all.ok_or("is larger than any file")?,
                shard: 0,
                offset,
                coded: None,
            },
        })
    }

    pub(super) fn name(&self) -> &'static str {
        match self.kind {
            BlockKind::Q4_0 => "Q4_0",
            BlockKind::Q4_1 => "Q4_1",
            BlockKind::Q5_0 => "Q5_0",
            BlockKind::Q5_1 => "Q5_1",
            BlockKind::Q8_0 => "Q8_0",
            BlockKind::Q4K => "Q4_K",
            BlockKind::Q5K => "Q5_K",
            BlockKind::Q6K => "Q6_K",
        }
    }

    /// The format in which products take such rows as they are, if they do.
    pub(crate) fn format(&self) -> Option<Format> {
        match self.kind {
            BlockKind::Q4_0 => Some(Format::Q4_0),
            BlockKind::Q4_1 => Some(Format::Q4_1),
            BlockKind::Q8_0 => Some(Format::Q8_0),
            BlockKind::Q4K => Some(Format::Q4K),
            BlockKind::Q6K => Some(Format::Q6K),
            BlockKind::Q5_0 | BlockKind::Q5_1 | BlockKind::Q5K => None,
        }
    }

    pub(crate) fn stored(&self) -> &TensorInfo {
        &self.stored
    }

    pub(crate) fn stored_mut(&mut self) -> &mut TensorInfo {
        &mut self.stored
    }

    /// From this row on, in a file of its shards.
    pub(super) fn open<'a>(
        &self,
        shards: &'a Shards,
        shard: usize,
        first: usize,
    ) -> Result<impl Decoder + use<'a>, TensorError> {
        let rows = self.stored.shape[0];
        let mut stored = self.stored.rows(first.min(rows)..rows);
        stored.shard = shard;
        Ok(BlockRows {
            reader: shards.stored(&stored)?,
            kind: self.kind,
            columns: self.columns,
            bytes: vec![0; self.stored.shape[1]],
        })
    }
}

struct BlockRows<R> {
    reader: R,
    kind: BlockKind,
    columns: usize,
    bytes: Vec<u8>,
}

impl<R: Read> Decoder for BlockRows<R> {
    fn columns(&self) -> usize {
        self.columns
    }

    fn next(&mut self, row: &mut [f32]) -> io::Result<()> {
        self.reader.read_exact(&mut self.bytes)?;
        let (numbers, bytes) = self.kind.size();
        let blocks = self.bytes.chunks_exact(bytes);
        for (block, numbers) in blocks.zip(row.chunks_exact_mut(numbers)) {
            self.kind.widen(block, numbers);
        }
        Ok(())
    }
}
