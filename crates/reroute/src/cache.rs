use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reroute_layers::write_rows;

use crate::pool::Pool;

/// Rows that a layer's cache grows by when it is full.
const GROWTH: usize = 128;

/// Keys and values of every layer and sample. Each layer has a length of its own: it holds exactly
/// the rows that the layer processed.
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    /// `[layers][samples]`
    layers: Vec<Vec<Entry<B>>>,
    /// Rows of each sample so far: prompt and generated tokens, deferred ones included.
    rows: Vec<usize>,
    /// Position of each sample's next token: that of the full prompt, whatever was deferred.
    next_position: Vec<i64>,
    /// By how much the next position is lower in a layer, `[layers][samples]`: rows that a schedule
    /// removed and whose positions it gave away.
    lowered: Vec<Vec<i64>>,
    /// What a later turn chooses from, if it was asked for.
    pub(crate) pool: Option<Pool<B>>,
}

/// One sample's keys and values in one layer.
#[derive(Debug, Clone)]
struct Entry<B: Backend> {
    /// Keys and values, `[kv_heads, head_dim, capacity]` each; `None` before the first row.
    buffers: Option<[Tensor<B, 3>; 2]>,
    /// The rows in use, ascending, numbered within the sample.
    rows: Vec<usize>,
}

impl<B: Backend> KvCache<B> {
    /// An empty cache.
    pub fn new(layers: usize, samples: usize) -> Self {
        let entry = Entry {
            buffers: None,
            rows: Vec::new(),
        };
        Self {
            layers: vec![vec![entry; samples]; layers],
            rows: vec![0; samples],
            next_position: vec![0; samples],
            lowered: vec![vec![0; samples]; layers],
            pool: None,
        }
    }

    /// Appends rows to a sample's entry in a layer and returns all its keys and values.
    ///
    /// # Shapes
    /// - `keys`, `values`: `[kv_heads, head_dim, rows]`
    /// - returns `[kv_heads, head_dim, length]`, twice
    pub(crate) fn append(
        &mut self,
        layer: usize,
        sample: usize,
        rows: impl IntoIterator<Item = usize>,
        keys: Tensor<B, 3>,
        values: Tensor<B, 3>,
    ) -> [Tensor<B, 3>; 2] {
        let entry = &mut self.layers[layer][sample];
        let used = entry.rows.len();
        entry.rows.extend(rows);
        // Taking the buffers hands them over, so that backends can write in place.
        let buffers = match entry.buffers.take() {
            Some([all_keys, all_values]) => {
                [write(all_keys, used, keys), write(all_values, used, values)]
            }
            None => [keys, values],
        };
        entry.buffers = Some(buffers.clone());
        buffers.map(|all| in_use(all, entry.rows.len()))
    }

    /// The keys of one sample in one layer, `[kv_heads, head_dim, length]`; `None` if there are none.
    pub(crate) fn keys(&self, layer: usize, sample: usize) -> Option<Tensor<B, 3>> {
        let entry = &self.layers[layer][sample];
        let [keys, _] = entry.buffers.as_ref()?;
        (!entry.rows.is_empty()).then(|| in_use(keys.clone(), entry.rows.len()))
    }

    /// Says which row and which position come next in a sample.
    pub(crate) fn continue_at(&mut self, sample: usize, row: usize, position: i64) {
        self.rows[sample] = row;
        self.next_position[sample] = position;
    }

    /// Lowers the positions of a sample's next tokens in a layer.
    pub(crate) fn lower(&mut self, layer: usize, sample: usize, by: i64) {
        self.lowered[layer][sample] = by;
    }

    /// By how much positions of the samples are lower in a layer.
    pub(crate) fn lowered(&self, layer: usize, samples: impl Iterator<Item = usize>) -> Vec<i64> {
        samples.map(|sample| self.lowered[layer][sample]).collect()
    }

    /// The row and the position of a sample's next token, which it takes.
    pub(crate) fn take_next(&mut self, sample: usize) -> (usize, i64) {
        let next = (self.rows[sample], self.next_position[sample]);
        self.rows[sample] += 1;
        self.next_position[sample] += 1;
        next
    }

    /// Forgets the rows of a sample from `row` on, as when the text after it has changed.
    ///
    /// The next thing to do with the cache is [`Decoder::resume`](crate::Decoder::resume), whose
    /// prompt says where positions go on.
    pub fn truncate(&mut self, sample: usize, row: usize) {
        for layer in 0..self.layers.len() {
            self.truncate_layer(layer, sample, row);
        }
        self.rows[sample] = self.rows[sample].min(row);
    }

    pub(crate) fn truncate_layer(&mut self, layer: usize, sample: usize, row: usize) {
        let rows = &mut self.layers[layer][sample].rows;
        rows.truncate(rows.partition_point(|&held| held < row));
    }

    /// The position that a sample's next token will have.
    pub fn next_position(&self, sample: usize) -> i64 {
        self.next_position[sample]
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.rows.len()
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Rows of a sample so far: those of the prompt and of generated tokens, deferred ones included.
    pub fn rows(&self, sample: usize) -> usize {
        self.rows[sample]
    }

    /// Rows held per layer for one sample.
    pub fn lengths(&self, sample: usize) -> Vec<usize> {
        let length = |layer: &Vec<Entry<B>>| layer[sample].rows.len();
        self.layers.iter().map(length).collect()
    }

    /// Bytes of the rows in use, per layer, for one sample.
    pub fn bytes(&self, sample: usize) -> Vec<u64> {
        let bytes = |layer: &Vec<Entry<B>>| {
            let entry = &layer[sample];
            let row = entry.buffers.iter().flatten().map(|buffer| {
                let [kv_heads, head_dim, _] = buffer.dims();
                kv_heads * head_dim * buffer.dtype().size()
            });
            (row.sum::<usize>() * entry.rows.len()) as u64
        };
        self.layers.iter().map(bytes).collect()
    }
}

/// The rows of a buffer that are in use.
fn in_use<B: Backend>(all: Tensor<B, 3>, rows: usize) -> Tensor<B, 3> {
    match all.dims()[2] == rows {
        true => all,
        false => all.narrow(2, 0, rows),
    }
}

/// Writes rows at `start`, growing the buffer when it is full.
fn write<B: Backend>(all: Tensor<B, 3>, start: usize, new: Tensor<B, 3>) -> Tensor<B, 3> {
    let [kv_heads, head_dim, capacity] = all.dims();
    let end = start + new.dims()[2];
    let all = if end > capacity {
        let options = (&all.device(), all.dtype());
        let spare = Tensor::zeros([kv_heads, head_dim, end - capacity + GROWTH], options);
        Tensor::cat(vec![all, spare], 2)
    } else {
        all
    };
    write_rows(all, start, new)
}
