use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use layers::Rotary;
use reducers::{Action, Schedule, last_row_scores, top_k};

use crate::pool::{Past, Pool, PooledRows};
use crate::prompt::ranges;
use crate::{Decision, DecoderLayer, KvCache, Prompt, RerouteError, SelfAttention};

/// Walks the rows of a prompt through the stages of a schedule.
///
/// Between decisions only *active* rows exist for the layers. *Deferred* rows wait with the hidden
/// state they had when they were last active (Reroute, arXiv 2606.12412) and stand again at the
/// next decision; under [`Action::Remove`] they are forgotten.
#[derive(Debug)]
pub struct Router<'a, B: Backend> {
    schedule: &'a Schedule,
    /// Packed rows of each sample.
    samples: Vec<Range<usize>>,
    /// Packed visual rows of each sample, in visual order.
    visual: Vec<Vec<usize>>,
    /// How many of them stand at the first decision: all that earlier turns have not settled.
    standing: Vec<usize>,
    /// Keep counts of each sample at each stage: the budget is a share of its standing tokens.
    keep_counts: Vec<Vec<usize>>,
    /// See [`Prompt::deepstack`].
    deepstack: &'a [Tensor<B, 2>],
    /// Rotary table of all rows.
    prompt_rope: Rotary<B>,
    /// Rotary table of the active rows.
    active_rope: Rotary<B>,
    /// Packed rows that the layers work on, ascending.
    active: Vec<usize>,
    deferred: Option<Deferred<B>>,
    /// What stood at the first decision, if it is to be kept for a later turn.
    pool: Option<Pool<B>>,
    keep_pool: bool,
    /// The last selection of each sample.
    selected: Vec<Option<Vec<usize>>>,
}

/// Rows that bypass the current stage.
#[derive(Debug)]
struct Deferred<B: Backend> {
    /// `[hidden_size, rows]`, untouched since the rows were last active.
    hidden_states: Tensor<B, 2>,
    /// Packed rows, ascending.
    rows: Vec<usize>,
}

/// The input of a decoder layer after routing.
#[derive(Debug)]
pub struct Routed<B: Backend> {
    /// `[hidden_size, active rows]`
    pub hidden_states: Tensor<B, 2>,
    /// `[hidden_size, active rows]`, after the layer's input norm.
    pub normed: Tensor<B, 2>,
    /// `[num_key_value_heads · head_dim, active rows]`, rotated; at a decision layer these are the
    /// very rows that were scored, not a second projection.
    pub keys: Tensor<B, 2>,
    /// The decisions taken here, one per sample with visual tokens.
    pub decisions: Vec<Decision>,
}

impl<'a, B: Backend> Router<'a, B> {
    /// Starts with all rows active. `rope` is the table of all rows of the prompt.
    pub fn new(prompt: &'a Prompt<B>, schedule: &'a Schedule, rope: Rotary<B>) -> Self {
        Self::resume(prompt, schedule, rope, Past::none(prompt.samples.len()))
    }

    /// Starts with the rows active that are not in the past. Rows that the past has parked wait, as
    /// deferred rows do, for the first decision.
    pub(crate) fn resume(
        prompt: &'a Prompt<B>,
        schedule: &'a Schedule,
        rope: Rotary<B>,
        past: Past<B>,
    ) -> Self {
        let samples = prompt.ranges();
        let visual = prompt.samples.iter().zip(&samples);
        let visual: Vec<Vec<usize>> = visual
            .map(|(layout, range)| layout.visual.iter().map(|v| range.start + v).collect())
            .collect();
        let (mut active, mut parked_rows, mut parked) = (Vec::new(), Vec::new(), Vec::new());
        let mut standing = Vec::new();
        for (index, range) in samples.iter().enumerate() {
            let start = range.start;
            let mut settled = start + past.cached[index];
            active.extend(settled..range.end);
            if let Some(pooled) = &past.parked[index] {
                settled = start + pooled.rows.start;
                parked_rows.extend(settled..start + pooled.rows.end);
                parked.push(pooled.hidden_states.clone());
            }
            let visual = &visual[index];
            standing.push(visual.len() - visual.partition_point(|&row| row < settled));
        }
        let is_everything = samples.last().is_some_and(|last| last.end == active.len());
        let active_rope = match is_everything {
            true => rope.clone(),
            false => rope.select(indices(&active, &prompt.embeddings.device())),
        };
        Self {
            schedule,
            keep_counts: standing.iter().map(|&n| schedule.keep_counts(n)).collect(),
            standing,
            deepstack: &prompt.deepstack,
            selected: vec![None; visual.len()],
            active,
            active_rope,
            deferred: (!parked.is_empty()).then(|| Deferred {
                hidden_states: Tensor::cat(parked, 1),
                rows: parked_rows,
            }),
            pool: None,
            keep_pool: false,
            samples,
            visual,
            prompt_rope: rope,
        }
    }

