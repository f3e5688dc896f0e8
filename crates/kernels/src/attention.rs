//! Attention without a score matrix.

mod few;
mod gradient;
mod pairs;

pub use few::{Cache, Cached, attention_of_few};
pub use gradient::attention_gradient;
pub use pairs::attention_of_pairs;
use pulp::bytemuck::cast_slice_mut;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::exp::exp;

/// Registers of queries in a tile.
const REGISTERS: usize = 3;

/// Keys, or channels of values, in a panel: with a tile of queries, their sums fill 24 of the 32
/// registers of AVX-512.
const PANEL: usize = 8;

/// Keys whose weights are held at a time: with a tile of queries, they stay in a second-level cache.
const KEYS: usize = 64 * PANEL;

/// Sizes of an attention: `heads / kv_heads` query heads share a key head.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSizes {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, of which `heads` is a multiple.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Queries.
    pub queries: usize,
    /// Keys; no fewer than queries where attention is causal.
    pub keys: usize,
}

/// Scaled dot-product attention (arXiv 1706.03762, §3.2.1), exact, tile by tile with a running softmax
/// (FlashAttention, arXiv 2205.14135, §3.1): per thread, some KiB for any number of keys.
///
/// A causal query sees the keys up to the one that is as far from the last key as it is from the last
/// query. A query's result does not depend on those beside it.
///
/// # Shapes
/// - `query`: `[heads, head_dim, queries]`
/// - `key`, `value`: `[kv_heads, head_dim, keys]`
/// - returns `[heads, head_dim, queries]`
pub fn attention(
    query: &[f32],
    key: &[f32],
    value: &[f32],
    sizes: AttentionSizes,
    causal: bool,
) -> Vec<f32> {
    let AttentionSizes {
        heads,
        kv_heads,
        head_dim,
        queries,
        keys,
    } = sizes;
    let arch = Arch::new();
    let width = arch.dispatch(TileWidth);
    let mut output = vec![0.0; heads * head_dim * queries];
    let heads_of_output = output.par_chunks_mut((head_dim * queries).max(1));
    heads_of_output.enumerate().for_each(|(head, output)| {
        let kv_head = head * kv_heads / heads * head_dim * keys;
        let key = key_panels(&key[kv_head..][..head_dim * keys], keys);
        let value = value_panels(&value[kv_head..][..head_dim * keys], keys);
        let tile = |start: usize| Tile {
            query: &query[head * head_dim * queries..][..head_dim * queries],
            key: &key,
            value: &value,
            sizes,
            start,
            causal,
        };
        let tiles = (0..queries.div_ceil(width)).into_par_iter();
        let tiles = tiles.map(|at| arch.dispatch(tile(at * width)));
        for (at, context) in tiles.collect::<Vec<_>>().into_iter().enumerate() {
            let columns = width.min(queries - at * width);
            let rows = output.chunks_exact_mut(queries);
            for (row, context) in rows.zip(context.chunks_exact(width)) {
                row[at * width..][..columns].copy_from_slice(&context[..columns]);
            }
        }
    });
    output
}

/// Keys in panels, so that products read them one after another; zeros beyond the last.
///
/// # Shapes
/// - `key`: `[head_dim, keys]`
/// - returns `[panels, head_dim, PANEL]`
fn key_panels(key: &[f32], keys: usize) -> Vec<f32> {
    let head_dim = key.len() / keys.max(1);
    let mut panels = vec![0.0; keys.div_ceil(PANEL) * head_dim * PANEL];
    for (channel, key) in key.chunks_exact(keys.max(1)).enumerate() {
        let rows = panels.as_chunks_mut().0.iter_mut();
        let mut rows = rows.skip(channel).step_by(head_dim);
        let (whole, rest) = key.as_chunks::<PANEL>();
        whole
            .iter()
            .zip(&mut rows)
            .for_each(|(key, row)| *row = *key);
        if let Some(row) = rows.next() {
            row[..rest.len()].copy_from_slice(rest);
        }
    }
    panels
}

