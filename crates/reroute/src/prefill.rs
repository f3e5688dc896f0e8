//! Prompts through all layers: at once, or layer by layer.

use std::mem;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::{Schedule, Scorer};
use reroute_layers::{CausalMask, indices};
use tracing::Span;

use crate::block::Run;
use crate::pool::Past;
use crate::{Decoder, KvCache, Prompt, RerouteError, Router, RoutingTrace, SampleLayout};

/// What a prefill shall return besides the logits of the last row.
#[derive(Debug, Clone, Copy, Default)]
pub struct PrefillOptions {
    /// Also return every layer's output ([`Prefill::hidden_states`]), for inspection.
    pub hidden_states: bool,
    /// Keep the input of the first decision layer in the cache (`rows · hidden_size` numbers), so
    /// that under *reroute* [`Decoder::resume`] can choose anew among all visual tokens.
    pub keep_pool: bool,
}

/// The result of a prefill.
#[derive(Debug)]
pub struct Prefill<B: Backend> {
    /// `[samples, vocab_size]`, logits of each sample's last row.
    pub logits: Tensor<B, 2>,
    /// Keys and values for decoding.
    pub cache: KvCache<B>,
    /// What routing did.
    pub trace: RoutingTrace,
    /// Output of every layer, DeepStack features not yet added, if asked for.
    pub hidden_states: Vec<HiddenStates<B>>,
}

/// The output of one layer.
#[derive(Debug, Clone)]
pub struct HiddenStates<B: Backend> {
    /// The packed rows that the layer processed, ascending; deferred ones too under
    /// [`HiddenLayout::PerLayer`](reducers::HiddenLayout::PerLayer).
    pub rows: Vec<usize>,
    /// `[hidden_size, rows]`
    pub values: Tensor<B, 2>,
}

/// A prefill on its way: between two of its layers others may be served, or it may be dropped.
///
/// Never between its rows: a decision ranks all of them.
pub struct Prefilling<'a, B: Backend> {
    decoder: &'a Decoder<B>,
    router: Router<'a, B>,
    cache: KvCache<B>,
    mask: CausalMask<B>,
    /// What enters the next layer.
    hidden_states: Tensor<B, 2>,
    /// Last rows of each sample that go past keys and values of the last layer.
    asked: Vec<usize>,
    /// The next layer.
    next: usize,
    trace: RoutingTrace,
    observed: Vec<HiddenStates<B>>,
    span: Span,
}

impl<'a, B: Backend> Prefilling<'a, B> {
    /// Layers that are still to be run.
    pub fn layers_left(&self) -> usize {
        self.decoder.layers().len() - self.next
    }

    /// Runs the next layer, if there is one; `scorer` ranks instead of the schedule's own scores. With
    /// `observe` its output is part of [`Prefill::hidden_states`].
    ///
    /// # Errors
    /// [`RerouteError::Reducer`] for scores that cannot be ranked, [`RerouteError::Scores`],
    /// [`RerouteError::Readback`]. There is nothing to go on with then.
    pub fn step(
        &mut self,
        scorer: Option<&dyn Scorer<B>>,
        observe: bool,
    ) -> Result<(), RerouteError> {
        let index = self.next;
        let Some(layer) = self.decoder.layers().get(index) else {
            return Ok(());
        };
        let _entered = self.span.enter();
        let (router, cache) = (&mut self.router, &mut self.cache);
        // Not a clone: then the layer may work in its place. Nobody enters by what stands in for it.
        let nothing = Tensor::empty([1, 1], &self.hidden_states.device());
        let hidden_states = mem::replace(&mut self.hidden_states, nothing);
        let mut input = router.enter(index, hidden_states, cache, scorer)?;
        self.trace.decisions.append(&mut input.decisions);
        cache.lower(index, router.lowered());
        let is_last = index + 1 == self.decoder.layers().len();
        let (asking, runs) = match is_last && !observe {
            true => {
                let normed = input.normed.clone();
                let ([left, asking], runs) =
                    router.keep_last(input.hidden_states, normed, &self.asked);
                input.hidden_states = left;
                (asking, runs)
            }
            false => (input.normed.clone(), router.runs()),
        };
        let queries = layer.self_attn.queries(asking, router.active_rope());
        router.executed(index, &queries);
        let count = |of: &dyn Fn(&Run) -> usize| runs.iter().map(of).collect();
        self.trace.rows.push(count(&|run| run.rows.len()));
        self.trace.queries.push(count(&|run| run.queries.len()));
        let (mask, kv) = (Some(&self.mask), self.decoder.kv_type());
        let output = layer.forward(input, queries, &runs, cache.layer(index, kv), mask)?;
        if observe {
            self.observed.push(router.observe(index, output.clone()));
        }
        self.hidden_states = router.leave(index, output);
        self.next += 1;
        Ok(())
    }

