mod decide;
mod waiting;

use std::ops::Range;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::{HiddenLayout, Positions, Schedule, ScoreLayer, Scorer};
use reroute_layers::{Rotary, indices};

use crate::block::Run;
use crate::pool::{Past, Pool};
use crate::prompt::ranges;
use crate::{Decision, Decoder, HiddenStates, KvCache, Prompt, RerouteError, SampleLayout};
use waiting::Riding;

/// Walks the rows of a prompt through the stages of a schedule.
///
/// Between decisions only *active* rows exist for the layers. *Deferred* rows wait with the hidden
/// state they had when they were last active (Reroute, arXiv 2606.12412), unless they
/// [receive something](reducers::Waiting), and stand again at the next decision; under [`Action::Remove`](reducers::Action::Remove) they are forgotten.
pub struct Router<'a, B: Backend> {
    decoder: &'a Decoder<B>,
    prompt: Prompt<B>,
    schedule: Schedule,
    /// Packed rows of each sample.
    samples: Vec<Range<usize>>,
    /// Packed visual rows of each sample, in visual order.
    visual: Vec<Vec<usize>>,
    /// How many of them are candidates of the first decision: all that earlier turns have not settled.
    candidates: Vec<usize>,
    /// Keep counts of each sample at each stage: the budget is a share of its candidates.
    keep_counts: Vec<Vec<usize>>,
    /// Rotary table of all rows.
    prompt_rope: Rotary<B>,
    /// Rotary table of the active rows.
    active_rope: Rotary<B>,
    /// Packed rows that the layers work on, ascending.
    active: Vec<usize>,
    deferred: Option<Deferred<B>>,
    /// Where the active rows began, if those that are deferred ride along.
    riding: Option<Riding<B>>,
    /// Between two layers under [`HiddenLayout::PerLayer`]: active and deferred rows, all in place.
    scattered: Option<Vec<usize>>,
    /// Queries of the active rows in the layer before, if the next decision asks for them.
    executed: Option<Tensor<B, 2>>,
    /// The rows of each sample at the first decision, if they are to be kept for a later turn.
    pools: Vec<Option<Pool<B>>>,
    keep_pool: bool,
    /// The last selection of each sample.
    selected: Vec<Option<Vec<usize>>>,
    /// What decisions remember of each visual token of each sample.
    remembered: Vec<Vec<Option<f32>>>,
}

/// Rows that bypass the current stage.
#[derive(Debug)]
struct Deferred<B: Backend> {
    /// `[hidden_size, rows]`, untouched since the rows were last active unless they receive something.
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
    ///
    /// # Errors
    /// Those of [`Decoder::check`].
    pub fn new(
        decoder: &'a Decoder<B>,
        prompt: Prompt<B>,
        schedule: Schedule,
    ) -> Result<Self, RerouteError> {
        decoder.check(&prompt, &schedule)?;
        let past = Past::none(prompt.samples.len());
        Ok(Self::resume(decoder, prompt, schedule, past))
    }

    /// Starts with the rows active that are not in the past. Rows that the past has deferred wait for
    /// the first decision.
    pub(crate) fn resume(
        decoder: &'a Decoder<B>,
        prompt: Prompt<B>,
        schedule: Schedule,
        past: Past<B>,
    ) -> Self {
        let rope = &decoder.config().rope;
        let prompt_rope = rope.table(prompt.positions.clone(), prompt.embeddings.dtype());
        let samples = prompt.ranges();
        let visual = prompt.samples.iter().zip(&samples);
        let visual: Vec<Vec<usize>> = visual
            .map(|(layout, range)| layout.visual.iter().map(|v| range.start + v).collect())
            .collect();
        let (mut active, mut deferred_rows, mut deferred) = (Vec::new(), Vec::new(), Vec::new());
        let mut candidates = Vec::new();
        for (index, range) in samples.iter().enumerate() {
            let start = range.start;
            let mut settled = start + past.cached[index];
            active.extend(settled..range.end);
            if let Some(pooled) = &past.deferred[index] {
                settled = start + pooled.rows.start;
                deferred_rows.extend(settled..start + pooled.rows.end);
                deferred.push(pooled.hidden_states.clone());
            }
            let visual = &visual[index];
            candidates.push(visual.len() - visual.partition_point(|&row| row < settled));
        }
        let is_everything = samples.last().is_some_and(|last| last.end == active.len());
        let active_rope = match is_everything {
            true => prompt_rope.clone(),
            false => prompt_rope.select(indices(&active, &prompt.embeddings.device())),
        };
        Self {
            decoder,
            keep_counts: candidates
                .iter()
                .map(|&n| schedule.keep_counts(n))
                .collect(),
            candidates,
            pools: vec![None; samples.len()],
            selected: vec![None; visual.len()],
            remembered: visual.iter().map(|rows| vec![None; rows.len()]).collect(),
            active,
            active_rope,
            deferred: (!deferred.is_empty()).then(|| Deferred {
                hidden_states: Tensor::cat(deferred, 1),
                rows: deferred_rows,
            }),
            riding: None,
            scattered: None,
            executed: None,
            keep_pool: false,
            samples,
            visual,
            prompt_rope,
            prompt,
            schedule,
        }
    }