/// Values in panels of channels; zeros beyond the last.
///
/// # Shapes
/// - `value`: `[head_dim, keys]`
/// - returns `[panels, keys, PANEL]`
fn value_panels(value: &[f32], keys: usize) -> Vec<f32> {
    let head_dim = value.len() / keys.max(1);
    let mut panels = vec![0.0; head_dim.div_ceil(PANEL) * keys * PANEL];
    for (panel, channels) in panels
        .chunks_exact_mut((keys * PANEL).max(1))
        .zip(value.chunks((keys * PANEL).max(1)))
    {
        for (channel, values) in channels.chunks_exact(keys).enumerate() {
            let column = panel.iter_mut().skip(channel).step_by(PANEL);
            column.zip(values).for_each(|(x, value)| *x = *value);
        }
    }
    panels
}

/// Asks for the number of queries in a tile.
struct TileWidth;

impl WithSimd for TileWidth {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        REGISTERS * S::F32_LANES
    }
}

/// Some queries of a head, and what they attend to.
struct Tile<'a> {
    /// `[head_dim, queries]`
    query: &'a [f32],
    /// `[panels, head_dim, PANEL]`
    key: &'a [f32],
    /// `[panels, keys, PANEL]`
    value: &'a [f32],
    sizes: AttentionSizes,
    /// The first query.
    start: usize,
    causal: bool,
}

impl WithSimd for Tile<'_> {
    /// `[head_dim, width]`
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let AttentionSizes {
            head_dim,
            queries,
            keys,
            ..
        } = self.sizes;
        let zero = [simd.splat_f32s(0.0); REGISTERS];
        let query = self.scaled_query(simd);
        let mut context = vec![[zero; PANEL]; head_dim.div_ceil(PANEL)];
        let mut softmax = RunningSoftmax::new(REGISTERS * S::F32_LANES);

        // The key that the first query sees last.
        let diagonal = (keys + self.start).saturating_sub(queries);
        let visible = match self.causal {
            true => keys.min(diagonal + softmax.width),
            false => keys,
        };
        let mut weights = vec![[zero; PANEL]; KEYS.min(visible).div_ceil(PANEL)];
        for first in (0..visible).step_by(KEYS) {
            let count = KEYS.min(visible - first);
            let panels = self.key[first * head_dim..].chunks_exact(head_dim * PANEL);
            for (weights, panel) in weights.iter_mut().zip(panels) {
                *weights = product(simd, panel, &query);
            }
            let weights = &mut weights.as_flattened_mut()[..count];
            if self.causal {
                hide_later_keys::<S>(weights, first, diagonal);
            }
            softmax.weigh(flat::<S>(weights), flat::<S>(context.as_flattened_mut()));
            for (context, panel) in context
                .iter_mut()
                .zip(self.value.chunks_exact(keys * PANEL))
            {
                let sums = product(simd, &panel[first * PANEL..], weights);
                add(simd, context, &sums);
            }
        }
        softmax.divide(flat::<S>(context.as_flattened_mut()));
        flat::<S>(&mut context.as_flattened_mut()[..head_dim]).to_vec()
    }
}

impl Tile<'_> {
    /// Queries over `√head_dim`, `[head_dim, width]`; zeros beyond the last.
    #[inline(always)]
    fn scaled_query<S: Simd>(&self, simd: S) -> Vec<[S::f32s; REGISTERS]> {
        let AttentionSizes {
            head_dim, queries, ..
        } = self.sizes;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut scaled = vec![[simd.splat_f32s(0.0); REGISTERS]; head_dim];
        for (scaled, row) in scaled.iter_mut().zip(self.query.chunks_exact(queries)) {
            let scaled: &mut [f32] = cast_slice_mut(scaled);
            for (scaled, x) in scaled.iter_mut().zip(&row[self.start..]) {
                *scaled = x * scale;
            }
        }
        scaled
    }
}