    /// Runs the layers that are left, and the head on the last row of each sample.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub fn finish(mut self, scorer: Option<&dyn Scorer<B>>) -> Result<Prefill<B>, RerouteError> {
        while self.layers_left() > 0 {
            self.step(scorer, false)?;
        }
        let Self {
            decoder,
            mut router,
            mut cache,
            trace,
            ..
        } = self;
        let hidden_states = router.gather(self.hidden_states);
        let last: Vec<usize> = router.ranges().iter().map(|range| range.end - 1).collect();
        let last = indices(&last, &hidden_states.device());
        for (sample, layout) in router.layouts().iter().enumerate() {
            cache.continue_at(sample, layout.rows, layout.next_position);
        }
        cache.keep_pools(router.into_pools());
        Ok(Prefill {
            logits: decoder.logits(hidden_states.select(1, last))?,
            cache,
            trace,
            hidden_states: self.observed,
        })
    }
}

impl<B: Backend> Decoder<B> {
    /// The plain model on prompts that hold what is to be said, too: the last layer's output of so many last rows
    /// of each sample (`asked`), for [`logits`](Self::logits) of some of them. Nothing is kept to go on with.
    ///
    /// # Shapes
    /// - returns `[hidden_size, all that is asked]`, sample by sample
    ///
    /// # Errors
    /// Those of [`check`](Self::check); [`RerouteError::Prompt`] if of a sample no rows are asked for, or more than it has.
    pub fn forward(
        &self,
        prompt: &Prompt<B>,
        asked: &[usize],
    ) -> Result<Tensor<B, 2>, RerouteError> {
        let mut prefilling = self.begin_plain(prompt, asked)?;
        while prefilling.layers_left() > 0 {
            prefilling.step(None, false)?;
        }
        Ok(prefilling.router.gather(prefilling.hidden_states))
    }

    /// The same of one layer, given what enters it.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, rows]`
    /// - returns the same, of the last layer `[hidden_size, all that is asked]`
    pub(crate) fn one_layer(
        &self,
        layer: usize,
        prompt: &Prompt<B>,
        asked: &[usize],
        hidden_states: Tensor<B, 2>,
    ) -> Result<Tensor<B, 2>, RerouteError> {
        let mut prefilling = self.begin_plain(prompt, asked)?;
        (prefilling.next, prefilling.hidden_states) = (layer, hidden_states);
        prefilling.step(None, false)?;
        Ok(prefilling.router.gather(prefilling.hidden_states))
    }

