//! Where the codes of a format are in a row, and what they are read with: as data, which every way of
//! reading a row goes by.

use std::marker::PhantomData;

use super::{Blocks, CHUNK, CHUNKS, Factors, SPAN};
use crate::precision::single_of_half;

/// A format, known when a loop is compiled.
pub(crate) trait Coding: Sync {
    /// Columns that share a scale at least: a power of two, of 16 or more.
    const GROUP: usize;
    /// The largest code.
    const LARGEST: u8;
    /// Bytes of a span.
    const BYTES: usize;
    /// Where a row begins, behind what belongs to all of it.
    const START: usize = 0;
    /// Where the codes of a span are.
    const CODES: Codes;
    /// Where its factors are.
    const FACTORS: Place;
}

/// Where the codes of a chunk are in a span; the first chunk's begin at `first`, `step` bytes apart.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Codes {
    /// Signed bytes.
    Bytes { first: usize, step: usize },
    /// The lower halves of 16 bytes, then the upper ones.
    Halves { first: usize, step: usize },
    /// The lower halves of 32 bytes; the upper ones are the next chunk's.
    Shared { first: usize, step: usize },
    /// Q6_K: of each half of a span, 4 bits of two numbers in a byte and 2 of four.
    SixBits,
}

/// Where the factors of chunks are in a span, in f16 unless it says otherwise.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// Nowhere: the scale is one, and codes are this much larger than what they stand for.
    Nowhere { zero: f32 },
    /// A scale for each chunk, so many bytes apart, and codes that much larger.
    Scales { step: usize, zero: f32 },
    /// A scale and a least number behind it for each chunk.
    Twos { step: usize },
    /// The same for two chunks.
    SharedTwos { step: usize },
    /// Q4_K: a scale, a least number, and 6 bits of each for each chunk.
    SixBits,
    /// Q6_K: a byte for each half of a chunk, and a scale of all.
    OfHalves,
}

/// Compiles an expression for each format, `$coding` being its type.
macro_rules! with_coding {
    ($format:expr, $coding:ident => $work:expr) => {{
        use $crate::blocks::{Format, coding};
        match $format {
            Format::Int8 => {
                type $coding = coding::Int8;
                $work
            }
            Format::Int4 => {
                type $coding = coding::Int4;
                $work
            }
            Format::Q8_0 => {
                type $coding = coding::Q8_0;
                $work
            }
            Format::Q4_0 => {
                type $coding = coding::Q4_0;
                $work
            }
            Format::Q4_1 => {
                type $coding = coding::Q4_1;
                $work
            }
            Format::Q4K => {
                type $coding = coding::Q4K;
                $work
            }
            Format::Q6K => {
                type $coding = coding::Q6K;
                $work
            }
        }
    }};
}
pub(crate) use with_coding;

pub(crate) struct Int8;
pub(crate) struct Int4;
pub(crate) struct Q8_0;
pub(crate) struct Q4_0;
pub(crate) struct Q4_1;
pub(crate) struct Q4K;
pub(crate) struct Q6K;

impl Coding for Int8 {
    const GROUP: usize = 128;
    const LARGEST: u8 = 255;
    const BYTES: usize = SPAN;
    const START: usize = 4;
    const CODES: Codes = Codes::Bytes {
        first: 0,
        step: CHUNK,
    };
    /// Without the scale of the row.
    const FACTORS: Place = Place::Nowhere { zero: 128.0 };
}

impl Coding for Int4 {
    const GROUP: usize = 64;
    const LARGEST: u8 = 15;
    const BYTES: usize = 4 * 36;
    const CODES: Codes = Codes::Shared { first: 4, step: 36 };
    const FACTORS: Place = Place::SharedTwos { step: 36 };
}

impl Coding for Q8_0 {
    const GROUP: usize = 32;
    const LARGEST: u8 = 255;
    const BYTES: usize = 8 * 34;
    const CODES: Codes = Codes::Bytes { first: 2, step: 34 };
    const FACTORS: Place = Place::Scales {
        step: 34,
        zero: 128.0,
    };
}

impl Coding for Q4_0 {
    const GROUP: usize = 32;
    const LARGEST: u8 = 15;
    const BYTES: usize = 8 * 18;
    const CODES: Codes = Codes::Halves { first: 2, step: 18 };
    const FACTORS: Place = Place::Scales {
        step: 18,
        zero: 8.0,
    };
}

impl Coding for Q4_1 {
    const GROUP: usize = 32;
    const LARGEST: u8 = 15;
    const BYTES: usize = 8 * 20;
    const CODES: Codes = Codes::Halves { first: 4, step: 20 };
    const FACTORS: Place = Place::Twos { step: 20 };
}

impl Coding for Q4K {
    const GROUP: usize = 32;
    const LARGEST: u8 = 15;
    const BYTES: usize = 4 + 12 + 128;
    const CODES: Codes = Codes::Shared {
        first: 16,
        step: 32,
    };
    const FACTORS: Place = Place::SixBits;
}

impl Coding for Q6K {
    const GROUP: usize = 16;
    const LARGEST: u8 = 63;
    const BYTES: usize = 128 + 64 + 16 + 2;
    const CODES: Codes = Codes::SixBits;
    const FACTORS: Place = Place::OfHalves;
}

/// Most bytes of a span.
pub(crate) const ROOM: usize = 8 * 34;

/// 256 columns of a row.
pub(crate) struct Span<'a, C> {
    /// `C::BYTES` of them.
    bytes: &'a [u8],
    coding: PhantomData<C>,
}

impl<C> Clone for Span<'_, C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C> Copy for Span<'_, C> {}

