//! Rows of a weight in fewer bits: groups of codes with a scale, and what is added to them.
//!
//! A number is `scale · code + least`; where the codes of a format are signed, they are shifted to begin
//! at zero.

pub(crate) mod coding;
mod quantise;

pub(crate) use coding::{Codes, Coding, Place, ROOM, Span, with_coding};

use half::f16;

use crate::split::pieces;

/// How a row is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// A scale in f32, then a signed byte for each number; filled up with zeros to whole words.
    Int8,
    /// Groups of 64: scale and least number in f16, then codes of 4 bits, the lower halves of 32 bytes
    /// first. The last group is filled up with codes 0.
    Int4,
    /// ggml's: 32 signed bytes with a scale in f16.
    Q8_0,
    /// ggml's: 32 codes of 4 bits less 8, with a scale in f16.
    Q4_0,
    /// ggml's: 32 codes of 4 bits, with a scale and a least number in f16.
    Q4_1,
    /// ggml's: 256 codes of 4 bits in groups of 32, whose scales and least numbers are 6 bits of others.
    Q4K,
    /// ggml's: 256 codes of 6 bits less 32 in groups of 16, whose scales are a byte of another.
    Q6K,
}

/// Columns that are multiplied at a time: two halves, which may differ in scale.
pub(crate) const CHUNK: usize = 32;

/// Chunks that are read at a time.
pub(crate) const CHUNKS: usize = 8;

/// Columns that are read at a time: whole blocks of every format.
pub(crate) const SPAN: usize = CHUNK * CHUNKS;

/// What makes numbers of codes: `scale · code + least`, for either half of each chunk of a span.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Factors {
    pub(crate) scale: [[f32; CHUNKS]; 2],
    pub(crate) least: [[f32; CHUNKS]; 2],
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Int8,
        Self::Int4,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q4K,
        Self::Q6K,
    ];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// What people call so.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Whether all numbers of a row are finite: of its scales none is NaN or infinite.
    pub fn is_finite(self, row: &[u8]) -> bool {
        let halves: &[usize] = match self {
            Self::Int8 => {
                let scale = row.first_chunk().copied().map(f32::from_le_bytes);
                return scale.is_some_and(|scale| (scale * 128.0).is_finite());
            }
            Self::Q8_0 | Self::Q4_0 => &[0],
            Self::Int4 | Self::Q4_1 | Self::Q4K => &[0, 2],
            Self::Q6K => &[208],
        };
        let mut blocks = row.chunks_exact(self.block().1);
        blocks.all(|block| {
            let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
            halves.iter().all(|&at| half(at).is_finite())
        })
    }

    /// Numbers and bytes of a block; a row of `Int8` is one.
    fn block(self) -> (usize, usize) {
        match self {
            Self::Int8 => (1, 1),
            Self::Int4 => (64, 4 + 32),
            Self::Q8_0 => (32, 2 + 32),
            Self::Q4_0 => (32, 2 + 16),
            Self::Q4_1 => (32, 4 + 16),
            Self::Q4K => (256, 4 + 12 + 128),
            Self::Q6K => (256, 128 + 64 + 16 + 2),
        }
    }

    /// Bytes of a row of so many columns; `None` if they are no whole blocks of this format.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        let (numbers, bytes) = self.block();
        match self {
            Self::Int8 => columns.checked_next_multiple_of(4)?.checked_add(4),
            Self::Int4 => columns.div_ceil(numbers).checked_mul(bytes),
            _ if !columns.is_multiple_of(numbers) => None,
            _ => (columns / numbers).checked_mul(bytes),
        }
    }
}

/// A matrix of rows in this format.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    format: Format,
    columns: usize,
    /// From one row to the next.
    stride: usize,
    bytes: &'a [u8],
}

impl<'a> Blocks<'a> {
    /// Rows that are `stride` bytes apart; `None` if a row is longer than that, or does not exist.
    pub fn new(format: Format, columns: usize, stride: usize, bytes: &'a [u8]) -> Option<Self> {
        let fits =
            format.row_bytes(columns)? <= stride && bytes.len().is_multiple_of(stride.max(1));
        fits.then_some(Self {
            format,
            columns,
            stride,
            bytes,
        })
    }

    /// The format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Numbers of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.bytes.len() / self.stride.max(1)
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.stride..][..self.stride]
    }

    /// All bytes, and where those of a row begin.
    #[inline(always)]
    pub(crate) fn bytes_and_start(&self, row: usize) -> (&'a [u8], usize) {
        (self.bytes, row * self.stride)
    }

    /// What all numbers of a row are multiplied with besides.
    #[inline(always)]
    pub(crate) fn row_scale(&self, row: usize) -> f32 {
        match (self.format, self.row(row).first_chunk()) {
            (Format::Int8, Some(scale)) => f32::from_le_bytes(*scale),
            _ => 1.0,
        }
    }

    /// The numbers of a row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn widen(&self, row: usize, numbers: &mut [f32]) {
        with_coding!(self.format, C => self.widen_as::<C>(row, numbers))
    }

    /// The numbers of all rows, on all threads.
    pub fn widen_all(&self, numbers: &mut [f32]) {
        pieces(numbers, self.columns, |row, numbers| {
            self.widen(row, numbers)
        });
    }

    fn widen_as<C: Coding>(&self, row: usize, numbers: &mut [f32]) {
        let scale = self.row_scale(row);
        for (index, numbers) in numbers.chunks_mut(SPAN).enumerate() {
            let mut room = [0; ROOM];
            let span = Span::<C>::new(*self, row, index, &mut room);
            let factors = span.factors();
            for (chunk, numbers) in numbers.chunks_mut(CHUNK).enumerate() {
                let codes = span.codes(chunk);
                for (half, numbers) in numbers.chunks_mut(CHUNK / 2).enumerate() {
                    let (by, least) = (factors.scale[half][chunk], factors.least[half][chunk]);
                    for (number, &code) in numbers.iter_mut().zip(&codes[half * CHUNK / 2..]) {
                        *number = scale * (by * f32::from(code) + least);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::Format;

    #[test]
    fn every_scale_of_a_row_is_looked_at() {
        for format in Format::ALL {
            assert_eq!(Format::named(format.name()), Some(format));
            let length = format.row_bytes(512).expect("whole blocks");
            let good = vec![0; length];
            assert!(format.is_finite(&good), "{format:?}");
            let (_, block) = format.block();
            let of_block: &[usize] = match format {
                Format::Int8 => &[],
                Format::Q8_0 | Format::Q4_0 => &[0],
                Format::Int4 | Format::Q4_1 | Format::Q4K => &[0, 2],
                Format::Q6K => &[208],
            };
            let blocks = (0..length).step_by(block);
            for at in blocks.flat_map(|start| of_block.iter().map(move |at| start + at)) {
                let mut bad = good.clone();
                bad[at..at + 2].copy_from_slice(&f16::NAN.to_le_bytes());
                assert!(!format.is_finite(&bad), "{format:?} {at}");
            }
            if format == Format::Int8 {
                for scale in [f32::NAN, f32::NEG_INFINITY, f32::MAX] {
                    let mut bad = good.clone();
                    bad[..4].copy_from_slice(&scale.to_le_bytes());
                    assert!(!format.is_finite(&bad), "{scale}");
                }
            }
        }
        assert_eq!(Format::named("int3"), None);
    }
}
