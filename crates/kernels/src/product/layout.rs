//! How operands of a product with many rows lie while it is computed: in pieces that a register tile
//! reads one after another.

/// Tokens of a panel.
pub(crate) const TOKENS: usize = 32;

/// Words of 32 bits in the 64 bytes that a chunk has of a row: two bf16 or four codes in each.
pub(crate) const WORDS: usize = 16;

/// 64 bytes of each of `ROWS` rows of a weight: 32 bf16, or 64 codes of a byte.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct WeightChunk<const ROWS: usize>(pub [[u32; WORDS]; ROWS]);

/// What meets them of the tokens of a panel.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct InputChunk(pub [[u32; TOKENS]; WORDS]);

/// Sums of `ROWS` rows for the tokens of a panel.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Sums<const ROWS: usize>(pub [[f32; TOKENS]; ROWS]);

impl<const ROWS: usize> WeightChunk<ROWS> {
    pub(crate) const ZERO: Self = Self([[0; WORDS]; ROWS]);
}

impl InputChunk {
    pub(crate) const ZERO: Self = Self([[0; TOKENS]; WORDS]);
}

impl<const ROWS: usize> Sums<ROWS> {
    pub(crate) const ZERO: Self = Self([[0.0; TOKENS]; ROWS]);
}

/// Chunks of codes, and by their groups the scales of the rows and what is added.
pub(crate) type QuadRows<'a, const ROWS: usize> = (&'a [WeightChunk<ROWS>], &'a [[[f32; ROWS]; 2]]);

/// Chunks of inputs as bytes, and by their groups the scales of the tokens and their sums.
pub(crate) type QuadTokens<'a> = (&'a [InputChunk], &'a [[[f32; TOKENS]; 2]]);
