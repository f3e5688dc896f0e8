//! How weights are spread over several files, and what the index says of it.

use serde_json::json;

use crate::NewTensor;
use crate::companions::json_bytes;
use crate::shards::{SINGLE, numbered};

/// Groups of bounded size in bytes, in the order given; one larger thing is a group, too. There is one
/// group at least.
pub fn split<T, E>(
    things: Vec<T>,
    max_bytes: u64,
    bytes: impl Fn(&T) -> Result<u64, E>,
) -> Result<Vec<Vec<T>>, E> {
    let mut last = Vec::new();
    let mut last_bytes = 0_u64;
    let mut groups = Vec::new();
    for thing in things {
        let bytes = bytes(&thing)?;
        if last_bytes > 0 && last_bytes.saturating_add(bytes) > max_bytes {
            groups.push(std::mem::take(&mut last));
            last_bytes = 0;
        }
        last_bytes = last_bytes.saturating_add(bytes);
        last.push(thing);
    }
    groups.push(last);
    Ok(groups)
}

/// Name of one of `count` safetensors files, counted from 0.
pub fn shard_name(at: usize, count: usize) -> String {
    match count {
        1 => SINGLE.to_owned(),
        _ => numbered(at as u64 + 1, count as u64),
    }
}

/// The index of several files: which tensor lies in which, and how many bytes there are in all.
pub fn shard_index<'a>(files: impl IntoIterator<Item = (&'a str, &'a [NewTensor])>) -> Vec<u8> {
    let mut weight_map = serde_json::Map::new();
    let mut total_size = 0;
    for (file, tensors) in files {
        for tensor in tensors {
            weight_map.insert(tensor.name.clone(), file.into());
            total_size += tensor.bytes().unwrap_or(0);
        }
    }
    json_bytes(&json!({"metadata": {"total_size": total_size}, "weight_map": weight_map}))
}
