//! One binary for all tests that cross crates: every further one that instantiates a backend costs
//! minutes to build.

mod adapters;
mod against_reference;
mod bad_checkpoint;
mod bad_request;
mod bad_text;
mod batches;
mod chat;
mod command_line;
mod compare;
mod conversations;
mod convert;
mod doctor;
mod early;
mod golden;
mod gradients;
mod grounding;
mod inputs;
mod invariants;
mod layers;
mod limits;
mod llava_variants;
mod methods;
mod nuwa;
mod parity;
mod program;
mod questions;
mod qwen_cases;
mod qwen_program;
mod reference;
mod scenes;
mod support;
mod templates;
mod text;
mod threads;
mod training;
