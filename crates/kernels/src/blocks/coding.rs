//! Where the codes of a format are in a row.

use super::{CHUNK, Factors};
use crate::precision::single_of_half;

/// A format, known when a loop is compiled.
pub(crate) trait Coding: Sync {
    /// Columns that share a scale at least: a power of two, of 16 or more.
    const GROUP: usize;
    /// The largest code.
    const LARGEST: u8;

    /// About where a chunk begins in a row.
    fn start(chunk: usize) -> usize;

    /// Codes `32 · chunk ..` of a row. Beyond the last column, codes and factors may be anything finite:
    /// they meet inputs that are zero.
    fn codes(row: &[u8], columns: usize, chunk: usize, codes: &mut [u8; CHUNK]);

    /// The two halves from which the factors of a chunk are made.
    fn halves(row: &[u8], chunk: usize) -> [u16; 2];

    /// The factors of a chunk, of its halves in f32.
    fn factors(row: &[u8], chunk: usize, halves: [f32; 2]) -> Factors;

    /// Codes and factors of a chunk.
    #[inline(always)]
    fn chunk(row: &[u8], columns: usize, chunk: usize, codes: &mut [u8; CHUNK]) -> Factors {
        Self::codes(row, columns, chunk, codes);
        Self::factors(row, chunk, Self::halves(row, chunk).map(single_of_half))
    }
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

/// The block, of so many bytes, that a chunk of a row is in, of which it has `chunks`.
#[inline(always)]
fn block<const BYTES: usize>(row: &[u8], chunk: usize, chunks: usize) -> Option<&[u8; BYTES]> {
    row.get(chunk / chunks * BYTES..)?.first_chunk()
}

/// Codes of 4 bits: the lower halves of 16 bytes, then the upper ones.
#[inline(always)]
fn nibbles(bytes: &[u8], codes: &mut [u8; CHUNK]) {
    let Some(bytes) = bytes.first_chunk::<{ CHUNK / 2 }>() else {
        return;
    };
    for at in 0..CHUNK / 2 {
        codes[at] = bytes[at] & 15;
        codes[at + CHUNK / 2] = bytes[at] >> 4;
    }
}

/// One half of 32 bytes.
#[inline(always)]
fn upper_or_lower(bytes: &[u8], upper: bool, codes: &mut [u8; CHUNK]) {
    let Some(bytes) = bytes.first_chunk::<CHUNK>() else {
        return;
    };
    // Shifts by numbers that are known: there are no others for vectors of bytes.
    match upper {
        false => (0..CHUNK).for_each(|at| codes[at] = bytes[at] & 15),
        true => (0..CHUNK).for_each(|at| codes[at] = bytes[at] >> 4),
    }
}

/// Signed bytes.
#[inline(always)]
fn bytes(bytes: &[u8; CHUNK], codes: &mut [u8; CHUNK]) {
    for at in 0..CHUNK {
        codes[at] = bytes[at] ^ 0x80;
    }
}

/// The same of a slice.
#[inline(always)]
fn signed(from: &[u8], codes: &mut [u8; CHUNK]) {
    if let Some(from) = from.first_chunk() {
        bytes(from, codes);
    }
}

/// Q6_K: of each half of 128, 4 bits of two numbers in a byte and 2 of four.
#[inline(always)]
fn six_bits(block: &[u8; 210], chunk: usize, codes: &mut [u8; CHUNK]) {
    let (half, quarter) = (chunk % 8 / 4, chunk % 4);
    upper_or_lower(&block[half * 64 + quarter % 2 * 32..], quarter > 1, codes);
    let Some(high) = block[128 + half * 32..].first_chunk::<CHUNK>() else {
        return;
    };
    match quarter {
        0 => (0..CHUNK).for_each(|at| codes[at] |= high[at] << 4 & 48),
        1 => (0..CHUNK).for_each(|at| codes[at] |= high[at] << 2 & 48),
        2 => (0..CHUNK).for_each(|at| codes[at] |= high[at] & 48),
        _ => (0..CHUNK).for_each(|at| codes[at] |= high[at] >> 2 & 48),
    }
}

/// The two halves of 16 bits in a block of a row.
#[inline(always)]
fn two<const BYTES: usize>(row: &[u8], chunk: usize, chunks: usize, at: [usize; 2]) -> [u16; 2] {
    match block::<BYTES>(row, chunk, chunks) {
        Some(block) => at.map(|at| u16::from_le_bytes([block[at], block[at + 1]])),
        None => [0; 2],
    }
}

impl Coding for Int8 {
    const GROUP: usize = 128;
    const LARGEST: u8 = 255;

    #[inline(always)]
    fn start(chunk: usize) -> usize {
        chunk * CHUNK
    }

    #[inline(always)]
    fn codes(row: &[u8], columns: usize, chunk: usize, codes: &mut [u8; CHUNK]) {
        let from = row.get(4..4 + columns).unwrap_or_default();
        let from = from.get(chunk * CHUNK..).unwrap_or_default();
        match from.first_chunk::<CHUNK>() {
            Some(from) => bytes(from, codes),
            None => {
                let mut padded = [0; CHUNK];
                padded[..from.len()].copy_from_slice(from);
                bytes(&padded, codes);
            }
        }
    }

    #[inline(always)]
    fn halves(_: &[u8], _: usize) -> [u16; 2] {
        [0; 2]
    }

    /// Without the scale of the row.
    #[inline(always)]
    fn factors(_: &[u8], _: usize, _: [f32; 2]) -> Factors {
        Factors::of_both(1.0, -128.0)
    }
}

impl Coding for Int4 {
    const GROUP: usize = 64;
    const LARGEST: u8 = 15;

