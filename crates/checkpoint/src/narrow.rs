//! Elements of one type from bytes of another.

use half::{bf16, f16};
use safetensors::Dtype;

/// The types that weights are converted from, to F32, F16 or BF16; tensors of other types stay what
/// they are.
pub fn is_weight(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Converts blocks of whole elements, little-endian, rounding to the nearest, ties to even.
#[derive(Debug)]
pub struct Narrow {
    from: Dtype,
    to: Dtype,
    /// Finite values beyond the range of `to` so far. Here they become its largest value; whether that
    /// is wanted is for the caller to say.
    pub overflows: u64,
}

impl Narrow {
    /// From one type that [is a weight's](is_weight) to F32, F16 or BF16, or from any type to itself.
    pub fn new(from: Dtype, to: Dtype) -> Self {
        Self {
            from,
            to,
            overflows: 0,
        }
    }

    /// The block itself, or its elements in `buffer`.
    pub fn block<'a>(&mut self, block: &'a [u8], buffer: &'a mut Vec<u8>) -> &'a [u8] {
        if self.from == self.to {
            return block;
        }
        buffer.clear();
        match self.to {
            Dtype::F16 => decode(self.from, block, |value, _| {
                let narrow = f16::from_f32(value);
                let lost = narrow.is_infinite() && value.is_finite();
                self.overflows += u64::from(lost);
                let largest = f16::MAX.to_f32().copysign(value);
                let narrow = if lost { f16::from_f32(largest) } else { narrow };
                buffer.extend(narrow.to_le_bytes());
            }),
            Dtype::BF16 => decode(self.from, block, |value, _| {
                let narrow = bf16::from_f32(value);
                let lost = narrow.is_infinite() && value.is_finite();
                self.overflows += u64::from(lost);
                let largest = bf16::MAX.to_f32().copysign(value);
                let narrow = if lost {
                    bf16::from_f32(largest)
                } else {
                    narrow
                };
                buffer.extend(narrow.to_le_bytes());
            }),
            _ => decode(self.from, block, |value, lost| {
                self.overflows += u64::from(lost);
                buffer.extend(value.to_le_bytes());
            }),
        }
        buffer
    }
}

/// Every element of a block of f64, f32, f16 or bf16, and whether it is the largest f32 in the place
/// of a finite value beyond.
fn decode(dtype: Dtype, block: &[u8], mut each: impl FnMut(f32, bool)) {
    match dtype {
        Dtype::F64 => block.as_chunks().0.iter().for_each(|raw| {
            let value = f64::from_le_bytes(*raw);
            let narrow = value as f32;
            match narrow.is_infinite() && value.is_finite() {
                true => each(f32::MAX.copysign(narrow), true),
                false => each(narrow, false),
            }
        }),
        Dtype::F32 => {
            (block.as_chunks().0.iter()).for_each(|raw| each(f32::from_le_bytes(*raw), false));
        }
        Dtype::F16 => (block.as_chunks().0.iter())
            .for_each(|raw| each(f16::from_le_bytes(*raw).to_f32(), false)),
        _ => (block.as_chunks().0.iter())
            .for_each(|raw| each(bf16::from_le_bytes(*raw).to_f32(), false)),
    }
}
