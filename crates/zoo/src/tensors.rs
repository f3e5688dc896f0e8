use std::ops::ControlFlow;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::encoder::Tap;
use reroute::{
    Generation, GenerationOptions, HiddenStates, KvCache, PrefillOptions, Prompt, RoutingTrace,
    generate,
};
use reroute_family::{FamilyError, Modality, Sample};
use vision_encoder::Grid;

use crate::{PixelTensors, Routing, VisualTokens, Vlm, ZooError};

/// Inputs as tensors, past tokenizer and image preprocessing: for comparing implementations.
#[derive(Debug, Clone)]
pub struct TensorInputs<B: Backend> {
    /// Token ids of each sample without padding, slots repeated once per visual token.
    pub samples: Vec<Vec<u32>>,
    /// The images and videos of all samples in order.
    pub pixels: PixelTensors<B>,
    /// Seconds that a temporal patch of each video lasts, in order; none at all is 1 second each.
    pub second_per_grid_ts: Vec<f32>,
}

/// Everything a comparison may want to see.
#[derive(Debug)]
pub struct TensorOutputs<B: Backend> {
    /// What the vision tower made of the pixels.
    pub tokens: VisualTokens<B>,
    /// The packed prompt: embeddings and positions.
    pub prompt: Prompt<B>,
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
    pub fn run_tensors<'a>(
        &self,
        inputs: TensorInputs<B>,
        routing: impl Into<Routing<'a, B>>,
        new_tokens: usize,
        hidden_states: bool,
    ) -> Result<TensorOutputs<B>, ZooError> {
        let model = self.model();
        let videos = inputs.pixels.videos.as_ref();
        let videos = videos.map_or(0, |videos| videos.grids().len());
        let seconds = &inputs.second_per_grid_ts;
        if !seconds.is_empty() && seconds.len() != videos {
            return Err(ZooError::Family(FamilyError::SecondsPerGrid {
                given: seconds.clone(),
                videos,
            }));
        }
        let samples = self.with_grids(&inputs);
        let routing = routing.into();
        let pixels = inputs.pixels.cast(self.dtype());
        let step = routing.encoder.as_ref();
        if let Some(step) = step
            && step
                .reducer
                .needs(&self.config().encoder())?
                .contains(&Tap::Question)
        {
            return Err(ZooError::NoQuestion);
        }
        let tokens = model.see_reduced(pixels, step, Default::default())?;
        let prompt = model.prompt(&samples, &tokens)?;
        let decoder = model.decoder();
        let options = PrefillOptions {
            hidden_states,
            ..Default::default()
        };
        let cache = KvCache::new(decoder.layers().len(), prompt.samples.len())?;
        let (scorer, schedule) = (routing.scorer.as_deref(), &routing.schedule);
        let prefill = decoder.resume_by(scorer, cache, &prompt, schedule, options)?;
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
            tokens,
            prompt,
            hidden_states: prefill.hidden_states,
            logits,
            trace: prefill.trace,
            kv_lengths,
            generations: generations.into_iter().collect::<Result<_, _>>()?,
        })
    }

    /// Gives every sample the images and videos that its slots ask for, in order.
    fn with_grids(&self, inputs: &TensorInputs<B>) -> Vec<Sample> {
        let [images, videos] = Modality::ALL.map(|modality| {
            let pictures = inputs.pixels.of_modality(modality);
            let grids = pictures.map_or(&[][..], |pictures| pictures.grids());
            let slot = self.config().slots().of(modality);
            self.split(grids, &inputs.samples, slot)
        });
        let mut seconds = inputs.second_per_grid_ts.iter().copied();
        let visuals = images.into_iter().zip(videos);
        let samples = inputs.samples.iter().zip(visuals);
        samples
            .map(|(ids, (image_grids, video_grids))| Sample {
                ids: ids.clone(),
                second_per_grid_ts: seconds.by_ref().take(video_grids.len()).collect(),
                image_grids,
                video_grids,
            })
            .collect()
    }

    /// Divides grids among samples by their slots. What is left over goes to the last sample, where it
    /// is found to be too much.
    fn split(&self, grids: &[Grid], samples: &[Vec<u32>], slot: Option<u32>) -> Vec<Vec<Grid>> {
        let merge = self.config().spatial_merge_size();
        let mut rest = grids;
        let mut divided = Vec::new();
        for (index, ids) in samples.iter().enumerate() {
            let mut slots = ids.iter().filter(|&&id| Some(id) == slot).count();
            let mut taken = 0;
            while taken < rest.len() && (slots > 0 || index + 1 == samples.len()) {
                slots = slots.saturating_sub(rest[taken].tokens(merge));
                taken += 1;
            }
            let (of_sample, others) = rest.split_at(taken);
            divided.push(of_sample.to_vec());
            rest = others;
        }
        divided
    }
}