    #[inline(always)]
    fn start(chunk: usize) -> usize {
        chunk * 36 / 2
    }

    #[inline(always)]
    fn codes(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) {
        match block::<36>(row, chunk, 2) {
            Some(block) => upper_or_lower(&block[4..], chunk % 2 == 1, codes),
            None => codes.fill(0),
        }
    }

    #[inline(always)]
    fn halves(row: &[u8], chunk: usize) -> [u16; 2] {
        two::<36>(row, chunk, 2, [0, 2])
    }

    #[inline(always)]
    fn factors(_: &[u8], _: usize, [scale, least]: [f32; 2]) -> Factors {
        Factors::of_both(scale, least)
    }
}

impl Coding for Q8_0 {
    const GROUP: usize = 32;
    const LARGEST: u8 = 255;

    #[inline(always)]
    fn start(chunk: usize) -> usize {
        chunk * 34
    }

    #[inline(always)]
    fn codes(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) {
        match block::<34>(row, chunk, 1) {
            Some(block) => signed(&block[2..], codes),
            None => codes.fill(0),
        }
    }

    #[inline(always)]
    fn halves(row: &[u8], chunk: usize) -> [u16; 2] {
        two::<34>(row, chunk, 1, [0, 0])
    }

    #[inline(always)]
    fn factors(_: &[u8], _: usize, [scale, _]: [f32; 2]) -> Factors {
        Factors::of_both(scale, -128.0 * scale)
    }
}

impl Coding for Q4_0 {
    const GROUP: usize = 32;
    const LARGEST: u8 = 15;

    #[inline(always)]
    fn start(chunk: usize) -> usize {
        chunk * 18
    }

    #[inline(always)]
    fn codes(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) {
        match block::<18>(row, chunk, 1) {
            Some(block) => nibbles(&block[2..], codes),
            None => codes.fill(0),
        }
    }

    #[inline(always)]
    fn halves(row: &[u8], chunk: usize) -> [u16; 2] {
        two::<18>(row, chunk, 1, [0, 0])
    }

    #[inline(always)]
    fn factors(_: &[u8], _: usize, [scale, _]: [f32; 2]) -> Factors {
        Factors::of_both(scale, -8.0 * scale)
    }
}

impl Coding for Q4_1 {
    const GROUP: usize = 32;
    const LARGEST: u8 = 15;

    #[inline(always)]
    fn start(chunk: usize) -> usize {
        chunk * 20
    }

    #[inline(always)]
    fn codes(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) {
        match block::<20>(row, chunk, 1) {
            Some(block) => nibbles(&block[4..], codes),
            None => codes.fill(0),
        }
    }

    #[inline(always)]
    fn halves(row: &[u8], chunk: usize) -> [u16; 2] {
        two::<20>(row, chunk, 1, [0, 2])
    }

    #[inline(always)]
    fn factors(_: &[u8], _: usize, [scale, least]: [f32; 2]) -> Factors {
        Factors::of_both(scale, least)
    }
}

impl Coding for Q4K {
    const GROUP: usize = 32;
    const LARGEST: u8 = 15;

    #[inline(always)]
    fn start(chunk: usize) -> usize {
        chunk * 144 / 8
    }

    #[inline(always)]
    fn codes(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) {
        match block::<144>(row, chunk, 8) {
            Some(block) => {
                // Two groups share their bytes.
                let (pair, upper) = (chunk % 8 / 2, chunk % 2 == 1);
                upper_or_lower(&block[16 + pair * 32..], upper, codes);
            }
            None => codes.fill(0),
        }
    }

    #[inline(always)]
    fn halves(row: &[u8], chunk: usize) -> [u16; 2] {
        two::<144>(row, chunk, 8, [0, 2])
    }

    #[inline(always)]
    fn factors(row: &[u8], chunk: usize, [scale, least]: [f32; 2]) -> Factors {
        let group = chunk % 8;
        let (unit, low) = match (block::<144>(row, chunk, 8), group) {
            (None, _) => (0, 0),
            (Some(block), 0..4) => (block[4 + group] & 63, block[8 + group] & 63),
            (Some(block), _) => (
                block[8 + group] & 15 | block[group] >> 6 << 4,
                block[8 + group] >> 4 | block[4 + group] >> 6 << 4,
            ),
        };
        Factors::of_both(scale * f32::from(unit), -(least * f32::from(low)))
    }
}

impl Coding for Q6K {
    const GROUP: usize = 16;
    const LARGEST: u8 = 63;

    #[inline(always)]
    fn start(chunk: usize) -> usize {
        chunk * 210 / 8
    }

    #[inline(always)]
    fn codes(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) {
        match block::<210>(row, chunk, 8) {
            Some(block) => six_bits(block, chunk, codes),
            None => codes.fill(0),
        }
    }

    #[inline(always)]
    fn halves(row: &[u8], chunk: usize) -> [u16; 2] {
        two::<210>(row, chunk, 8, [208, 208])
    }

    #[inline(always)]
    fn factors(row: &[u8], chunk: usize, [unit, _]: [f32; 2]) -> Factors {
        let scale = match block::<210>(row, chunk, 8) {
            Some(block) => {
                let at = 192 + chunk % 8 * 2;
                [at, at + 1].map(|at| unit * f32::from(block[at] as i8))
            }
            None => [0.0; 2],
        };
        Factors {
            scale,
            least: scale.map(|scale| -32.0 * scale),
        }
    }
}
