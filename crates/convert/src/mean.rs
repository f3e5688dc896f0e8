//! Rows that a source does not store: the mean of those that it does.

use reroute_checkpoint::{Dtype, Narrow};

/// The mean of all rows of a matrix, computed while it passes by in blocks of whole elements.
#[derive(Debug)]
pub(crate) struct MeanRow {
    dtype: Dtype,
    widen: Narrow,
    sums: Vec<f64>,
    elements: usize,
}

impl MeanRow {
    /// `columns` must not be 0.
    pub(crate) fn new(dtype: Dtype, columns: usize) -> Self {
        Self {
            dtype,
            widen: Narrow::new(dtype, Dtype::F32),
            sums: vec![0.0; columns],
            elements: 0,
        }
    }

    pub(crate) fn add(&mut self, block: &[u8]) {
        let columns = self.sums.len();
        let mut buffer = Vec::new();
        for raw in self.widen.block(block, &mut buffer).as_chunks().0 {
            self.sums[self.elements % columns] += f64::from(f32::from_le_bytes(*raw));
            self.elements += 1;
        }
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
