//! One binary for all tests that cross crates: every further one that instantiates a backend costs
//! minutes to build.

mod against_reference;
mod bad_checkpoint;
mod bad_request;
mod bad_text;
mod batches;
mod command_line;
mod conversations;
mod gradients;
mod invariants;
mod layers;
mod limits;
mod parity;
mod program;
mod questions;
mod reference;
mod scenes;
mod support;
mod text;
