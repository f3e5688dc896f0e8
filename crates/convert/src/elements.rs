//! Elements of one type from bytes of another.

use half::{bf16, f16};
use reroute_checkpoint::Dtype;

/// The types that weights are converted from, to F32, F16 or BF16; tensors of other types stay what
/// they are.
pub(crate) fn is_weight(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Converts blocks of whole elements.
#[derive(Debug)]
pub(crate) struct Narrow {
    from: Dtype,
    to: Dtype,
    /// Finite values beyond the range of `to` so far. Here they become its largest value; whether that
    /// is wanted is for the caller to say.
    pub(crate) overflows: u64,
}

impl Narrow {
    pub(crate) fn new(from: Dtype, to: Dtype) -> Self {
        Self {
            from,
            to,
            overflows: 0,
        }
    }

    /// The block itself, or its elements in `buffer`.
    pub(crate) fn block<'a>(&mut self, block: &'a [u8], buffer: &'a mut Vec<u8>) -> &'a [u8] {
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

/// The mean of all rows of a matrix, computed while it passes by in blocks of whole elements.
#[derive(Debug)]
pub(crate) struct MeanRow {
    dtype: Dtype,
    sums: Vec<f64>,
    elements: usize,
}

impl MeanRow {
    /// `columns` must not be 0.
    pub(crate) fn new(dtype: Dtype, columns: usize) -> Self {
        Self {
            dtype,
            sums: vec![0.0; columns],
            elements: 0,
        }
    }

    pub(crate) fn add(&mut self, block: &[u8]) {
        let columns = self.sums.len();
        decode(self.dtype, block, |value, _| {
            self.sums[self.elements % columns] += f64::from(value);
            self.elements += 1;
        });
    }

    /// The mean, as bytes of the matrix's type.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let rows = (self.elements / self.sums.len()).max(1) as f64;
        let means: Vec<u8> = (self.sums.iter())
            .flat_map(|sum| ((sum / rows) as f32).to_le_bytes())
            .collect();
        let mut buffer = Vec::new();
        let mut narrow = Narrow::new(Dtype::F32, self.dtype);
        narrow.block(&means, &mut buffer).to_vec()
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
