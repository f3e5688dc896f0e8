//! What processors multiply tiles with.

use std::marker::PhantomData;

use super::inputs::{Pairs, Quads};
use super::layout::{QuadRows, QuadTokens, Sums, WORDS, WeightChunk};
use super::many_rows::{BlockSizes, Kernel, Rows};
use crate::blocks::{Blocks, CHUNK, CHUNKS, Coding, ROOM, SPAN, Span};
use crate::isa::{self, amx, avx2, avx512, prefetch};
use crate::precision::Number;
use crate::split::some;
use half::bf16;
use half::slice::HalfFloatSliceExt;

/// Chunks of a span in pairs.
const PAIRS: usize = SPAN / Pairs::FEATURES;

/// Chunks of a span in quads.
const QUADS: usize = SPAN / Quads::FEATURES;

/// Rows of bf16, packed.
pub(crate) struct PairTile<const ROWS: usize>(pub(super) Vec<WeightChunk<ROWS>>);

/// Rows of codes, packed, with their factors.
pub(crate) struct QuadTile<const ROWS: usize, C> {
    chunks: Vec<WeightChunk<ROWS>>,
    /// `[groups]`: the scales of the rows, and what is added.
    factors: Vec<[[f32; ROWS]; 2]>,
    coding: PhantomData<C>,
}

impl Kernel<{ amx::ROWS }> for amx::Amx {
    const SPAN: usize = PAIRS;
    type Tile = PairTile<{ amx::ROWS }>;
    type Inputs = Pairs;
    type Ready = amx::Tiles;

    /// A panel's part of a block, 32 KiB, stays in the first cache while all tiles meet it. In the second, of
    /// 2 MiB: 256 rows of the weight twice, 640 KiB of what they meet and of sums, at 640 tokens. With very
    /// few tokens the weight is read in longer pieces: memory is slower than the products.
    fn blocks(panels: usize) -> BlockSizes {
        let (tiles, depth) = match panels {
            0..=2 => (2, 64),
            3..=8 => (4, 16),
            _ => (8, 16),
        };
        BlockSizes {
            tiles,
            depth,
            panels: panels.min(24),
        }
    }

    fn tile(depth: usize) -> Self::Tile {
        PairTile(vec![WeightChunk::ZERO; depth])
    }

    #[inline(always)]
    fn ready(self) -> amx::Tiles {
        self.tiles()
    }

    #[inline(always)]
    fn multiply(
        ready: &amx::Tiles,
        weight: &Self::Tile,
        inputs: &Pairs,
        panel: usize,
        first: usize,
        sums: &mut Sums<{ amx::ROWS }>,
    ) {
        let input = inputs.0.panel(panel, first);
        ready.multiply(&weight.0[..input.len()], input, sums, first > 0);
    }
}

impl Kernel<{ avx512::ROWS }> for avx512::Bf16 {
    const SPAN: usize = PAIRS;
    type Tile = PairTile<{ avx512::ROWS }>;
    type Inputs = Pairs;
    type Ready = Self;

    /// 48 rows of 2048 columns: 192 KiB.
    fn blocks(panels: usize) -> BlockSizes {
        BlockSizes {
            tiles: 4,
            depth: 64,
            panels: panels.min(24),
        }
    }

    fn tile(depth: usize) -> Self::Tile {
        PairTile(vec![WeightChunk::ZERO; depth])
    }

    #[inline(always)]
    fn ready(self) -> Self {
        self
    }

    #[inline(always)]
    fn multiply(
        ready: &Self,
        weight: &Self::Tile,
        inputs: &Pairs,
        panel: usize,
        first: usize,
        sums: &mut Sums<{ avx512::ROWS }>,
    ) {
        let input = inputs.0.panel(panel, first);
        Self::multiply(*ready, &weight.0[..input.len()], input, sums, first > 0);
    }
}