    /// Keeps the rows at the first decision under [`Action::Reroute`](reducers::Action::Reroute), for a later turn.
    pub(crate) fn keeping_pool(self, keep_pool: bool) -> Self {
        Self { keep_pool, ..self }
    }

    /// The rows of each sample at the first decision, where they were kept.
    pub(crate) fn into_pools(self) -> Vec<Option<Pool<B>>> {
        self.pools
    }

    /// How the rows of the prompt divide into samples.
    pub(crate) fn layouts(&self) -> &[SampleLayout] {
        &self.prompt.samples
    }

    /// The rotary table of the active rows.
    pub(crate) fn active_rope(&self) -> &Rotary<B> {
        &self.active_rope
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

    /// Each sample's active rows.
    pub(crate) fn runs(&self) -> Vec<Run> {
        let run = |(sample, packed): (usize, Range<usize>)| {
            let start = self.samples[sample].start;
            let rows = self.active[packed.clone()].iter();
            Run {
                sample,
                rows: rows.map(|row| row - start).collect(),
                queries: packed.clone(),
                packed,
            }
        };
        self.ranges().into_iter().enumerate().map(run).collect()
    }

    /// Where each sample's rows stand among the active rows.
    pub(crate) fn ranges(&self) -> Vec<Range<usize>> {
        split(&self.active, &self.samples)
    }

    /// Prepares the input of layer `index`; decides first if the schedule says so. `cache` holds the
    /// rows of earlier turns; `scorer` ranks instead of the schedule's own scores.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, rows]` as leaving a layer returned them
    ///
    /// # Errors
    /// [`RerouteError::Prompt`] for a layer that there is not or other rows, [`RerouteError::Cache`] for
    /// the cache of another decoder, [`RerouteError::Type`], and what a scorer refuses.
    pub fn enter(
        &mut self,
        index: usize,
        hidden_states: Tensor<B, 2>,
        cache: &KvCache<B>,
        scorer: Option<&dyn Scorer<B>>,
    ) -> Result<Routed<B>, RerouteError> {
        self.decoder.check_cache(cache, self.samples.len())?;
        let layer = self.decoder.layers().get(index).ok_or_else(|| {
            let layers = self.decoder.layers().len();
            RerouteError::Prompt(format!("layer {index} is entered, of {layers}"))
        })?;
        let rows = self.scattered.as_ref().unwrap_or(&self.active).len();
        let expected = [self.decoder.config().hidden_size, rows];
        if hidden_states.dims() != expected {
            return Err(RerouteError::Prompt(format!(
                "layer {index} is entered by {:?} numbers, expected {expected:?}",
                hidden_states.dims()
            )));
        }
        self.decoder
            .check_type("hidden states", hidden_states.dtype())?;
        let hidden_states = self.gather(hidden_states);
        match self.schedule.decision_at(index) {
            Some(stage) if self.candidates.iter().any(|&candidates| candidates > 0) => {
                self.decide(stage, layer, hidden_states, cache, scorer)
            }
            _ => Ok(layer.enter(hidden_states, &self.active_rope)),
        }
    }

    /// Finishes a layer: adds its DeepStack features to its output, to the active visual rows, and to those
    /// that this turn has deferred, so that a row's features do not depend on when it is selected.
    /// Rows deferred by an earlier turn have theirs.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, active rows]`
    /// - returns `[hidden_size, active rows]`, deferred ones among them under [`HiddenLayout::PerLayer`]
    pub(crate) fn leave(&mut self, index: usize, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        if let Some(arrived) = self.arrived(index, &hidden_states) {
            (self.deferred, self.riding) = (Some(arrived), None);
        }
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

    /// Goes on with the last rows of each sample alone, whose keys and values the layer has. For the last
    /// layer: nothing else of what leaves it is asked for.
    ///
    /// # Shapes
    /// - `hidden_states`, `normed`: `[hidden_size, active rows]`
    /// - `counts`: rows of each sample, one at least
    /// - returns the same of the rows that are left, and the runs that they are queries of
    pub(crate) fn keep_last(
        &mut self,
        hidden_states: Tensor<B, 2>,
        normed: Tensor<B, 2>,
        counts: &[usize],
    ) -> ([Tensor<B, 2>; 2], Vec<Run>) {
        let mut runs = self.runs();
        let mut last = Vec::new();
        for run in &mut runs {
            let count = counts[run.sample].min(run.packed.len());
            run.queries = last.len()..last.len() + count;
            last.extend(run.packed.end - count..run.packed.end);
        }
        self.active = last.iter().map(|&at| self.active[at]).collect();
        let last = indices(&last, &normed.device());
        self.active_rope = self.active_rope.select(last.clone());
        let kept = [hidden_states, normed].map(|x| x.select(1, last.clone()));
        (kept, runs)
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
        let of = |rows: &[usize]| {
            let column = |row: &usize| visual.binary_search(row).map_or(0, |at| at + 1);
            let columns: Vec<usize> = rows.iter().map(column).collect();
            features.clone().select(1, indices(&columns, &device))
        };
        let decided = self
            .schedule
            .stages()
            .iter()
            .any(|stage| stage.layer <= index);
        self.deferred = self.deferred.take().map(|deferred| match decided {
            true => Deferred {
                hidden_states: deferred.hidden_states + of(&deferred.rows),
                ..deferred
            },
            false => deferred,
        });
        let features = of(&self.active);
        self.discount(&features);
        hidden_states + features
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

    /// The output of layer `index` as people inspect it.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, active rows]`
    pub(crate) fn observe(&self, index: usize, hidden_states: Tensor<B, 2>) -> HiddenStates<B> {
        let per_layer = self.schedule.layout() == HiddenLayout::PerLayer;
        let arrived = self.arrived(index, &hidden_states);
        let deferred = arrived.as_ref().or(self.deferred.as_ref());
        let (values, rows) = self.merge(hidden_states, deferred.filter(|_| per_layer));
        HiddenStates { rows, values }
    }

    /// The rotary table of these packed rows.
    fn rope_of(&self, rows: &[usize], device: &B::Device) -> Rotary<B> {
        match self.samples.last() {
            Some(last) if rows.len() < last.end => self.prompt_rope.select(indices(rows, device)),
            _ => self.prompt_rope.clone(),
        }
    }

    /// The rows at a decision, sample by sample.
    fn pooled(&self, hidden_states: &Tensor<B, 2>, pool: &[usize]) -> Vec<Option<Pool<B>>> {
        let layer = self.schedule.stages()[0].layer;
        let bounds = split(pool, &self.samples).into_iter().zip(&self.samples);
        let samples = bounds.map(|(range, sample)| {
            let first = pool.get(range.start).map_or(0, |row| row - sample.start);
            Some(Pool {
                layer,
                rows: first..first + range.len(),
                hidden_states: hidden_states.clone().narrow(1, range.start, range.len()),
            })
        });
        samples.collect()
    }
}

/// Where each sample's rows stand in `rows`, a sorted subset of the packed rows.
fn split(rows: &[usize], samples: &[Range<usize>]) -> Vec<Range<usize>> {
    ranges(samples.iter().map(|sample| {
        let before = |limit: usize| rows.partition_point(|&row| row < limit);
        before(sample.end) - before(sample.start)
    }))
}
