use std::ops::Range;

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use reducers::{Positions, Schedule, Scorer};
use reroute_layers::{CausalMask, RmsNorm, RmsNormConfig, Vocabulary, VocabularyConfig};

use crate::pool::Past;
use crate::prompt::ranges;
use crate::{
    DecoderConfig, DecoderLayer, KvCache, Prompt, RerouteError, Router, RoutingTrace, SampleLayout,
};

/// A LLaMA-style decoder whose prefill follows a routing schedule.
#[derive(Module, Debug)]
pub struct Decoder<B: Backend> {
    embed_tokens: Vocabulary<B>,
    layers: Vec<DecoderLayer<B>>,
    norm: RmsNorm<B>,
    /// `None` when the logits reuse the embedding table.
    lm_head: Option<Vocabulary<B>>,
    #[module(skip)]
    config: DecoderConfig,
}

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

impl<B: Backend> Decoder<B> {
    pub(crate) fn new(config: &DecoderConfig, device: &B::Device) -> Self {
        let features = config.hidden_size;
        let vocabulary = VocabularyConfig::new(config.vocab_size, features);
        let layer = |_| DecoderLayer::new(config, device);
        let epsilon = config.rms_norm_eps;
        Self {
            embed_tokens: vocabulary.init(device),
            layers: (0..config.num_layers).map(layer).collect(),
            norm: RmsNormConfig { features, epsilon }.init(device),
            lm_head: (!config.tie_word_embeddings).then(|| vocabulary.init(device)),
            config: config.clone(),
        }
    }

    /// The resolved configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The layers, first to last.
    pub fn layers(&self) -> &[DecoderLayer<B>] {
        &self.layers
    }

    /// The norm behind the last layer.
    pub(crate) fn output_norm(&self) -> &RmsNorm<B> {
        &self.norm
    }

    /// A decoder with the same embedding, norm and head around other layers.
    ///
    /// Layers may share their parameters (a clone is a reference), which makes a decoder of any
    /// depth from a few layers' memory.
    pub fn with_layers(mut self, layers: Vec<DecoderLayer<B>>) -> Self {
        self.config.num_layers = layers.len();
        self.layers = layers;
        self
    }

    /// Embeds token ids, at least one; every id must be below `vocab_size`.
    ///
    /// # Shapes
    /// - returns `[hidden_size, ids]`
    pub fn embed(&self, ids: &[u32]) -> Tensor<B, 2> {
        self.embed_tokens.embed(ids)
    }

    /// Whether prompt and schedule fit the decoder and each other.
    pub fn check(&self, prompt: &Prompt<B>, schedule: &Schedule) -> Result<(), RerouteError> {
        prompt.validate(&self.config)?;
        if schedule.positions() == Positions::Renumber && self.config.rope.axes() > 1 {
            return Err(RerouteError::Renumber);
        }
        let spreads = schedule.stages().iter().any(|stage| stage.stride.is_some());
        let unknown = |sample: &SampleLayout| sample.cells.len() < sample.visual.len();
        if spreads && prompt.samples.iter().any(unknown) {
            return Err(RerouteError::Prompt(
                "a stage with a stride needs the row and column of every visual token \
                 (SampleLayout::cells)"
                    .into(),
            ));
        }
        Ok(schedule.check_depth(self.layers.len())?)
    }

    /// Runs prompts through all layers under a schedule and fills the cache.
    ///
    /// Samples are routed one by one by their own scores; samples without visual tokens take the
    /// dense path. [`Schedule::dense`] is the plain model.
    pub fn prefill(
        &self,
        prompt: &Prompt<B>,
        schedule: &Schedule,
        options: PrefillOptions,
    ) -> Result<Prefill<B>, RerouteError> {
        let cache = KvCache::new(self.layers.len(), prompt.samples.len());
        self.resume(cache, prompt, schedule, options)
    }