    fn begin_plain(
        &self,
        prompt: &Prompt<B>,
        asked: &[usize],
    ) -> Result<Prefilling<'_, B>, RerouteError> {
        let samples = &prompt.samples;
        let fits = |(sample, &rows): (&SampleLayout, &usize)| (1..=sample.rows).contains(&rows);
        if asked.len() != samples.len() || !samples.iter().zip(asked).all(fits) {
            let rows: Vec<usize> = samples.iter().map(|sample| sample.rows).collect();
            return Err(RerouteError::Prompt(format!(
                "the last {asked:?} rows are asked for of samples that have {rows:?}"
            )));
        }
        let cache = KvCache::new(self.layers().len(), samples.len())?;
        let mut prefilling = self.begin(cache, prompt.clone(), Schedule::dense(), false)?;
        prefilling.asked = asked.to_vec();
        Ok(prefilling)
    }

    /// Runs prompts through all layers under a schedule and fills the cache.
    ///
    /// Samples are routed one by one by their own scores; samples without visual tokens take the
    /// dense path. [`Schedule::dense`] is the plain model.
    ///
    /// # Errors
    /// Those of [`check`](Self::check), and [`RerouteError::Reducer`] for scores that cannot be ranked.
    pub fn prefill(
        &self,
        prompt: &Prompt<B>,
        schedule: &Schedule,
        options: PrefillOptions,
    ) -> Result<Prefill<B>, RerouteError> {
        let cache = KvCache::new(self.layers().len(), prompt.samples.len())?;
        self.resume(cache, prompt, schedule, options)
    }

    /// The same for the next turn of a conversation: `prompt` is the whole conversation, and `cache`
    /// what the earlier turns have cached, whose rows it must begin with
    /// ([`KvCache::truncate`] forgets the rest).
    ///
    /// - Under [`Action::Reroute`](reducers::Action::Reroute) the result is that of
    ///   [`prefill`](Self::prefill) on the whole conversation: *all* visual tokens are candidates again,
    ///   and this turn's last row chooses among them. Layers below the first decision compute new rows
    ///   only; from the first decision on all text rows after the first image and the tokens now
    ///   selected are computed, as in a prefill. This needs [`PrefillOptions::keep_pool`] in the
    ///   earlier turn; without it everything after the first image is computed anew.
    /// - Under [`Action::Remove`](reducers::Action::Remove) new rows run through all layers and see
    ///   what each layer has kept: what an earlier turn removed is gone. Only new images are decided on.
    /// - Without decisions the result is that of the plain model: new rows run through all layers and see
    ///   everything, and what an earlier turn kept from a layer is computed there.
    ///
    /// Schedules that give positions away or rank by what no cache holds compute everything anew.
    ///
    /// # Errors
    /// Those of [`prefill`](Self::prefill); [`RerouteError::Cache`] for a cache of another decoder or
    /// other samples; [`RerouteError::MixedPositions`] where an earlier turn gave positions away and this
    /// one keeps them.
    pub fn resume(
        &self,
        cache: KvCache<B>,
        prompt: &Prompt<B>,
        schedule: &Schedule,
        options: PrefillOptions,
    ) -> Result<Prefill<B>, RerouteError> {
        self.resume_by(None, cache, prompt, schedule, options)
    }

    /// The same, with a rule of the caller's own that ranks instead of the schedule's scores.
    pub fn resume_by(
        &self,
        scorer: Option<&dyn Scorer<B>>,
        cache: KvCache<B>,
        prompt: &Prompt<B>,
        schedule: &Schedule,
        options: PrefillOptions,
    ) -> Result<Prefill<B>, RerouteError> {
        let mut prefilling =
            self.begin(cache, prompt.clone(), schedule.clone(), options.keep_pool)?;
        while prefilling.layers_left() > 0 {
            prefilling.step(scorer, options.hidden_states)?;
        }
        prefilling.finish(scorer)
    }

    /// The same layer by layer: nothing is computed yet.
    ///
    /// # Errors
    /// Those of [`resume`](Self::resume) that can be known before.
    pub fn begin(
        &self,
        mut cache: KvCache<B>,
        prompt: Prompt<B>,
        schedule: Schedule,
        keep_pool: bool,
    ) -> Result<Prefilling<'_, B>, RerouteError> {
        self.check(&prompt, &schedule)?;
        self.check_cache(&cache, prompt.samples.len())?;
        let longest = prompt.samples.iter().map(|sample| sample.rows).max();
        let mask = CausalMask::new(longest.unwrap_or(0), &prompt.embeddings.device());
        let past = Past::take(&mut cache, &prompt.samples, &schedule)?;
        let embeddings = prompt.embeddings.clone();
        let (samples, rows) = (prompt.samples.len(), embeddings.dims()[1]);
        let span = tracing::info_span!("prefill", samples, rows);
        let router = Router::resume(self, prompt, schedule, past).keeping_pool(keep_pool);
        Ok(Prefilling {
            decoder: self,
            hidden_states: router.rows_of(embeddings),
            router,
            cache,
            mask,
            asked: vec![1; samples],
            next: 0,
            trace: RoutingTrace::default(),
            observed: Vec::new(),
            span,
        })
    }
}
