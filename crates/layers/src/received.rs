use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::attention::BLOCK_SCORES;

/// Attention probability that every row receives: summed over the queries, the mean over heads. In
/// f32, block by block; never a `rows × rows` matrix.
///
/// # Shapes
/// - `queries`, `keys`: `[num_heads, head_dim, rows]`
/// - returns `[1, rows]`, f32
pub fn received_attention<B: Backend>(queries: Tensor<B, 3>, keys: Tensor<B, 3>) -> Tensor<B, 2> {
    let [num_heads, head_dim, rows] = queries.dims();
    let queries = queries.cast(DType::F32) * (head_dim as f64).powf(-0.5);
    let keys = keys.cast(DType::F32);
    let most = (BLOCK_SCORES / (num_heads * rows).max(1)).max(1);
    let blocks = (0..rows).step_by(most).map(|start| {
        let block = queries.clone().narrow(2, start, most.min(rows - start));
        let probabilities = softmax(block.swap_dims(1, 2).matmul(keys.clone()), 2);
        probabilities.sum_dim(1).mean_dim(0).reshape([1, rows])
    });
    blocks
        .reduce(|sum, block| sum + block)
        .unwrap_or_else(|| Tensor::zeros([1, rows], (&keys.device(), DType::F32)))
}
