//! What processors multiply tiles with.

use std::marker::PhantomData;

use super::inputs::{Pairs, Quads};
use super::layout::{Sums, WORDS, WeightChunk};
use super::many_rows::{BlockSizes, Kernel, Rows};
use crate::blocks::{Blocks, CHUNK, Coding};
use crate::isa::{amx, avx512, prefetch};
use crate::precision::Number;
use half::bf16;
use half::slice::HalfFloatSliceExt;

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
    type Tile = PairTile<{ amx::ROWS }>;
    type Inputs = Pairs;
    type Ready = amx::Tiles;

    /// In 2 MiB: the inputs of a block take a quarter, or less where there are few.
    fn blocks(panels: usize) -> BlockSizes {
        let panels = panels.min(24);
        let depth = (256 / panels).clamp(8, 128);
        let tiles = (128 / depth).clamp(1, 8);
        BlockSizes {
            tiles,
            depth,
            panels,
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

/// Codes of a format and AVX512-VNNI.
pub(crate) struct Vnni<C>(pub(crate) avx512::Vnni, pub(crate) PhantomData<C>);

impl<C> Clone for Vnni<C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C> Copy for Vnni<C> {}

/// Chunks of 64 codes in a block.
const QUAD_DEPTH: usize = 32;

impl<C: Coding> Kernel<{ avx512::ROWS }> for Vnni<C> {
    type Tile = QuadTile<{ avx512::ROWS }, C>;
    type Inputs = Quads;
    type Ready = Self;

    /// 48 rows of 2048 columns: 96 KiB.
    fn blocks(panels: usize) -> BlockSizes {
        BlockSizes {
            tiles: 4,
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
        sums: &mut Sums<{ avx512::ROWS }>,
    ) {
        let input = (
            inputs.packed.panel(panel, first),
            inputs.factors(panel, first),
        );
        let weight = (&weight.chunks[..input.0.len()], &weight.factors[..]);
        match C::GROUP {
            16 => ready.0.multiply::<16>(weight, input, sums, first > 0),
            32 => ready.0.multiply::<32>(weight, input, sums, first > 0),
            64 => ready.0.multiply::<64>(weight, input, sums, first > 0),
            _ => ready.0.multiply::<128>(weight, input, sums, first > 0),
        }
    }
}

/// A weight in bf16.
pub(crate) struct PlainRows<'a> {
    pub(crate) weight: &'a [bf16],
    pub(crate) columns: usize,
}

impl<const ROWS: usize> Rows<PairTile<ROWS>> for PlainRows<'_> {
    #[inline(always)]
    fn read(&self, row: usize, chunk: usize, tile: &mut PairTile<ROWS>, [to, at]: [usize; 2]) {
        let row = &self.weight[row * self.columns..][..self.columns];
        let from: &[u16] = row[chunk * Pairs::FEATURES..].reinterpret_cast();
        let to: &mut [u16; Pairs::FEATURES] = bytemuck::cast_mut(&mut tile.0[at].0[to]);
        match from.first_chunk() {
            Some(from) => *to = *from,
            None => {
                to[..from.len()].copy_from_slice(from);
                to[from.len()..].fill(0);
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, chunk: usize) {
        prefetch(self.weight, row * self.columns + chunk * Pairs::FEATURES);
    }

    #[inline(always)]
    fn scale(&self, _: usize) -> f32 {
        1.0
    }
}

/// A weight in codes of a format.
pub(crate) struct CodedRows<'a, C> {
    pub(crate) blocks: Blocks<'a>,
    pub(crate) widen: Option<avx512::Widen>,
    pub(crate) coding: PhantomData<C>,
}

impl<C: Coding> CodedRows<'_, C> {
    /// Fetches what a chunk begins with.
    #[inline(always)]
    fn fetch(&self, row: usize, chunk: usize) {
        let (bytes, start) = self.blocks.bytes_and_start(row);
        prefetch(bytes, start + C::start(chunk));
    }
}

/// Widened to bf16, of which there are two in a word.
impl<const ROWS: usize, C: Coding> Rows<PairTile<ROWS>> for CodedRows<'_, C> {
    #[inline(always)]
    fn read(&self, row: usize, chunk: usize, tile: &mut PairTile<ROWS>, [to, at]: [usize; 2]) {
        let mut codes = [0; CHUNK];
        let factors = C::chunk(
            self.blocks.row(row),
            self.blocks.columns(),
            chunk,
            &mut codes,
        );
        let to: &mut [u16; CHUNK] = bytemuck::cast_mut(&mut tile.0[at].0[to]);
        if let Some(widen) = self.widen {
            return widen.widen(&codes, &factors, to);
        }
        for half in 0..2 {
            let (scale, least) = (factors.scale[half], factors.least[half]);
            for at in half * CHUNK / 2..(half + 1) * CHUNK / 2 {
                let number = f32::from(codes[at]) * scale + least;
                to[at] = number.to_bf16().to_bits();
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, chunk: usize) {
        self.fetch(row, chunk);
    }

    #[inline(always)]
    fn scale(&self, row: usize) -> f32 {
        self.blocks.row_scale(row)
    }
}

/// As they are.
impl<const ROWS: usize, C: Coding> Rows<QuadTile<ROWS, C>> for CodedRows<'_, C> {
    #[inline(always)]
    fn read(&self, row: usize, chunk: usize, tile: &mut QuadTile<ROWS, C>, [to, at]: [usize; 2]) {
        let bytes = self.blocks.row(row);
        let codes: &mut [u8; 4 * WORDS] = bytemuck::cast_mut(&mut tile.chunks[at].0[to]);
        for (half, codes) in codes.as_chunks_mut::<CHUNK>().0.iter_mut().enumerate() {
            let factors = C::chunk(bytes, self.blocks.columns(), chunk * 2 + half, codes);
            let column = (at * 2 + half) * CHUNK;
            for part in 0..(CHUNK / C::GROUP).max(1) {
                let group = &mut tile.factors[column / C::GROUP + part];
                group[0][to] = factors.scale[part];
                group[1][to] = factors.least[part];
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, chunk: usize) {
        self.fetch(row, 2 * chunk);
    }

    #[inline(always)]
    fn scale(&self, row: usize) -> f32 {
        self.blocks.row_scale(row)
    }
}
