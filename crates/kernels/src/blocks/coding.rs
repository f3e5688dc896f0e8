//! Where the codes of a format are in a row.

use super::{CHUNK, Factors, float};

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
    fn chunk(row: &[u8], columns: usize, chunk: usize, codes: &mut [u8; CHUNK]) -> Factors;
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

/// Beyond the last column.
#[inline(always)]
fn nothing(codes: &mut [u8; CHUNK]) -> Factors {
    codes.fill(0);
    Factors::of_both(0.0, 0.0)
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
fn halves(bytes: &[u8], upper: bool, codes: &mut [u8; CHUNK]) {
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

impl Coding for Int8 {
    const GROUP: usize = 128;
    const LARGEST: u8 = 255;

    #[inline(always)]
    fn start(chunk: usize) -> usize {
        chunk * CHUNK
    }

    /// Without the scale of the row.
    #[inline(always)]
    fn chunk(row: &[u8], columns: usize, chunk: usize, codes: &mut [u8; CHUNK]) -> Factors {
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
    fn chunk(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) -> Factors {
        let Some(block) = block::<36>(row, chunk, 2) else {
            return nothing(codes);
        };
        halves(&block[4..], chunk % 2 == 1, codes);
        Factors::of_both(float(block, 0), float(block, 2))
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
    fn chunk(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) -> Factors {
        let Some(block) = block::<34>(row, chunk, 1) else {
            return nothing(codes);
        };
        if let Some(signed) = block[2..].first_chunk() {
            bytes(signed, codes);
        }
        let scale = float(block, 0);
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
    fn chunk(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) -> Factors {
        let Some(block) = block::<18>(row, chunk, 1) else {
            return nothing(codes);
        };
        nibbles(&block[2..], codes);
        let scale = float(block, 0);
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
    fn chunk(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) -> Factors {
        let Some(block) = block::<20>(row, chunk, 1) else {
            return nothing(codes);
        };
        nibbles(&block[4..], codes);
        Factors::of_both(float(block, 0), float(block, 2))
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
    fn chunk(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) -> Factors {
        let Some(block) = block::<144>(row, chunk, 8) else {
            return nothing(codes);
        };
        let group = chunk % 8;
        let packed = &block[4..16];
        let (unit, low) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => (
                packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                packed[group + 4] >> 4 | packed[group] >> 6 << 4,
            ),
        };
        // Two groups share their bytes.
        halves(&block[16 + group / 2 * 32..][..32], group % 2 == 1, codes);
        let (scale, least) = (float(block, 0), float(block, 2));
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
    fn chunk(row: &[u8], _: usize, chunk: usize, codes: &mut [u8; CHUNK]) -> Factors {
        let Some(block) = block::<210>(row, chunk, 8) else {
            return nothing(codes);
        };
        let (half, quarter) = (chunk % 8 / 4, chunk % 4);
        halves(&block[half * 64 + quarter % 2 * 32..], quarter > 1, codes);
        if let Some(high) = block[128 + half * 32..].first_chunk::<CHUNK>() {
            match quarter {
                0 => (0..CHUNK).for_each(|at| codes[at] |= high[at] << 4 & 48),
                1 => (0..CHUNK).for_each(|at| codes[at] |= high[at] << 2 & 48),
                2 => (0..CHUNK).for_each(|at| codes[at] |= high[at] & 48),
                _ => (0..CHUNK).for_each(|at| codes[at] |= high[at] >> 2 & 48),
            }
        }
        let (unit, at) = (float(block, 208), 192 + chunk % 8 * 2);
        let scale = [at, at + 1].map(|at| unit * f32::from(block[at] as i8));
        Factors {
            scale,
            least: scale.map(|scale| -32.0 * scale),
        }
    }
}
