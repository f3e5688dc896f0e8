//! How weights are spread over several files, and what the index says of it.

use serde_json::json;

use crate::NewTensor;
use crate::companions::json_bytes;
use crate::shards::SINGLE;

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

/// A shard whose name says which of how many it is: `model-00002-of-00003.safetensors`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Numbered {
    pub(crate) of: u32,
    pub(crate) at: u32,
}

impl Numbered {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let numbers = name.strip_prefix("model-")?.strip_suffix(".safetensors")?;
        let (at, of) = numbers.split_once("-of-")?;
        let shard = Self {
            of: of.parse().ok()?,
            at: at.parse().ok()?,
        };
        (shard.name() == name).then_some(shard)
    }

    pub(crate) fn name(self) -> String {
        numbered(u64::from(self.at), u64::from(self.of))
    }
}

/// Name of one of several shards, counted from 1.
fn numbered(at: u64, of: u64) -> String {
    format!("model-{at:05}-of-{of:05}.safetensors")
}
