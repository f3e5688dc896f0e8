//! Attention of bf16 by the instructions that multiply pairs of it; sums and softmax are f32.

use half::bf16;
use pulp::bytemuck::cast_slice_mut;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{AttentionSizes, RunningSoftmax};
use crate::isa::{Isa, PairKernel, amx, avx512, numbers};
use crate::precision::Number;
use crate::product::layout::{InputChunk, Sums, TOKENS, WORDS, WeightChunk};

/// Keys whose weights are held at a time (36 KiB of scores): whole tiles of either kernel, and whole
/// chunks.
const KEYS: usize = 288;

/// bf16 of a row of a chunk.
const PAIRED: usize = 2 * WORDS;

/// The same as [`attention`](super::attention) for bf16, where the processor multiplies that (AMX,
/// AVX512-BF16); `None` elsewhere. Scores and sums are f32; weights of keys are rounded to bf16 before they
/// meet values.
///
/// # Shapes
/// As [`attention`](super::attention).
pub fn attention_of_pairs(
    query: &[bf16],
    key: &[bf16],
    value: &[bf16],
    sizes: AttentionSizes,
    causal: bool,
) -> Option<Vec<bf16>> {
    let x = [query, key, value];
    on(Isa::of_this_processor(), x, sizes, causal)
}

/// The same with certain instructions.
fn on(isa: Isa, x: [&[bf16]; 3], sizes: AttentionSizes, causal: bool) -> Option<Vec<bf16>> {
    match isa.pairs? {
        PairKernel::Amx(amx) => Some(by_tiles(amx, x, sizes, causal)),
        PairKernel::Avx512(avx512) => Some(by_tiles(avx512, x, sizes, causal)),
    }
}

/// A product of `ROWS` rows with a panel of inputs.
trait Multiply<const ROWS: usize>: Copy + Sync {
    /// What a thread must hold while it multiplies.
    type Ready;

    fn ready(self) -> Self::Ready;

    fn multiply(
        ready: &Self::Ready,
        rows: &[WeightChunk<ROWS>],
        input: &[InputChunk],
        sums: &mut Sums<ROWS>,
        adds: bool,
    );
}

impl Multiply<{ amx::ROWS }> for amx::Amx {
    type Ready = amx::Tiles;

    #[inline(always)]
    fn ready(self) -> amx::Tiles {
        self.tiles()
    }

    #[inline(always)]
    fn multiply(
        ready: &amx::Tiles,
        rows: &[WeightChunk<{ amx::ROWS }>],
        input: &[InputChunk],
        sums: &mut Sums<{ amx::ROWS }>,
        adds: bool,
    ) {
        ready.multiply(rows, input, sums, adds);
    }
}

impl Multiply<{ avx512::ROWS }> for avx512::Bf16 {
    type Ready = Self;

    #[inline(always)]
    fn ready(self) -> Self {
        self
    }

    #[inline(always)]
    fn multiply(
        ready: &Self,
        rows: &[WeightChunk<{ avx512::ROWS }>],
        input: &[InputChunk],
        sums: &mut Sums<{ avx512::ROWS }>,
        adds: bool,
    ) {
        Self::multiply(*ready, rows, input, sums, adds);
    }
}

