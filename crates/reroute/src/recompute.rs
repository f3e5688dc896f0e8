//! The plain model with gradients, in less memory: layers keep nothing but their inputs, and what is between is computed again on
//! the way back (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).

use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;

use crate::{Decoder, Prompt, RerouteError};

/// What a forward pass keeps for the way back.
pub struct Kept<'a, B: AutodiffBackend> {
    decoder: &'a Decoder<B>,
    /// As it was given, with the way to what it was made of.
    prompt: Prompt<B>,
    /// The same without.
    cut: Prompt<B>,
    asked: Vec<usize>,
    seed: u64,
    /// What enters each layer, `[hidden_size, rows]`.
    inputs: Vec<Tensor<B::InnerBackend, 2>>,
}

impl<B: AutodiffBackend> Decoder<B> {
    /// As [`forward`](Self::forward), but gradients end at what it returns: those of all that was before are had from
    /// [`Kept::backward`], given its own. What layers draw (dropout) is drawn from `seed`, on both ways alike.
    ///
    /// # Shapes
    /// - returns `[hidden_size, all that is asked]`
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_keeping_inputs(
        &self,
        prompt: Prompt<B>,
        asked: &[usize],
        seed: u64,
    ) -> Result<(Tensor<B, 2>, Kept<'_, B>), RerouteError> {
        let cut = Prompt {
            embeddings: prompt.embeddings.clone().detach(),
            deepstack: { prompt.deepstack.iter() }
                .map(|features| features.clone().detach())
                .collect(),
            positions: prompt.positions.clone(),
            samples: prompt.samples.clone(),
        };
        let mut kept = Kept {
            decoder: self,
            prompt,
            asked: asked.to_vec(),
            seed,
            inputs: Vec::new(),
            cut,
        };
        let mut hidden_states = kept.cut.embeddings.clone();
        for layer in 0..self.layers().len() {
            kept.inputs.push(hidden_states.clone().inner());
            // What the layer has computed is let go here.
            hidden_states = kept.layer(layer, &kept.cut, hidden_states)?.detach();
        }
        Ok((hidden_states.require_grad(), kept))
    }
}

impl<B: AutodiffBackend> Kept<'_, B> {
    /// Goes back from the gradient of what the layers returned, layer by layer, and gives away the gradients of each and of
    /// what was before the first: a parameter's is the sum of all that it is in.
    ///
    /// # Shapes
    /// - `gradient`: `[hidden_size, all that was asked]`
    ///
    /// # Errors
    /// [`RerouteError::Readback`] of a device that fails.
    pub fn backward(
        mut self,
        mut gradient: Tensor<B::InnerBackend, 2>,
        mut take: impl FnMut(B::Gradients),
    ) -> Result<(), RerouteError> {
        // What leads back to what the prompt was made of.
        let mut below = Vec::new();
        while let Some(input) = self.inputs.pop() {
            let layer = self.inputs.len();
            let input = Tensor::from_inner(input).require_grad();
            let mut prompt = self.cut.clone();
            let features = prompt.deepstack.get_mut(layer);
            let features = features.map(|features| {
                *features = features.clone().require_grad();
                features.clone()
            });
            let output = self.layer(layer, &prompt, input.clone())?;
            let gradients = along(output, gradient).backward();
            let of_features = features.and_then(|features| features.grad(&gradients));
            if let Some(of_features) = of_features {
                below.push((self.prompt.deepstack[layer].clone(), of_features));
            }
            gradient = match input.grad(&gradients) {
                Some(gradient) => gradient,
                None => input.inner().zeros_like(),
            };
            take(gradients);
        }
        // All at once: a tower has made both, and its graph is gone through once.
        let embeddings = along(self.prompt.embeddings, gradient);
        let below = below.into_iter();
        let sum = below.fold(embeddings, |sum, (made, gradient)| {
            sum + along(made, gradient)
        });
        take(sum.backward());
        Ok(())
    }

    /// The output of one layer of the plain model.
    fn layer(
        &self,
        layer: usize,
        prompt: &Prompt<B>,
        hidden_states: Tensor<B, 2>,
    ) -> Result<Tensor<B, 2>, RerouteError> {
        let device = hidden_states.device();
        B::seed(&device, self.seed.wrapping_add(layer as u64 + 1));
        self.decoder
            .one_layer(layer, prompt, &self.asked, hidden_states)
    }
}

/// A number of which a tensor has this gradient.
fn along<B: AutodiffBackend>(
    of: Tensor<B, 2>,
    gradient: Tensor<B::InnerBackend, 2>,
) -> Tensor<B, 1> {
    (of * Tensor::from_inner(gradient)).sum()
}
