//! The building blocks that vision towers, projectors and decoders share.
//!
//! # Feature-major activations
//!
//! Activations are `[features, rows]`: one *column* per token. A checkpoint stores a linear weight
//! as `[out, in]`; with feature-major activations `y = W · x` needs neither the weight nor the
//! activation transposed. On CPU backends the weight is then the streamed left operand of the
//! matrix product, which keeps the product at full speed for the few rows that routing leaves
//! (with `[rows, features]` it drops to under half below about a hundred rows). Attention heads
//! fall out of `[heads · head_dim, rows]` by a reshape, without a permutation.
//!
//! Rows of several samples stand side by side ("packed"): there is no padding anywhere.
//!
//! # Errors
//!
//! Ids and rows that come from outside are checked ([`LayerError`]). Everything else works on tensors
//! whose shapes are stated, and treats others as Burn's own operations do.

mod activation;
mod attention;
mod cached;
mod embedding;
mod error;
mod gradient;
mod host;
mod linear;
mod low_rank;
mod norm;
mod received;
mod rotary;
mod rows;
mod vocabulary;
mod walk;
mod weight;

pub use activation::{add, gelu_tanh, quick_gelu, silu, silu_product};
pub use attention::{
    CausalMask, QUERY_BLOCK, Segment, attention, attention_on_record, queries_at_a_time,
};
pub use cached::Cached;
pub use embedding::{Embedding, EmbeddingConfig};
pub use error::LayerError;
pub use linear::{Linear, LinearConfig};
pub use low_rank::{LowRank, Scaling};
pub use norm::{LayerNorm, LayerNormConfig, RmsNorm, RmsNormConfig};
pub use received::received_attention;
pub use reroute_kernels::{Format as CodeFormat, WIDENED};
pub use rotary::Rotary;
pub use rows::{indices, write_rows};
pub use vocabulary::{Vocabulary, VocabularyConfig};
pub use walk::Linears;
#[doc(hidden)]
pub use walk::below;
pub use weight::{Coded, Weight};
