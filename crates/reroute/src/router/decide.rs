//! What happens at a decision layer.

use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reducers::{Action, HiddenLayout, Positions, ScoreLayer, Scorer, Stage};
use reroute_layers::indices;
use tracing::field::Empty;

use super::{Deferred, Router, split};
use crate::decision::{self, DecisionInput, Earlier, SampleInput};
use crate::host::read_back;
use crate::{Decision, DecoderLayer, KvCache, RerouteError, Routed};

impl<'a, B: Backend> Router<'a, B> {
    /// Scores the candidates of each sample, selects, and splits the rows.
    ///
    /// Waits for the device once, to read one score per row of all samples; a rule may have to read
    /// more.
    pub(super) fn decide(
        &mut self,
        stage: usize,
        layer: &DecoderLayer<B>,
        hidden_states: Tensor<B, 2>,
        cache: &KvCache<B>,
        scorer: Option<&dyn Scorer<B>>,
    ) -> Result<Routed<B>, RerouteError> {
        let layer_index = self.schedule.stages()[stage].layer;
        let span = tracing::debug_span!(
            "decision",
            layer = layer_index,
            candidates = Empty,
            kept = Empty
        );
        let _entered = span.enter();
        let (hidden_states, rows) = self.gather_pool(hidden_states);
        if stage == 0 && self.keep_pool && self.schedule.action() == Action::Reroute {
            self.pools = self.pooled(&hidden_states, &rows);
        }
        let input = self.decision_input(stage, layer, hidden_states, rows);
        let decisions = self.select(stage, &input, cache, scorer)?;
        let mut kept = vec![true; input.rows.len()];
        for decision in &decisions {
            let visual = &self.visual[decision.sample];
            for &token in &decision.candidates {
                if let Ok(at) = input.rows.binary_search(&visual[token]) {
                    kept[at] = decision.selected.binary_search(&token).is_ok();
                }
            }
            self.selected[decision.sample] = Some(decision.selected.clone());
            let remembered = decision
                .candidates
                .iter()
                .zip(decision.remembered.iter().flatten());
            for (&token, &score) in remembered {
                self.remembered[decision.sample][token] = Some(score);
            }
        }
        let sum = |of: &dyn Fn(&Decision) -> usize| decisions.iter().map(of).sum::<usize>();
        span.record("candidates", sum(&|decision| decision.candidates.len()));
        span.record("kept", sum(&|decision| decision.selected.len()));
        let (kept, rejected) = (0..input.rows.len()).partition(|&row| kept[row]);
        Ok(self.part(stage, input, kept, rejected, decisions))
    }