/// What multiplies bytes in fours, of `ROWS` rows.
pub(crate) trait QuadLoop<const ROWS: usize>: Copy + Sync {
    /// `sums (+)= weight · input`, over all chunks.
    fn multiply<C: Coding>(
        self,
        weight: QuadRows<'_, ROWS>,
        input: QuadTokens<'_>,
        sums: &mut Sums<ROWS>,
        adds: bool,
    );
}

impl QuadLoop<{ avx512::ROWS }> for avx512::Vnni {
    #[inline(always)]
    fn multiply<C: Coding>(
        self,
        weight: QuadRows<'_, { avx512::ROWS }>,
        input: QuadTokens<'_>,
        sums: &mut Sums<{ avx512::ROWS }>,
        adds: bool,
    ) {
        self.multiply::<C>(weight, input, sums, adds);
    }
}

impl QuadLoop<{ avx2::ROWS }> for isa::Bytes {
    #[inline(always)]
    fn multiply<C: Coding>(
        self,
        weight: QuadRows<'_, { avx2::ROWS }>,
        input: QuadTokens<'_>,
        sums: &mut Sums<{ avx2::ROWS }>,
        adds: bool,
    ) {
        self.multiply::<C>(weight, input, sums, adds);
    }
}

/// Such a loop and codes of a format.
pub(crate) struct OfCodes<L, C>(pub(crate) L, pub(crate) PhantomData<C>);

impl<L: Copy, C> Clone for OfCodes<L, C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<L: Copy, C> Copy for OfCodes<L, C> {}

/// Chunks of 64 codes in a block, whatever the loop.
pub(crate) const QUAD_DEPTH: usize = 32;

impl<const ROWS: usize, L: QuadLoop<ROWS>, C: Coding> Kernel<ROWS> for OfCodes<L, C> {
    const SPAN: usize = QUADS;
    type Tile = QuadTile<ROWS, C>;
    type Inputs = Quads;
    type Ready = Self;

    /// About 48 rows of 2048 columns: 96 KiB.
    fn blocks(panels: usize) -> BlockSizes {
        BlockSizes {
            tiles: 48 / ROWS,
            depth: QUAD_DEPTH,
            panels: panels.min(24),
        }
    }

    fn tile(depth: usize) -> Self::Tile {
        QuadTile {
            chunks: vec![WeightChunk::ZERO; depth],
            factors: vec![[[0.0; _]; 2]; (depth * Quads::FEATURES).div_ceil(C::GROUP)],
            coding: PhantomData,
        }
    }

    #[inline(always)]
    fn ready(self) -> Self {
        self
    }

    #[inline(always)]
    fn multiply(
        ready: &Self,
        weight: &Self::Tile,
        inputs: &Quads,
        panel: usize,
        first: usize,
        sums: &mut Sums<ROWS>,
    ) {
        let input = inputs.packed.panel(panel, first);
        let factors = inputs.factors(panel, first);
        let weight = (&weight.chunks[..input.len()], &weight.factors[..]);
        (ready.0).multiply::<C>(weight, (input, factors), sums, first > 0);
    }
}

/// A weight in bf16.
pub(crate) struct PlainRows<'a> {
    pub(crate) weight: &'a [bf16],
    pub(crate) columns: usize,
}

/// The chunks of a row of a tile from `at` on, as many as a span has.
#[inline(always)]
fn row_of<const ROWS: usize, const COUNT: usize>(
    chunks: &mut [WeightChunk<ROWS>],
    [row, at]: [usize; 2],
) -> [&mut [u32; WORDS]; COUNT] {
    match chunks[at..].first_chunk_mut() {
        Some(chunks) => chunks.each_mut().map(|chunk| &mut chunk.0[row]),
        None => unreachable!("blocks are whole spans"),
    }
}

