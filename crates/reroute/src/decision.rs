//! What a scorer sees of one sample at a decision, and the selection that its scores lead to.

use std::ops::Range;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::{DecisionView, Embedded, ReducerError, ScoreLayer, ScoreMemory, top_k};
use reroute_layers::{RmsNorm, Rotary, indices};

use crate::{Decision, SelfAttention};

/// The rows of all samples at a decision, active and deferred, in prompt order.
#[derive(Debug)]
pub(crate) struct DecisionInput<'a, B: Backend> {
    /// The decision layer.
    pub(crate) layer: usize,
    pub(crate) attention: &'a SelfAttention<B>,
    /// Packed rows of the prompt, ascending.
    pub(crate) rows: Vec<usize>,
    /// `[hidden_size, rows]`
    pub(crate) hidden_states: Tensor<B, 2>,
    /// `[hidden_size, rows]`
    pub(crate) normed: Tensor<B, 2>,
    /// `[num_key_value_heads · head_dim, rows]`
    pub(crate) unrotated_keys: Tensor<B, 2>,
    /// `[num_key_value_heads · head_dim, rows]`
    pub(crate) keys: Tensor<B, 2>,
    pub(crate) rope: Rotary<B>,
    /// The norm behind the last layer.
    pub(crate) output_norm: &'a RmsNorm<B>,
    /// Embeddings of all rows of the prompt.
    pub(crate) embeddings: Tensor<B, 2>,
    /// Queries of these rows in the layer before, `[num_attention_heads · head_dim, rows]`, if the
    /// decision asks for them.
    pub(crate) executed: Option<Tensor<B, 2>>,
}

/// One sample's share of a [`DecisionInput`].
pub(crate) struct SampleInput<'a, B: Backend> {
    pub(crate) all: &'a DecisionInput<'a, B>,
    /// Index of the sample in the batch.
    pub(crate) index: usize,
    /// Where its rows are among all.
    pub(crate) range: Range<usize>,
    /// Those of them that are candidates, counted from the start of the range.
    pub(crate) candidates: Vec<usize>,
    /// The indices of the candidates in visual order.
    pub(crate) tokens: Vec<usize>,
    /// The sample's rows among those of the prompt.
    pub(crate) sample: Range<usize>,
    /// The packed rows of all its visual tokens.
    pub(crate) visual: &'a [usize],
    /// How many candidates will be kept.
    pub(crate) keep_count: usize,
    /// One number per visual token of the sample.
    pub(crate) salience: Option<&'a [f32]>,
    /// Keys of earlier turns in the decision layer, `[num_key_value_heads, head_dim, earlier]`.
    pub(crate) earlier: Option<Tensor<B, 3>>,
    /// All keys of the layer before, `[num_key_value_heads, head_dim, earlier + rows]`.
    pub(crate) executed_keys: Option<Tensor<B, 3>>,
}

impl<B: Backend> SampleInput<'_, B> {
    fn share(&self, of: &Tensor<B, 2>) -> Tensor<B, 2> {
        of.clone().narrow(1, self.range.start, self.range.len())
    }
}

