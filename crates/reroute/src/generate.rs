use std::ops::ControlFlow;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::router::read_back;
use crate::{Decoder, KvCache, RerouteError, Sampler, SamplingOptions};

/// When and how to generate.
#[derive(Debug, Clone, Default)]
pub struct GenerationOptions {
    /// Tokens to generate at most, per sample.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// A sample ends when it generates one of these.
    pub stop_tokens: Vec<u32>,
    /// Also return the logits behind every generated token.
    pub logits: bool,
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
/// token) as soon as a token is chosen; breaking ends all samples.
pub fn generate<B: Backend>(
    decoder: &Decoder<B>,
    logits: Tensor<B, 2>,
    cache: &mut KvCache<B>,
    prompts: &[Vec<u32>],
    options: &GenerationOptions,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Generation>, RerouteError> {
    let samples = cache.samples();
    if prompts.len() != samples || logits.dims()[0] != samples {
        return Err(RerouteError::Prompt(format!(
            "{samples} samples are cached, but {} rows of logits and {} prompts were given",
            logits.dims()[0],
            prompts.len()
        )));
    }
    let mut writers = (0..samples)
        .map(|sample| Writer::new(sample, &prompts[sample], options))
        .collect::<Result<Vec<_>, _>>()?;
    let mut active: Vec<usize> = (0..samples).collect();
    let mut logits = logits;
    if options.max_new_tokens == 0 {
        active.clear();
    }
    while !active.is_empty() {
        let vocab_size = logits.dims()[1];
        let rows = read_back(logits, "logits")?;
        let mut next = Vec::with_capacity(active.len());
        for (&sample, row) in active.iter().zip(rows.chunks_exact(vocab_size)) {
            let writer = &mut writers[sample];
            let token = writer.choose(row)?;
            if on_token(sample, token).is_break() {
                writer.finish = Some(FinishReason::Cancelled);
            }
            let position = cache.next_position(sample) as usize;
            if writer.ends(token, position, decoder.config().max_position_embeddings) {
                continue;
            }
            next.push((sample, token));
        }
        if writers
            .iter()
            .any(|writer| writer.finish == Some(FinishReason::Cancelled))
        {
            break;
        }
        active = next.iter().map(|&(sample, _)| sample).collect();
        if active.is_empty() {
            break;
        }
        logits = decoder.decode(&next, cache)?;
    }
    Ok(writers.into_iter().map(Writer::into_generation).collect())
}

/// One sample's growing answer.
struct Writer<'a> {
    sample: usize,
    options: &'a GenerationOptions,
    sampler: Sampler,
    /// Prompt and generated tokens.
    seen: Vec<u32>,
    prompt: usize,
    logits: Vec<Vec<f32>>,
    finish: Option<FinishReason>,
}

impl<'a> Writer<'a> {
    fn new(
        sample: usize,
        prompt: &[u32],
        options: &'a GenerationOptions,
    ) -> Result<Self, RerouteError> {
        Ok(Self {
            sample,
            options,
            sampler: Sampler::new(&options.sampling, sample)?,
            seen: prompt.to_vec(),
            prompt: prompt.len(),
            logits: Vec::new(),
            finish: None,
        })
    }

    fn choose(&mut self, row: &[f32]) -> Result<u32, RerouteError> {
        let token =
            self.sampler
                .next(&mut row.to_vec(), &self.seen)
                .ok_or(RerouteError::NotANumber {
                    sample: self.sample,
                })?;
        self.seen.push(token);
        if self.options.logits {
            self.logits.push(row.to_vec());
        }
        Ok(token)
    }

    fn ends(&mut self, token: u32, position: usize, positions: usize) -> bool {
        let reason = if self.options.stop_tokens.contains(&token) {
            FinishReason::Stop
        } else if self.seen.len() - self.prompt >= self.options.max_new_tokens {
            FinishReason::Length
        } else if position >= positions {
            FinishReason::Context
        } else {
            return self.finish.is_some();
        };
        self.finish.get_or_insert(reason);
        true
    }

    fn into_generation(mut self) -> Generation {
        Generation {
            tokens: self.seen.split_off(self.prompt),
            logits: self.logits,
            finish: self.finish.unwrap_or(FinishReason::Cancelled),
        }
    }
}