impl<'a, C: Coding> Span<'a, C> {
    /// A span of a row of blocks in this format. The last one may have to be filled up with zeros, in
    /// `room`: beyond the last column, codes and factors are whatever zeros stand for, and meet inputs that
    /// are zero.
    #[inline(always)]
    pub(crate) fn new(
        blocks: Blocks<'a>,
        row: usize,
        index: usize,
        room: &'a mut [u8; ROOM],
    ) -> Self {
        let row = &blocks.row(row)[C::START..];
        let start = index * C::BYTES;
        let bytes = if (index + 1) * SPAN <= blocks.columns() {
            &row[start..][..C::BYTES]
        } else {
            let end = blocks.format().row_bytes(blocks.columns());
            let bytes = &row[start..end.map_or(start, |end| end - C::START)];
            room.fill(0);
            room[..bytes.len()].copy_from_slice(bytes);
            &room[..C::BYTES]
        };
        Self {
            bytes,
            coding: PhantomData,
        }
    }

    /// Some bytes.
    ///
    /// # Panics
    /// If a span has not so many; known when it is compiled, as is where they are.
    #[inline(always)]
    pub(crate) fn bytes<const COUNT: usize>(self, at: usize) -> &'a [u8; COUNT] {
        match self.bytes[..C::BYTES][at..].first_chunk() {
            Some(bytes) => bytes,
            None => unreachable!("{at}, {COUNT} of {}", C::BYTES),
        }
    }

    /// Those of a half.
    #[inline(always)]
    pub(crate) fn half(self, at: usize) -> u16 {
        u16::from_le_bytes(*self.bytes(at))
    }

    /// Those of a word.
    #[inline(always)]
    pub(crate) fn word(self, at: usize) -> u32 {
        u32::from_le_bytes(*self.bytes(at))
    }

    /// The codes of a chunk.
    #[inline(always)]
    pub(crate) fn codes(self, chunk: usize) -> [u8; CHUNK] {
        match C::CODES {
            Codes::Bytes { first, step } => {
                self.bytes::<CHUNK>(first + chunk * step).map(|x| x ^ 0x80)
            }
            Codes::Halves { first, step } => {
                let bytes = self.bytes::<{ CHUNK / 2 }>(first + chunk * step);
                let mut codes = [0; CHUNK];
                for (at, byte) in bytes.iter().enumerate() {
                    (codes[at], codes[at + CHUNK / 2]) = (byte & 15, byte >> 4);
                }
                codes
            }
            Codes::Shared { first, step } => {
                self.halves_of(first + chunk / 2 * step, !chunk.is_multiple_of(2))
            }
            Codes::SixBits => {
                let (half, quarter) = (chunk / 4, chunk % 4);
                let mut codes = self.halves_of(half * 64 + quarter % 2 * CHUNK, quarter > 1);
                let high = self.bytes::<CHUNK>(128 + half * CHUNK);
                for (code, high) in codes.iter_mut().zip(high) {
                    *code |= (high >> (2 * quarter) & 3) << 4;
                }
                codes
            }
        }
    }

    /// The upper or lower halves of 32 bytes.
    #[inline(always)]
    fn halves_of(self, at: usize, upper: bool) -> [u8; CHUNK] {
        let bytes = self.bytes::<CHUNK>(at);
        // Shifts by numbers that are known: there are no others for vectors of bytes.
        match upper {
            false => bytes.map(|byte| byte & 15),
            true => bytes.map(|byte| byte >> 4),
        }
    }

    /// The factors of all chunks.
    #[inline(always)]
    pub(crate) fn factors(self) -> Factors {
        let mut factors = Factors::default();
        for chunk in 0..CHUNKS {
            let (scale, least) = self.factors_of(chunk);
            for half in 0..2 {
                factors.scale[half][chunk] = scale[half];
                factors.least[half][chunk] = least[half];
            }
        }
        factors
    }

    /// Scales and least numbers of the halves of a chunk.
    #[inline(always)]
    fn factors_of(self, chunk: usize) -> ([f32; 2], [f32; 2]) {
        let single = |at: usize| single_of_half(self.half(at));
        let (scale, least) = match C::FACTORS {
            Place::Nowhere { zero } => (1.0, -zero),
            Place::Scales { step, zero } => {
                let scale = single(chunk * step);
                (scale, -zero * scale)
            }
            Place::Twos { step } => (single(chunk * step), single(chunk * step + 2)),
            Place::SharedTwos { step } => {
                let at = chunk / 2 * step;
                (single(at), single(at + 2))
            }
            Place::SixBits => {
                let [scales, leasts] = self.six_bits().map(|bits| bits.to_le_bytes()[chunk]);
                (
                    single(0) * f32::from(scales),
                    -(single(2) * f32::from(leasts)),
                )
            }
            Place::OfHalves => {
                let unit = single(208);
                let bytes: &[u8; 2] = self.bytes(192 + 2 * chunk);
                let scale = bytes.map(|byte| unit * f32::from(byte as i8));
                return (scale, scale.map(|scale| -32.0 * scale));
            }
        };
        ([scale; 2], [least; 2])
    }

    /// Q4_K: the 6 bits of the scales of all chunks, a byte each, and of their least numbers.
    #[inline(always)]
    pub(crate) fn six_bits(self) -> [u64; 2] {
        const SIX: u32 = 0x3f3f_3f3f;
        const FOUR: u32 = 0x0f0f_0f0f;
        const TWO: u32 = 0x0303_0303;
        let (scales, leasts, rest) = (self.word(4), self.word(8), self.word(12));
        let upper = |low: u32, high: u32| u64::from(low & FOUR | (high >> 6 & TWO) << 4) << 32;
        [
            u64::from(scales & SIX) | upper(rest, scales),
            u64::from(leasts & SIX) | upper(rest >> 4, leasts),
        ]
    }
}