    /// Keeps what stands at the first decision under [`Action::Reroute`], for a later turn.
    pub(crate) fn keeping_pool(self, keep_pool: bool) -> Self {
        Self { keep_pool, ..self }
    }

    /// What stood at the first decision, if it was kept.
    pub(crate) fn into_pool(self) -> Option<Pool<B>> {
        self.pool
    }

    /// The rotary table of the active rows.
    pub fn active_rope(&self) -> &Rotary<B> {
        &self.active_rope
    }

    /// The packed rows that are active, ascending.
    pub fn active(&self) -> &[usize] {
        &self.active
    }

    /// The active ones of all rows of the prompt.
    ///
    /// # Shapes
    /// - `all`: `[features, rows]`
    /// - returns `[features, active rows]`
    pub(crate) fn rows_of(&self, all: Tensor<B, 2>) -> Tensor<B, 2> {
        match all.dims()[1] == self.active.len() {
            true => all,
            false => {
                let active = indices(&self.active, &all.device());
                all.select(1, active)
            }
        }
    }

    /// Some of the active rows, numbered within their sample.
    pub(crate) fn sample_rows(&self, sample: usize, active: Range<usize>) -> Vec<usize> {
        let start = self.samples[sample].start;
        self.active[active].iter().map(|row| row - start).collect()
    }