fn by_tiles<'a, const ROWS: usize, K: Multiply<ROWS>>(
    kernel: K,
    [query, key, value]: [&'a [bf16]; 3],
    sizes: AttentionSizes,
    causal: bool,
) -> Vec<bf16> {
    let AttentionSizes {
        heads,
        kv_heads,
        head_dim,
        queries,
        keys,
    } = sizes;
    let arch = Arch::new();
    let mut output = vec![bf16::ZERO; heads * head_dim * queries];
    let group = heads / kv_heads.max(1);
    let of_head = head_dim * queries;
    let output_of_groups = output.par_chunks_mut((group * of_head).max(1));
    output_of_groups.enumerate().for_each(|(kv_head, output)| {
        let of_kv_head = |x: &'a [bf16]| &x[kv_head * head_dim * keys..][..head_dim * keys];
        let key = arch.dispatch(Pack::<ROWS>::Columns(of_kv_head(key), sizes));
        let value = arch.dispatch(Pack::<ROWS>::Rows(of_kv_head(value), sizes));
        let query = &query[kv_head * group * of_head..][..group * of_head];
        let panels = queries.div_ceil(TOKENS);
        let tile = |at: usize| Tile {
            kernel,
            query: &query[at / panels * of_head..][..of_head],
            key: &key,
            value: &value,
            sizes,
            start: at % panels * TOKENS,
            causal,
        };
        let tiles = (0..group * panels).into_par_iter();
        let contexts = tiles.map(|at| arch.dispatch(tile(at)));
        for (at, context) in contexts.collect::<Vec<_>>().into_iter().enumerate() {
            let (head, start) = (at / panels, at % panels * TOKENS);
            let columns = TOKENS.min(queries - start);
            let rows = output[head * of_head..][..of_head].chunks_exact_mut(queries);
            let context = context.iter().flat_map(|sums| &sums.0);
            for (row, context) in rows.zip(context) {
                let row = &mut row[start..][..columns];
                row.iter_mut()
                    .zip(context)
                    .for_each(|(y, x)| *y = x.to_bf16());
            }
        }
    });
    output
}

/// Packs `[head_dim, keys]` into tiles of `ROWS` rows.
enum Pack<'a, const ROWS: usize> {
    /// A row for every key, whose numbers are channels: `[keys / ROWS, head_dim / PAIRED]`.
    Columns(&'a [bf16], AttentionSizes),
    /// A row for every channel, whose numbers are keys: `[head_dim / ROWS, keys / PAIRED]`.
    Rows(&'a [bf16], AttentionSizes),
}

impl<const ROWS: usize> WithSimd for Pack<'_, ROWS> {
    type Output = Vec<WeightChunk<ROWS>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        match self {
            Self::Columns(x, sizes) => columns(x, sizes),
            Self::Rows(x, sizes) => rows(x, sizes),
        }
    }
}

#[inline(always)]
fn columns<const ROWS: usize>(x: &[bf16], sizes: AttentionSizes) -> Vec<WeightChunk<ROWS>> {
    let AttentionSizes { head_dim, keys, .. } = sizes;
    let depth = head_dim.div_ceil(PAIRED);
    let mut tiles = vec![WeightChunk::ZERO; keys.div_ceil(ROWS) * depth];
    for (at, chunk) in tiles.iter_mut().enumerate() {
        let (first, channel) = (at / depth * ROWS, at % depth * PAIRED);
        let count = ROWS.min(keys - first);
        for (word, channel) in (channel..head_dim.min(channel + PAIRED))
            .step_by(2)
            .enumerate()
        {
            let row = |channel: usize| &x[channel * keys + first..][..count];
            let even = chunk.0.iter_mut().zip(row(channel));
            even.for_each(|(words, x)| words[word] = u32::from(x.to_bits()));
            if channel + 1 < head_dim {
                let odd = chunk.0.iter_mut().zip(row(channel + 1));
                odd.for_each(|(words, x)| words[word] |= u32::from(x.to_bits()) << 16);
            }
        }
    }
    tiles
}

#[inline(always)]
fn rows<const ROWS: usize>(x: &[bf16], sizes: AttentionSizes) -> Vec<WeightChunk<ROWS>> {
    let AttentionSizes { head_dim, keys, .. } = sizes;
    let depth = keys.div_ceil(PAIRED);
    let mut tiles = vec![WeightChunk::ZERO; head_dim.div_ceil(ROWS) * depth];
    for (channel, x) in x.chunks_exact(keys.max(1)).enumerate() {
        let chunks = tiles[channel / ROWS * depth..].iter_mut();
        for (chunk, x) in chunks.zip(x.chunks(PAIRED)) {
            let to: &mut [bf16] = cast_slice_mut(&mut chunk.0[channel % ROWS]);
            to[..x.len()].copy_from_slice(x);
        }
    }
    tiles
}

