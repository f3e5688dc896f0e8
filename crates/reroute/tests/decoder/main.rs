//! The decoder by itself: a tiny one with random weights.

mod errors;
mod generation;
mod inspection;
mod routing;
mod support;