    /// Where each sample's rows stand among the active rows.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        split(&self.active, &self.samples)
    }

    /// Prepares the input of layer `index`; decides first if the schedule says so. `cache` holds the
    /// rows of earlier turns.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, active rows]`
    pub fn enter(
        &mut self,
        index: usize,
        layer: &DecoderLayer<B>,
        hidden_states: Tensor<B, 2>,
        cache: &KvCache<B>,
    ) -> Result<Routed<B>, RerouteError> {
        if let Some(stage) = self.schedule.decision_at(index)
            && self.standing.iter().any(|&standing| standing > 0)
        {
            return self.decide(stage, layer, hidden_states, cache);
        }
        let normed = layer.input_layernorm.forward(hidden_states.clone());
        Ok(Routed {
            keys: layer.self_attn.keys(normed.clone(), &self.active_rope),
            hidden_states,
            normed,
            decisions: Vec::new(),
        })
    }

    /// Adds the layer's DeepStack features to its output: to the active visual rows, and to those
    /// that this turn has deferred, so that a row's features do not depend on when it is selected.
    /// Rows parked by an earlier turn have theirs.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, active rows]`
    pub fn leave(&mut self, index: usize, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        let visual = self.visual.concat();
        let features = self.deepstack.get(index).filter(|_| !visual.is_empty());
        let Some(features) = features else {
            return hidden_states;
        };
        let device = features.device();
        // Column 0 is what text rows receive.
        let nothing = features.clone().narrow(1, 0, 1).zeros_like();
        let features = Tensor::cat(vec![nothing, features.clone()], 1);
        let add = |hidden_states: Tensor<B, 2>, rows: &[usize]| {
            let column = |row: &usize| visual.binary_search(row).map_or(0, |at| at + 1);
            let columns: Vec<usize> = rows.iter().map(column).collect();
            hidden_states + features.clone().select(1, indices(&columns, &device))
        };
        let decided = self
            .schedule
            .stages()
            .iter()
            .any(|stage| stage.layer <= index);
        self.deferred = self.deferred.take().map(|deferred| match decided {
            true => Deferred {
                hidden_states: add(deferred.hidden_states, &deferred.rows),
                ..deferred
            },
            false => deferred,
        });
        add(hidden_states, &self.active)
    }

    /// Scores the candidates with the last row of each sample, selects, and splits the rows.
    ///
    /// The only host round trip of a stage is reading one score per pool row.
    fn decide(
        &mut self,
        stage: usize,
        layer: &DecoderLayer<B>,
        hidden_states: Tensor<B, 2>,
        cache: &KvCache<B>,
    ) -> Result<Routed<B>, RerouteError> {
        let device = hidden_states.device();
        let (hidden_states, pool) = self.gather_pool(hidden_states);
        let is_active = pool.len() == self.active.len();
        let rope = match is_active {
            true => self.active_rope.clone(),
            false => self.rope_of(&pool, &device),
        };
        if stage == 0 && self.keep_pool && self.schedule.action() == Action::Reroute {
            self.pool = Some(self.pooled(&hidden_states, &pool));
        }
        let normed = layer.input_layernorm.forward(hidden_states.clone());
        let keys = layer.self_attn.keys(normed.clone(), &rope);
        let index = self.schedule.stages()[stage].layer;
        let past: Vec<_> = (0..self.samples.len())
            .map(|s| cache.keys(index, s))
            .collect();
        let scores = self.scores(&layer.self_attn, &normed, &keys, &rope, &pool, past)?;

        let mut decisions = Vec::new();
        let mut keep = vec![true; pool.len()];
        for sample in 0..self.samples.len() {
            if self.standing[sample] > 0 {
                let decision = self.select(stage, sample, &pool, &scores, &mut keep)?;
                self.selected[sample] = Some(decision.selected.clone());
                decisions.push(decision);
            }
        }
        let (kept, left): (Vec<usize>, Vec<usize>) = (0..pool.len()).partition(|&i| keep[i]);
        if left.is_empty() {
            self.active = pool;
            self.active_rope = rope;
            self.deferred = None;
            return Ok(Routed {
                hidden_states,
                normed,
                keys,
                decisions,
            });
        }

        let comes_back =
            self.schedule.action() == Action::Reroute && stage + 1 < self.schedule.stages().len();
        self.deferred = comes_back.then(|| Deferred {
            hidden_states: hidden_states.clone().select(1, indices(&left, &device)),
            rows: left.iter().map(|&i| pool[i]).collect(),
        });
        self.active = kept.iter().map(|&i| pool[i]).collect();
        let kept = indices(&kept, &device);
        self.active_rope = rope.select(kept.clone());
        Ok(Routed {
            hidden_states: hidden_states.select(1, kept.clone()),
            normed: normed.select(1, kept.clone()),
            keys: keys.select(1, kept),
            decisions,
        })
    }

    /// Active and deferred rows back in prompt order.
    fn gather_pool(&mut self, hidden_states: Tensor<B, 2>) -> (Tensor<B, 2>, Vec<usize>) {
        let Some(deferred) = self.deferred.take() else {
            return (hidden_states, self.active.clone());
        };
        let device = hidden_states.device();
        let rows: Vec<usize> = self.active.iter().chain(&deferred.rows).copied().collect();
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_unstable_by_key(|&i| rows[i]);
        let all = Tensor::cat(vec![hidden_states, deferred.hidden_states], 1);
        let pool = order.iter().map(|&i| rows[i]).collect();
        (all.select(1, indices(&order, &device)), pool)
    }

    /// The rotary table of these packed rows.
    fn rope_of(&self, rows: &[usize], device: &B::Device) -> Rotary<B> {
        match self.samples.last() {
            Some(last) if rows.len() < last.end => self.prompt_rope.select(indices(rows, device)),
            _ => self.prompt_rope.clone(),
        }
    }

    /// What stands at a decision, sample by sample.
    fn pooled(&self, hidden_states: &Tensor<B, 2>, pool: &[usize]) -> Pool<B> {
        let bounds = split(pool, &self.samples).into_iter().zip(&self.samples);
        let samples = bounds.map(|(range, sample)| {
            let first = pool.get(range.start).map_or(0, |row| row - sample.start);
            PooledRows {
                rows: first..first + range.len(),
                hidden_states: hidden_states.clone().narrow(1, range.start, range.len()),
            }
        });
        Pool {
            layer: self.schedule.stages()[0].layer,
            samples: samples.collect(),
        }
    }

    /// One score per pool row; rows of samples without candidates score 0. `past` are the keys of
    /// each sample's earlier rows, which take part in the softmax.
    fn scores(
        &self,
        attention: &SelfAttention<B>,
        normed: &Tensor<B, 2>,
        keys: &Tensor<B, 2>,
        rope: &Rotary<B>,
        pool: &[usize],
        past: Vec<Option<Tensor<B, 3>>>,
    ) -> Result<Vec<f32>, RerouteError> {
        let bounds = split(pool, &self.samples);
        let asked: Vec<usize> = (0..bounds.len())
            .filter(|&s| self.standing[s] > 0)
            .collect();
        let last: Vec<usize> = asked.iter().map(|&s| bounds[s].end - 1).collect();
        let last = indices(&last, &normed.device());
        let queries = attention.queries(normed.clone().select(1, last.clone()), &rope.select(last));
        let queries = attention.split_heads(queries);
        let keys = attention.split_heads(keys.clone());
        let rows = asked.iter().enumerate().map(|(column, &sample)| {
            let range = bounds[sample].clone();
            let keys = keys.clone().narrow(2, range.start, range.len());
            let past = past[sample].clone();
            let earlier = past.as_ref().map_or(0, |past| past.dims()[2]);
            let keys = Tensor::cat(past.into_iter().chain([keys]).collect(), 2);
            let query = queries.clone().narrow(2, column, 1).squeeze_dim::<2>(2);
            last_row_scores(query, keys.swap_dims(1, 2)).narrow(0, earlier, range.len())
        });
        let read = read_back(Tensor::cat(rows.collect(), 0), "routing scores")?;
        let mut scores = vec![0.0; pool.len()];
        let mut read = read.into_iter();
        for &sample in &asked {
            for (score, value) in scores[bounds[sample].clone()].iter_mut().zip(&mut read) {
                *score = value;
            }
        }
        Ok(scores)
    }

    /// Chooses one sample's tokens and clears `keep` for the rest of its visual rows.
    fn select(
        &self,
        stage: usize,
        sample: usize,
        pool: &[usize],
        scores: &[f32],
        keep: &mut [bool],
    ) -> Result<Decision, RerouteError> {
        // (index in visual order, index in the pool) of every candidate.
        let stands = |(token, row): (usize, &usize)| Some((token, pool.binary_search(row).ok()?));
        let candidates: Vec<(usize, usize)> = self.visual[sample]
            .iter()
            .enumerate()
            .filter_map(stands)
            .collect();
        let scores: Vec<f32> = candidates.iter().map(|&(_, at)| scores[at]).collect();
        let previous = self.selected[sample].as_deref();
        let mut ranked = scores.clone();
        if let (true, Some(previous)) = (self.schedule.monotonic(), previous) {
            for (score, (token, _)) in ranked.iter_mut().zip(&candidates) {
                if previous.binary_search(token).is_err() && !score.is_nan() {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
        let chosen = top_k(&ranked, self.keep_counts[sample][stage])?;
        candidates.iter().for_each(|&(_, at)| keep[at] = false);
        chosen.iter().for_each(|&i| keep[candidates[i].1] = true);
        let selected: Vec<usize> = chosen.iter().map(|&i| candidates[i].0).collect();
        let was_deferred =
            |token: &&usize| previous.is_some_and(|p| p.binary_search(token).is_err());
        Ok(Decision {
            layer: self.schedule.stages()[stage].layer,
            sample,
            returned: selected.iter().filter(was_deferred).copied().collect(),
            candidates: candidates.iter().map(|&(token, _)| token).collect(),
            scores,
            selected,
        })
    }
}

/// Where each sample's rows stand in `rows`, a sorted subset of the packed rows.
fn split(rows: &[usize], samples: &[Range<usize>]) -> Vec<Range<usize>> {
    ranges(samples.iter().map(|sample| {
        let before = |limit: usize| rows.partition_point(|&row| row < limit);
        before(sample.end) - before(sample.start)
    }))
}

fn indices<B: Backend>(rows: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    Tensor::from_data(rows.as_slice(), device)
}

/// Copies a tensor to the host as f32.
pub(crate) fn read_back<B: Backend, const D: usize>(
    tensor: Tensor<B, D>,
    what: &'static str,
) -> Result<Vec<f32>, RerouteError> {
    let failed = |reason: String| RerouteError::Readback { what, reason };
    let data = tensor
        .try_into_data()
        .map_err(|error| failed(format!("{error:?}")))?;
    data.convert::<f32>()
        .into_vec()
        .map_err(|error| failed(format!("{error:?}")))
}