impl<B: Backend> DecisionView<B> for SampleInput<'_, B> {
    fn rows(&self) -> usize {
        self.range.len()
    }

    fn candidates(&self) -> &[usize] {
        &self.candidates
    }

    fn layer(&self) -> usize {
        self.all.layer
    }

    fn salience(&self) -> Option<Vec<f32>> {
        let salience = self.salience?;
        Some(self.tokens.iter().map(|&token| salience[token]).collect())
    }

    fn hidden_states(&self) -> Tensor<B, 2> {
        self.share(&self.all.hidden_states)
    }

    fn output_normed(&self) -> Tensor<B, 2> {
        self.all.output_norm.forward(self.hidden_states())
    }

    fn prompt(&self) -> Embedded<B> {
        let (start, rows) = (self.sample.start, self.sample.len());
        Embedded {
            embeddings: self.all.embeddings.clone().narrow(1, start, rows),
            visual: self.visual.iter().map(|row| row - start).collect(),
        }
    }

    fn rows_in_prompt(&self) -> Vec<usize> {
        let rows = self.all.rows[self.range.clone()].iter();
        rows.map(|row| row - self.sample.start).collect()
    }

    fn keep_count(&self) -> usize {
        self.keep_count
    }

    fn queries(
        &self,
        layer: ScoreLayer,
        rows: &[usize],
        rope: bool,
    ) -> Result<Tensor<B, 3>, ReducerError> {
        let there_are = self.rows();
        if let Some(&row) = rows.iter().find(|&&row| row >= there_are) {
            let rows = there_are;
            return Err(ReducerError::Row { row, rows });
        }
        let DecisionInput {
            attention,
            normed,
            executed,
            ..
        } = self.all;
        let rows: Vec<usize> = rows.iter().map(|row| self.range.start + row).collect();
        let rows = indices(&rows, &normed.device());
        if let (ScoreLayer::Previous, Some(executed)) = (layer, executed) {
            let queries = executed.clone().select(1, rows.clone());
            return Ok(attention.split_heads(match rope {
                true => queries,
                false => self.all.rope.select(rows).undo(queries),
            }));
        }
        let queries = attention.unrotated_queries(normed.clone().select(1, rows.clone()));
        Ok(attention.split_heads(match rope {
            true => self.all.rope.select(rows).apply(queries),
            false => queries,
        }))
    }

    fn keys(&self, layer: ScoreLayer, rope: bool) -> Tensor<B, 3> {
        if let (ScoreLayer::Previous, Some(executed)) = (layer, &self.executed_keys) {
            if rope {
                return executed.clone();
            }
            // A prompt that is scored like this has no earlier rows.
            let [heads, head_dim, rows] = executed.dims();
            let own: Vec<usize> = self.range.clone().collect();
            let rope = self.all.rope.select(indices(&own, &executed.device()));
            let keys = rope.undo(executed.clone().reshape([heads * head_dim, rows]));
            return self.all.attention.split_heads(keys);
        }
        let keys = match rope {
            true => &self.all.keys,
            false => &self.all.unrotated_keys,
        };
        let keys = self.all.attention.split_heads(self.share(keys));
        match &self.earlier {
            Some(earlier) => Tensor::cat(vec![earlier.clone(), keys], 2),
            None => keys,
        }
    }
}

/// What of earlier decisions counts at this one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Earlier<'a> {
    /// The last selection.
    pub(crate) selected: Option<&'a [usize]>,
    /// Whether what is not in it ranks behind everything else.
    pub(crate) monotonic: bool,
    /// What becomes of earlier scores.
    pub(crate) memory: ScoreMemory,
    /// What is remembered of each visual token of the sample.
    pub(crate) remembered: &'a [Option<f32>],
}

impl Earlier<'_> {
    /// What tokens with these scores are ranked by, if it is not these.
    fn remembered(&self, tokens: &[usize], scores: &[f32]) -> Option<Vec<f32>> {
        if self.memory == ScoreMemory::Off {
            return None;
        }
        let sizes = scores.iter().map(|&score| f64::from(score.abs()));
        let all: f64 = sizes.filter(|size| size.is_finite()).sum();
        let remembered = tokens.iter().zip(scores).map(|(&token, &score)| {
            // What a rule excludes or demands stays so; what is no number is refused when it is ranked.
            let share = match score.is_finite() && all > 0.0 {
                true => (f64::from(score) / all) as f32,
                false => score,
            };
            self.memory.with(self.remembered[token], share)
        });
        Some(remembered.collect())
    }
}

/// Chooses among a sample's candidates: first the `spread` tokens, then by score and what counts of earlier
/// decisions.
pub(crate) fn select(
    input: &SampleInput<'_, impl Backend>,
    scores: &[f32],
    spread: impl Fn(usize) -> bool,
    earlier: Earlier,
) -> Result<Decision, ReducerError> {
    let (tokens, previous) = (&input.tokens, earlier.selected);
    let scores: Vec<f32> = input.candidates.iter().map(|&row| scores[row]).collect();
    let remembered = earlier.remembered(tokens, &scores);
    let mut ranked = remembered.as_ref().unwrap_or(&scores).clone();
    if let (true, Some(previous)) = (earlier.monotonic, previous) {
        for (score, token) in ranked.iter_mut().zip(tokens) {
            if previous.binary_search(token).is_err() && !score.is_nan() {
                *score = f32::NEG_INFINITY;
            }
        }
    }
    for (score, &token) in ranked.iter_mut().zip(tokens) {
        if spread(token) && !score.is_nan() {
            *score = f32::INFINITY;
        }
    }
    let chosen = top_k(&ranked, input.keep_count)?;
    let selected: Vec<usize> = chosen.iter().map(|&i| tokens[i]).collect();
    let was_deferred = |token: &&usize| previous.is_some_and(|p| p.binary_search(token).is_err());
    Ok(Decision {
        layer: input.all.layer,
        sample: input.index,
        returned: selected.iter().filter(was_deferred).copied().collect(),
        candidates: tokens.clone(),
        scores,
        remembered,
        selected,
    })
}
