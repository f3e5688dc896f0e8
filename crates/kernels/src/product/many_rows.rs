//! Products with many tokens: blocks of a weight are packed (and widened, if they are stored in fewer
//! bits) into a thread's second cache and meet all tokens there.

use std::mem::swap;
use std::ops::Range;

use super::inputs::Packed;
use super::layout::{Sums, TOKENS};
use crate::precision::Number;
use crate::split::pieces_with;

/// Spans that are fetched before they are read: about what memory takes to answer.
const AHEAD: usize = 8;

/// The loop of a processor's instructions.
pub(crate) trait Kernel<const ROWS: usize>: Copy + Sync {
    /// Chunks that are packed at a time.
    const SPAN: usize;
    /// `ROWS` rows of a block, packed.
    type Tile;
    /// The inputs, packed.
    type Inputs: AsRef<Packed> + Sync;
    /// What this thread must hold while it multiplies.
    type Ready;

    /// The blocks to work in.
    fn blocks(panels: usize) -> BlockSizes;

    /// Room for `depth` chunks, which are whole spans.
    fn tile(depth: usize) -> Self::Tile;

    /// Makes this thread ready.
    fn ready(self) -> Self::Ready;

    /// `sums (+)= weight · input` over a block of chunks, that begins with `first`, of a panel.
    fn multiply(
        ready: &Self::Ready,
        weight: &Self::Tile,
        inputs: &Self::Inputs,
        panel: usize,
        first: usize,
        sums: &mut Sums<ROWS>,
    );
}

/// A matrix whose rows can be packed into tiles.
pub(crate) trait Rows<Tile>: Sync {
    /// Packs a span of a row as the row of a tile and the chunks from there on that `slot` says.
    fn read(&self, row: usize, span: usize, tile: &mut Tile, slot: [usize; 2]);

    /// Fetches what `read` will read.
    fn prefetch(&self, row: usize, span: usize);

    /// What the products of a row are multiplied with.
    fn scale(&self, row: usize) -> f32;
}

/// Sizes of blocks, which the second cache holds together: of the weight twice (the next one is packed
/// meanwhile), of the inputs, and the sums.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockSizes {
    /// Tiles of rows.
    pub(crate) tiles: usize,
    /// Chunks: of whole spans.
    pub(crate) depth: usize,
    /// Panels of tokens.
    pub(crate) panels: usize,
}

/// `W · X`.
///
/// # Shapes
/// - `weight`: `[output, features]`
/// - `inputs`: `[features, tokens]`
/// - `y`: `[output, tokens]`
pub(crate) fn product<const ROWS: usize, K: Kernel<ROWS>, Y: Number>(
    kernel: K,
    weight: &impl Rows<K::Tile>,
    inputs: &K::Inputs,
    y: &mut [Y],
) {
    let tokens = inputs.as_ref().tokens;
    let panels = tokens.div_ceil(TOKENS);
    let blocks = K::blocks(panels);
    // At least two blocks of rows for every thread, or the last one is waited for.
    let share = (y.len() / tokens).div_ceil(2 * rayon::current_num_threads());
    let tiles = share.div_ceil(ROWS).clamp(1, blocks.tiles);
    let height = tiles * ROWS;
    let scratch = || Scratch::<ROWS, K> {
        now: (0..tiles).map(|_| K::tile(blocks.depth)).collect(),
        next: (0..tiles).map(|_| K::tile(blocks.depth)).collect(),
        sums: vec![Sums::ZERO; tiles * blocks.panels],
    };
    pieces_with(
        y,
        height * tokens,
        scratch,
        #[inline(always)]
        |scratch, block, y: &mut [Y]| {
            let task = Block {
                weight,
                inputs,
                first: block * height,
                rows: y.len() / tokens,
                depth: blocks.depth,
            };
            for panel in (0..panels).step_by(blocks.panels) {
                let panels = panel..panels.min(panel + blocks.panels);
                task.run(kernel, panels.clone(), scratch);
                task.write::<ROWS, K::Tile, Y>(panels, &scratch.sums, y);
            }
        },
    );
}

/// What a thread works in.
struct Scratch<const ROWS: usize, K: Kernel<ROWS>> {
    now: Vec<K::Tile>,
    next: Vec<K::Tile>,
    /// `[panels, tiles]`
    sums: Vec<Sums<ROWS>>,
}

