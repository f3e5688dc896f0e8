//! The decoder by itself: a tiny one with random weights.

mod errors;
mod generation;
mod inspection;
mod kv_types;
mod routing;
mod support;
