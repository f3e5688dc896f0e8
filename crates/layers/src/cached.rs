use std::borrow::Cow;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Int, IntDType, Tensor, TensorData};
use half::{bf16, f16};

use crate::LayerError;
use crate::host::{self, HostTensor, Number};
use crate::rows::{fits, write};

/// Keys, or values, of all heads, as a cache holds them.
#[derive(Debug, Clone)]
pub enum Cached<B: Backend> {
    /// `[heads, head_dim, rows]`
    Float(Tensor<B, 3>),
    /// In bytes, with a scale for each head and row.
    Int8 {
        /// `[heads, head_dim, rows]`, i8: -127 to 127.
        codes: Tensor<B, 3, Int>,
        /// `[heads, 1, rows]`, f32: what the codes are multiplied with.
        scales: Tensor<B, 3>,
    },
}

impl<B: Backend> From<Tensor<B, 3>> for Cached<B> {
    fn from(rows: Tensor<B, 3>) -> Self {
        Self::Float(rows)
    }
}

impl<B: Backend> Cached<B> {
    /// Rounds rows to floats of a type, or to bytes with scales for [`DType::I8`]: the largest number of a
    /// head and row becomes ±127. Where one is not finite, some of what is kept of the head and row is not.
    ///
    /// # Shapes
    /// - `rows`: `[heads, head_dim, rows]`
    pub fn of(rows: Tensor<B, 3>, dtype: DType) -> Self {
        if dtype == rows.dtype() {
            return Self::Float(rows);
        }
        let (shape, device) = (rows.dims(), rows.device());
        let host = HostTensor::of(&rows).packed();
        if let (Some(numbers), true) = (host.singles(), dtype == DType::I8) {
            let [heads, head_dim, count] = shape;
            let (codes, scales) = reroute_kernels::to_bytes(&numbers, head_dim, count);
            let codes = TensorData::new(codes, shape);
            return Self::Int8 {
                codes: Tensor::from_data(codes, (&device, DType::I8)),
                scales: host::tensor(scales, [heads, 1, count], DType::F32, &device),
            };
        }
        match (host.singles(), dtype) {
            (_, DType::I8) => Self::in_bytes(rows),
            (Some(Cow::Borrowed(numbers)), _) => {
                Self::Float(host::tensor(numbers.to_vec(), shape, dtype, &device))
            }
            (Some(Cow::Owned(numbers)), _) => {
                Self::Float(host::tensor(numbers, shape, dtype, &device))
            }
            (None, _) => Self::Float(rows.cast(dtype)),
        }
    }

    /// The same by operations of the backend.
    fn in_bytes(rows: Tensor<B, 3>) -> Self {
        let rows = rows.cast(DType::F32);
        // Not finite where a number is not, whatever the backend takes for the largest.
        let finite = rows.clone().mul_scalar(0.0).sum_dim(1);
        let scales = rows.clone().abs().max_dim(1).div_scalar(127.0) + finite;
        let codes = (rows * scales.clone().clamp_min(1e-38).recip()).round();
        Self::Int8 {
            codes: codes.clamp(-127.0, 127.0).cast(IntDType::I8),
            scales,
        }
    }

    /// Heads, channels of a head, rows.
    pub fn dims(&self) -> [usize; 3] {
        match self {
            Self::Float(rows) => rows.dims(),
            Self::Int8 { codes, .. } => codes.dims(),
        }
    }

