//! From files to pixels and visual tokens, in one binary: each further one that instantiates a backend
//! costs as much to build.

mod decode;
mod extreme_shapes;
mod preprocess;
mod qwen_limits;
mod qwen_preprocess;
mod qwen_tower;
mod support;
mod vit;