impl<const ROWS: usize> Rows<PairTile<ROWS>> for PlainRows<'_> {
    #[inline(always)]
    fn read(&self, row: usize, span: usize, tile: &mut PairTile<ROWS>, slot: [usize; 2]) {
        let row = &self.weight[row * self.columns..][..self.columns];
        let mut from: &[u16] = row[span * SPAN..].reinterpret_cast();
        for to in row_of::<_, PAIRS>(&mut tile.0, slot) {
            let to: &mut [u16; Pairs::FEATURES] = bytemuck::cast_mut(to);
            match from.split_first_chunk() {
                Some((chunk, rest)) => (*to, from) = (*chunk, rest),
                None => {
                    to[..from.len()].copy_from_slice(from);
                    to[from.len()..].fill(0);
                    from = &[];
                }
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, span: usize) {
        prefetch(some(self.weight, row * self.columns + span * SPAN, SPAN));
    }

    #[inline(always)]
    fn scale(&self, _: usize) -> f32 {
        1.0
    }
}

/// A weight in codes of a format.
pub(crate) struct CodedRows<'a, C> {
    pub(crate) blocks: Blocks<'a>,
    pub(crate) bytes: Option<isa::Bytes>,
    pub(crate) widen: Option<avx512::Widen>,
    pub(crate) coding: PhantomData<C>,
}

impl<C: Coding> CodedRows<'_, C> {
    /// Fetches a span.
    #[inline(always)]
    fn fetch(&self, row: usize, span: usize) {
        let (bytes, start) = self.blocks.bytes_and_start(row);
        prefetch(some(bytes, start + span * C::BYTES, C::BYTES));
    }
}

/// Widened to bf16, of which there are two in a word.
impl<const ROWS: usize, C: Coding> Rows<PairTile<ROWS>> for CodedRows<'_, C> {
    #[inline(always)]
    fn read(&self, row: usize, span: usize, tile: &mut PairTile<ROWS>, slot: [usize; 2]) {
        let mut room = [0; ROOM];
        let span = Span::<C>::new(self.blocks, row, span, &mut room);
        let to = row_of(&mut tile.0, slot).map(bytemuck::cast_mut);
        if let Some(widen) = self.widen {
            return widen.widen(span, to);
        }
        let factors = span.factors();
        for (chunk, to) in to.into_iter().enumerate() {
            let to: &mut [u16; CHUNK] = to;
            for (at, (to, code)) in to.iter_mut().zip(span.codes(chunk)).enumerate() {
                let half = at / (CHUNK / 2);
                let (scale, least) = (factors.scale[half][chunk], factors.least[half][chunk]);
                *to = (f32::from(code) * scale + least).to_bf16().to_bits();
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, span: usize) {
        self.fetch(row, span);
    }

    #[inline(always)]
    fn scale(&self, row: usize) -> f32 {
        self.blocks.row_scale(row)
    }
}

/// As they are.
impl<const ROWS: usize, C: Coding> Rows<QuadTile<ROWS, C>> for CodedRows<'_, C> {
    #[inline(always)]
    fn read(&self, row: usize, span: usize, tile: &mut QuadTile<ROWS, C>, slot: [usize; 2]) {
        let mut room = [0; ROOM];
        let span = Span::<C>::new(self.blocks, row, span, &mut room);
        let mut codes = [[0; CHUNK]; CHUNKS];
        let factors = match self.bytes {
            Some(bytes) => bytes.read(span, &mut codes),
            None => {
                codes = std::array::from_fn(|chunk| span.codes(chunk));
                span.factors()
            }
        };
        let [to, at] = slot;
        let codes: &[[u32; WORDS]; QUADS] = bytemuck::cast_ref(&codes);
        for (to, codes) in row_of::<_, QUADS>(&mut tile.chunks, slot)
            .into_iter()
            .zip(codes)
        {
            *to = *codes;
        }
        let first = at * Quads::FEATURES / C::GROUP;
        for (index, group) in tile.factors[first..][..SPAN / C::GROUP]
            .iter_mut()
            .enumerate()
        {
            let column = index * C::GROUP;
            let (chunk, half) = (column / CHUNK, column % CHUNK / (CHUNK / 2));
            (group[0][to], group[1][to]) = (factors.scale[half][chunk], factors.least[half][chunk]);
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, span: usize) {
        self.fetch(row, span);
    }

    #[inline(always)]
    fn scale(&self, row: usize) -> f32 {
        self.blocks.row_scale(row)
    }
}