    /// The type of the numbers: [`DType::I8`] where they are bytes.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Float(rows) => rows.dtype(),
            Self::Int8 { codes, .. } => codes.dtype(),
        }
    }

    /// Some of the rows, without a copy.
    pub fn narrow(self, start: usize, rows: usize) -> Self {
        match self {
            Self::Float(all) => Self::Float(all.narrow(2, start, rows)),
            Self::Int8 { codes, scales } => Self::Int8 {
                codes: codes.narrow(2, start, rows),
                scales: scales.narrow(2, start, rows),
            },
        }
    }

    /// So many rows of zeros, of the same heads and type.
    pub fn zeros(&self, rows: usize) -> Self {
        let [heads, head_dim, _] = self.dims();
        match self {
            Self::Float(all) => {
                let options = (&all.device(), all.dtype());
                Self::Float(Tensor::zeros([heads, head_dim, rows], options))
            }
            Self::Int8 { scales, .. } => {
                let device = scales.device();
                Self::Int8 {
                    codes: Tensor::zeros([heads, head_dim, rows], (&device, DType::I8)),
                    scales: Tensor::zeros([heads, 1, rows], (&device, DType::F32)),
                }
            }
        }
    }

    /// These rows, and behind them others of the same heads and type.
    ///
    /// # Errors
    /// [`LayerError::Rows`] for others.
    pub fn followed_by(self, others: Self) -> Result<Self, LayerError> {
        self.check(others.dims()[2], &others, 0)?;
        Ok(match (self, others) {
            (Self::Float(rows), Self::Float(others)) => {
                Self::Float(Tensor::cat(vec![rows, others], 2))
            }
            (
                Self::Int8 { codes, scales },
                Self::Int8 {
                    codes: other_codes,
                    scales: other_scales,
                },
            ) => Self::Int8 {
                codes: Tensor::cat(vec![codes, other_codes], 2),
                scales: Tensor::cat(vec![scales, other_scales], 2),
            },
            (rows, _) => rows,
        })
    }

    /// Overwrites rows, from `start` on; see [`write_rows`](crate::write_rows).
    ///
    /// # Errors
    /// [`LayerError::Rows`] if they do not fit or are of another type.
    pub fn write(self, start: usize, rows: Self) -> Result<Self, LayerError> {
        self.check(self.dims()[2], &rows, start)?;
        Ok(match (self, rows) {
            (Self::Float(all), Self::Float(rows)) => Self::Float(write(all, start, rows)),
            (
                Self::Int8 { codes, scales },
                Self::Int8 {
                    codes: new_codes,
                    scales: new_scales,
                },
            ) => Self::Int8 {
                codes: write(codes, start, new_codes),
                scales: write(scales, start, new_scales),
            },
            (all, _) => all,
        })
    }

    /// Whether rows fit among so many of these, from `start` on.
    fn check(&self, among: usize, rows: &Self, start: usize) -> Result<(), LayerError> {
        let [heads, head_dim, _] = self.dims();
        let buffer = ([heads, head_dim, among], self.dtype());
        fits(buffer, start, (rows.dims(), rows.dtype()))
    }

    /// The numbers as floats of a type.
    ///
    /// # Shapes
    /// - returns `[heads, head_dim, rows]`
    pub fn widened(&self, dtype: DType) -> Tensor<B, 3> {
        match self {
            Self::Float(rows) => rows.clone().cast(dtype),
            Self::Int8 { codes, scales } => {
                let host = HostCached::of(self);
                match host.singles() {
                    Some(numbers) => {
                        let numbers = numbers.into_owned();
                        host::tensor(numbers, codes.dims(), dtype, &scales.device())
                    }
                    None => {
                        let codes = codes.clone().cast(FloatDType::F32);
                        (codes * scales.clone()).cast(dtype)
                    }
                }
            }
        }
    }
}

/// A share in what is in this program's memory.
pub(crate) enum HostCached {
    Float(HostTensor),
    Int8 {
        codes: HostTensor,
        scales: HostTensor,
        shape: [usize; 3],
    },
}

impl HostCached {
    pub(crate) fn of<B: Backend>(cached: &Cached<B>) -> Self {
        match cached {
            Cached::Float(rows) => Self::Float(HostTensor::of(rows)),
            Cached::Int8 { codes, scales } => Self::Int8 {
                codes: HostTensor::of(codes),
                scales: HostTensor::of(scales),
                shape: codes.dims(),
            },
        }
    }

    /// With floats side by side, as [`HostTensor::packed`].
    pub(crate) fn packed(self) -> Self {
        match self {
            Self::Float(rows) => Self::Float(rows.packed()),
            coded => coded,
        }
    }

    /// The numbers as f32 side by side, if they are within reach and packed, or codes.
    pub(crate) fn singles(&self) -> Option<Cow<'_, [f32]>> {
        match self {
            Self::Float(rows) => rows.singles(),
            Self::Int8 { shape, .. } => {
                Some(Cow::Owned(reroute_kernels::of_bytes(self.bytes()?, *shape)))
            }
        }
    }

    /// The numbers side by side, if they are within reach, packed and floats of this type.
    pub(crate) fn packed_floats<E: Number>(&self) -> Option<&[E]> {
        match self {
            Self::Float(rows) => rows.slice(),
            Self::Int8 { .. } => None,
        }
    }

    /// The codes where they lie, if they are within reach.
    fn bytes(&self) -> Option<reroute_kernels::Cached<'_, i8>> {
        let Self::Int8 { codes, scales, .. } = self else {
            return None;
        };
        let (codes, capacity) = codes.rows()?;
        let (scales, same) = scales.rows()?;
        (same == capacity).then(|| reroute_kernels::Cached::coded(codes, scales, capacity))
    }

    /// The numbers where they lie, if they are floats of this type.
    fn floats<E: Number>(&self) -> Option<reroute_kernels::Cached<'_, E>> {
        let Self::Float(rows) = self else {
            return None;
        };
        let (numbers, capacity) = rows.rows()?;
        Some(reroute_kernels::Cached::plain(numbers, capacity))
    }
}

/// Keys and values where they lie, if both are within reach and of one type.
pub(crate) fn where_they_lie<'a>(
    key: &'a HostCached,
    value: &'a HostCached,
) -> Option<reroute_kernels::Cache<'a>> {
    use reroute_kernels::Cache;
    fn both<T>(key: Option<T>, value: Option<T>) -> Option<[T; 2]> {
        Some([key?, value?])
    }
    (both(key.floats(), value.floats()).map(Cache::F32))
        .or_else(|| both(key.floats::<f16>(), value.floats()).map(Cache::F16))
        .or_else(|| both(key.floats::<bf16>(), value.floats()).map(Cache::BF16))
        .or_else(|| both(key.bytes(), value.bytes()).map(Cache::Int8))
}
