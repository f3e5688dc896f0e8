//! Attention of few queries, as in decoding: bound by reading keys and values, once, where they lie.

use std::array::from_fn;
use std::slice;

use half::{bf16, f16};
use pulp::{Arch, Simd, bytemuck};

use super::AttentionSizes;
use crate::exp::exp;
use crate::precision::Widen;
use crate::product::{STREAMS, dots};
use crate::split::{Work, pieces_on, reading};

/// Keys and values of all heads, which may have room for more.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Cache<'a> {
    /// In single precision.
    F32([Cached<'a, f32>; 2]),
    /// In half precision; widened on the way.
    F16([Cached<'a, f16>; 2]),
    /// In the upper half of single precision; widened on the way.
    BF16([Cached<'a, bf16>; 2]),
    /// In bytes with scales; widened on the way.
    Int8([Cached<'a, i8>; 2]),
}

/// The keys, or the values.
#[derive(Debug, Clone, Copy)]
pub struct Cached<'a, T> {
    /// `[kv_heads, head_dim, capacity]`; the last row may end with its last key.
    pub numbers: &'a [T],
    /// Numbers from the first key of a channel to the first of the next.
    pub capacity: usize,
    /// `[kv_heads, capacity]`: what the numbers of a head and key are multiplied with, if they are codes.
    pub scales: Option<&'a [f32]>,
}

impl<'a> Cached<'a, i8> {
    /// Codes and their scales, which have room for the same number of keys.
    pub fn coded(numbers: &'a [i8], scales: &'a [f32], capacity: usize) -> Self {
        Self {
            numbers,
            capacity,
            scales: Some(scales),
        }
    }
}

impl<'a, T> Cached<'a, T> {
    /// Numbers that stand for themselves.
    pub fn plain(numbers: &'a [T], capacity: usize) -> Self {
        Self {
            numbers,
            capacity,
            scales: None,
        }
    }

    /// What the first keys of a head are multiplied with; empty if with nothing.
    #[inline(always)]
    pub(crate) fn scales_of(self, head: usize, keys: usize) -> &'a [f32] {
        let of_head = |scales: &'a [f32]| &scales[head * self.capacity..][..keys];
        self.scales.map_or(&[], of_head)
    }
}

/// Numbers that a thread reads at least.
const NUMBERS: usize = 32 << 10;

/// The same as [`attention`](super::attention), for a few queries and for every type of cache.
///
/// # Shapes
/// - `query`: `[heads, head_dim, queries]`
/// - `cache`: keys and values, `[kv_heads, head_dim, keys]` each
/// - returns `[heads, head_dim, queries]`
pub fn attention_of_few(
    query: &[f32],
    cache: Cache,
    sizes: AttentionSizes,
    causal: bool,
) -> Vec<f32> {
    match cache {
        Cache::F32(cache) => attend(reading(), query, cache, sizes, causal),
        Cache::F16(cache) => attend(Arch::new(), query, cache, sizes, causal),
        Cache::BF16(cache) => attend(Arch::new(), query, cache, sizes, causal),
        Cache::Int8(cache) => attend(Arch::new(), query, cache, sizes, causal),
    }
}

fn attend<T: Widen>(
    arch: Arch,
    query: &[f32],
    cache: [Cached<T>; 2],
    sizes: AttentionSizes,
    causal: bool,
) -> Vec<f32> {
    let mut output = vec![0.0; query.len()];
    let numbers_of_head = 2 * sizes.head_dim * sizes.keys;
    let heads = Heads {
        query,
        cache,
        sizes,
        causal,
        at_once: (NUMBERS / numbers_of_head.max(1)).max(1),
    };
    pieces_on(arch, &mut output, heads.at_once * heads.size(), &heads);
    output
}

/// All key heads, and how many of them a piece has.
struct Heads<'a, T> {
    /// `[heads, head_dim, queries]`
    query: &'a [f32],
    cache: [Cached<'a, T>; 2],
    sizes: AttentionSizes,
    causal: bool,
    at_once: usize,
}

impl<T> Heads<'_, T> {
    /// Numbers of the queries that share a key head.
    fn size(&self) -> usize {
        self.sizes.heads / self.sizes.kv_heads.max(1) * self.sizes.head_dim * self.sizes.queries
    }
}

impl<T: Widen> Work<f32> for Heads<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, index: usize, output: &mut [f32]) {
        let size = self.size().max(1);
        for (at, output) in output.chunks_mut(size).enumerate() {
            let kv_head = index * self.at_once + at;
            let [key, value] = self.cache;
            let head = Head {
                simd,
                query: &self.query[kv_head * size..][..size],
                key,
                value,
                kv_head,
                sizes: self.sizes,
                causal: self.causal,
            };
            head.attend(output);
        }
    }
}

/// A key head and the query heads that share it.
struct Head<'a, S, T> {
    simd: S,
    /// `[group, head_dim, queries]`
    query: &'a [f32],
    key: Cached<'a, T>,
    value: Cached<'a, T>,
    kv_head: usize,
    sizes: AttentionSizes,
    causal: bool,
}

impl<S: Simd, T: Widen> Head<'_, S, T> {
    /// Reads parts of the channels at the same time, as products read rows of a weight.
    ///
    /// # Shapes
    /// - `output`: `[group, head_dim, queries]`
    #[inline(always)]
    fn attend(&self, output: &mut [f32]) {
        let AttentionSizes {
            head_dim,
            queries,
            keys,
            ..
        } = self.sizes;
        let asking = self.query.len() / head_dim.max(1);
        let part = head_dim / STREAMS;
        let channels = |at| from_fn::<_, STREAMS, _>(|stream| stream * part + at);

        // `[asking, keys]`
        let mut weights = vec![0.0; asking * keys];
        for at in 0..part {
            self.add_scores(channels(at), &mut weights);
        }
        for channel in part * STREAMS..head_dim {
            self.add_scores([channel], &mut weights);
        }

        let visible = |asking: usize| match self.causal {
            true => (keys + asking % queries + 1).saturating_sub(queries),
            false => keys,
        };
        // Of a query that sees nothing, an infinite number, and its result is undefined.
        let inverses: Vec<f32> = (0..asking)
            .map(|asking| {
                let weights = &mut weights[asking * keys..][..keys];
                let (seen, hidden) = weights.split_at_mut(visible(asking));
                hidden.fill(0.0);
                scale(seen, self.key.scales_of(self.kv_head, keys));
                let total = exponentials(seen);
                scale(seen, self.value.scales_of(self.kv_head, keys));
                total.recip()
            })
            .collect();

        for asking in 0..asking {
            let weights = &weights[asking * keys..][..keys];
            for at in 0..part {
                let sums = self.context(channels(at), weights);
                for (channel, sum) in channels(at).into_iter().zip(sums) {
                    output[self.place(asking, channel)] = sum * inverses[asking];
                }
            }
            for channel in part * STREAMS..head_dim {
                let [sum] = self.context([channel], weights);
                output[self.place(asking, channel)] = sum * inverses[asking];
            }
        }
    }

    /// Adds the products of some channels to the scores.
    ///
    /// # Shapes
    /// - `scores`: `[asking, keys]`
    #[inline(always)]
    fn add_scores<const N: usize>(&self, channels: [usize; N], scores: &mut [f32]) {
        let scale = (self.sizes.head_dim as f32).sqrt().recip();
        let rows = channels.map(|channel| self.row(self.key, channel));
        for (asking, scores) in scores.chunks_exact_mut(self.sizes.keys.max(1)).enumerate() {
            let factors = channels.map(|channel| self.query[self.place(asking, channel)] * scale);
            add_weighted(self.simd, scores, rows, factors);
        }
    }

    /// The weighted sums of some channels' values.
    #[inline(always)]
    fn context<const N: usize>(&self, channels: [usize; N], weights: &[f32]) -> [f32; N] {
        let rows = channels.map(|channel| self.row(self.value, channel));
        dots(self.simd, rows, weights)
    }

    /// A channel of the head.
    #[inline(always)]
    fn row<'b>(&self, of: Cached<'b, T>, channel: usize) -> &'b [T] {
        &of.numbers[(self.kv_head * self.sizes.head_dim + channel) * of.capacity..]
            [..self.sizes.keys]
    }

    /// Where a query has its number for a channel, or its result.
    #[inline(always)]
    fn place(&self, asking: usize, channel: usize) -> usize {
        let AttentionSizes {
            head_dim, queries, ..
        } = self.sizes;
        (asking / queries * head_dim + channel) * queries + asking % queries
    }
}