/// The numbers of a tile.
#[inline(always)]
fn flat<S: Simd>(rows: &mut [[S::f32s; REGISTERS]]) -> &mut [f32] {
    cast_slice_mut(rows.as_flattened_mut())
}

/// The product of a panel with rows, its sums side by side in registers.
///
/// # Shapes
/// - `panel`: `[rows, PANEL]`; more is ignored
/// - `rows`: `[rows, width]`
/// - returns `[PANEL, width]`
#[inline(always)]
fn product<S: Simd>(
    simd: S,
    panel: &[f32],
    rows: &[[S::f32s; REGISTERS]],
) -> [[S::f32s; REGISTERS]; PANEL] {
    let mut sums = [[simd.splat_f32s(0.0); REGISTERS]; PANEL];
    for (factors, row) in panel.as_chunks::<PANEL>().0.iter().zip(rows) {
        for at in 0..PANEL {
            let factor = simd.splat_f32s(factors[at]);
            for register in 0..REGISTERS {
                sums[at][register] = simd.mul_add_e_f32s(factor, row[register], sums[at][register]);
            }
        }
    }
    sums
}

#[inline(always)]
fn add<S: Simd>(simd: S, rows: &mut [[S::f32s; REGISTERS]], sums: &[[S::f32s; REGISTERS]]) {
    let sums = sums.as_flattened();
    for (x, sum) in rows.as_flattened_mut().iter_mut().zip(sums) {
        *x = simd.add_f32s(*x, *sum);
    }
}

/// Gives the lowest score to keys that a query does not see; `diagonal` is the last key of the first.
#[inline(always)]
fn hide_later_keys<S: Simd>(scores: &mut [[S::f32s; REGISTERS]], first: usize, diagonal: usize) {
    let beyond = (diagonal + 1).saturating_sub(first);
    for (at, scores) in scores.iter_mut().enumerate().skip(beyond) {
        let scores: &mut [f32] = cast_slice_mut(scores);
        let hidden = scores.len().min(first + at - diagonal);
        scores[..hidden].fill(f32::NEG_INFINITY);
    }
}

/// Softmax of columns whose rows come in parts.
struct RunningSoftmax {
    width: usize,
    /// The largest score of each column so far.
    largest: Vec<f32>,
    /// The sum of each column's weights so far.
    total: Vec<f32>,
}

impl RunningSoftmax {
    #[inline(always)]
    fn new(width: usize) -> Self {
        let (largest, total) = (vec![f32::NEG_INFINITY; width], vec![0.0; width]);
        Self {
            width,
            largest,
            total,
        }
    }

    /// Makes weights of scores, and brings what was summed with earlier weights to their scale.
    #[inline(always)]
    fn weigh(&mut self, scores: &mut [f32], context: &mut [f32]) {
        let before = self.largest.clone();
        for scores in scores.chunks_exact(self.width) {
            for (largest, &score) in self.largest.iter_mut().zip(scores) {
                *largest = if score > *largest { score } else { *largest };
            }
        }
        if before != self.largest {
            let mut shrink = before;
            for (shrink, largest) in shrink.iter_mut().zip(&self.largest) {
                *shrink = exp(*shrink - largest);
            }
            for row in context.chunks_exact_mut(self.width) {
                row.iter_mut()
                    .zip(&shrink)
                    .for_each(|(x, shrink)| *x *= shrink);
            }
            self.total
                .iter_mut()
                .zip(&shrink)
                .for_each(|(x, shrink)| *x *= shrink);
        }
        for scores in scores.chunks_exact_mut(self.width) {
            let statistics = self.largest.iter().zip(&mut self.total);
            for (score, (largest, total)) in scores.iter_mut().zip(statistics) {
                *score = exp(*score - largest);
                *total += *score;
            }
        }
    }

