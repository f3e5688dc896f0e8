//! Gradients of what a model says of known answers, in less memory.

use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;

use super::Lesson;
use crate::{Schedule, VisualTokens, Vlm, ZooError};

impl<B: AutodiffBackend> Vlm<B> {
    /// The sum of the losses of lessons' answers through the plain model, times `share`, and its gradients: `take` is given them
    /// in parts, of which a parameter's are to be added up. They are those of [`answer_logits`](Self::answer_logits) to rounding; the
    /// decoder's layers keep nothing but what enters them, and compute everything once more on the way back. What is
    /// drawn (dropout) is drawn from `seed`.
    ///
    /// Lessons that are no prompts, since an answer has the token of an image, are learnt as by `answer_logits`.
    ///
    /// # Shapes
    /// - returns `[1]`
    pub fn learn_recomputing(
        &self,
        lessons: &[&Lesson],
        seen: Option<&[VisualTokens<B>]>,
        (share, seed): (f64, u64),
        mut take: impl FnMut(GradientsParams),
    ) -> Result<Tensor<B::InnerBackend, 1>, ZooError> {
        let model = self.model();
        B::seed(self.device(), seed);
        let (chosen, others): (Vec<usize>, Vec<usize>) =
            (0..lessons.len()).partition(|&index| self.is_prompt(lessons[index]));
        let mut sums = Vec::new();
        for index in others {
            let seen = seen.map(|seen| std::slice::from_ref(&seen[index]));
            let said = self.answer_logits(&lessons[index..=index], seen, Schedule::dense())?;
            let loss = said.losses().sum().mul_scalar(share);
            sums.push(loss.clone().inner());
            take(GradientsParams::from_grads(loss.backward(), model));
        }
        if !chosen.is_empty() {
            let read = self.as_prompts(lessons, &chosen, seen, &Schedule::dense().into())?;
            let decoder = model.decoder();
            let (prompt, rows) = (read.prompt.clone(), read.rows.clone());
            let (left, kept) = decoder.forward_keeping_inputs(prompt, &rows, seed)?;
            let loss = read.said(self, left.clone())?.losses();
            let loss = loss.sum().mul_scalar(share);
            sums.push(loss.clone().inner());
            let gradients = loss.backward();
            let gradient = left.grad(&gradients);
            take(GradientsParams::from_grads(gradients, model));
            if let Some(gradient) = gradient {
                kept.backward(gradient, |gradients| {
                    take(GradientsParams::from_grads(gradients, model));
                })?;
            }
        }
        Ok(Tensor::cat(sums, 0).sum())
    }
}
