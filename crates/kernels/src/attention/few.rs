//! Attention of few queries, as in decoding: bound by reading keys and values, once, where they lie.

use super::AttentionSizes;
use crate::exp::exp;
use crate::product::{Processor, Widen, dots, processor};
use crate::split::pieces;

/// Keys or values of all heads in a cache that may have room for more.
#[derive(Debug, Clone, Copy)]
pub struct Cached<'a, T> {
    /// `[kv_heads, head_dim, capacity]`; the last row may end with its last key.
    pub numbers: &'a [T],
    /// Numbers from the first key of a channel to the first of the next.
    pub capacity: usize,
}

/// Numbers that a thread reads at least.
const NUMBERS: usize = 32 << 10;

/// Channels that are read at the same time.
const STREAMS: usize = 4;

/// The same as [`attention`](super::attention), for a few queries and for every type of cache.
///
/// # Shapes
/// - `query`: `[heads, head_dim, queries]`
/// - `key`, `value`: `[kv_heads, head_dim, keys]`
/// - returns `[heads, head_dim, queries]`
pub fn attention_of_few<T: Widen>(
    query: &[f32],
    key: Cached<T>,
    value: Cached<T>,
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
    let processor = processor();
    let mut output = vec![0.0; query.len()];
    let size = heads / kv_heads.max(1) * head_dim * queries;
    let heads_at_once = (NUMBERS / (2 * head_dim * keys).max(1)).max(1);
    pieces(
        &mut output,
        heads_at_once * size,
        #[inline(always)]
        |piece, output| {
            for (at, output) in output.chunks_mut(size.max(1)).enumerate() {
                let kv_head = piece * heads_at_once + at;
                let head = Head {
                    query: &query[kv_head * size..][..size],
                    key,
                    value,
                    first_channel: kv_head * head_dim,
                    sizes,
                    causal,
                    processor,
                };
                head.attend(output);
            }
        },
    );
    output
}

/// A key head and the query heads that share it.
struct Head<'a, T> {
    /// `[group, head_dim, queries]`
    query: &'a [f32],
    key: Cached<'a, T>,
    value: Cached<'a, T>,
    first_channel: usize,
    sizes: AttentionSizes,
    causal: bool,
    processor: Processor,
}

impl<T: Widen> Head<'_, T> {
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
        let whole = head_dim - head_dim % STREAMS;

        // `[asking, keys]`
        let mut weights = vec![0.0; asking * keys];
        for channel in (0..whole).step_by(STREAMS) {
            self.add_scores::<STREAMS>(channel, &mut weights);
        }
        for channel in whole..head_dim {
            self.add_scores::<1>(channel, &mut weights);
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
                exponentials(seen).recip()
            })
            .collect();

        let mut gather = |channel, context: &[f32], asking: usize| {
            for (at, context) in context.iter().enumerate() {
                output[self.place(asking, channel + at)] = context * inverses[asking];
            }
        };
        for asking in 0..asking {
            let weights = &weights[asking * keys..][..keys];
            for channel in (0..whole).step_by(STREAMS) {
                let rows = self.rows::<STREAMS>(self.value, channel);
                gather(channel, &dots(rows, weights, self.processor), asking);
            }
            for channel in whole..head_dim {
                let rows = self.rows::<1>(self.value, channel);
                gather(channel, &dots(rows, weights, self.processor), asking);
            }
        }
    }

    /// Adds the products of some channels to the scores.
    ///
    /// # Shapes
    /// - `scores`: `[asking, keys]`
    #[inline(always)]
    fn add_scores<const N: usize>(&self, channel: usize, scores: &mut [f32]) {
        let scale = (self.sizes.head_dim as f32).sqrt().recip();
        let rows = self.rows::<N>(self.key, channel);
        for (asking, scores) in scores.chunks_exact_mut(self.sizes.keys.max(1)).enumerate() {
            let factor = |at| self.query[self.place(asking, channel + at)] * scale;
            add_weighted(scores, rows, std::array::from_fn(factor), self.processor);
        }
    }

    /// Some channels of the head.
    #[inline(always)]
    fn rows<'b, const N: usize>(&self, of: Cached<'b, T>, channel: usize) -> [&'b [T]; N] {
        let first = self.first_channel + channel;
        std::array::from_fn(|at| &of.numbers[(first + at) * of.capacity..][..self.sizes.keys])
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

/// Numbers handled together: the independent sums of [`dots`].
const LANES: usize = crate::product::LANES;

/// Adds `factors[0] · rows[0] + factors[1] · rows[1] + …` to the sums.
#[inline(always)]
fn add_weighted<T: Widen, const N: usize>(
    sums: &mut [f32],
    rows: [&[T]; N],
    factors: [f32; N],
    processor: Processor,
) {
    let (chunks, rest) = sums.as_chunks_mut::<LANES>();
    let whole = chunks.len() * LANES;
    let row_chunks = rows.map(|row| &row.as_chunks::<LANES>().0[..chunks.len()]);
    for (at, sums) in chunks.iter_mut().enumerate() {
        for (row, factor) in row_chunks.iter().zip(factors) {
            let numbers = T::widen_chunk(&row[at], processor);
            for lane in 0..LANES {
                sums[lane] += factor * numbers[lane];
            }
        }
    }
    for (row, factor) in rows.into_iter().zip(factors) {
        for (sum, number) in rest.iter_mut().zip(&row[whole..]) {
            *sum += factor * number.widen();
        }
    }
}

/// Replaces scores by their exponentials over the largest, and returns the sum of these.
#[inline(always)]
fn exponentials(scores: &mut [f32]) -> f32 {
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
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::attention::tests::{naive, value};

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
            let query: Vec<f32> = (0..heads * head_dim * queries).map(value).collect();
            let numbers: Vec<f32> = (7..7 + kv_heads * head_dim * keys).map(value).collect();
            check(&query, &numbers, sizes);
            check::<f16>(
                &query,
                &numbers
                    .iter()
                    .map(|&x| f16::from_f32(x))
                    .collect::<Vec<_>>(),
                sizes,
            );
            check::<bf16>(
                &query,
                &numbers
                    .iter()
                    .map(|&x| bf16::from_f32(x))
                    .collect::<Vec<_>>(),
                sizes,
            );
        }
    }

    fn check<T: Widen>(query: &[f32], numbers: &[T], sizes: AttentionSizes) {
        let wide: Vec<f32> = numbers.iter().map(|x| x.widen()).collect();
        let channels = numbers.chunks(sizes.keys);
        let roomy = channels.flat_map(|row| row.iter().chain(&numbers[..3.min(numbers.len())]));
        let roomy: Vec<T> = roomy.copied().collect();
        let room = roomy.len() / (sizes.kv_heads * sizes.head_dim);
        let caches = [(numbers, sizes.keys), (&roomy[..], room)];
        for ((numbers, capacity), causal) in
            caches.into_iter().flat_map(|c| [(c, true), (c, false)])
        {
            let cached = Cached { numbers, capacity };
            let output = attention_of_few(query, cached, cached, sizes, causal);
            let exact = naive([query, &wide, &wide], sizes, causal);
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
        let cached = Cached::<f32> {
            numbers: &[],
            capacity: 0,
        };
        let output = attention_of_few(&[1.0; 3], cached, cached, sizes, false);
        assert!(output.len() == 3 && output.iter().all(|x| x.is_nan()));
    }
}