    /// The rows of a decision, normalised, and their keys.
    fn decision_input<'d>(
        &mut self,
        stage: usize,
        layer: &'d DecoderLayer<B>,
        hidden_states: Tensor<B, 2>,
        rows: Vec<usize>,
    ) -> DecisionInput<'d, B>
    where
        'a: 'd,
    {
        let rope = match rows.len() == self.active.len() {
            true => self.active_rope.clone(),
            false => self.rope_of(&rows, &hidden_states.device()),
        };
        let normed = layer.input_layernorm.forward(hidden_states.clone());
        let unrotated_keys = layer.self_attn.unrotated_keys(normed.clone());
        DecisionInput {
            layer: self.schedule.stages()[stage].layer,
            attention: &layer.self_attn,
            keys: rope.apply(unrotated_keys.clone()),
            unrotated_keys,
            rows,
            hidden_states,
            normed,
            rope,
            output_norm: self.decoder.output_norm(),
            embeddings: self.prompt.embeddings.clone(),
            executed: self.executed.take(),
        }
    }

    /// Goes on with the kept rows; the rejected ones are deferred or removed. Both are indices into
    /// the rows of the decision.
    fn part(
        &mut self,
        stage: usize,
        input: DecisionInput<'_, B>,
        kept: Vec<usize>,
        rejected: Vec<usize>,
        decisions: Vec<Decision>,
    ) -> Routed<B> {
        (self.deferred, self.riding) = (None, None);
        if rejected.is_empty() {
            self.active = input.rows;
            self.active_rope = input.rope;
            return Routed {
                hidden_states: input.hidden_states,
                normed: input.normed,
                keys: input.keys,
                decisions,
            };
        }
        let device = input.hidden_states.device();
        let of = |rows: &[usize]| rows.iter().map(|&row| input.rows[row]).collect();
        let stands_again = stage + 1 < self.schedule.stages().len()
            || self.schedule.layout() == HiddenLayout::PerLayer;
        if stands_again && self.schedule.action() == Action::Reroute {
            let hidden_states = input.hidden_states.clone();
            self.deferred = Some(Deferred {
                hidden_states: hidden_states.select(1, indices(&rejected, &device)),
                rows: of(&rejected),
            });
        }
        self.active = of(&kept);
        let kept = indices(&kept, &device);
        let hidden_states = input.hidden_states.select(1, kept.clone());
        self.mount(&hidden_states);
        let keys = match self.schedule.positions() {
            Positions::Gap => {
                self.active_rope = input.rope.select(kept.clone());
                input.keys.select(1, kept.clone())
            }
            Positions::Renumber => {
                self.active_rope = self.renumbered(&device);
                let keys = input.unrotated_keys.select(1, kept.clone());
                self.active_rope.apply(keys)
            }
        };
        Routed {
            hidden_states,
            normed: input.normed.select(1, kept),
            keys,
            decisions,
        }
    }

    /// The decision of every sample that has candidates.
    fn select(
        &self,
        stage: usize,
        input: &DecisionInput<'_, B>,
        cache: &KvCache<B>,
        scorer: Option<&dyn Scorer<B>>,
    ) -> Result<Vec<Decision>, RerouteError> {
        let Stage { score, stride, .. } = &self.schedule.stages()[stage];
        let ranges = split(&input.rows, &self.samples).into_iter().enumerate();
        let asked = ranges.filter(|&(sample, _)| self.candidates[sample] > 0);
        let samples: Vec<SampleInput<'_, B>> = asked
            .map(|(sample, range)| self.sample_input(stage, input, sample, range, cache))
            .collect();
        let scorer: &dyn Scorer<B> = scorer.unwrap_or(score);
        let mut scores = Vec::new();
        for sample in &samples {
            let of_sample = scorer.score(sample)?;
            let (given, expected) = (of_sample.dims()[0], sample.range.len());
            if given != expected {
                return Err(RerouteError::Scores { given, expected });
            }
            // A rule may compute in a type of its own.
            scores.push(of_sample.cast(DType::F32));
        }
        let scores = read_back(Tensor::cat(scores, 0), "routing scores")?;

        let mut rest = &scores[..];
        let mut decisions = Vec::new();
        for sample in &samples {
            let (scores, others) = rest.split_at(sample.range.len());
            rest = others;
            let cells = &self.prompt.samples[sample.index].cells;
            let spread = |token: usize| {
                stride.is_some_and(|n| cells[token].iter().all(|at| at.is_multiple_of(n)))
            };
            let earlier = Earlier {
                selected: self.selected[sample.index].as_deref(),
                monotonic: self.schedule.monotonic(),
                memory: self.schedule.memory(),
                remembered: &self.remembered[sample.index],
            };
            decisions.push(decision::select(sample, scores, spread, earlier)?);
        }
        Ok(decisions)
    }

    /// What a scorer sees of one sample, whose rows are `range` of those of the decision.
    fn sample_input<'d>(
        &'d self,
        stage: usize,
        input: &'d DecisionInput<'d, B>,
        sample: usize,
        range: Range<usize>,
        cache: &KvCache<B>,
    ) -> SampleInput<'d, B> {
        let rows = &input.rows[range.clone()];
        // (index in visual order, row of the range) of every candidate.
        let candidate =
            |(token, row): (usize, &usize)| Some((token, rows.binary_search(row).ok()?));
        let visual = self.visual[sample].iter().enumerate();
        let (tokens, candidates) = visual.filter_map(candidate).unzip();
        let score = &self.schedule.stages()[stage].score;
        let before = input.layer.checked_sub(1);
        let before = before.filter(|_| score.uses(ScoreLayer::Previous));
        let dtype = input.keys.dtype();
        SampleInput {
            all: input,
            index: sample,
            range,
            candidates,
            tokens,
            sample: self.samples[sample].clone(),
            visual: &self.visual[sample],
            keep_count: self.keep_counts[sample][stage],
            salience: self.prompt.samples[sample].salience.as_deref(),
            earlier: cache.keys(input.layer, sample, dtype),
            executed_keys: before.and_then(|layer| cache.keys(layer, sample, dtype)),
        }
    }
}
