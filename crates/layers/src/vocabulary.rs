use burn::module::{Initializer, Module};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::{LayerError, Weight, indices};

/// Bytes that every WebGPU device can bind as one buffer
/// (`maxStorageBufferBindingSize`, <https://www.w3.org/TR/webgpu/#limits>).
const MAX_BLOCK_BYTES: usize = 128 << 20;

/// The table of a vocabulary, one vector per token: turns ids into embeddings, or hidden states into
/// logits, or both where the two are tied.
///
/// The table of a large vocabulary (152064 × 3584: 2.2 GB in f32) is larger than what many devices
/// can bind at once, so it is kept in blocks of tokens.
#[derive(Module, Debug)]
pub struct Vocabulary<B: Backend> {
    /// Blocks `[tokens, features]`, one below the other; only the last may be lower than the first.
    pub weight: Vec<Weight<B>>,
}

/// Sizes of a [`Vocabulary`].
#[derive(Debug, Clone, Copy)]
pub struct VocabularyConfig {
    /// Number of tokens.
    pub entries: usize,
    /// Features of one vector.
    pub features: usize,
    /// Tokens of one block.
    pub block: usize,
}

impl VocabularyConfig {
    /// The fewest blocks of equal height that no device refuses in f32.
    pub fn new(entries: usize, features: usize) -> Self {
        let most = (MAX_BLOCK_BYTES / features.max(1) / size_of::<f32>()).max(1);
        let blocks = entries.div_ceil(most).max(1);
        Self {
            entries,
            features,
            block: entries.div_ceil(blocks),
        }
    }

    /// Builds the module; the table is lazily random (normal, σ = 0.02) until loaded.
    pub fn init<B: Backend>(self, device: &B::Device) -> Vocabulary<B> {
        let init = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        let starts = (0..self.entries).step_by(self.block.max(1));
        let block = |start| {
            let tokens = self.block.min(self.entries - start);
            Weight::init(&init, [tokens, self.features], device)
        };
        Vocabulary {
            weight: starts.map(block).collect(),
        }
    }
}

impl<B: Backend> Vocabulary<B> {
    /// The device that the table lies on.
    pub fn device(&self) -> B::Device {
        let first = self.weight.first();
        first.map(Weight::device).unwrap_or_default()
    }

    /// Number of tokens.
    pub fn entries(&self) -> usize {
        self.weight.iter().map(|block| block.dims()[0]).sum()
    }

    /// Looks tokens up, at least one.
    ///
    /// # Shapes
    /// - returns `[features, ids]`
    ///
    /// # Errors
    /// [`LayerError::Id`], [`LayerError::NoIds`]
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor<B, 2>, LayerError> {
        let entries = self.entries();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= entries) {
            return Err(LayerError::Id { id, entries });
        }
        let (Some(first), false) = (self.weight.first(), ids.is_empty()) else {
            return Err(LayerError::NoIds);
        };
        let (device, height) = (self.device(), first.dims()[0]);
        let block = |at: usize| ids[at] as usize / height;
        // Ids sorted by block, so that each block is asked once.
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|&at| block(at));
        let found = order.chunk_by(|&a, &b| block(a) == block(b)).map(|run| {
            let rows: Vec<usize> = run.iter().map(|&at| ids[at] as usize % height).collect();
            self.weight[block(run[0])].rows(indices(&rows, &device))
        });
        let found = Tensor::cat(found.collect(), 0);
        if order.is_sorted() {
            return Ok(found.transpose());
        }
        let mut place = vec![0; ids.len()];
        (0..).zip(&order).for_each(|(from, &at)| place[at] = from);
        Ok(found.select(0, indices(&place, &device)).transpose())
    }

    /// Scores hidden states against every token.
    ///
    /// # Shapes
    /// - `hidden_states`: `[features, rows]`
    /// - returns `[rows, entries]`
    pub fn logits(&self, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        let block = |weight: &Weight<B>| weight.product(hidden_states.clone());
        Tensor::cat(self.weight.iter().map(block).collect(), 0).transpose()
    }
}
