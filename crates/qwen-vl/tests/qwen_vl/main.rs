//! Qwen-VL without its weights: configurations, positions, names, prompts.

mod config;
mod fixture;
mod names;
mod positions;
mod prompt;
