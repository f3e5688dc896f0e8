//! Weights that stay in fewer bits in memory: as a file has them, or made while they are read.

use std::io::{self, Read};
use std::ops::Range;

use burn::tensor::DType;
use reroute_kernels::Format;

use crate::convert::BLOCK_BYTES;
use crate::quantised::own::{self, WORD};
use crate::quantised::{Blocks, Coded};
use crate::{CheckpointError, Shards, TensorError, TensorInfo};

/// Rows of a weight in a format of fewer bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCodes {
    /// The format.
    pub format: Format,
    /// Numbers of a row.
    pub columns: usize,
    /// Rows, each filled up to whole words of 32 bits.
    pub words: Vec<i32>,
}

impl StoredCodes {
    /// The words in memory's own order.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }
}

/// Most numbers that are read at a time to be quantised (16 MiB), or a row.
const READ: usize = 4 << 20;

impl TensorInfo {
    /// The format in which the file has it, if products take it as it is.
    pub fn code_format(&self) -> Option<Format> {
        match self.coded.as_deref()? {
            Coded::Arranged(arranged) => {
                let parts = arranged.rows()?;
                let mut formats = parts.iter().map(|(part, _)| match part.coded.as_deref() {
                    Some(Coded::Blocks(blocks)) => blocks.format(),
                    _ => None,
                });
                let first = formats.next()??;
                formats.all(|format| format == Some(first)).then_some(first)
            }
            coded => coded.format(),
        }
    }
}

impl Shards {
    /// [`TensorInfo::code_format`] of a tensor.
    pub fn code_format(&self, name: &str) -> Option<Format> {
        self.info(name)?.code_format()
    }

    /// Some rows of a tensor in the format in which the file has them; `None` if that is none which products
    /// take as it is.
    pub fn stored_codes(
        &self,
        name: &str,
        rows: Range<usize>,
    ) -> Result<Option<StoredCodes>, CheckpointError> {
        let info = self.tensor(name)?;
        let Some(format) = info.code_format() else {
            return Ok(None);
        };
        let Some((columns, row_words)) = row_of(info, format) else {
            return Ok(None);
        };
        let mut words = vec![0; rows.len() * row_words];
        let read = self.read_codes(info, rows, (format, row_words), &mut words);
        read.map_err(|source| self.failure(name, source))?;
        Ok(Some(StoredCodes {
            format,
            columns,
            words,
        }))
    }

    /// Some rows of a tensor in this format: as the file has them, or made of its numbers block by block.
    ///
    /// # Errors
    /// [`TensorError::NotQuantised`] for numbers that the format has no codes for.
    pub fn codes_as(
        &self,
        name: &str,
        rows: Range<usize>,
        format: Format,
    ) -> Result<Option<StoredCodes>, CheckpointError> {
        if self.code_format(name) == Some(format) {
            return self.stored_codes(name, rows);
        }
        let Some((columns, row_words)) = row_of(self.tensor(name)?, format) else {
            return Ok(None);
        };
        let mut words = vec![0; rows.len() * row_words];
        let mut places = words.chunks_exact_mut(row_words);
        let height = (READ / columns).max(1);
        for start in rows.clone().step_by(height) {
            let end = rows.end.min(start + height);
            let data = self.read_rows(name, start..end, DType::F32)?;
            let numbers: &[f32] = data.as_slice().unwrap_or_default();
            let coded = format.quantise_rows(numbers, columns);
            let coded = coded.ok_or_else(|| {
                self.failure(
                    name,
                    TensorError::NotQuantised {
                        format: format.name(),
                    },
                )
            })?;
            for (row, place) in coded.chunks(coded.len() / (end - start)).zip(&mut places) {
                put(row, place);
            }
        }
        Ok(Some(StoredCodes {
            format,
            columns,
            words,
        }))
    }

    fn tensor(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        self.find(name).map(|(info, _)| info)
    }

    /// What went wrong with a tensor.
    pub(crate) fn failure(&self, name: &str, source: TensorError) -> CheckpointError {
        match self.find(name) {
            Ok((_, shard)) => shard.error(name, source),
            Err(error) => error,
        }
    }

    fn read_codes(
        &self,
        info: &TensorInfo,
        rows: Range<usize>,
        (format, row_words): (Format, usize),
        words: &mut [i32],
    ) -> Result<(), TensorError> {
        let mut places = words.chunks_exact_mut(row_words);
        let mut next = |row: &[u8]| {
            if let Some(place) = places.next() {
                put(row, place);
            }
        };
        match info.coded.as_deref() {
            Some(Coded::Rows(codes)) => codes.read(self, info.shard, rows, words),
            Some(Coded::Grid(grid)) => grid.int8_rows(self, rows, next),
            Some(Coded::Blocks(blocks)) => {
                self.raw_rows((blocks, format), info.shard, rows, &mut next)
            }
            Some(Coded::Arranged(arranged)) => {
                for (part, places) in arranged.rows().unwrap_or_default() {
                    let Some(Coded::Blocks(blocks)) = part.coded.as_deref() else {
                        continue;
                    };
                    let mut places = places.into_iter();
                    let all = 0..part.shape[0];
                    self.raw_rows((blocks, format), part.shard, all, &mut |row| {
                        let place = places.next().and_then(|at| at.checked_sub(rows.start));
                        let place = place.filter(|at| *at < rows.len());
                        let Some(place) = place else { return };
                        put(row, &mut words[place * row_words..][..row_words]);
                    })?;
                }
                Ok(())
            }
            Some(Coded::Columns(_)) | None => Ok(()),
        }
    }

    /// Hands on the bytes of every row.
    fn raw_rows(
        &self,
        (blocks, format): (&Blocks, Format),
        shard: usize,
        rows: Range<usize>,
        each: &mut dyn FnMut(&[u8]),
    ) -> Result<(), TensorError> {
        let mut stored = blocks.stored().rows(rows.clone());
        stored.shard = shard;
        let mut reader = io::BufReader::with_capacity(BLOCK_BYTES, self.stored(&stored)?);
        let mut row = vec![0; blocks.stored().shape[1]];
        for _ in rows {
            reader.read_exact(&mut row)?;
            if !format.is_finite(&row) {
                return Err(own::not_finite());
            }
            each(&row);
        }
        Ok(())
    }
}

/// Columns of a matrix, and words of a row of it in a format; `None` if it has no such rows.
fn row_of(info: &TensorInfo, format: Format) -> Option<(usize, usize)> {
    let &[_, columns] = &info.shape[..] else {
        return None;
    };
    let bytes = format.row_bytes(columns).filter(|_| columns > 0)?;
    Some((columns, bytes.div_ceil(WORD)))
}

/// Bytes as words, in memory's own order; what is left of the words stays.
fn put(bytes: &[u8], words: &mut [i32]) {
    for (word, bytes) in words.iter_mut().zip(bytes.chunks(WORD)) {
        let mut whole = [0; WORD];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = i32::from_ne_bytes(whole);
    }
}
