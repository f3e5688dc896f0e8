//! A tensor that is made of others whose rows stand in another order, read row by row.

use std::io::{self, Read};

use half::{bf16, f16};
use safetensors::Dtype;

use crate::pieces::Pieces;
use crate::quantised::Coded;
use crate::shards::Shards;
use crate::{TensorError, TensorInfo};

/// Tensors, and where their rows go. Rows are of equal length, and there is a part.
#[derive(Debug, Clone)]
pub(crate) struct Arranged {
    pub(crate) parts: Vec<TensorInfo>,
    order: Order,
    /// Rows that belong together: those of one part at a time, or one of each.
    group: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Part below part.
    Stacked,
    /// A row of each part in turn.
    Alternating,
    /// Of every group, the even rows and then the odd ones.
    EvenThenOdd,
}

impl Arranged {
    /// Part below part: `[rows, …]` each.
    pub(crate) fn stacked(parts: Vec<TensorInfo>) -> Result<TensorInfo, String> {
        let mut shape = common_tail(&parts)?;
        let rows = parts.iter().map(|part| part.shape.first().copied());
        let rows = rows.sum::<Option<usize>>().ok_or("has no rows")?;
        shape.insert(0, rows);
        let order = Order::Stacked;
        Self::tensor(parts, order, 1, shape)
    }

    /// A new axis before the last `inner`, along which the parts lie, of equal shape each.
    pub(crate) fn alternating(
        mut parts: Vec<TensorInfo>,
        inner: usize,
    ) -> Result<TensorInfo, String> {
        let first = parts.first().map(|part| part.shape.clone());
        let mut shape = first.ok_or("has no parts")?;
        let outer = shape.len().checked_sub(inner);
        let outer = outer.ok_or("has fewer axes than it must have")?;
        if parts.iter().any(|part| part.shape != shape) {
            return Err("is made of parts of different shapes".into());
        }
        if parts.iter().any(|part| part.coded.is_some()) {
            return Err("is quantised, which such a tensor never is".into());
        }
        let rows = shape[..outer].iter().product();
        let columns = shape[outer..].iter().product();
        for part in &mut parts {
            part.shape = vec![rows, columns];
        }
        shape.insert(outer, parts.len());
        let group = parts.len();
        Self::tensor(parts, Order::Alternating, group, shape)
    }

    /// Of every `group` rows, the even ones and then the odd ones.
    pub(crate) fn even_then_odd(part: TensorInfo, group: usize) -> Result<TensorInfo, String> {
        let shape = part.shape.clone();
        let rows = shape.first().copied().unwrap_or(0);
        if rows == 0 || group == 0 || group % 2 == 1 || rows % group > 0 {
            return Err(format!("has {rows} rows, no heads of {group}"));
        }
        Self::tensor(vec![part], Order::EvenThenOdd, group, shape)
    }

    fn tensor(
        parts: Vec<TensorInfo>,
        order: Order,
        group: usize,
        shape: Vec<usize>,
    ) -> Result<TensorInfo, String> {
        let first = parts.first().ok_or("has no parts")?;
        let (shard, one) = (first.shard, first.dtype);
        let dtype = match parts.iter().all(|part| part.dtype == one) {
            true => one,
            false => Dtype::F32,
        };
        let elements = shape
            .iter()
            .try_fold(1_u64, |all, &side| all.checked_mul(side as u64));
        let bytes = elements.and_then(|elements| elements.checked_mul(dtype.bitsize() as u64 / 8));
        Ok(TensorInfo {
            dtype,
            bytes: bytes.ok_or("is larger than any file")?,
            shape,
            shard,
            offset: 0,
            coded: Some(Box::new(Coded::Arranged(Self {
                parts,
                order,
                group,
            }))),
        })
    }

    /// The parts, and where each of their rows goes.
    pub(crate) fn rows(&self) -> Option<Vec<(&TensorInfo, Vec<usize>)>> {
        let mut start = 0;
        let parts = self.parts.iter().map(|part| {
            let rows = *part.shape.first()?;
            let place = |row: usize| match self.order {
                Order::Stacked => Some(start + row),
                Order::EvenThenOdd => {
                    let (group, within) = (row / self.group, row % self.group);
                    let half = within % 2 * (self.group / 2);
                    Some(group * self.group + half + within / 2)
                }
                Order::Alternating => None,
            };
            let places = (0..rows).map(place).collect::<Option<Vec<_>>>()?;
            start += rows;
            Some((part, places))
        });
        parts.collect()
    }

