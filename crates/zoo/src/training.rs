//! What a model says of an answer that is known: for training on it, and for measuring it.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reroute::{KvCache, Prefill, PrefillOptions};

use crate::{Question, Routing, Vlm, ZooError};

impl<B: Backend> Vlm<B> {
    /// Logits behind the question and behind each token of `answer`, as when the model gives that
    /// answer itself: the question alone decides what is routed, and the answer sees what is left.
    ///
    /// On `Autodiff<B>` gradients reach every parameter, the vision tower's too; a selection is a
    /// constant.
    ///
    /// # Shapes
    /// - returns `[1 + answer, vocab_size]`
    pub fn logits<'a>(
        &self,
        question: &Question,
        answer: &[u32],
        routing: impl Into<Routing<'a, B>>,
    ) -> Result<Tensor<B, 2>, ZooError> {
        let Routing {
            schedule,
            scorer,
            encoder,
        } = routing.into();
        let prompt = self.prompt_of(question, encoder.as_ref())?;
        let decoder = self.model().decoder();
        let cache = KvCache::new(decoder.layers().len(), 1)?;
        let options = PrefillOptions::default();
        let Prefill {
            logits, mut cache, ..
        } = decoder.resume_by(scorer.as_deref(), cache, &prompt, &schedule, options)?;
        if answer.is_empty() {
            return Ok(logits);
        }
        let answer: Vec<(usize, u32)> = answer.iter().map(|&id| (0, id)).collect();
        let behind = decoder.decode(&answer, &mut cache)?;
        Ok(Tensor::cat(vec![logits, behind], 0))
    }
}
