//! Loops over plain slices, compiled once per instruction set, chosen at run time, spread over threads:
//! products of weights as they are stored, in half precision or codes of fewer bits, and what a CPU
//! backend runs one number at a time.
//!
//! Every result depends on its own inputs alone, never on how the work was cut into threads or on
//! what else is in the slice: a batch equals its samples, bit for bit. (Not where a product is computed in
//! f32, which the crate `gemm` does; and a single row has loops of its own, [`matrix_vector`].) Nothing here
//! knows of tensors.

mod activation;
mod attention;
mod blocks;
mod bytes;
mod columns;
mod exp;
mod isa;
mod limit;
mod norm;
mod precision;
mod product;
mod rotary;
mod split;

pub use activation::{
    add, add_bias, gelu_tanh, gelu_tanh_gradient, swish, swish_gradient, swish_product,
    swish_product_gradient,
};
pub use attention::{
    AttentionSizes, Cache, Cached, attention, attention_gradient, attention_of_few,
    attention_of_pairs,
};
pub use blocks::{Blocks, Format};
pub use bytes::{of_bytes, to_bytes};
pub use columns::{read_columns, write_columns};
pub use limit::{Limit, Multiplied, Reading, limit};
pub use norm::{layer_norm, layer_norm_gradient, rms_norm, rms_norm_gradient};
pub use precision::{Number, narrow, widen};
pub use product::{Inputs, WIDENED, Weight, matrix_vector, product_with_transposed};
pub use rotary::{rotate, rotate_back};