/// Some queries of a head, and what they attend to.
struct Tile<'a, const ROWS: usize, K> {
    kernel: K,
    /// `[head_dim, queries]`
    query: &'a [bf16],
    /// [`columns`]
    key: &'a [WeightChunk<ROWS>],
    /// [`rows`]
    value: &'a [WeightChunk<ROWS>],
    sizes: AttentionSizes,
    /// The first query.
    start: usize,
    causal: bool,
}

impl<const ROWS: usize, K: Multiply<ROWS>> WithSimd for Tile<'_, ROWS, K> {
    /// `[head_dim, TOKENS]`
    type Output = Vec<Sums<ROWS>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<Sums<ROWS>> {
        let AttentionSizes {
            head_dim,
            queries,
            keys,
            ..
        } = self.sizes;
        let ready = self.kernel.ready();
        let query = self.query_panel();
        let mut context = vec![Sums::<ROWS>::ZERO; head_dim.div_ceil(ROWS)];
        let mut softmax = RunningSoftmax::new(TOKENS);

        // The key that the first query sees last.
        let diagonal = (keys + self.start).saturating_sub(queries);
        let visible = match self.causal {
            true => keys.min(diagonal + TOKENS),
            false => keys,
        };
        let block = KEYS.min(visible);
        let mut scores = vec![Sums::<ROWS>::ZERO; block.div_ceil(ROWS)];
        let mut weights = vec![InputChunk::ZERO; block.div_ceil(PAIRED)];
        for first in (0..visible).step_by(KEYS) {
            let count = KEYS.min(visible - first);
            let tiles = self.key[first / ROWS * query.len()..].chunks_exact(query.len());
            for (scores, tile) in scores.iter_mut().zip(tiles) {
                K::multiply(&ready, tile, &query, scores, false);
            }
            let scores = &mut numbers(&mut scores)[..count * TOKENS];
            self.scale(scores, first, diagonal);
            softmax.weigh(scores, numbers(&mut context));
            let weights = &mut weights[..count.div_ceil(PAIRED)];
            pack_weights(scores, weights);
            let depth = keys.div_ceil(PAIRED);
            for (context, value) in context.iter_mut().zip(self.value.chunks_exact(depth)) {
                let value = &value[first / PAIRED..][..weights.len()];
                K::multiply(&ready, value, weights, context, true);
            }
        }
        softmax.divide(numbers(&mut context));
        context
    }
}

