use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use reducers::{Action, HiddenLayout, Positions, Schedule, ScoreLayer, Scorer, Stage};
use reroute_layers::Rotary;

use crate::decision::{self, SampleStanding};
use crate::pool::{Past, Pool, PooledRows};
use crate::prompt::ranges;
use crate::{Decision, Decoder, DecoderLayer, HiddenStates, KvCache, Prompt, RerouteError};

/// Walks the rows of a prompt through the stages of a schedule.
///
/// Between decisions only *active* rows exist for the layers. *Deferred* rows wait with the hidden
/// state they had when they were last active (Reroute, arXiv 2606.12412) and stand again at the
/// next decision; under [`Action::Remove`] they are forgotten.
pub struct Router<'a, B: Backend> {
    decoder: &'a Decoder<B>,
    prompt: &'a Prompt<B>,
    schedule: &'a Schedule,
    /// Ranks instead of the schedule's own scores.
    scorer: Option<&'a dyn Scorer<B>>,
    /// Packed rows of each sample.
    samples: Vec<Range<usize>>,
    /// Packed visual rows of each sample, in visual order.
    visual: Vec<Vec<usize>>,
    /// How many of them stand at the first decision: all that earlier turns have not settled.
    standing: Vec<usize>,
    /// Keep counts of each sample at each stage: the budget is a share of its standing tokens.
    keep_counts: Vec<Vec<usize>>,
    /// Rotary table of all rows.
    prompt_rope: Rotary<B>,
    /// Rotary table of the active rows.
    active_rope: Rotary<B>,
    /// Packed rows that the layers work on, ascending.
    active: Vec<usize>,
    deferred: Option<Deferred<B>>,
    /// Between two layers under [`HiddenLayout::PerLayer`]: all rows that stand, deferred ones in place.
    scattered: Option<Vec<usize>>,
    /// Queries of the active rows in the layer before, if the next decision asks for them.
    executed: Option<Tensor<B, 2>>,
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
    /// Starts with all rows active.
    pub fn new(decoder: &'a Decoder<B>, prompt: &'a Prompt<B>, schedule: &'a Schedule) -> Self {
        Self::resume(decoder, prompt, schedule, Past::none(prompt.samples.len()))
    }

    /// Starts with the rows active that are not in the past. Rows that the past has parked wait, as
    /// deferred rows do, for the first decision.
    pub(crate) fn resume(
        decoder: &'a Decoder<B>,
        prompt: &'a Prompt<B>,
        schedule: &'a Schedule,
        past: Past<B>,
    ) -> Self {
        let rope = &decoder.config().rope;
        let prompt_rope = rope.table(prompt.positions.clone(), prompt.embeddings.dtype());
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
            true => prompt_rope.clone(),
            false => prompt_rope.select(indices(&active, &prompt.embeddings.device())),
        };
        Self {
            decoder,
            prompt,
            schedule,
            scorer: None,
            keep_counts: standing.iter().map(|&n| schedule.keep_counts(n)).collect(),
            standing,
            selected: vec![None; visual.len()],
            active,
            active_rope,
            deferred: (!parked.is_empty()).then(|| Deferred {
                hidden_states: Tensor::cat(parked, 1),
                rows: parked_rows,
            }),
            scattered: None,
            executed: None,
            pool: None,
            keep_pool: false,
            samples,
            visual,
            prompt_rope,
        }
    }

    /// Keeps what stands at the first decision under [`Action::Reroute`], for a later turn.
    pub(crate) fn keeping_pool(self, keep_pool: bool) -> Self {
        Self { keep_pool, ..self }
    }

    /// Ranks by `scorer` instead of the schedule's own scores.
    pub(crate) fn ranking_by(self, scorer: Option<&'a dyn Scorer<B>>) -> Self {
        Self { scorer, ..self }
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
    /// - `hidden_states`: `[hidden_size, rows]` as [`leave`](Self::leave) returned them
    pub fn enter(
        &mut self,
        index: usize,
        layer: &DecoderLayer<B>,
        hidden_states: Tensor<B, 2>,
        cache: &KvCache<B>,
    ) -> Result<Routed<B>, RerouteError> {
        let hidden_states = self.gather(hidden_states);
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

    /// Finishes a layer: adds its DeepStack features to its output, to the active visual rows, and to those
    /// that this turn has deferred, so that a row's features do not depend on when it is selected.
    /// Rows parked by an earlier turn have theirs.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, active rows]`
    /// - returns `[hidden_size, active rows]`, or all rows that stand under [`HiddenLayout::PerLayer`]
    pub fn leave(&mut self, index: usize, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        let hidden_states = self.add_deepstack(index, hidden_states);
        match self.schedule.layout() {
            HiddenLayout::Stagewise => hidden_states,
            HiddenLayout::PerLayer => {
                let (hidden_states, rows) = self.gather_pool(hidden_states);
                self.scattered = Some(rows);
                hidden_states
            }
        }
    }

    /// The active rows of what [`leave`](Self::leave) returned.
    ///
    /// # Shapes
    /// - returns `[hidden_size, active rows]`
    pub(crate) fn gather(&mut self, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        let Some(rows) = self.scattered.take() else {
            return hidden_states;
        };
        let device = hidden_states.device();
        let is_active = |&i: &usize| self.active.binary_search(&rows[i]).is_ok();
        let (active, waiting): (Vec<usize>, Vec<usize>) = (0..rows.len()).partition(is_active);
        self.deferred = (!waiting.is_empty()).then(|| Deferred {
            hidden_states: hidden_states.clone().select(1, indices(&waiting, &device)),
            rows: waiting.iter().map(|&i| rows[i]).collect(),
        });
        match self.deferred {
            Some(_) => hidden_states.select(1, indices(&active, &device)),
            None => hidden_states,
        }
    }

    /// Remembers the queries of layer `index` if the next decision ranks by them.
    ///
    /// # Shapes
    /// - `queries`: `[num_attention_heads · head_dim, active rows]`
    pub(crate) fn executed(&mut self, index: usize, queries: &Tensor<B, 2>) {
        let next = self.schedule.decision_at(index + 1);
        let next = next.map(|stage| &self.schedule.stages()[stage].score);
        let asked = next.is_some_and(|score| score.uses(ScoreLayer::Previous));
        self.executed = asked.then(|| queries.clone());
    }

    /// By how much each sample's positions are lower than those of the full prompt.
    pub(crate) fn lowered(&self) -> Vec<i64> {
        let samples = self.prompt.samples.iter().zip(self.ranges());
        let lowered = samples
            .zip(&self.selected)
            .map(|((layout, range), selected)| {
                let renumbered =
                    self.schedule.positions() == Positions::Renumber && selected.is_some();
                match renumbered {
                    true => layout.next_position - range.len() as i64,
                    false => 0,
                }
            });
        lowered.collect()
    }

    fn add_deepstack(&mut self, index: usize, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        let visual = self.visual.concat();
        let features = self
            .prompt
            .deepstack
            .get(index)
            .filter(|_| !visual.is_empty());
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

    /// Scores the candidates of each sample, selects, and splits the rows.
    ///
    /// Waits for the device once, to read one score per pool row of all samples; a rule may have to
    /// read more.
    fn decide(
        &mut self,
        stage: usize,
        layer: &DecoderLayer<B>,
        hidden_states: Tensor<B, 2>,
        cache: &KvCache<B>,
    ) -> Result<Routed<B>, RerouteError> {
        let device = hidden_states.device();
        let (hidden_states, rows) = self.gather_pool(hidden_states);
        let rope = match rows.len() == self.active.len() {
            true => self.active_rope.clone(),
            false => self.rope_of(&rows, &device),
        };
        if stage == 0 && self.keep_pool && self.schedule.action() == Action::Reroute {
            self.pool = Some(self.pooled(&hidden_states, &rows));
        }
        let normed = layer.input_layernorm.forward(hidden_states.clone());
        let unrotated_keys = layer.self_attn.unrotated_keys(normed.clone());
        let pool = decision::Pool {
            layer: self.schedule.stages()[stage].layer,
            attention: &layer.self_attn,
            keys: rope.apply(unrotated_keys.clone()),
            unrotated_keys,
            rows,
            hidden_states,
            normed,
            rope,
            output_norm: self.decoder.output_norm(),
            embeddings: &self.prompt.embeddings,
            executed: self.executed.take(),
        };
        let decisions = self.select(stage, &pool, cache)?;

        let mut keep = vec![true; pool.rows.len()];
        for decision in &decisions {
            let visual = &self.visual[decision.sample];
            let at = |token: usize| pool.rows.binary_search(&visual[token]).ok();
            for &token in &decision.candidates {
                let stays = decision.selected.binary_search(&token).is_ok();
                at(token).into_iter().for_each(|at| keep[at] = stays);
            }
            self.selected[decision.sample] = Some(decision.selected.clone());
        }
        let (kept, left): (Vec<usize>, Vec<usize>) = (0..pool.rows.len()).partition(|&i| keep[i]);
        if left.is_empty() {
            self.active = pool.rows;
            self.active_rope = pool.rope;
            self.deferred = None;
            return Ok(Routed {
                hidden_states: pool.hidden_states,
                normed: pool.normed,
                keys: pool.keys,
                decisions,
            });
        }

        let comes_back = stage + 1 < self.schedule.stages().len()
            || self.schedule.layout() == HiddenLayout::PerLayer;
        let comes_back = comes_back && self.schedule.action() == Action::Reroute;
        self.deferred = comes_back.then(|| Deferred {
            hidden_states: pool
                .hidden_states
                .clone()
                .select(1, indices(&left, &device)),
            rows: left.iter().map(|&i| pool.rows[i]).collect(),
        });
        self.active = kept.iter().map(|&i| pool.rows[i]).collect();
        let kept = indices(&kept, &device);
        let keys = match self.schedule.positions() {
            Positions::Gap => {
                self.active_rope = pool.rope.select(kept.clone());
                pool.keys.select(1, kept.clone())
            }
            Positions::Renumber => {
                self.active_rope = self.renumbered(&device);
                self.active_rope
                    .apply(pool.unrotated_keys.select(1, kept.clone()))
            }
        };
        Ok(Routed {
            hidden_states: pool.hidden_states.select(1, kept.clone()),
            normed: pool.normed.select(1, kept),
            keys,
            decisions,
        })
    }

    /// The decision of every sample that has something to decide.
    fn select(
        &self,
        stage: usize,
        pool: &decision::Pool<'_, B>,
        cache: &KvCache<B>,
    ) -> Result<Vec<Decision>, RerouteError> {
        let Stage { score, stride, .. } = &self.schedule.stages()[stage];
        let executed = |sample| {
            let before = pool.layer.checked_sub(1)?;
            let needed = score.uses(ScoreLayer::Previous);
            cache.keys(before, sample).filter(|_| needed)
        };
        let ranges = split(&pool.rows, &self.samples);
        let asked = (0..ranges.len()).filter(|&sample| self.standing[sample] > 0);
        let standing: Vec<(usize, SampleStanding<'_, B>)> = asked
            .map(|sample| {
                let range = ranges[sample].clone();
                // (index in visual order, row of the range) of every candidate.
                let stands = |(token, row): (usize, &usize)| {
                    let at = pool.rows[range.clone()].binary_search(row).ok()?;
                    Some((token, at))
                };
                let visual = self.visual[sample].iter().enumerate();
                let (tokens, candidates) = visual.filter_map(stands).unzip();
                let standing = SampleStanding {
                    pool,
                    range: range.clone(),
                    candidates,
                    tokens,
                    sample: self.samples[sample].clone(),
                    visual: &self.visual[sample],
                    keep_count: self.keep_counts[sample][stage],
                    salience: self.prompt.samples[sample].salience.as_deref(),
                    earlier: cache.keys(pool.layer, sample),
                    executed_keys: executed(sample),
                };
                (sample, standing)
            })
            .collect();
        let scorer: &dyn Scorer<B> = self.scorer.unwrap_or(score);
        let scores = standing.iter().map(|(_, standing)| scorer.score(standing));
        let scores = Tensor::cat(scores.collect::<Result<_, _>>()?, 0);
        let scores = read_back(scores, "routing scores")?;
        let mut rest = &scores[..];
        let decide = |(sample, standing): &(usize, SampleStanding<'_, B>)| {
            let (scores, others) = rest.split_at(standing.range.len());
            rest = others;
            let previous = self.selected[*sample].as_deref();
            let monotonic = self.schedule.monotonic();
            let cells = &self.prompt.samples[*sample].cells;
            let on_stride = |token: usize| {
                let [row, column] = cells[token];
                stride.is_some_and(|n| row.is_multiple_of(n) && column.is_multiple_of(n))
            };
            let spread = |token| stride.is_some() && on_stride(token);
            decision::select(standing, *sample, scores, spread, previous, monotonic)
        };
        Ok(standing.iter().map(decide).collect::<Result<_, _>>()?)
    }

    /// The rotary table of the active rows of each sample, numbered from 0.
    fn renumbered(&self, device: &B::Device) -> Rotary<B> {
        let positions = self.ranges().into_iter().flat_map(|range| 0..range.len());
        let positions: Vec<usize> = positions.collect();
        let positions = indices::<B>(&positions, device).unsqueeze();
        let rope = &self.decoder.config().rope;
        rope.table(positions, self.prompt.embeddings.dtype())
    }

    /// Active and deferred rows back in prompt order.
    fn gather_pool(&mut self, hidden_states: Tensor<B, 2>) -> (Tensor<B, 2>, Vec<usize>) {
        let deferred = self.deferred.take();
        self.merge(hidden_states, deferred.as_ref())
    }

    fn merge(
        &self,
        hidden_states: Tensor<B, 2>,
        deferred: Option<&Deferred<B>>,
    ) -> (Tensor<B, 2>, Vec<usize>) {
        let Some(deferred) = deferred else {
            return (hidden_states, self.active.clone());
        };
        let device = hidden_states.device();
        let rows: Vec<usize> = self.active.iter().chain(&deferred.rows).copied().collect();
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_unstable_by_key(|&i| rows[i]);
        let all = Tensor::cat(vec![hidden_states, deferred.hidden_states.clone()], 1);
        let pool = order.iter().map(|&i| rows[i]).collect();
        (all.select(1, indices(&order, &device)), pool)
    }

    /// A layer's output as people inspect it.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, active rows]`
    pub(crate) fn observe(&self, hidden_states: Tensor<B, 2>) -> HiddenStates<B> {
        let per_layer = self.schedule.layout() == HiddenLayout::PerLayer;
        let deferred = self.deferred.as_ref().filter(|_| per_layer);
        let (values, rows) = self.merge(hidden_states, deferred);
        HiddenStates { rows, values }
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
}

/// Where each sample's rows stand in `rows`, a sorted subset of the packed rows.
fn split(rows: &[usize], samples: &[Range<usize>]) -> Vec<Range<usize>> {
    ranges(samples.iter().map(|sample| {
        let before = |limit: usize| rows.partition_point(|&row| row < limit);
        before(sample.end) - before(sample.start)
    }))
}

pub(crate) fn indices<B: Backend>(rows: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
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
