//! Where a pickle says that its tensors lie.

use burn_store::pytorch::pickle_reader::Object;
use checkpoint::{Dtype, NewTensor};

use super::Storages;

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

/// Replaces every call of a function (`REDUCE`) by that of a constructor (`NEWOBJ`).
///
/// `burn-store` answers the former with a tensor of its own; the latter it hands on with all
/// arguments. Calls without arguments make empty dictionaries and stay.
pub(super) fn note_calls(pickle: &mut [u8]) -> Result<(), String> {
    const REDUCE: u8 = b'R';
    const NEWOBJ: u8 = 0x81;
    const EMPTY_TUPLE: u8 = b')';
    let (mut at, mut previous) = (0, 0);
    while let Some(&opcode) = pickle.get(at) {
        if opcode == REDUCE && previous != EMPTY_TUPLE {
            pickle[at] = NEWOBJ;
        }
        let operand = operand_bytes(opcode, &pickle[at + 1..]);
        let operand = operand.ok_or_else(|| format!("its pickle is damaged at byte {at}"))?;
        at = at.saturating_add(1 + operand);
        previous = opcode;
    }
    Ok(())
}

/// Length of what follows an opcode that `burn-store` knows (Python's `pickletools`).
fn operand_bytes(opcode: u8, rest: &[u8]) -> Option<usize> {
    let line = |rest: &[u8]| Some(1 + rest.iter().position(|&byte| byte == b'\n')?);
    let short = || rest.first().map(|&length| 1 + usize::from(length));
    Some(match opcode {
        b'q' | b'h' | b'K' | 0x80 => 1,
        b'M' => 2,
        b'J' | b'r' | b'j' => 4,
        b'G' => 8,
        b'U' | 0x8a => short()?,
        b'X' => {
            let length = u32::from_le_bytes(*rest.first_chunk()?);
            usize::try_from(length).ok()?.checked_add(4)?
        }
        b'I' => line(rest)?,
        b'c' => {
            let module = line(rest)?;
            module + line(&rest[module..])?
        }
        _ => 0,
    })
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
