//! The score of a row: how much the last row of the prompt attends to it.

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Tensor};

/// Attention probabilities of one query row over all rows of one sample, averaged over the query
/// heads: the score of Reroute (arXiv 2606.12412), which ranks with the decision layer's own
/// projections instead of the attention of the layer before as FastV (arXiv 2403.06764) does.
///
/// `query` is the last prompt row. The causal mask never hides anything from it, so no mask is
/// needed, and one row of the attention matrix is all there is to compute. Everything is in f32
/// whatever the dtype of the model, and stays on the device. The probabilities of a head sum to 1
/// over *all* rows, text included; a caller reads off the visual ones and does not normalise again.
/// Rows of padding must not be among `keys`.
///
/// # Shapes
/// * `query`: `[num_heads, head_dim]`, rotated to its position
/// * `keys`: `[num_kv_heads, rows, head_dim]`, rotated to their positions; `num_heads` is a
///   multiple of `num_kv_heads`, and query head `j` belongs to key head `j / (num_heads /
///   num_kv_heads)`
/// * returns `[rows]`
pub fn last_row_scores<B: Backend>(query: Tensor<B, 2>, keys: Tensor<B, 3>) -> Tensor<B, 1> {
    let [num_heads, head_dim] = query.dims();
    let [num_kv_heads, rows, _] = keys.dims();

    // Query heads that share a key head become rows of one matrix: no key is repeated.
    let query =
        query
            .cast(FloatDType::F32)
            .reshape([num_kv_heads, num_heads / num_kv_heads, head_dim]);
    let keys = keys.cast(FloatDType::F32);

    // Scaled after the product, like the reference: scaling the query first rounds differently.
    let logits = query.matmul(keys.transpose()) * (head_dim as f64).powf(-0.5);
    let probabilities = softmax(logits, 2);
    probabilities
        .reshape([num_heads, rows])
        .mean_dim(0)
        .reshape([rows])
}