/// A span of a row of a block.
struct Piece {
    row: usize,
    at: usize,
}

impl Piece {
    /// One of many, row by row.
    #[inline(always)]
    fn new(index: usize, depth: usize) -> Self {
        let (row, at) = (index / depth, index % depth);
        Self { row, at }
    }

    #[inline(always)]
    fn advance(&mut self, depth: usize) {
        self.at += 1;
        if self.at == depth {
            (self.row, self.at) = (self.row + 1, 0);
        }
    }
}

/// Some rows of a weight.
struct Block<'a, W, I> {
    weight: &'a W,
    inputs: &'a I,
    first: usize,
    rows: usize,
    /// Chunks that are packed at a time.
    depth: usize,
}

impl<W, I: AsRef<Packed>> Block<'_, W, I> {
    #[inline(always)]
    fn run<const ROWS: usize, K: Kernel<ROWS, Inputs = I>>(
        &self,
        kernel: K,
        panels: Range<usize>,
        scratch: &mut Scratch<ROWS, K>,
    ) where
        W: Rows<K::Tile>,
    {
        let tiles = self.rows.div_ceil(ROWS);
        let Scratch { now, next, sums } = scratch;
        self.pack::<ROWS, K>(0, 0..usize::MAX, now);
        for first in (0..self.inputs.as_ref().depth).step_by(self.depth) {
            let after = first + self.depth;
            let pieces = self.rows * self.spans_at::<ROWS, K>(after);
            let each = pieces.div_ceil(panels.len() * tiles);
            let ready = kernel.ready();
            let mut packed = 0;
            let sums = sums.chunks_exact_mut(tiles);
            for (panel, sums) in panels.clone().zip(sums) {
                for (weight, sums) in now.iter().zip(sums) {
                    self.pack::<ROWS, K>(after, packed..packed + each, next);
                    packed += each;
                    K::multiply(&ready, weight, self.inputs, panel, first, sums);
                }
            }
            swap(now, next);
        }
    }

    /// Spans of the block that begins with chunk `first`.
    #[inline(always)]
    fn spans_at<const ROWS: usize, K: Kernel<ROWS>>(&self, first: usize) -> usize {
        let rest = self.inputs.as_ref().depth.saturating_sub(first);
        self.depth.min(rest).div_ceil(K::SPAN)
    }

    /// Packs some pieces, each a span of a row, of the block that begins with chunk `first`.
    #[inline(always)]
    fn pack<const ROWS: usize, K: Kernel<ROWS>>(
        &self,
        first: usize,
        pieces: Range<usize>,
        to: &mut [K::Tile],
    ) where
        W: Rows<K::Tile>,
    {
        let depth = self.spans_at::<ROWS, K>(first);
        let total = self.rows * depth;
        let (start, end) = (pieces.start, pieces.end.min(total));
        if start >= end {
            return;
        }
        let first = first / K::SPAN;
        let mut piece = Piece::new(start, depth);
        let mut ahead = Piece::new((start + AHEAD).min(total - 1), depth);
        for _ in start..end {
            self.weight
                .prefetch(self.first + ahead.row, first + ahead.at);
            let (tile, slot) = (piece.row / ROWS, [piece.row % ROWS, piece.at * K::SPAN]);
            let (row, span) = (self.first + piece.row, first + piece.at);
            self.weight.read(row, span, &mut to[tile], slot);
            piece.advance(depth);
            ahead.advance(depth);
            ahead.row = ahead.row.min(self.rows - 1);
        }
    }

    #[inline(always)]
    fn write<const ROWS: usize, Tile, Y: Number>(
        &self,
        panels: Range<usize>,
        sums: &[Sums<ROWS>],
        y: &mut [Y],
    ) where
        W: Rows<Tile>,
    {
        let tiles = self.rows.div_ceil(ROWS);
        for (row, y) in y.chunks_exact_mut(self.inputs.as_ref().tokens).enumerate() {
            let scale = self.weight.scale(self.first + row);
            let y = y[panels.start * TOKENS..].chunks_mut(TOKENS);
            for (panel, y) in y.take(panels.len()).enumerate() {
                let sums = &sums[panel * tiles + row / ROWS].0[row % ROWS];
                for (y, sum) in y.iter_mut().zip(sums) {
                    *y = Y::of(sum * scale);
                }
            }
        }
    }
}
