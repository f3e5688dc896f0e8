use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};

/// Most queries handled at a time: bounds the score matrix to `heads × BLOCK × keys` and lets causal
/// attention skip the keys that no query of the block may see, about half of the work.
const BLOCK: usize = 128;

/// Most scores held at a time (16 MiB); with many keys a block has fewer queries. With 16 heads over
/// 4096 keys, blocks of 32 MiB took 1.6 times as long on a CPU: from that size on glibc no longer
/// reuses freed memory.
const BLOCK_SCORES: usize = 4 << 20;

/// Makes attention causal: the last query sees every key, the one before it all but the last, …
///
/// One band of `BLOCK` query rows serves every block of every layer, because it is aligned to the
/// *last* key: a block that sees fewer keys takes the right end of the band.
#[derive(Debug, Clone)]
pub struct CausalMask<B: Backend> {
    /// `[BLOCK, keys]`, f32: 0 where the key is visible, a large negative number where it is not.
    band: Tensor<B, 2>,
}

impl<B: Backend> CausalMask<B> {
    /// A mask for up to `keys` keys.
    pub fn new(keys: usize, device: &B::Device) -> Self {
        let keys = keys.max(BLOCK);
        let column = Tensor::<B, 1, Int>::arange(0..keys as i64, device).unsqueeze_dim::<2>(0);
        let row = Tensor::<B, 1, Int>::arange(0..BLOCK as i64, device).unsqueeze_dim::<2>(1);
        let last_visible = row.add_scalar((keys - BLOCK) as i64);
        let future = column.greater(last_visible);
        let band = future.float().cast(DType::F32).mul_scalar(-1e30);
        Self { band }
    }

    /// The mask of a block of `queries` queries that sees `keys` keys, flattened.
    fn block(&self, queries: usize, keys: usize) -> Tensor<B, 2> {
        let [rows, columns] = self.band.dims();
        let block = self.band.clone();
        block
            .slice([rows - queries..rows, columns - keys..columns])
            .reshape([1, queries * keys])
    }
}

/// Scaled dot-product attention of one sample (arXiv 1706.03762, §3.2.1) with grouped key/value
/// heads (arXiv 2305.13245): query heads `h · group … (h + 1) · group − 1` share key/value head `h`.
///
/// Without a mask every query sees every key. Softmax runs in f32. Works block by block over the
/// queries and never builds a `rows × rows` matrix. Queries must not outnumber keys when causal.
///
/// # Shapes
/// - `query`: `[kv_heads, group, head_dim, queries]`
/// - `key`, `value`: `[kv_heads, head_dim, keys]`
/// - returns `[kv_heads · group · head_dim, queries]`
pub fn attention<B: Backend>(
    query: Tensor<B, 4>,
    key: Tensor<B, 3>,
    value: Tensor<B, 3>,
    causal: Option<&CausalMask<B>>,
) -> Tensor<B, 2> {
    let [kv_heads, group, head_dim, queries] = query.dims();
    let keys = key.dims()[2];
    let dtype = query.dtype();
    let query = query.mul_scalar((head_dim as f64).powf(-0.5));
    let key = key.unsqueeze_dim::<4>(1);
    let value = value.unsqueeze_dim::<4>(1);

    let most = BLOCK_SCORES / (kv_heads * group * keys).max(1);
    // Whole vectors of processors with wide registers.
    let most = (most & !15).clamp(16, BLOCK);
    let blocks = (0..queries).step_by(most).map(|start| {
        let size = most.min(queries - start);
        let visible = match causal {
            Some(_) => keys - (queries - start - size),
            None => keys,
        };
        let block = query.clone().narrow(3, start, size).swap_dims(2, 3);
        let mut scores = block
            .matmul(key.clone().narrow(3, 0, visible))
            .cast(DType::F32);
        if let (Some(mask), true) = (causal, size > 1) {
            let flat = scores.reshape([kv_heads * group, size * visible]);
            scores = (flat + mask.block(size, visible)).reshape([kv_heads, group, size, visible]);
        }
        let weights = softmax(scores, 3).cast(dtype);
        value
            .clone()
            .narrow(3, 0, visible)
            .matmul(weights.swap_dims(2, 3))
    });
    Tensor::cat(blocks.collect(), 3).reshape([kv_heads * group * head_dim, queries])
}
