use burn::module::Module;
use burn::tensor::backend::{Backend, DTypeUsage};
use burn::tensor::{DType, Int, Tensor};
use reducers::{KvType, Positions, Schedule};
use reroute_layers::{
    CausalMask, RmsNorm, RmsNormConfig, Rotary, Vocabulary, VocabularyConfig, linears,
};

use crate::block::Run;
use crate::{
    DecoderConfig, DecoderLayer, KvCache, Place, Prompt, RerouteError, SampleLayout, Shortcuts,
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
    /// `None` for that of the weights.
    #[module(skip)]
    kv: Option<KvType>,
    #[module(skip)]
    shortcuts: Shortcuts,
}

linears!(Decoder: embed_tokens, layers, lm_head);

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
            kv: None,
            shortcuts: Shortcuts::default(),
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

    /// The type that the decoder computes in.
    pub fn dtype(&self) -> DType {
        self.norm.weight.val().dtype()
    }

    /// The type that caches keep keys and values in.
    pub fn kv_type(&self) -> KvType {
        self.kv.unwrap_or_else(|| self.dtype().into())
    }

    /// What rows that wait take instead of layers under [`Waiting::Shortcut`](reducers::Waiting::Shortcut); none unless
    /// [given](Self::set_shortcuts).
    pub fn shortcuts(&self) -> &Shortcuts {
        &self.shortcuts
    }

    /// Gives other shortcuts to the decoder.
    ///
    /// # Errors
    /// [`RerouteError::Shortcut`] for one that does not fit, and the decoder has those that it had.
    pub fn set_shortcuts(&mut self, shortcuts: Shortcuts) -> Result<(), RerouteError> {
        shortcuts.check(self.layers.len(), self.config.hidden_size)?;
        self.shortcuts = shortcuts;
        Ok(())
    }

    /// Says what type caches keep keys and values in; by default that of the weights. Attention reads what is
    /// kept, in a prefill too: a resumed conversation then sees the numbers that a prefill of it all would.
    ///
    /// # Errors
    /// [`RerouteError::KvType`] for one that the backend cannot keep, or that gradients do not pass.
    pub fn set_kv_type(&mut self, kv: Option<KvType>) -> Result<(), RerouteError> {
        self.kv = kv;
        self.check_kv_type()
    }

    /// Asked again before anything runs: on another backend it may not hold.
    fn check_kv_type(&self) -> Result<(), RerouteError> {
        let device = self.embed_tokens.device();
        self.kv.map_or(Ok(()), |kv| check_kv_type::<B>(kv, &device))
    }

    /// A decoder with the same embedding, norm and head around other layers.
    ///
    /// Layers may share their parameters (a clone is a reference), which makes a decoder of any
    /// depth from a few layers' memory.
    ///
    /// # Errors
    /// [`RerouteError::Config`] without a layer or with too many, [`RerouteError::Layer`] if one is of
    /// other sizes.
    pub fn with_layers(mut self, layers: Vec<DecoderLayer<B>>) -> Result<Self, RerouteError> {
        self.config.num_layers = layers.len();
        self.config.validate()?;
        for (layer, weights) in layers.iter().enumerate() {
            if let Some((what, given, expected)) = weights.misfit(&self.config) {
                return Err(RerouteError::Layer {
                    layer,
                    what,
                    given: format!("{given:?}"),
                    expected: format!("{expected:?}"),
                });
            }
        }
        self.layers = layers;
        Ok(self)
    }

    /// Embeds token ids.
    ///
    /// # Shapes
    /// - returns `[hidden_size, ids]`
    ///
    /// # Errors
    /// [`RerouteError::TokenId`], [`RerouteError::NoTokens`]
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor<B, 2>, RerouteError> {
        self.check_ids(ids.iter().copied())?;
        Ok(self.embed_tokens.embed(ids)?)
    }

    fn check_ids(&self, mut ids: impl ExactSizeIterator<Item = u32>) -> Result<(), RerouteError> {
        let vocab_size = self.config.vocab_size;
        if ids.len() == 0 {
            return Err(RerouteError::NoTokens);
        }
        match ids.find(|&id| id as usize >= vocab_size) {
            Some(id) => Err(RerouteError::TokenId { id, vocab_size }),
            None => Ok(()),
        }
    }

    /// Whether something is of the type of the weights.
    pub(crate) fn check_type(&self, what: &'static str, given: DType) -> Result<(), RerouteError> {
        let expected = self.dtype();
        match given == expected {
            true => Ok(()),
            false => Err(RerouteError::Type {
                what,
                given,
                expected,
            }),
        }
    }

    /// Whether prompt and schedule fit the decoder and each other.
    ///
    /// # Errors
    /// [`RerouteError::Prompt`] for a prompt that contradicts itself, [`RerouteError::Type`] for one in
    /// another type, [`RerouteError::ContextLength`], [`RerouteError::Renumber`], [`RerouteError::Reducer`]
    /// for a decision beyond the last layer, and [`RerouteError::Shortcut`] where one is missing.
    pub fn check(&self, prompt: &Prompt<B>, schedule: &Schedule) -> Result<(), RerouteError> {
        prompt.validate(&self.config)?;
        for (what, given) in prompt.types() {
            self.check_type(what, given)?;
        }
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
        schedule.check(&self.config.shape())?;
        self.check_shortcuts(schedule)
    }

    /// Whether a cache can be this decoder's, for so many samples.
    pub(crate) fn check_cache(
        &self,
        cache: &KvCache<B>,
        samples: usize,
    ) -> Result<(), RerouteError> {
        self.check_kv_type()?;
        let refused =
            |given: String, expected: String| Err(RerouteError::Cache { given, expected });
        if cache.samples() != samples {
            let expected = format!("{samples}, as the prompt has");
            return refused(format!("{} samples", cache.samples()), expected);
        }
        let (layers, format) = cache.format();
        if layers != self.layers.len() {
            let expected = format!("{} layers", self.layers.len());
            return refused(format!("{layers} layers"), expected);
        }
        let config = &self.config;
        let channels = [config.num_key_value_heads, config.head_dim];
        let expected = (channels, self.kv_type());
        let mut features = cache.pools().map(|pool| pool.hidden_states.dims()[0]);
        if let Some(other) = features.find(|&features| features != config.hidden_size) {
            let expected = format!("hidden_size {}", config.hidden_size);
            return refused(format!("hidden states of {other} features"), expected);
        }
        match format {
            Some(given) if given != expected => {
                let name = |([heads, channels], kv): ([usize; 2], KvType)| {
                    format!("{heads} heads of {channels} channels in {kv}")
                };
                refused(name(given), name(expected))
            }
            _ => Ok(()),
        }
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
    ///
    /// # Errors
    /// [`RerouteError::NoTokens`], [`RerouteError::TokenId`], [`RerouteError::Sample`],
    /// [`RerouteError::Truncated`], [`RerouteError::ContextLength`], and [`RerouteError::Cache`] for a
    /// cache of another decoder. A step that is refused leaves the cache as it was.
    pub fn decode(
        &self,
        tokens: &[(usize, u32)],
        cache: &mut KvCache<B>,
    ) -> Result<Tensor<B, 2>, RerouteError> {
        self.logits(self.feed(tokens, cache)?)
    }

    /// [`decode`](Self::decode) up to the last layer's output, for [`logits`](Self::logits) of a few rows.
    ///
    /// # Shapes
    /// - returns `[hidden_size, tokens]`
    pub fn feed(
        &self,
        tokens: &[(usize, u32)],
        cache: &mut KvCache<B>,
    ) -> Result<Tensor<B, 2>, RerouteError> {
        self.check_tokens(tokens, cache)?;
        let _span = tracing::debug_span!("decode", tokens = tokens.len()).entered();
        let device = self.embed_tokens.device();
        let ids: Vec<u32> = tokens.iter().map(|&(_, id)| id).collect();
        let mut hidden_states = self.embed_tokens.embed(&ids)?;
        let dtype = hidden_states.dtype();
        let next = tokens.iter().map(|&(sample, _)| cache.take_next(sample));
        let (rows, positions): (Vec<usize>, Vec<i64>) =
            next.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        let runs = runs(tokens, &rows);
        let mask = runs.iter().any(|run| run.rows.len() > 1).then(|| {
            let keys = rows.iter().max().map_or(0, |last| last + 1);
            CausalMask::new(keys, &device)
        });
        let lowered = |layer, cache: &KvCache<B>| -> Vec<i64> {
            let lowered = cache.lowered(layer);
            let tokens = tokens.iter().zip(&positions);
            tokens
                .map(|(&(sample, _), at)| at - lowered[sample])
                .collect()
        };
        let mut at = lowered(0, cache);
        let mut rope = self.rope_at(&at, dtype, &device);
        let kv = self.kv_type();

        for (index, layer) in self.layers.iter().enumerate() {
            let here = lowered(index, cache);
            if here != at {
                rope = self.rope_at(&here, dtype, &device);
                at = here;
            }
            let input = layer.enter(hidden_states, &rope);
            let queries = layer.self_attn.queries(input.normed.clone(), &rope);
            hidden_states =
                layer.forward(input, queries, &runs, cache.layer(index, kv), mask.as_ref())?;
        }
        Ok(hidden_states)
    }

    /// The rotary table of tokens, which have one position on all axes.
    fn rope_at(&self, positions: &[i64], dtype: DType, device: &B::Device) -> Rotary<B> {
        let rope = &self.config.rope;
        let positions = Tensor::<B, 1, Int>::from_data(positions, device).unsqueeze::<2>();
        rope.table(positions.repeat_dim(0, rope.axes()), dtype)
    }

    /// Whether tokens can be fed. Asked before any is taken: a refused step leaves the cache as it was.
    fn check_tokens(
        &self,
        tokens: &[(usize, u32)],
        cache: &KvCache<B>,
    ) -> Result<(), RerouteError> {
        self.check_ids(tokens.iter().map(|&(_, id)| id))?;
        self.check_cache(cache, cache.samples())?;
        let mut needed = vec![0; cache.samples()];
        for &(sample, _) in tokens {
            cache.check_sample(sample)?;
            if cache.known_position(sample).is_none() {
                return Err(RerouteError::Truncated { sample });
            }
            needed[sample] = needed[sample].max(cache.next_position(sample) as usize) + 1;
        }
        let needed = needed.into_iter().max().unwrap_or(0);
        let (available, limit) = self.config.context();
        match needed > available {
            true => Err(RerouteError::ContextLength {
                needed,
                available,
                limit,
            }),
            false => Ok(()),
        }
    }

    /// Final norm and vocabulary head.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, rows]`
    /// - returns `[rows, vocab_size]`
    ///
    /// # Errors
    /// [`RerouteError::Prompt`] for other features, or no rows; [`RerouteError::Type`].
    pub fn logits(&self, hidden_states: Tensor<B, 2>) -> Result<Tensor<B, 2>, RerouteError> {
        let [features, rows] = hidden_states.dims();
        if features != self.config.hidden_size || rows == 0 {
            return Err(RerouteError::Prompt(format!(
                "{rows} rows of {features} features are given to the head, which takes hidden_size {}",
                self.config.hidden_size
            )));
        }
        self.check_type("hidden states", hidden_states.dtype())?;
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        Ok(head.logits(self.norm.forward(hidden_states)))
    }

    /// Why these logits of a sample are no numbers. Reads its whole cache back.
    pub(crate) fn not_a_number(
        &self,
        cache: &KvCache<B>,
        sample: usize,
        logits: &[f32],
    ) -> Result<RerouteError, RerouteError> {
        // The norm behind the last layer makes all of a row NaN if one number is not finite.
        let behind = match logits.iter().all(|logit| logit.is_nan()) {
            true => Place::Layer(self.layers.len() - 1),
            false => Place::Head,
        };
        Ok(RerouteError::NotANumber {
            sample,
            place: cache.first_not_finite(sample)?.unwrap_or(behind),
            dtype: self.dtype(),
            kv: self.kv_type(),
        })
    }
}

