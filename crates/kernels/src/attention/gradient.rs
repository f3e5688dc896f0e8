//! What attention gives back: the weights of a block of queries are computed anew, none are kept.

use gemm::Parallelism;
use pulp::Arch;
use rayon::prelude::*;

use super::AttentionSizes;
use super::few::exponentials;
use crate::isa::single::{Operand, multiply_into};
use crate::split::{PIECE, pieces};

/// Queries whose weights are held at a time, with all keys: `2 · QUERIES · keys` numbers for a thread.
const QUERIES: usize = 64;

/// What [`attention`](super::attention) gives back to queries, keys and values, where its result gets
/// `gradient` (FlashAttention, arXiv 2205.14135, algorithm 4, in blocks of queries alone).
///
/// # Shapes
/// - `query`, `gradient`: `[heads, head_dim, queries]`
/// - `key`, `value`: `[kv_heads, head_dim, keys]`
/// - returns the shapes of `query`, `key`, `value`
pub fn attention_gradient(
    query: &[f32],
    key: &[f32],
    value: &[f32],
    gradient: &[f32],
    sizes: AttentionSizes,
    causal: bool,
) -> [Vec<f32>; 3] {
    let AttentionSizes {
        heads,
        kv_heads,
        head_dim,
        queries,
        keys,
    } = sizes;
    let (own, shared) = (head_dim * queries, head_dim * keys);
    let mut of_query = vec![0.0; heads * own];
    // Of every query head apart: those that share a key head are added in the end.
    let mut of_cache = vec![0.0; heads * 2 * shared];
    let of_heads = of_query
        .par_chunks_mut(own.max(1))
        .zip(of_cache.par_chunks_mut((2 * shared).max(1)));
    of_heads
        .enumerate()
        .for_each(|(head, (of_query, of_cache))| {
            let kv_head = head * kv_heads / heads * shared;
            let (of_key, of_value) = of_cache.split_at_mut(shared);
            let given = Head {
                query: &query[head * own..][..own],
                key: &key[kv_head..][..shared],
                value: &value[kv_head..][..shared],
                gradient: &gradient[head * own..][..own],
                sizes,
                causal,
            };
            given.give_back(of_query, of_key, of_value);
        });
    let group = heads / kv_heads.max(1);
    let added = |side: usize| {
        let mut sums = vec![0.0; kv_heads * shared];
        for (kv_head, sums) in sums.chunks_exact_mut(shared.max(1)).enumerate() {
            let heads = (kv_head * group..(kv_head + 1) * group)
                .map(|head| &of_cache[(2 * head + side) * shared..][..shared]);
            add_all(sums, &heads.collect::<Vec<_>>());
        }
        sums
    };
    let [of_key, of_value] = [added(0), added(1)];
    [of_query, of_key, of_value]
}

fn add_all(sums: &mut [f32], parts: &[&[f32]]) {
    pieces(
        sums,
        PIECE,
        #[inline(always)]
        |index, sums| {
            for part in parts {
                let part = &part[index * PIECE..];
                sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
        },
    );
}

/// A query head, with the keys and values that it sees.
struct Head<'a> {
    /// `[head_dim, queries]`
    query: &'a [f32],
    /// `[head_dim, keys]`
    key: &'a [f32],
    /// `[head_dim, keys]`
    value: &'a [f32],
    /// `[head_dim, queries]`
    gradient: &'a [f32],
    sizes: AttentionSizes,
    causal: bool,
}

impl Head<'_> {
    /// Writes what queries get, adds what keys and values do.
    fn give_back(&self, of_query: &mut [f32], of_key: &mut [f32], of_value: &mut [f32]) {
        let AttentionSizes {
            head_dim,
            queries,
            keys,
            ..
        } = self.sizes;
        let arch = Arch::new();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let most = QUERIES.min(queries);
        let [mut weights, mut changes] = [0; 2].map(|_| vec![0.0; most * keys]);
        for start in (0..queries).step_by(QUERIES) {
            let count = QUERIES.min(queries - start);
            // Keys that the last query of the block sees.
            let visible = match self.causal {
                true => (keys + start + count).saturating_sub(queries),
                false => keys,
            };
            // `[head_dim, count]`, `[head_dim, visible]`
            let [query, gradient] = [self.query, self.gradient]
                .map(|x| Operand::new(&x[start..], [head_dim, count], queries));
            let [key, value] =
                [self.key, self.value].map(|x| Operand::new(x, [head_dim, visible], keys));

            // `[count, visible]`
            let (weights, changes) = (
                &mut weights[..count * visible],
                &mut changes[..count * visible],
            );
            multiply([query.transposed(), key], (weights, visible), false);
            multiply([gradient.transposed(), value], (changes, visible), false);
            arch.dispatch(
                #[inline(always)]
                || {
                    for at in 0..count {
                        let (weights, changes) = (
                            &mut weights[at * visible..][..visible],
                            &mut changes[at * visible..][..visible],
                        );
                        let hidden = if self.causal { count - 1 - at } else { 0 };
                        softmax(weights, visible.saturating_sub(hidden), scale);
                        through_softmax(weights, changes, scale);
                    }
                },
            );
            let [weights, changes] =
                [&*weights, &*changes].map(|x| Operand::new(x, [count, visible], visible));
            let of_query = (&mut of_query[start..], queries);
            multiply([key, changes.transposed()], of_query, false);
            multiply([query, changes], (of_key, keys), true);
            multiply([gradient, weights], (of_value, keys), true);
        }
    }
}

