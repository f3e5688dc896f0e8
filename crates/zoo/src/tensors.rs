use std::ops::ControlFlow;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::Schedule;
use reroute::{
    Generation, GenerationOptions, HiddenStates, PrefillOptions, RoutingTrace, generate,
};

use crate::{Vlm, ZooError};

/// Inputs as tensors, past tokenizer and image preprocessing: for comparing implementations.
#[derive(Debug, Clone)]
pub struct TensorInputs<B: Backend> {
    /// Token ids of each sample without padding, image slots repeated once per visual token.
    pub samples: Vec<Vec<u32>>,
    /// `[images, 3, height, width]`, the images of all samples in order.
    pub pixel_values: Option<Tensor<B, 4>>,
}

/// Everything a comparison may want to see.
#[derive(Debug)]
pub struct TensorOutputs<B: Backend> {
    /// `[vision hidden_size, rows]`, packed.
    pub vision_features: Option<Tensor<B, 2>>,
    /// `[hidden_size, rows]`, packed.
    pub image_embeds: Option<Tensor<B, 2>>,
    /// `[hidden_size, rows]`, packed.
    pub inputs_embeds: Tensor<B, 2>,
    /// Output of every layer, if asked for.
    pub hidden_states: Vec<HiddenStates<B>>,
    /// `[samples, vocab_size]`, logits of the last row of the prefill.
    pub logits: Tensor<B, 2>,
    /// What routing did.
    pub trace: RoutingTrace,
    /// Rows in each layer's cache after the prefill, `[samples][layers]`.
    pub kv_lengths: Vec<Vec<usize>>,
    /// Greedy continuation of every sample, with logits.
    pub generations: Vec<Generation>,
}

impl<B: Backend> Vlm<B> {
    /// Runs prepared tensors through the model and continues greedily for `new_tokens` tokens,
    /// stop tokens or not.
    pub fn run_tensors(
        &self,
        inputs: TensorInputs<B>,
        schedule: &Schedule,
        new_tokens: usize,
        hidden_states: bool,
    ) -> Result<TensorOutputs<B>, ZooError> {
        let model = self.model();
        let pixels = inputs.pixel_values.filter(|pixels| pixels.dims()[0] > 0);
        let pixels = pixels.map(|pixels| pixels.cast(self.dtype()));
        let vision_features = pixels
            .map(|pixels| model.vision_features(pixels))
            .transpose()?;
        let image_embeds = vision_features
            .clone()
            .map(|features| model.project(features));
        let prompt = model.prompt(&inputs.samples, image_embeds.clone(), self.device())?;
        let decoder = model.decoder();
        let prefill = decoder.prefill(
            &prompt,
            schedule,
            PrefillOptions {
                hidden_states,
                ..Default::default()
            },
        )?;
        let mut cache = prefill.cache;
        let kv_lengths = (0..cache.samples())
            .map(|sample| cache.lengths(sample))
            .collect();
        let options = GenerationOptions {
            max_new_tokens: new_tokens,
            logits: true,
            ..GenerationOptions::default()
        };
        let logits = prefill.logits;
        let go_on = &mut |_, _| ControlFlow::Continue(());
        let generations = generate(
            decoder,
            logits.clone(),
            &mut cache,
            &inputs.samples,
            &options,
            go_on,
        )?;
        Ok(TensorOutputs {
            vision_features,
            image_embeds,
            inputs_embeds: prompt.embeddings,
            hidden_states: prefill.hidden_states,
            logits,
            trace: prefill.trace,
            kv_lengths,
            generations,
        })
    }
}