impl<const ROWS: usize, K> Tile<'_, ROWS, K> {
    /// The queries, two channels in a word; zeros beyond the last.
    #[inline(always)]
    fn query_panel(&self) -> Vec<InputChunk> {
        let AttentionSizes {
            head_dim, queries, ..
        } = self.sizes;
        let count = TOKENS.min(queries - self.start);
        let mut panel = vec![InputChunk::ZERO; head_dim.div_ceil(PAIRED)];
        let rows = self.query.chunks_exact(queries).enumerate();
        for (channel, row) in rows {
            let words = &mut panel[channel / PAIRED].0[channel % PAIRED / 2];
            let shift = channel % 2 * 16;
            for (word, x) in words.iter_mut().zip(&row[self.start..][..count]) {
                *word |= u32::from(x.to_bits()) << shift;
            }
        }
        panel
    }

    /// Scores of keys from `first` on over `√head_dim`, the lowest of those that a query does not see;
    /// `diagonal` is the last key of the first.
    #[inline(always)]
    fn scale(&self, scores: &mut [f32], first: usize, diagonal: usize) {
        let scale = 1.0 / (self.sizes.head_dim as f32).sqrt();
        scores.iter_mut().for_each(|score| *score *= scale);
        if self.causal {
            let beyond = (diagonal + 1).saturating_sub(first);
            let rows = scores.chunks_exact_mut(TOKENS).enumerate();
            for (at, scores) in rows.skip(beyond) {
                let hidden = TOKENS.min(first + at - diagonal);
                scores[..hidden].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Weights of keys, two keys in a word; zero for what fills the last chunk.
#[inline(always)]
fn pack_weights(weights: &[f32], to: &mut [InputChunk]) {
    let bits = |x: f32| u32::from(x.to_bf16().to_bits());
    let mut words = to.iter_mut().flat_map(|chunk| &mut chunk.0);
    let pairs = weights.chunks_exact(2 * TOKENS);
    let rest = pairs.remainder();
    for (pair, words) in pairs.zip(&mut words) {
        let (even, odd) = pair.split_at(TOKENS);
        for ((word, &even), &odd) in words.iter_mut().zip(even).zip(odd) {
            *word = bits(even) | bits(odd) << 16;
        }
    }
    // Of an odd number of keys the last, before what fills.
    let last = (!rest.is_empty()).then(|| words.next()).flatten();
    if let Some(words) = last {
        words
            .iter_mut()
            .zip(rest)
            .for_each(|(word, &x)| *word = bits(x));
    }
    words.for_each(|words| words.fill(0));
}

#[cfg(test)]
mod tests {
    use super::super::tests::{naive, value};
    use super::*;

    /// Around the sizes of tiles, chunks and parts, with keys before the first query and without.
    #[test]
    fn is_the_formula_of_rounded_numbers() {
        for (heads, kv_heads, head_dim, queries, keys) in [
            (1, 1, 1, 1, 1),
            (4, 2, 8, 48, 48),
            (2, 1, 33, 49, 70),
            (2, 2, 80, 3, KEYS + 1),
            (1, 1, 128, 100, 2 * KEYS + 61),
            (3, 1, 4, KEYS + 9, KEYS + 9),
            (2, 2, 4, 0, 5),
        ] {
            let sizes = AttentionSizes {
                heads,
                kv_heads,
                head_dim,
                queries,
                keys,
            };
            let numbers = |count: usize, from: usize| -> Vec<bf16> {
                (from..from + count).map(|i| value(i).to_bf16()).collect()
            };
            let x = [
                numbers(heads * head_dim * queries, 0),
                numbers(kv_heads * head_dim * keys, 7),
                numbers(kv_heads * head_dim * keys, 99),
            ];
            let singles = x
                .each_ref()
                .map(|x| -> Vec<f32> { x.iter().map(|&x| Number::to_f32(x)).collect() });
            for causal in [false, true] {
                let exact = naive(singles.each_ref().map(|x| &x[..]), sizes, causal);
                for isa in Isa::all() {
                    let Some(output) = on(isa, x.each_ref().map(|x| &x[..]), sizes, causal) else {
                        continue;
                    };
                    assert_eq!(output.len(), exact.len());
                    for (x, exact) in output.iter().zip(&exact) {
                        // Weights and the result are rounded to 8 digits; values are 2 at most.
                        let error = (f64::from(Number::to_f32(*x)) - exact).abs();
                        assert!(error < 0.012, "{sizes:?}, {isa:?}: {x}, {exact}");
                    }
                }
            }
        }
    }

    /// What is seen only later, however large, changes nothing before; what is undefined is seen; nothing to
    /// attend to is undefined, and no panic.
    #[test]
    fn later_keys_do_not_reach_earlier_queries() {
        let sizes = |queries, keys| AttentionSizes {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            queries,
            keys,
        };
        let x: Vec<bf16> = (0..120).map(|i| value(i).to_bf16()).collect();
        let mut changed = x.clone();
        (changed[59], changed[119]) = (1e30f32.to_bf16(), f32::NAN.to_bf16());
        for isa in Isa::all() {
            let causal = |key: &[bf16]| on(isa, [&x, key, &x], sizes(60, 60), true);
            let (Some(plain), Some(output)) = (causal(&x), causal(&changed)) else {
                continue;
            };
            for row in 0..60 {
                assert_eq!(plain[row] == output[row], row < 59, "row {row}");
            }
            assert!(output[59].is_nan());
            let of_nothing = on(isa, [&x, &[], &[]], sizes(60, 0), false).unwrap_or_default();
            assert!(of_nothing.len() == 120 && of_nothing.iter().all(|x| x.is_nan()));
        }
    }
}