/// Adds `factors[0] · rows[0] + factors[1] · rows[1] + …` to the sums.
#[inline(always)]
fn add_weighted<S: Simd, T: Widen, const N: usize>(
    simd: S,
    sums: &mut [f32],
    rows: [&[T]; N],
    factors: [f32; N],
) {
    /// Registers at a time: the fewer instructions, the further ahead a processor reads. With 1, a layer
    /// of 32 heads over 70 keys took 145 instead of 76 µs.
    const REGISTERS: usize = 4;
    let mut splat = [simd.splat_f32s(0.0); N];
    for (splat, factor) in splat.iter_mut().zip(factors) {
        *splat = simd.splat_f32s(factor);
    }
    let mut last = f32::load_last(simd, sums);
    for (row, factor) in rows.iter().zip(splat) {
        last = simd.mul_add_e_f32s(factor, T::load_last(simd, row), last);
    }
    let lanes = S::F32_LANES;
    let (registers, rest) = S::as_mut_simd_f32s(sums);
    let (chunks, single) = registers.as_chunks_mut();
    for (at, sums) in chunks.iter_mut().enumerate() {
        add_registers::<S, T, N, REGISTERS>(simd, sums, rows, splat, at * REGISTERS * lanes);
    }
    let start = chunks.len() * REGISTERS * lanes;
    for (at, sum) in single.iter_mut().enumerate() {
        add_registers(
            simd,
            std::array::from_mut(sum),
            rows,
            splat,
            start + at * lanes,
        );
    }
    let last: &[f32] = bytemuck::cast_slice(slice::from_ref(&last));
    rest.copy_from_slice(&last[lanes - rest.len()..]);
}