    /// Delivers the bytes of `info`, which may be a part of the whole.
    pub(crate) fn open<'a>(
        &self,
        shards: &'a Shards,
        info: &TensorInfo,
    ) -> Result<Box<dyn Read + 'a>, TensorError> {
        let rows = |part: &TensorInfo| part.shape.first().copied().unwrap_or(0).max(1);
        let first = self
            .parts
            .first()
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let columns = first.shape[1..].iter().product::<usize>();
        let row_bytes = (columns * info.dtype.bitsize() / 8).max(1);
        let group_bytes = (row_bytes * self.group) as u64;
        // Groups before the first that is read.
        let mut skipped = usize::try_from(info.offset / group_bytes).unwrap_or(usize::MAX);
        let mut streams = Vec::new();
        for part in &self.parts {
            let rows = rows(part);
            let from = match self.order {
                Order::Alternating => skipped.min(rows),
                Order::EvenThenOdd => skipped.saturating_mul(self.group).min(rows),
                Order::Stacked => {
                    let from = skipped.min(rows);
                    skipped -= from;
                    from
                }
            };
            streams.push(Stream {
                reader: shards.reader(&part.rows(from..rows))?,
                dtype: part.dtype,
                rows: rows - from,
            });
        }
        let (arranged, form) = ((self.order, self.group), (columns, info.dtype));
        let next = move |bytes: &mut Vec<u8>| advance(&mut streams, arranged, form, bytes);
        let within = (info.offset % group_bytes) as usize;
        Ok(Box::new(Pieces::new(next, within, info.bytes)?))
    }
}

/// The axes behind the first, which all have in common.
fn common_tail(parts: &[TensorInfo]) -> Result<Vec<usize>, String> {
    let tail = |part: &TensorInfo| part.shape.get(1..).map(<[usize]>::to_vec);
    let first = parts.first().and_then(tail).ok_or("has no rows")?;
    match parts.iter().all(|part| tail(part).as_ref() == Some(&first)) {
        true => Ok(first),
        false => Err("is made of parts whose rows differ in length".into()),
    }
}

/// The rows of a part that are left.
struct Stream<'a> {
    reader: Box<dyn Read + 'a>,
    dtype: Dtype,
    rows: usize,
}

impl Stream<'_> {
    /// Appends a row to `bytes` as elements of `dtype`.
    fn row(&mut self, columns: usize, dtype: Dtype, bytes: &mut Vec<u8>) -> io::Result<()> {
        let start = bytes.len();
        bytes.resize(start + columns * self.dtype.bitsize() / 8, 0);
        self.reader.read_exact(&mut bytes[start..])?;
        self.rows = self.rows.saturating_sub(1);
        if dtype != self.dtype {
            let narrow = bytes.split_off(start);
            let halves = narrow.as_chunks::<2>().0.iter();
            let numbers = halves.map(|&raw| match self.dtype {
                Dtype::F16 => f16::from_le_bytes(raw).to_f32(),
                _ => bf16::from_le_bytes(raw).to_f32(),
            });
            bytes.extend(numbers.flat_map(f32::to_le_bytes));
        }
        Ok(())
    }
}

/// Appends the bytes of the next group.
fn advance(
    streams: &mut [Stream<'_>],
    arranged: (Order, usize),
    (columns, dtype): (usize, Dtype),
    bytes: &mut Vec<u8>,
) -> io::Result<()> {
    let (order, group) = arranged;
    match order {
        Order::Alternating => {
            for stream in streams {
                stream.row(columns, dtype, bytes)?;
            }
        }
        Order::Stacked => {
            let stream = streams.iter_mut().find(|stream| stream.rows > 0);
            let stream = stream.ok_or(io::ErrorKind::UnexpectedEof)?;
            stream.row(columns, dtype, bytes)?;
        }
        Order::EvenThenOdd => {
            let stream = streams.first_mut().ok_or(io::ErrorKind::UnexpectedEof)?;
            let mut odd = Vec::new();
            for row in 0..group {
                let half = if row % 2 == 0 { &mut *bytes } else { &mut odd };
                stream.row(columns, dtype, half)?;
            }
            bytes.append(&mut odd);
        }
    }
    Ok(())
}
