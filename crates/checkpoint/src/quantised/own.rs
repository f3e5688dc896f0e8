//! Codes in files of our own: rows as products take them from memory, so that loading is a copy.
//!
//! A weight `[out, in]` is a tensor of its name, of U8 `[out, bytes of a row]`: scales are within the rows, and
//! each row is filled up with zeros to whole words of 32 bits. A note in the header of the file says what the
//! bytes are: `codes.NAME` is `FORMAT IN`, the format as [`Format::name`] has it, and columns.
//!
//! A file needs nothing beside it to be understood. Others find a weight of another shape, which they refuse. In
//! folders, `config.json` says `quant_method: "reroute"`, too.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read};
use std::ops::Range;

use reroute_kernels::{Blocks, Format};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::rows::Decoder;
use super::{Coded, weight};
use crate::convert::BLOCK_BYTES;
use crate::shards::Shards;
use crate::{NewTensor, TensorError, TensorInfo};

/// What `config.json` calls it.
pub(super) const METHOD: &str = "reroute";
/// Bytes that a row is whole words of.
pub(crate) const WORD: usize = size_of::<i32>();

/// Rows of codes.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    pub(crate) format: Format,
    columns: usize,
    /// `[rows, bytes of a row]`
    stored: TensorInfo,
}

/// What the notes of a file that say which tensors are codes begin with.
const NOTE: &str = "codes.";

/// How a weight `[rows, columns]` in a format lies in a file, which has a [`codes_note`] of it, too; `None` if it
/// has no such rows.
pub fn coded_tensor(name: &str, format: Format, [rows, columns]: [usize; 2]) -> Option<NewTensor> {
    let row = format.row_bytes(columns).filter(|_| columns > 0)?;
    Some(NewTensor {
        name: name.to_owned(),
        dtype: Dtype::U8,
        shape: vec![rows, row.checked_next_multiple_of(WORD)?],
    })
}

/// Key and text of the note that says what the codes of a weight are.
pub fn codes_note(name: &str, format: Format, columns: usize) -> (String, String) {
    (
        format!("{NOTE}{name}"),
        format!("{} {columns}", format.name()),
    )
}

/// Says in a `config.json` that weights are in these formats, if there are any.
pub fn set_codes(config: &mut Value, mut formats: Vec<Format>) {
    formats.sort_by_key(|format| format.name());
    formats.dedup();
    let names: Vec<&str> = formats.iter().map(|format| format.name()).collect();
    if let (Value::Object(object), false) = (config, names.is_empty()) {
        let said = json!({"quant_method": METHOD, "formats": names});
        object.insert("quantization_config".to_owned(), said);
    }
}

/// Puts the weights in the place of their codes, which the notes of their file tell.
pub(crate) fn assemble(
    notes: &BTreeMap<String, String>,
    tensors: &mut [(String, TensorInfo)],
) -> Result<(), (String, TensorError)> {
    for (name, info) in tensors {
        if let Some(note) = notes.get(&format!("{NOTE}{name}")) {
            let damaged = |reason| (name.clone(), TensorError::Quantised { reason });
            *info = widened(name, info, note).map_err(damaged)?;
        }
    }
    Ok(())
}

/// The weight that codes stand for.
fn widened(name: &str, stored: &TensorInfo, note: &str) -> Result<TensorInfo, String> {
    let parts = note.split_once(' ');
    let parts = parts.and_then(|(format, columns)| Some((format, columns.parse().ok()?)));
    let Some((format, columns)) = parts else {
        return Err(format!("its note says {note:?}, not a format and columns"));
    };
    let known = Format::ALL.map(Format::name).join(", ");
    let format = Format::named(format)
        .ok_or_else(|| format!("{format} is no format that this version knows ({known})"))?;
    let rows = stored.shape.first().copied().unwrap_or(0);
    let expected = coded_tensor(name, format, [rows, columns])
        .ok_or_else(|| format!("rows of {columns} are no blocks of {}", format.name()))?;
    if (stored.dtype, &stored.shape) != (expected.dtype, &expected.shape) {
        return Err(format!(
            "it is {:?} {:?}, but rows of {columns} in {} make it {:?} {:?}",
            stored.dtype,
            stored.shape,
            format.name(),
            expected.dtype,
            expected.shape
        ));
    }
    let codes = Rows {
        format,
        columns,
        stored: stored.clone(),
    };
    weight([rows, columns], stored.shard, Coded::Rows(codes))
}

impl TensorInfo {
    /// Whether the file has it in codes as [`coded_tensor`] lays them out.
    pub fn is_in_own_codes(&self) -> bool {
        matches!(self.coded.as_deref(), Some(Coded::Rows(_)))
    }
}

impl Rows {
    /// Fills words with some rows.
    pub(crate) fn read(
        &self,
        shards: &Shards,
        shard: usize,
        rows: Range<usize>,
        words: &mut [i32],
    ) -> Result<(), TensorError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(words);
        self.open_stored(shards, shard, rows)?.read_exact(bytes)?;
        let mut rows = bytes.chunks_exact(self.stored.shape[1]);
        match rows.all(|row| self.format.is_finite(row)) {
            true => Ok(()),
            false => Err(not_finite()),
        }
    }

    fn open_stored(
        &self,
        shards: &Shards,
        shard: usize,
        rows: Range<usize>,
    ) -> io::Result<Box<dyn Read>> {
        let mut stored = self.stored.rows(rows);
        stored.shard = shard;
        shards.stored(&stored)
    }

    /// From this row on.
    pub(super) fn open(
        &self,
        shards: &Shards,
        shard: usize,
        first: usize,
    ) -> Result<impl Decoder + use<>, TensorError> {
        let rows = self.open_stored(shards, shard, first..self.stored.shape[0])?;
        Ok(Widened {
            reader: BufReader::with_capacity(BLOCK_BYTES, rows),
            format: self.format,
            columns: self.columns,
            row: vec![0; self.stored.shape[1]],
        })
    }
}

/// A scale is no number.
pub(crate) fn not_finite() -> TensorError {
    TensorError::Quantised {
        reason: "a scale of it is NaN or infinite".into(),
    }
}

struct Widened<R> {
    reader: R,
    format: Format,
    columns: usize,
    row: Vec<u8>,
}

impl<R: Read> Decoder for Widened<R> {
    fn columns(&self) -> usize {
        self.columns
    }

    fn next(&mut self, row: &mut [f32]) -> io::Result<()> {
        self.reader.read_exact(&mut self.row)?;
        if !self.format.is_finite(&self.row) {
            return Err(io::Error::other(not_finite()));
        }
        if let Some(codes) = Blocks::new(self.format, self.columns, self.row.len(), &self.row) {
            codes.widen(0, row);
        }
        Ok(())
    }
}
