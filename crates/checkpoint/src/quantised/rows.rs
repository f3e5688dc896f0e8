use std::io::{self, Read};

use super::Coded;
use crate::shards::Shards;
use crate::{TensorError, TensorInfo};

/// A weight, row after row.
pub(super) trait Decoder {
    /// Numbers in a row.
    fn columns(&self) -> usize;

    /// The next row.
    fn next(&mut self, row: &mut [f32]) -> io::Result<()>;
}

/// The bytes of a weight as if it were stored in f32.
pub(crate) struct Rows<'a> {
    decoder: Box<dyn Decoder + 'a>,
    row: Vec<f32>,
    bytes: Vec<u8>,
    /// Bytes of the row that are delivered.
    at: usize,
    /// Bytes that are left.
    left: u64,
}

impl<'a> Rows<'a> {
    /// Stands at the first byte of `info`, which may be a part of the weight.
    pub(crate) fn open(
        shards: &'a Shards,
        info: &TensorInfo,
        coded: &Coded,
    ) -> Result<Rows<'a>, TensorError> {
        let columns = info.shape.last().copied().unwrap_or(1);
        let row_bytes = (columns as u64 * 4).max(1);
        let first = info.offset / row_bytes;
        let decoder: Box<dyn Decoder> = match coded {
            Coded::Grid(grid) => Box::new(grid.open(shards, first as usize)?),
            Coded::Columns(columns) => Box::new(columns.open(shards, first as usize)?),
            Coded::Blocks(blocks) => Box::new(blocks.open(shards, info.shard, first as usize)?),
        };
        let mut rows = Self {
            row: vec![0.0; decoder.columns()],
            decoder,
            bytes: Vec::new(),
            at: 0,
            left: info.bytes,
        };
        let skipped = info.offset % row_bytes;
        if skipped > 0 {
            rows.advance()?;
            rows.at = skipped as usize;
        }
        Ok(rows)
    }

    fn advance(&mut self) -> io::Result<()> {
        self.decoder.next(&mut self.row)?;
        self.bytes.clear();
        let bytes = self.row.iter().flat_map(|number| number.to_le_bytes());
        self.bytes.extend(bytes);
        self.at = 0;
        Ok(())
    }
}

impl Read for Rows<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || into.is_empty() {
            return Ok(0);
        }
        if self.at == self.bytes.len() {
            self.advance()?;
        }
        let ready = &self.bytes[self.at..];
        let count = ready.len().min(into.len());
        let count = count.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        into[..count].copy_from_slice(&ready[..count]);
        self.at += count;
        self.left -= count as u64;
        Ok(count)
    }
}
