//! Weights that become codes of fewer bits on their way from file to file.

use std::collections::BTreeSet;

use reroute_checkpoint::{CodeFormat, Dtype, NameTable, Narrow};
use reroute_kernels::Blocks;

/// Which weights become codes.
#[derive(Debug, Clone)]
pub struct Codes {
    /// The format, [`CodeFormat::Int8`] or [`CodeFormat::Int4`].
    pub format: CodeFormat,
    /// What checkpoints of the family call parameters.
    pub names: &'static NameTable,
    /// Paths of the parameters that become codes; all others stay what they are.
    pub paths: BTreeSet<String>,
}

impl Codes {
    /// The format that a tensor gets, by its name.
    pub(crate) fn of(&self, name: &str) -> Option<CodeFormat> {
        let path = self.names.module_path(name)?;
        self.paths.contains(&path).then_some(self.format)
    }
}

/// Makes rows of codes of the bytes of a matrix.
pub(crate) struct Coder {
    narrow: Narrow,
    format: CodeFormat,
    columns: usize,
    /// What is no whole row yet.
    begun: Vec<f32>,
    /// What the codes of a block stand for.
    decoded: Vec<f32>,
    buffer: Vec<u8>,
    /// Sums of squares: of what the numbers are off by, and of the numbers.
    squares: [f64; 2],
}

impl Coder {
    pub(crate) fn new(from: Dtype, format: CodeFormat, columns: usize) -> Self {
        Self {
            narrow: Narrow::new(from, Dtype::F32),
            format,
            columns,
            begun: Vec::new(),
            decoded: Vec::new(),
            buffer: Vec::new(),
            squares: [0.0; 2],
        }
    }

    pub(crate) fn format(&self) -> CodeFormat {
        self.format
    }

    /// Finite values beyond the range of f32, which became its largest.
    pub(crate) fn overflows(&self) -> u64 {
        self.narrow.overflows
    }

    /// The rows that are whole with a further block of elements; `None` if the format has no codes for one.
    pub(crate) fn block(&mut self, block: &[u8]) -> Option<Vec<u8>> {
        let numbers = self.narrow.block(block, &mut self.buffer).as_chunks().0;
        self.begun
            .extend(numbers.iter().map(|&number| f32::from_le_bytes(number)));
        let whole = self.begun.len() / self.columns.max(1) * self.columns;
        let codes = self
            .format
            .quantise_rows(&self.begun[..whole], self.columns)?;
        let row_bytes = self.format.row_bytes(self.columns)?;
        self.decoded.resize(whole, 0.0);
        Blocks::new(self.format, self.columns, row_bytes, &codes)?.widen_all(&mut self.decoded);
        for (number, decoded) in self.begun.drain(..whole).zip(&self.decoded) {
            self.squares[0] += f64::from(number - decoded).powi(2);
            self.squares[1] += f64::from(number).powi(2);
        }
        Some(codes)
    }

    /// The root of the mean square of what the numbers are off by, as a share of theirs.
    pub(crate) fn error(&self) -> f64 {
        match self.squares {
            [_, 0.0] => 0.0,
            [off, all] => (off / all).sqrt(),
        }
    }
}