/// On this thread: every head has one.
fn multiply(operands: [Operand<'_>; 2], y: (&mut [f32], usize), adds: bool) {
    multiply_into(operands, y, adds, Parallelism::None);
}

/// Makes weights of products, of which the first `visible` are seen.
#[inline(always)]
fn softmax(products: &mut [f32], visible: usize, scale: f32) {
    let (seen, hidden) = products.split_at_mut(visible);
    hidden.fill(0.0);
    seen.iter_mut().for_each(|x| *x *= scale);
    let inverse = exponentials(seen).recip();
    seen.iter_mut().for_each(|x| *x *= inverse);
}

/// Makes gradients of products of what the weights get.
#[inline(always)]
fn through_softmax(weights: &[f32], changes: &mut [f32], scale: f32) {
    let mut products = [0.0; 16];
    for (weights, changes) in weights.chunks(16).zip(changes.chunks(16)) {
        for ((product, weight), change) in products.iter_mut().zip(weights).zip(changes) {
            *product += weight * change;
        }
    }
    let mean: f32 = products.iter().sum();
    for (change, weight) in changes.iter_mut().zip(weights) {
        *change = (*change - mean) * (weight * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::value;
    use super::*;

    /// One number at a time, in f64.
    fn naive(
        [query, key, value, gradient]: [&[f32]; 4],
        sizes: AttentionSizes,
        causal: bool,
    ) -> [Vec<f64>; 3] {
        let AttentionSizes {
            heads,
            kv_heads,
            head_dim,
            queries,
            keys,
        } = sizes;
        let mut found = [query.len(), key.len(), value.len()].map(|count| vec![0.0; count]);
        let scale = (head_dim as f64).sqrt().recip();
        for (head, at) in (0..heads).flat_map(|head| (0..queries).map(move |at| (head, at))) {
            let own = |c: usize| (head * head_dim + c) * queries + at;
            let of_key = |c: usize, k: usize| (head * kv_heads / heads * head_dim + c) * keys + k;
            let visible = if causal {
                keys - queries + at + 1
            } else {
                keys
            };
            let dot = |of: &[f32], with: &[f32], k: usize| -> f64 {
                let product = |c| f64::from(of[own(c)]) * f64::from(with[of_key(c, k)]);
                (0..head_dim).map(product).sum()
            };
            let powers: Vec<f64> = (0..visible)
                .map(|k| (dot(query, key, k) * scale).exp())
                .collect();
            let total: f64 = powers.iter().sum();
            let weights: Vec<f64> = powers.iter().map(|power| power / total).collect();
            let changes: Vec<f64> = (0..visible).map(|k| dot(gradient, value, k)).collect();
            let mean: f64 = weights.iter().zip(&changes).map(|(w, c)| w * c).sum();
            for (k, c) in (0..visible).flat_map(|k| (0..head_dim).map(move |c| (k, c))) {
                let change = weights[k] * (changes[k] - mean) * scale;
                found[0][own(c)] += change * f64::from(key[of_key(c, k)]);
                found[1][of_key(c, k)] += change * f64::from(query[own(c)]);
                found[2][of_key(c, k)] += weights[k] * f64::from(gradient[own(c)]);
            }
        }
        found
    }

    /// Around the size of a block, with keys before the first query and without.
    #[test]
    fn is_the_derivative() {
        for (heads, kv_heads, head_dim, queries, keys) in [
            (1, 1, 1, 1, 1),
            (4, 2, 8, QUERIES, QUERIES),
            (6, 2, 7, QUERIES + 1, 100),
            (2, 1, 12, 2 * QUERIES + 5, 2 * QUERIES + 9),
            (2, 2, 5, 1, 40),
            (2, 2, 4, 0, 5),
        ] {
            let sizes = AttentionSizes {
                heads,
                kv_heads,
                head_dim,
                queries,
                keys,
            };
            let numbers = |count: usize, from: usize| -> Vec<f32> {
                (from..from + count).map(value).collect()
            };
            let query = numbers(heads * head_dim * queries, 0);
            let gradient = numbers(heads * head_dim * queries, 51);
            let key = numbers(kv_heads * head_dim * keys, 7);
            let values = numbers(kv_heads * head_dim * keys, 99);
            for causal in [false, true] {
                let found = attention_gradient(&query, &key, &values, &gradient, sizes, causal);
                let exact = naive([&query, &key, &values, &gradient], sizes, causal);
                for (found, exact) in found.iter().zip(&exact) {
                    assert_eq!(found.len(), exact.len());
                    let largest = exact.iter().fold(0f64, |most, x| most.max(x.abs()));
                    for (x, exact) in found.iter().zip(exact) {
                        let error = (f64::from(*x) - exact).abs();
                        assert!(error <= 3e-6 * (1.0 + largest), "{sizes:?}: {x}, {exact}");
                    }
                }
            }
        }
    }

    /// Keys that nobody sees get nothing, whatever they are.
    #[test]
    fn what_is_not_seen_gets_nothing() {
        let sizes = AttentionSizes {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            queries: 0,
            keys: 3,
        };
        let [of_query, of_key, of_value] =
            attention_gradient(&[], &[f32::NAN; 6], &[1.0; 6], &[], sizes, true);
        assert!(of_query.is_empty());
        assert_eq!([of_key, of_value], [[0.0; 6], [0.0; 6]]);
    }
}
