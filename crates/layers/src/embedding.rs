use burn::module::{Initializer, Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};

/// A lookup table of vectors.
#[derive(Module, Debug)]
pub struct Embedding<B: Backend> {
    /// `[entries, features]`
    pub weight: Param<Tensor<B, 2>>,
}

/// Sizes of an [`Embedding`].
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingConfig {
    /// Number of vectors in the table.
    pub entries: usize,
    /// Features of one vector.
    pub features: usize,
}

impl EmbeddingConfig {
    /// Builds the module; the table is lazily random (normal, σ = 0.02) until loaded.
    pub fn init<B: Backend>(self, device: &B::Device) -> Embedding<B> {
        let init = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        Embedding {
            weight: init.init([self.entries, self.features], device),
        }
    }
}

impl<B: Backend> Embedding<B> {
    /// Looks vectors up. Indices must be below the number of entries.
    ///
    /// # Shapes
    /// - `ids`: `[rows]`
    /// - returns `[features, rows]`
    pub fn forward(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        self.weight.val().select(0, ids).transpose()
    }
}
