use std::ops::ControlFlow;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::host::read_back;
use crate::{Decoder, KvCache, RerouteError, Sampler, SamplingOptions};

/// When and how to generate.
#[derive(Debug, Clone)]
pub struct GenerationOptions {
    /// Tokens to generate at most, per sample; 0 generates none. The default is
    /// [`DEFAULT_NEW_TOKENS`](Self::DEFAULT_NEW_TOKENS).
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// A sample ends when it generates one of these.
    pub stop_tokens: Vec<u32>,
    /// Also return the logits behind every generated token.
    pub logits: bool,
}

impl GenerationOptions {
    /// Tokens to generate at most where nobody says how many.
    pub const DEFAULT_NEW_TOKENS: usize = 256;
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: Self::DEFAULT_NEW_TOKENS,
            sampling: SamplingOptions::default(),
            stop_tokens: Vec::new(),
            logits: false,
        }
    }
}

/// What one sample generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The tokens, including the stop token if there was one.
    pub tokens: Vec<u32>,
    /// Logits behind each token, `[tokens][vocab_size]`, if asked for.
    pub logits: Vec<Vec<f32>>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// A stop token was generated.
    Stop,
    /// `max_new_tokens` were generated.
    Length,
    /// The model has no further position.
    Context,
    /// The caller asked to stop.
    Cancelled,
}

/// Continues prefilled prompts.
///
/// `logits` (`[samples, vocab_size]`) and `cache` come from [`Decoder::prefill`]; `prompts` are the
/// token ids that count as seen for the repetition penalty. `on_token` is called with (sample,
/// token) as soon as a token is chosen; breaking ends all samples, and it is not called again.
///
/// # Errors
/// Of one sample: [`RerouteError::NotANumber`] if its logits are not finite; the others go on. Of all:
/// options out of range, arguments that do not belong together, a device that does not answer.
pub fn generate<B: Backend>(
    decoder: &Decoder<B>,
    logits: Tensor<B, 2>,
    cache: &mut KvCache<B>,
    prompts: &[Vec<u32>],
    options: &GenerationOptions,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Result<Generation, RerouteError>>, RerouteError> {
    let (samples, vocab_size) = (cache.samples(), decoder.config().vocab_size);
    if prompts.len() != samples || logits.dims() != [samples, vocab_size] {
        return Err(RerouteError::Prompt(format!(
            "{samples} samples are cached and the vocabulary has {vocab_size} tokens, but logits are \
             {:?}, and {} prompts were given",
            logits.dims(),
            prompts.len()
        )));
    }
    let mut writers = (0..samples)
        .map(|sample| Writer::new(sample, &prompts[sample], options))
        .collect::<Result<Vec<_>, _>>()?;
    let mut logits = logits;
    'tokens: loop {
        let active = (0..samples).filter(|&sample| writers[sample].end.is_none());
        let active: Vec<usize> = active.collect();
        if active.is_empty() {
            break;
        }
        let mut rows = read_back(logits, "logits")?;
        let mut next = Vec::with_capacity(active.len());
        for (sample, row) in active.into_iter().zip(rows.chunks_exact_mut(vocab_size)) {
            let writer = &mut writers[sample];
            let Some(token) = writer.choose(row) else {
                writer.end = Some(Err(decoder.not_a_number(cache, sample, row)?));
                continue;
            };
            if on_token(sample, token).is_break() {
                break 'tokens;
            }
            let has_room = cache.next_position(sample) < decoder.config().context().0 as i64;
            writer.end = writer.ends(token, has_room).map(Ok);
            if writer.end.is_none() {
                next.push((sample, token));
            }
        }
        if next.is_empty() {
            break;
        }
        logits = decoder.decode(&next, cache)?;
    }
    Ok(writers.into_iter().map(Writer::into_generation).collect())
}

/// One sample's growing answer.
struct Writer<'a> {
    options: &'a GenerationOptions,
    sampler: Sampler,
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
    /// How it ended.
    end: Option<Result<FinishReason, RerouteError>>,
}

impl<'a> Writer<'a> {
    fn new(
        sample: usize,
        prompt: &[u32],
        options: &'a GenerationOptions,
    ) -> Result<Self, RerouteError> {
        let mut sampler = Sampler::new(&options.sampling, sample)?;
        sampler.see(prompt);
        Ok(Self {
            options,
            sampler,
            tokens: Vec::new(),
            logits: Vec::new(),
            end: (options.max_new_tokens == 0).then_some(Ok(FinishReason::Length)),
        })
    }

    /// The next token; `None` if the logits are not finite, which are then as they were.
    fn choose(&mut self, row: &mut [f32]) -> Option<u32> {
        let logits = self.options.logits.then(|| row.to_vec());
        let token = self.sampler.next(row)?;
        self.tokens.push(token);
        self.logits.extend(logits);
        Some(token)
    }

    /// Why the answer ends with this token, if it does; `has_room` says that it could be fed.
    fn ends(&self, token: u32, has_room: bool) -> Option<FinishReason> {
        if self.options.stop_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else if self.tokens.len() >= self.options.max_new_tokens {
            Some(FinishReason::Length)
        } else if !has_room {
            Some(FinishReason::Context)
        } else {
            None
        }
    }

    fn into_generation(self) -> Result<Generation, RerouteError> {
        Ok(Generation {
            tokens: self.tokens,
            logits: self.logits,
            finish: self.end.unwrap_or(Ok(FinishReason::Cancelled))?,
        })
    }
}
