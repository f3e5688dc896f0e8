//! The types that keys and values are kept in.

use std::fmt;

use burn::tensor::DType;

/// The type that a cache keeps keys and values in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// Floats.
    Float(DType),
    /// Bytes, -127 to 127, with a scale in f32 for each head and row, of keys and of values: the largest
    /// number of the head becomes ±127.
    Int8,
}

impl KvType {
    /// Single precision.
    pub const F32: Self = Self::Float(DType::F32);
    /// Half precision.
    pub const F16: Self = Self::Float(DType::F16);
    /// The upper half of single precision.
    pub const BF16: Self = Self::Float(DType::BF16);
    /// All of them, from the widest on.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::BF16, Self::Int8];

    /// The type of the numbers themselves.
    pub fn dtype(self) -> DType {
        match self {
            Self::Float(dtype) => dtype,
            Self::Int8 => DType::I8,
        }
    }

    /// Bytes of the keys, or of the values, of one head and row: its `head_dim` numbers, and their scale.
    pub fn head_bytes(self, head_dim: usize) -> usize {
        let scale = match self {
            Self::Float(_) => 0,
            Self::Int8 => size_of::<f32>(),
        };
        let numbers = head_dim.saturating_mul(self.dtype().size());
        numbers.saturating_add(scale)
    }
}

impl From<DType> for KvType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::I8 => Self::Int8,
            dtype => Self::Float(dtype),
        }
    }
}

/// As flags and JSON call it: `f32`, `f16`, `bf16`, `int8`.
impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(dtype) => f.pad(dtype.name()),
            Self::Int8 => f.pad("int8"),
        }
    }
}
