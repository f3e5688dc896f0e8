use std::ops::Range;

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use half::bf16;
use reroute_kernels::{AttentionSizes, read_columns, write_columns};

use crate::cached::{Cached, HostCached, where_they_lie};
use crate::gradient::{Operation, Unranked, flat, recorded};
use crate::host::{self, HostTensor};

/// Most queries handled at a time: bounds the score matrix to `heads × QUERY_BLOCK × keys` and lets causal
/// attention skip the keys that no query of the block may see, about half of the work.
pub const QUERY_BLOCK: usize = 128;

/// Most scores held at a time (16 MiB); with many keys a block has fewer queries. With 16 heads over
/// 4096 keys, blocks of 32 MiB took 1.6 times as long on a CPU: from that size on glibc no longer
/// reuses freed memory.
pub(crate) const BLOCK_SCORES: usize = 4 << 20;

/// Makes attention causal: the last query sees every key, the one before it all but the last, …
///
/// One band of `QUERY_BLOCK` queries serves every block of every layer, because it is aligned to the
/// *last* key: a block that sees fewer keys takes the lower end of the band.
#[derive(Debug, Clone)]
pub struct CausalMask<B: Backend> {
    /// `[keys, QUERY_BLOCK]`, f32: 0 where the key is visible, a large negative number where it is not.
    band: Tensor<B, 2>,
}

impl<B: Backend> CausalMask<B> {
    /// A mask for up to `keys` keys.
    pub fn new(keys: usize, device: &B::Device) -> Self {
        let keys = keys.max(QUERY_BLOCK);
        let key = Tensor::<B, 1, Int>::arange(0..keys as i64, device).unsqueeze_dim::<2>(1);
        let query =
            Tensor::<B, 1, Int>::arange(0..QUERY_BLOCK as i64, device).unsqueeze_dim::<2>(0);
        let last_visible = query.add_scalar((keys - QUERY_BLOCK) as i64);
        let future = key.greater(last_visible);
        let band = future.float().cast(DType::F32).mul_scalar(-1e30);
        Self { band }
    }

    /// The mask of a block of `queries` queries that sees `keys` keys, flattened.
    fn block(&self, keys: usize, queries: usize) -> Tensor<B, 2> {
        let [rows, columns] = self.band.dims();
        let block = self.band.clone();
        block
            .slice([rows - keys..rows, columns - queries..columns])
            .reshape([1, keys * queries])
    }
}

/// How many queries [`attention`] handles at a time where it holds their scores, `heads × keys` for each:
/// whole vectors of processors with wide registers.
pub fn queries_at_a_time(heads: usize, keys: usize) -> usize {
    let most = BLOCK_SCORES / heads.saturating_mul(keys).max(1);
    (most & !15).clamp(16, QUERY_BLOCK)
}

/// Scaled dot-product attention of one sample (arXiv 1706.03762, §3.2.1) with grouped key/value
/// heads (arXiv 2305.13245): query heads `h · group … (h + 1) · group − 1` share key/value head `h`.
///
/// Without a mask every query sees every key. Softmax runs in f32. Works block by block over the
/// queries and never builds a `rows × rows` matrix. Queries must not outnumber keys when causal.
///
/// # Shapes
/// - `query`: `[kv_heads, group, head_dim, queries]`
/// - `key`, `value`: `[kv_heads, head_dim, keys]`, of the type of the queries or as a cache holds them
/// - returns `[kv_heads · group · head_dim, queries]`
pub fn attention<B: Backend>(
    query: Tensor<B, 4>,
    key: impl Into<Cached<B>>,
    value: impl Into<Cached<B>>,
    causal: Option<&CausalMask<B>>,
) -> Tensor<B, 2> {
    let [kv_heads, group, head_dim, queries] = query.dims();
    let (key, value) = (key.into(), value.into());
    let keys = key.dims()[2];
    let is_causal = causal.is_some();
    if let Some(context) = on_host(&query, [&key, &value], is_causal) {
        return context;
    }
    if let Some(context) = on_record(&query, [&key, &value], is_causal) {
        return context;
    }
    let dtype = query.dtype();
    let (key, value) = (key.widened(dtype), value.widened(dtype));
    let query = query.mul_scalar((head_dim as f64).powf(-0.5));
    // Not by a reshape, for which CPU backends copy a cache that has room for more keys.
    let per_group = |x: Tensor<B, 3>| x.expand([1, kv_heads, head_dim, keys]).swap_dims(0, 1);
    let key = per_group(key).swap_dims(2, 3);
    let value = per_group(value);

    let most = queries_at_a_time(kv_heads * group, keys);
    let blocks = (0..queries).step_by(most).map(|start| {
        let size = most.min(queries - start);
        let visible = match causal {
            Some(_) => keys - (queries - start - size),
            None => keys,
        };
        let block = query.clone().narrow(3, start, size);
        let (key, value) = (
            key.clone().narrow(2, 0, visible),
            value.clone().narrow(3, 0, visible),
        );
        let scores = product(key, block);
        let weights = softmax_over_keys(scores.cast(DType::F32), causal).cast(dtype);
        product(value, weights)
    });
    Tensor::cat(blocks.collect(), 3).reshape([kv_heads * group * head_dim, queries])
}

