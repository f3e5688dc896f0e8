//! Where a pickle says that its tensors lie.

use burn_store::pytorch::pickle_reader::Object;
use reroute_checkpoint::{Dtype, NewTensor};

use super::Storages;

/// Longest name of a tensor, in bytes.
const NAME_MAX_BYTES: usize = 1024;

/// Where a tensor lies in its file.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) dtype: Dtype,
    /// Length of every axis, slowest first.
    pub(super) shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// Appends every tensor below `object`, names joined by dots.
pub(super) fn find(
    object: &Object,
    name: &str,
    storages: &Storages,
    found: &mut Vec<(String, Stored)>,
) -> Result<(), String> {
    match object {
        Object::Dict(entries) => {
            for (key, entry) in entries {
                if name.len() + key.len() > NAME_MAX_BYTES {
                    return Err("it has a name that is too long for a tensor".to_owned());
                }
                let name = match name {
                    "" => key.clone(),
                    _ => format!("{name}.{key}"),
                };
                find(entry, &name, storages, found)?;
            }
        }
        Object::Reduce { .. } | Object::Build { .. } => {
            let stored = Stored::of(object, name, storages);
            found.push((
                name.to_owned(),
                stored.map_err(|problem| {
                    format!("tensor {name:?} {problem}; save the model as safetensors instead")
                })?,
            ));
        }
        _ => {}
    }
    Ok(())
}

impl Stored {
    /// Of a call that makes a tensor.
    fn of(call: &Object, name: &str, storages: &Storages) -> Result<Self, &'static str> {
        const UNKNOWN: &str = "is made in a way that is not known";
        let Object::Reduce { callable, args } = call else {
            return Err(UNKNOWN);
        };
        let (Object::Class { name: function, .. }, Object::Tuple(args)) = (&**callable, &**args)
        else {
            return Err(UNKNOWN);
        };
        match (function.as_str(), args.as_slice()) {
            ("_rebuild_parameter", [tensor, ..]) => Self::of(tensor, name, storages),
            (
                "_rebuild_tensor_v2",
                [
                    Object::PersistentTuple(storage),
                    Object::Int(offset),
                    Object::Tuple(shape),
                    Object::Tuple(strides),
                    ..,
                ],
            ) => {
                let (Some(shape), Some(strides)) = (sizes(shape), sizes(strides)) else {
                    return Err("has a shape that is none");
                };
                if !is_contiguous(&shape, &strides) {
                    return Err("does not lie row by row, as a transposed one");
                }
                let (dtype, key) = storage_of(storage).ok_or("is of a type that is not read")?;
                let tensor = NewTensor {
                    name: name.to_owned(),
                    dtype,
                    shape,
                };
                let place = || {
                    let bytes = tensor.bytes().ok()?;
                    let skipped = u64::try_from(*offset).ok()?;
                    let skipped = skipped.checked_mul(dtype.bitsize() as u64 / 8)?;
                    let (start, stored) = storages.get(key)?;
                    let is_inside = skipped.checked_add(bytes)? <= *stored;
                    is_inside.then_some((start + skipped, bytes))
                };
                let (start, bytes) = place().ok_or("lacks bytes")?;
                Ok(Self {
                    dtype,
                    shape: tensor.shape,
                    start,
                    bytes,
                })
            }
            _ => Err(UNKNOWN),
        }
    }
}

/// Type and key of `("storage", class, key, device, elements)`.
fn storage_of(storage: &[Object]) -> Option<(Dtype, &str)> {
    let [_, Object::Class { name, .. }, Object::String(key), ..] = storage else {
        return None;
    };
    let dtype = match name.as_str() {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        _ => return None,
    };
    Some((dtype, key))
}

fn sizes(objects: &[Object]) -> Option<Vec<usize>> {
    let size = |object: &Object| match object {
        Object::Int(size) => usize::try_from(*size).ok(),
        _ => None,
    };
    objects.iter().map(size).collect()
}

/// Whether elements lie one after the other, the last axis fastest.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut step = 1_usize;
    let mut axes = shape.iter().zip(strides).rev();
    let in_order = axes.all(|(&size, &stride)| {
        let fits = size == 1 || stride == step;
        step = step.saturating_mul(size);
        fits
    });
    shape.len() == strides.len() && (in_order || shape.contains(&0))
}
