use std::io::{self, Read};

use super::Coded;
use crate::pieces::Pieces;
use crate::shards::Shards;
use crate::{TensorError, TensorInfo};

/// A weight, row after row.
pub(super) trait Decoder {
    /// Numbers in a row.
    fn columns(&self) -> usize;

    /// The next row.
    fn next(&mut self, row: &mut [f32]) -> io::Result<()>;
}

impl Coded {
    /// The bytes of a weight as if it were stored in the type that `info` says, which may be a part of it.
    pub(crate) fn open<'a>(
        &self,
        shards: &'a Shards,
        info: &TensorInfo,
    ) -> Result<Box<dyn Read + 'a>, TensorError> {
        let columns = info.shape.last().copied().unwrap_or(1);
        let row_bytes = (columns as u64 * 4).max(1);
        let first = (info.offset / row_bytes) as usize;
        let mut decoder: Box<dyn Decoder + 'a> = match self {
            Self::Arranged(arranged) => return arranged.open(shards, info),
            Self::Grid(grid) => Box::new(grid.open(shards, first)?),
            Self::Columns(columns) => Box::new(columns.open(shards, first)?),
            Self::Blocks(blocks) => Box::new(blocks.open(shards, info.shard, first)?),
            Self::Rows(rows) => Box::new(rows.open(shards, info.shard, first)?),
        };
        let mut row = vec![0.0; decoder.columns()];
        let next = move |bytes: &mut Vec<u8>| {
            decoder.next(&mut row)?;
            bytes.extend(row.iter().flat_map(|number| number.to_le_bytes()));
            Ok(())
        };
        let skipped = (info.offset % row_bytes) as usize;
        Ok(Box::new(Pieces::new(next, skipped, info.bytes)?))
    }
}