/// Whether a backend can keep keys and values in a type.
///
/// # Errors
/// [`RerouteError::KvType`] if not; for bytes under `Autodiff<B>`.
pub fn check_kv_type<B: Backend>(kv: KvType, device: &B::Device) -> Result<(), RerouteError> {
    let usage = B::dtype_usage(device, kv.dtype());
    let reason = match kv {
        KvType::Float(dtype) if !dtype.is_float() => "they are floats, or bytes with scales",
        KvType::Int8 if B::ad_enabled(device) => "gradients do not pass through bytes",
        _ if !usage.contains(DTypeUsage::Storage) => "the backend does not have it",
        _ => return Ok(()),
    };
    Err(RerouteError::KvType { kv, reason })
}

/// Neighbouring tokens of one sample; `rows` are those that the tokens take in their samples.
fn runs(tokens: &[(usize, u32)], rows: &[usize]) -> Vec<Run> {
    let mut start = 0;
    let run = |tokens: &[(usize, u32)]| {
        let packed = start..start + tokens.len();
        start = packed.end;
        Run {
            sample: tokens[0].0,
            rows: rows[packed.clone()].to_vec(),
            queries: packed.clone(),
            packed,
        }
    };
    tokens.chunk_by(|a, b| a.0 == b.0).map(run).collect()
}