    /// The same for the next turn of a conversation: `prompt` is the whole conversation, and `cache`
    /// what is left of the earlier turns, whose rows it must begin with
    /// ([`KvCache::truncate`] forgets the rest).
    ///
    /// - Under [`Action::Reroute`](reducers::Action::Reroute) the result is that of
    ///   [`prefill`](Self::prefill) on the whole conversation: *all* visual tokens stand again, and
    ///   this turn's last row chooses among them. Layers below the first decision compute new rows
    ///   only; from the first decision on all text rows after the first image and the tokens now
    ///   selected are computed, as in a prefill. This needs [`PrefillOptions::keep_pool`] in the
    ///   earlier turn; without it everything after the first image is computed anew.
    /// - Under [`Action::Remove`](reducers::Action::Remove) new rows run through all layers and see
    ///   what each layer has kept: what an earlier turn removed is gone. Only new images are decided on.
    /// - Without decisions new rows run through all layers and see everything.
    ///
    /// Schedules that give positions away or rank by what no cache holds compute everything anew.
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
        let observed = |_| options.hidden_states;
        self.run(
            scorer,
            cache,
            prompt,
            schedule,
            options.keep_pool,
            &observed,
        )
    }

    /// Runs a turn, and returns the output of the layers that are observed.
    pub(crate) fn run(
        &self,
        scorer: Option<&dyn Scorer<B>>,
        mut cache: KvCache<B>,
        prompt: &Prompt<B>,
        schedule: &Schedule,
        keep_pool: bool,
        observed: &dyn Fn(usize) -> bool,
    ) -> Result<Prefill<B>, RerouteError> {
        self.check(prompt, schedule)?;
        if (cache.layers(), cache.samples()) != (self.layers.len(), prompt.samples.len()) {
            return Err(RerouteError::Prompt(format!(
                "the cache has {} layers and {} samples, expected {} and {}",
                cache.layers(),
                cache.samples(),
                self.layers.len(),
                prompt.samples.len()
            )));
        }
        let device = prompt.embeddings.device();
        let longest = prompt.samples.iter().map(|sample| sample.rows).max();
        let mask = CausalMask::new(longest.unwrap_or(0), &device);
        let past = Past::take(&mut cache, &prompt.samples, schedule);
        let mut router = Router::resume(self, prompt, schedule, past)
            .ranking_by(scorer)
            .keeping_pool(keep_pool);
        let mut hidden_states = router.rows_of(prompt.embeddings.clone());
        let mut trace = RoutingTrace::default();
        let mut captured = Vec::new();

        for (index, layer) in self.layers.iter().enumerate() {
            let input = router.enter(index, layer, hidden_states, &cache)?;
            let attention = &layer.self_attn;
            let queries = attention.queries(input.normed.clone(), router.active_rope());
            router.executed(index, &queries);
            let values = attention.split_heads(attention.values(input.normed));
            let keys = attention.split_heads(input.keys);
            let ranges = router.ranges();
            let contexts = ranges.iter().enumerate().map(|(sample, range)| {
                let (start, rows) = (range.start, range.len());
                let keys = keys.clone().narrow(2, start, rows);
                let values = values.clone().narrow(2, start, rows);
                let queries = queries.clone().narrow(1, start, rows);
                let held = router.sample_rows(sample, range.clone());
                let [keys, values] = cache.append(index, sample, held, keys, values);
                attention.attend(queries, keys, values, Some(&mask))
            });
            let contexts = Tensor::cat(contexts.collect(), 1);
            trace
                .rows
                .push(ranges.iter().map(|range| range.len()).collect());
            trace.decisions.extend(input.decisions);
            for (sample, by) in router.lowered().into_iter().enumerate() {
                cache.lower(index, sample, by);
            }
            hidden_states = layer.finish(input.hidden_states, contexts);
            if observed(index) {
                captured.push(router.observe(hidden_states.clone()));
            }
            hidden_states = router.leave(index, hidden_states);
        }
        let hidden_states = router.gather(hidden_states);

        let last: Vec<i64> = router
            .ranges()
            .iter()
            .map(|range| range.end as i64 - 1)
            .collect();
        let last = Tensor::from_data(last.as_slice(), &device);
        for (sample, layout) in prompt.samples.iter().enumerate() {
            cache.continue_at(sample, layout.rows, layout.next_position);
        }
        cache.pool = router.into_pool();
        Ok(Prefill {
            logits: self.logits(hidden_states.select(1, last)),
            cache,
            trace,
            hidden_states: captured,
        })
    }

    /// Feeds tokens to samples and returns the logits behind each. Tokens of one sample follow each
    /// other: several at once are a known answer, for training on it.
    ///
    /// Routing plays no part here: a token attends, per layer, to whatever that layer's cache holds,
    /// at the position it would have in the plain model (or, in layers whose rows were renumbered,
    /// behind them).
    ///
    /// # Shapes
    /// - `tokens`: (index of the sample, token id)
    /// - returns `[tokens, vocab_size]`
    pub fn decode(
        &self,
        tokens: &[(usize, u32)],
        cache: &mut KvCache<B>,
    ) -> Result<Tensor<B, 2>, RerouteError> {
        let device = self.embed_tokens.device();
        self.check_tokens(tokens, cache)?;
        let next = tokens.iter().map(|&(sample, _)| cache.take_next(sample));
        let (rows, positions): (Vec<usize>, Vec<i64>) = next.unzip();
        let runs: Vec<Range<usize>> = ranges(tokens.chunk_by(|a, b| a.0 == b.0).map(<[_]>::len));
        let mask = runs.iter().any(|run| run.len() > 1).then(|| {
            let keys = rows.iter().max().map_or(0, |last| last + 1);
            CausalMask::new(keys, &device)
        });
        let ids: Vec<u32> = tokens.iter().map(|&(_, id)| id).collect();
        let mut hidden_states = self.embed(&ids);
        let dtype = hidden_states.dtype();
        let table = |lowered: &[i64]| {
            let positions = positions.iter().zip(lowered).map(|(p, by)| p - by);
            let positions: Vec<i64> = positions.collect();
            let positions = Tensor::<B, 1, Int>::from_data(positions.as_slice(), &device)
                .unsqueeze::<2>()
                .repeat_dim(0, self.config.rope.axes());
            self.config.rope.table(positions, dtype)
        };
        let mut lowered = vec![0; tokens.len()];
        let mut rope = table(&lowered);

        for (index, layer) in self.layers.iter().enumerate() {
            let here = cache.lowered(index, tokens.iter().map(|&(sample, _)| sample));
            if here != lowered {
                (rope, lowered) = (table(&here), here);
            }
            let attention = &layer.self_attn;
            let normed = layer.input_layernorm.forward(hidden_states.clone());
            let queries = attention.queries(normed.clone(), &rope);
            let keys = attention.split_heads(attention.keys(normed.clone(), &rope));
            let values = attention.split_heads(attention.values(normed));
            let contexts = runs.iter().map(|run| {
                let (start, count) = (run.start, run.len());
                let keys = keys.clone().narrow(2, start, count);
                let values = values.clone().narrow(2, start, count);
                let queries = queries.clone().narrow(1, start, count);
                let (sample, held) = (tokens[start].0, rows[run.clone()].iter().copied());
                let [keys, values] = cache.append(index, sample, held, keys, values);
                attention.attend(queries, keys, values, mask.as_ref())
            });
            let contexts = Tensor::cat(contexts.collect(), 1);
            hidden_states = layer.finish(hidden_states, contexts);
        }
        Ok(self.logits(hidden_states))
    }

    /// Whether tokens can be fed. Asked before any is taken: a refused step leaves the cache as it was.
    fn check_tokens(
        &self,
        tokens: &[(usize, u32)],
        cache: &KvCache<B>,
    ) -> Result<(), RerouteError> {
        let vocab_size = self.config.vocab_size;
        let mut needed: Vec<usize> = (0..cache.samples())
            .map(|sample| cache.next_position(sample) as usize)
            .collect();
        for &(sample, id) in tokens {
            if id as usize >= vocab_size {
                return Err(RerouteError::TokenId { id, vocab_size });
            }
            needed[sample] += 1;
        }
        let needed = needed.into_iter().max().unwrap_or(0);
        let available = self.config.max_position_embeddings;
        match needed > available {
            true => Err(RerouteError::ContextLength { needed, available }),
            false => Ok(()),
        }
    }

    /// Final norm and vocabulary head.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, rows]`
    /// - returns `[rows, vocab_size]`
    pub fn logits(&self, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        head.logits(self.norm.forward(hidden_states))
    }
}