    #[inline(always)]
    fn divide(&self, context: &mut [f32]) {
        for row in context.chunks_exact_mut(self.width) {
            row.iter_mut()
                .zip(&self.total)
                .for_each(|(x, total)| *x /= total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn value(i: usize) -> f32 {
        (i as f32 * 0.731).sin() * 2.0
    }

    /// One number at a time, in f64.
    pub(super) fn naive(x: [&[f32]; 3], sizes: AttentionSizes, causal: bool) -> Vec<f64> {
        let AttentionSizes {
            heads,
            kv_heads,
            head_dim,
            queries,
            keys,
        } = sizes;
        let [query, key, value] = x;
        let mut output = vec![0.0; heads * head_dim * queries];
        for head in 0..heads {
            let of_key = |channel: usize, at: usize| {
                (head * kv_heads / heads * head_dim + channel) * keys + at
            };
            for at in 0..queries {
                let visible = if causal {
                    keys - queries + at + 1
                } else {
                    keys
                };
                let power = |k: usize| {
                    let dot = |c: usize| {
                        let q = query[(head * head_dim + c) * queries + at];
                        f64::from(q) * f64::from(key[of_key(c, k)])
                    };
                    ((0..head_dim).map(dot).sum::<f64>() / (head_dim as f64).sqrt()).exp()
                };
                let powers: Vec<f64> = (0..visible).map(power).collect();
                let total: f64 = powers.iter().sum();
                for c in 0..head_dim {
                    let weigh = |k: usize| powers[k] / total * f64::from(value[of_key(c, k)]);
                    output[(head * head_dim + c) * queries + at] = (0..visible).map(weigh).sum();
                }
            }
        }
        output
    }

    /// Around the sizes of tiles and of parts, with keys before the first query and without.
    #[test]
    fn is_the_formula() {
        for (heads, kv_heads, head_dim, queries, keys) in [
            (1, 1, 1, 1, 1),
            (4, 2, 8, 48, 48),
            (2, 1, 12, 49, 70),
            (2, 2, 7, 3, KEYS + 1),
            (1, 1, 16, 100, 2 * KEYS + 60),
            (1, 1, 4, KEYS + 9, KEYS + 9),
            (2, 2, 4, 0, 5),
        ] {
            let sizes = AttentionSizes {
                heads,
                kv_heads,
                head_dim,
                queries,
                keys,
            };
            let numbers = |count: usize, from: usize| (from..from + count).map(value).collect();
            let query: Vec<f32> = numbers(heads * head_dim * queries, 0);
            let key: Vec<f32> = numbers(kv_heads * head_dim * keys, 7);
            let values: Vec<f32> = numbers(kv_heads * head_dim * keys, 99);
            for causal in [false, true] {
                let output = attention(&query, &key, &values, sizes, causal);
                let exact = naive([&query, &key, &values], sizes, causal);
                assert_eq!(output.len(), exact.len());
                for (x, exact) in output.iter().zip(exact) {
                    assert!(
                        (f64::from(*x) - exact).abs() < 3e-6,
                        "{sizes:?}: {x}, {exact}"
                    );
                }
            }
        }
    }

    /// Nothing to attend to is undefined, and no panic.
    #[test]
    fn without_keys_every_result_is_undefined() {
        let sizes = AttentionSizes {
            heads: 1,
            kv_heads: 1,
            head_dim: 3,
            queries: 9,
            keys: 0,
        };
        let output = attention(&[1.0; 27], &[], &[], sizes, false);
        assert!(output.len() == 27 && output.iter().all(|x| x.is_nan()));
    }

    /// What is seen only later, however large, changes nothing before; what is undefined is seen.
    #[test]
    fn later_keys_do_not_reach_earlier_queries() {
        let sizes = AttentionSizes {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            queries: 60,
            keys: 60,
        };
        let x: Vec<f32> = (0..120).map(value).collect();
        let mut changed = x.clone();
        (changed[59], changed[119]) = (1e30, f32::NAN);
        let plain = attention(&x, &x, &x, sizes, true);
        let output = attention(&x, &changed, &x, sizes, true);
        for row in 0..60 {
            assert_eq!(plain[row] == output[row], row < 59, "row {row}");
        }
        assert!(output[59].is_nan());
    }
}