/// Fewer queries leave most registers of the kernel for many empty.
const MANY: usize = 8;

/// The sizes of an attention; shapes as [`attention`].
fn sizes<B: Backend>(query: &Tensor<B, 4>, keys: usize) -> AttentionSizes {
    let [kv_heads, group, head_dim, queries] = query.dims();
    AttentionSizes {
        heads: kv_heads * group,
        kv_heads,
        head_dim,
        queries,
        keys,
    }
}

/// The same by a kernel, if the tensors are within its reach; shapes as [`attention`].
fn on_host<B: Backend>(
    query: &Tensor<B, 4>,
    [key, value]: [&Cached<B>; 2],
    causal: bool,
) -> Option<Tensor<B, 2>> {
    let sizes = sizes(query, key.dims()[2]);
    let (dtype, device) = (query.dtype(), query.device());
    let shape = [sizes.heads * sizes.head_dim, sizes.queries];
    let query = HostTensor::of(query).packed();
    let mut cache = [key, value].map(HostCached::of);
    // Parts of a cache that has room for more, or of a tower's segments. A row of bf16 shall not depend on how
    // many there are beside it.
    if sizes.queries >= MANY || (sizes.queries > 1 && dtype == DType::BF16) {
        cache = cache.map(HostCached::packed);
        if let Some(context) = of_pairs(&query, &cache, sizes, causal) {
            let context = TensorData::new(context, shape);
            return Some(Tensor::from_data(context, (&device, dtype)));
        }
    }
    let query = query.singles()?;
    let context = match sizes.queries {
        0..MANY => {
            let cache = where_they_lie(&cache[0], &cache[1])?;
            reroute_kernels::attention_of_few(&query, cache, sizes, causal)
        }
        _ => {
            let [key, value] = cache.each_ref().map(HostCached::singles);
            reroute_kernels::attention(&query, &key?, &value?, sizes, causal)
        }
    };
    Some(host::tensor(context, shape, dtype, &device))
}

/// The same of bf16, where the processor multiplies that.
fn of_pairs(
    query: &HostTensor,
    cache: &[HostCached; 2],
    sizes: AttentionSizes,
    causal: bool,
) -> Option<Vec<bf16>> {
    let [key, value] = cache.each_ref().map(HostCached::packed_floats);
    reroute_kernels::attention_of_pairs(query.slice()?, key?, value?, sizes, causal)
}

/// The same below an autodiff backend, as one step.
fn on_record<B: Backend>(
    query: &Tensor<B, 4>,
    cache: [&Cached<B>; 2],
    causal: bool,
) -> Option<Tensor<B, 2>> {
    let [Cached::Float(key), Cached::Float(value)] = cache else {
        return None;
    };
    let all = Segment {
        queries: 0..query.dims()[3],
        keys: 0..key.dims()[2],
    };
    attention_on_record((query, key, value), vec![all], causal)
}

/// A sample among samples that are packed side by side.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Its queries.
    pub queries: Range<usize>,
    /// The keys that they see.
    pub keys: Range<usize>,
}