/// The same for a few registers of sums, which belong to the numbers from `start` on.
#[inline(always)]
fn add_registers<S: Simd, T: Widen, const N: usize, const R: usize>(
    simd: S,
    sums: &mut [S::f32s; R],
    rows: [&[T]; N],
    factors: [S::f32s; N],
    start: usize,
) {
    let mut new = *sums;
    for (row, factor) in rows.iter().zip(factors) {
        let row = &row[start..][..R * S::F32_LANES];
        for (register, sum) in new.iter_mut().enumerate() {
            let numbers = &row[register * S::F32_LANES..][..S::F32_LANES];
            *sum = simd.mul_add_e_f32s(factor, T::load(simd, numbers), *sum);
        }
    }
    *sums = new;
}

/// Multiplies numbers with scales, if there are any.
#[inline(always)]
fn scale(numbers: &mut [f32], scales: &[f32]) {
    for (x, scale) in numbers.iter_mut().zip(scales) {
        *x *= scale;
    }
}

/// Independent sums of [`exponentials`].
const LANES: usize = 64;

/// Replaces scores by their exponentials over the largest, and returns the sum of these.
#[inline(always)]
pub(super) fn exponentials(scores: &mut [f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for scores in scores.chunks(LANES) {
        for (lane, &score) in lanes.iter_mut().zip(scores) {
            *lane = larger(*lane, score);
        }
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
    let mut lanes = [0.0; LANES];
    for scores in scores.chunks_mut(LANES) {
        for (lane, score) in lanes.iter_mut().zip(scores) {
            *score = exp(*score - largest);
            *lane += *score;
        }
    }
    total(lanes)
}

/// Their sum, half added to half: of one after the other, each waits for the one before.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES;
    while half > 1 {
        half /= 2;
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::tests::{naive, value};
    use crate::{of_bytes, to_bytes};

    /// In every type, in a cache with room and in one without.
    #[test]
    fn is_the_formula() {
        for (heads, kv_heads, head_dim, queries, keys) in [
            (1, 1, 1, 1, 1),
            (4, 2, 8, 1, 130),
            (6, 2, 7, 3, 64),
            (2, 2, 5, 7, 7),
            (32, 8, 64, 1, 200),
            (2, 2, 4, 0, 5),
        ] {
            let sizes = AttentionSizes {
                heads,
                kv_heads,
                head_dim,
                queries,
                keys,
            };
            for room in [0, 3] {
                let capacity = keys + room;
                let numbers: Vec<f32> =
                    (7..7 + kv_heads * head_dim * capacity).map(value).collect();
                let halves: Vec<f16> = numbers.iter().map(|&x| f16::from_f32(x)).collect();
                let uppers: Vec<bf16> = numbers.iter().map(|&x| bf16::from_f32(x)).collect();
                let cache = Cache::F32([Cached::plain(&numbers, capacity); 2]);
                check(sizes, cache, &numbers);
                let cache = Cache::F16([Cached::plain(&halves, capacity); 2]);
                let numbers: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
                check(sizes, cache, &numbers);
                let cache = Cache::BF16([Cached::plain(&uppers, capacity); 2]);
                let numbers: Vec<f32> = uppers.iter().map(|x| x.to_f32()).collect();
                check(sizes, cache, &numbers);
                let (codes, scales) = to_bytes(&numbers, head_dim, capacity);
                let coded = Cached::coded(&codes, &scales, capacity);
                let numbers = of_bytes(coded, [kv_heads, head_dim, capacity]);
                check(sizes, Cache::Int8([coded; 2]), &numbers);
            }
        }
    }

    /// `numbers` are those of the cache.
    fn check(sizes: AttentionSizes, cache: Cache, numbers: &[f32]) {
        let count = sizes.heads * sizes.head_dim * sizes.queries;
        let query: Vec<f32> = (0..count).map(value).collect();
        let capacity = numbers.len() / (sizes.kv_heads * sizes.head_dim);
        let channels = numbers.chunks(capacity);
        let tight: Vec<f32> = channels
            .flat_map(|row| &row[..sizes.keys])
            .copied()
            .collect();
        for causal in [true, false] {
            let output = attention_of_few(&query, cache, sizes, causal);
            let exact = naive([&query, &tight, &tight], sizes, causal);
            assert_eq!(output.len(), exact.len());
            for (x, exact) in output.iter().zip(exact) {
                assert!(
                    (f64::from(*x) - exact).abs() < 3e-6,
                    "{sizes:?}: {x}, {exact}"
                );
            }
        }
    }

    #[test]
    fn without_keys_every_result_is_undefined() {
        let sizes = AttentionSizes {
            heads: 1,
            kv_heads: 1,
            head_dim: 3,
            queries: 1,
            keys: 0,
        };
        let cache = Cache::F32([Cached::plain(&[], 0); 2]);
        let output = attention_of_few(&[1.0; 3], cache, sizes, false);
        assert!(output.len() == 3 && output.iter().all(|x| x.is_nan()));
    }
}
