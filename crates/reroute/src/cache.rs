use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// Rows that a layer's cache grows by when it is full.
const GROWTH: usize = 128;

/// Keys and values of every layer and sample. Each layer has a length of its own: it holds exactly
/// the rows that the layer processed.
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    /// `[layers][samples]`
    layers: Vec<Vec<Entry<B>>>,
    /// Position of each sample's next token: that of the full prompt, whatever was deferred.
    next_position: Vec<i64>,
}

/// One sample's keys and values in one layer.
#[derive(Debug, Clone)]
struct Entry<B: Backend> {
    /// `[kv_heads, head_dim, capacity]`
    keys: Tensor<B, 3>,
    /// `[kv_heads, head_dim, capacity]`
    values: Tensor<B, 3>,
    /// Rows in use.
    length: usize,
}

impl<B: Backend> KvCache<B> {
    pub(crate) fn new(num_layers: usize, next_position: Vec<i64>) -> Self {
        Self {
            layers: Vec::with_capacity(num_layers),
            next_position,
        }
    }

    /// Adds the next layer with one entry of keys and values per sample.
    ///
    /// # Shapes
    /// - each entry: `[kv_heads, head_dim, rows]`, twice
    pub(crate) fn push_layer(&mut self, samples: Vec<(Tensor<B, 3>, Tensor<B, 3>)>) {
        let entry = |(keys, values): (Tensor<B, 3>, Tensor<B, 3>)| Entry {
            length: keys.dims()[2],
            keys,
            values,
        };
        self.layers.push(samples.into_iter().map(entry).collect());
    }

    /// Appends one row to a sample's entry in a layer and returns all its keys and values.
    ///
    /// # Shapes
    /// - `keys`, `values`: `[kv_heads, head_dim, 1]`
    /// - returns `[kv_heads, head_dim, length]`, twice
    pub(crate) fn append(
        &mut self,
        layer: usize,
        sample: usize,
        keys: Tensor<B, 3>,
        values: Tensor<B, 3>,
    ) -> (Tensor<B, 3>, Tensor<B, 3>) {
        let entry = &mut self.layers[layer][sample];
        let row = entry.length;
        entry.length += 1;
        // `replace_with` hands the buffer over, so that backends can write in place.
        replace_with(&mut entry.keys, |all| write(all, row, keys));
        replace_with(&mut entry.values, |all| write(all, row, values));
        (
            entry.keys.clone().narrow(2, 0, entry.length),
            entry.values.clone().narrow(2, 0, entry.length),
        )
    }

    /// The position of a sample's next token, which it takes.
    pub(crate) fn take_position(&mut self, sample: usize) -> i64 {
        let position = self.next_position[sample];
        self.next_position[sample] += 1;
        position
    }

    /// The position that a sample's next token will have.
    pub fn next_position(&self, sample: usize) -> i64 {
        self.next_position[sample]
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.next_position.len()
    }

    /// Rows held per layer for one sample.
    pub fn lengths(&self, sample: usize) -> Vec<usize> {
        self.layers
            .iter()
            .map(|layer| layer[sample].length)
            .collect()
    }

    /// Bytes of the rows in use, per layer, for one sample.
    pub fn bytes(&self, sample: usize) -> Vec<u64> {
        let bytes = |entry: &Entry<B>| {
            let [kv_heads, head_dim, _] = entry.keys.dims();
            (2 * kv_heads * head_dim * entry.length * entry.keys.dtype().size()) as u64
        };
        self.layers
            .iter()
            .map(|layer| bytes(&layer[sample]))
            .collect()
    }
}

/// Writes one row, growing the buffer when it is full.
fn write<B: Backend>(all: Tensor<B, 3>, row: usize, new: Tensor<B, 3>) -> Tensor<B, 3> {
    let [kv_heads, head_dim, capacity] = all.dims();
    let all = if row == capacity {
        let options = (&all.device(), all.dtype());
        let spare = Tensor::zeros([kv_heads, head_dim, GROWTH], options);
        Tensor::cat(vec![all, spare], 2)
    } else {
        all
    };
    all.slice_assign([0..kv_heads, 0..head_dim, row..row + 1], new)
}

fn replace_with<B: Backend>(
    slot: &mut Tensor<B, 3>,
    change: impl FnOnce(Tensor<B, 3>) -> Tensor<B, 3>,
) {
    let device = slot.device();
    let taken = std::mem::replace(slot, Tensor::empty([0, 0, 0], &device));
    *slot = change(taken);
}