/// [`attention`] within each of the segments, as one step of an autodiff backend whose numbers are in this
/// program's memory; `None` on any other. As a step for each segment, every gradient of a part would be as
/// wide as the whole.
///
/// # Shapes
/// - `query`: `[kv_heads, group, head_dim, queries]`, of the segments one after another
/// - `key`, `value`: `[kv_heads, head_dim, keys]`
/// - returns `[kv_heads · group · head_dim, queries]`
pub fn attention_on_record<B: Backend>(
    (query, key, value): (&Tensor<B, 4>, &Tensor<B, 3>, &Tensor<B, 3>),
    segments: Vec<Segment>,
    causal: bool,
) -> Option<Tensor<B, 2>> {
    let attend = Attend {
        sizes: sizes(query, key.dims()[2]),
        segments,
        causal,
    };
    let inputs = [
        query.clone().into(),
        key.clone().into(),
        value.clone().into(),
    ];
    recorded(attend, &inputs)
}

/// [`attention`] of segments, to be recorded.
#[derive(Debug, Clone)]
struct Attend {
    /// Of all segments together.
    sizes: AttentionSizes,
    segments: Vec<Segment>,
    causal: bool,
}

impl Operation<3> for Attend {
    fn forward<B: Backend>(&self, inputs: [Unranked<B>; 3]) -> Option<Unranked<B>> {
        let [query, key, value] = inputs;
        let (query, key, value) = (query.ranked::<4>(), key.ranked::<3>(), value.ranked::<3>());
        let contexts = self.segments.iter().map(|segment| {
            let Segment { queries, keys } = segment.clone();
            let query = query.clone().narrow(3, queries.start, queries.len());
            let [key, value] = [&key, &value].map(|x| {
                let rows = x.clone().narrow(2, keys.start, keys.len());
                Cached::Float(rows)
            });
            on_host(&query, [&key, &value], self.causal)
        });
        let contexts: Vec<_> = contexts.collect::<Option<_>>()?;
        Some(Tensor::cat(contexts, 1).into())
    }

    fn needs(&self, _: [bool; 3]) -> [bool; 3] {
        [true; 3]
    }

    fn backward(
        &self,
        [query, key, value]: [HostTensor; 3],
        gradient: &HostTensor,
        _: [bool; 3],
    ) -> [Option<TensorData>; 3] {
        let AttentionSizes { queries, keys, .. } = self.sizes;
        let (query, key, value) = (query.numbers(), key.numbers(), value.numbers());
        let gradient = gradient.numbers();
        let mut found = [&query, &key, &value].map(|x| vec![0.0; x.len()]);
        for segment in &self.segments {
            let (own, seen) = (segment.queries.clone(), segment.keys.clone());
            let sizes = AttentionSizes {
                queries: own.len(),
                keys: seen.len(),
                ..self.sizes
            };
            let [query, gradient] =
                [&query, &gradient].map(|x| read_columns(x, queries, own.clone()));
            let [key, value] = [&key, &value].map(|x| read_columns(x, keys, seen.clone()));
            let parts = reroute_kernels::attention_gradient(
                &query,
                &key,
                &value,
                &gradient,
                sizes,
                self.causal,
            );
            let places = [(queries, &own), (keys, &seen), (keys, &seen)];
            for ((found, part), (width, place)) in found.iter_mut().zip(&parts).zip(places) {
                write_columns(found, width, place.start, part, place.len());
            }
        }
        found.map(|numbers| Some(flat(numbers)))
    }
}

/// `a · b`; for a single column as `bᵀ · aᵀ`, of which CPU backends read `a` at full speed.
fn product<B: Backend>(a: Tensor<B, 4>, b: Tensor<B, 4>) -> Tensor<B, 4> {
    match b.dims()[3] {
        1 => b.swap_dims(2, 3).matmul(a.swap_dims(2, 3)).swap_dims(2, 3),
        _ => a.matmul(b),
    }
}

/// # Shapes
/// - `scores`: `[kv_heads, group, keys, queries]`, f32
/// - returns the same shape
fn softmax_over_keys<B: Backend>(
    mut scores: Tensor<B, 4>,
    causal: Option<&CausalMask<B>>,
) -> Tensor<B, 4> {
    let [kv_heads, group, keys, queries] = scores.dims();
    if let (Some(mask), true) = (causal, queries > 1) {
        let flat = scores.reshape([kv_heads * group, keys * queries]);
        scores = (flat + mask.block(keys, queries)).reshape([kv_heads, group, keys, queries]);
    }
    softmax(scores, 2)
}
