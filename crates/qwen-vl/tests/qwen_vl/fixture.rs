//! What lies in `tests/fixtures` of the workspace, see the scripts there.

use std::path::PathBuf;

use qwen_vl::{QwenVlConfig, QwenVlHfConfig};
use safetensors::SafeTensors;
use serde_json::Value;
use vision_encoder::Grid;

pub const FAMILIES: [&str; 3] = ["qwen2vl", "qwen25vl", "qwen3vl"];

pub fn path(name: &str) -> PathBuf {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");
    PathBuf::from(fixtures).join(name)
}

pub fn read(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

pub fn json(name: &str) -> Value {
    serde_json::from_slice(&read(name)).unwrap()
}

pub fn resolve(json: Value) -> Result<QwenVlConfig, reroute_family::FamilyError> {
    serde_json::from_value::<QwenVlHfConfig>(json)
        .unwrap()
        .resolve()
}

/// The resolved configuration of a family's checkpoint.
pub fn config(family: &str) -> QwenVlConfig {
    resolve(json(&format!("{family}/ckpt/config.json"))).unwrap()
}

/// The numbers of a tensor, none where it is absent.
pub fn integers(tensors: &SafeTensors, name: &str) -> Vec<i64> {
    let bytes = tensors.tensor(name).map_or(&[][..], |tensor| tensor.data());
    bytes
        .as_chunks()
        .0
        .iter()
        .copied()
        .map(i64::from_le_bytes)
        .collect()
}

/// The numbers of a tensor, none where it is absent.
pub fn floats(tensors: &SafeTensors, name: &str) -> Vec<f32> {
    let bytes = tensors.tensor(name).map_or(&[][..], |tensor| tensor.data());
    bytes
        .as_chunks()
        .0
        .iter()
        .copied()
        .map(f32::from_le_bytes)
        .collect()
}

/// Grids, none where the tensor is absent.
pub fn grids(tensors: &SafeTensors, name: &str) -> Vec<Grid> {
    let sizes: Vec<usize> = integers(tensors, name)
        .iter()
        .map(|&n| n as usize)
        .collect();
    let grid = |&[t, h, w]: &[usize; 3]| Grid { t, h, w };
    sizes.as_chunks().0.iter().map(grid).collect()
}
