//! Tokens that are mixtures of others.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

use super::Reduced;

/// The weights of a [`Reduced`] in the making.
pub(super) struct Mixture {
    places: Vec<Option<usize>>,
    sources: usize,
    /// Row by row, `[sources, kept]`.
    weights: Vec<f32>,
}

impl Mixture {
    /// Tokens at these places, of nothing yet.
    pub(super) fn new(places: Vec<Option<usize>>, sources: usize) -> Self {
        Self {
            weights: vec![0.0; sources * places.len()],
            places,
            sources,
        }
    }

    /// Adds a source, weighted, to a token.
    pub(super) fn add(&mut self, token: usize, source: usize, weight: f32) {
        self.weights[source * self.places.len() + token] += weight;
    }

    pub(super) fn on<B: Backend>(self, device: &B::Device) -> Reduced<B> {
        let shape = [self.sources, self.places.len()];
        let weights = TensorData::new(self.weights, shape);
        Reduced {
            places: self.places,
            weights: Some(Tensor::from_data(weights, (device, DType::F32))),
        }
    }
}
