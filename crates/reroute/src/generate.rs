use std::mem;
use std::ops::ControlFlow;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::host::read_back;
use crate::sampling::TokenLogprobs;
use crate::{Decoder, KvCache, Prefill, RerouteError, Sampler, SamplingOptions};

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
    /// Also return how likely each token was, and so many of the likeliest.
    pub logprobs: Option<usize>,
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
            logprobs: None,
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
    /// How likely each token was, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// A stop token was generated, or a stop string.
    Stop,
    /// `max_new_tokens` were generated.
    Length,
    /// The model has no further position.
    Context,
    /// The caller asked to stop.
    Cancelled,
}

/// Answers that are generated side by side, each with options of its own. They join and leave between
/// two tokens.
///
/// An answer is called by its index; when one leaves, those behind it move up by one.
pub struct Batch<B: Backend> {
    cache: KvCache<B>,
    /// One for each sample of the cache.
    writers: Vec<Writer>,
}

/// A token that an answer has grown by.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// The token.
    pub token: u32,
    /// How likely it was, if asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Why the answer ends with it, if it does.
    pub finish: Option<FinishReason>,
}

/// An answer by its index, and the token that it has grown by, or why it has failed.
pub type Step = (usize, Result<Chosen, RerouteError>);

impl<B: Backend> Batch<B> {
    /// Nobody's answers yet.
    pub fn new(decoder: &Decoder<B>) -> Self {
        Self {
            cache: KvCache::of(decoder.layers().len(), 0),
            writers: Vec::new(),
        }
    }

    /// Number of answers.
    pub fn len(&self) -> usize {
        self.writers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.writers.is_empty()
    }

    /// Keys and values of the answers, in order.
    pub fn cache(&self) -> &KvCache<B> {
        &self.cache
    }

    /// So many answers go on behind the prefill of one prompt, as the last of the batch. `prompt` are the
    /// token ids that count as seen for the repetition penalty; answer `i` draws from the random numbers
    /// `seed + i`.
    ///
    /// # Errors
    /// Options out of range; the prefill of another decoder, or of several samples. The batch is then as
    /// it was.
    pub fn join(
        &mut self,
        decoder: &Decoder<B>,
        prefill: Prefill<B>,
        prompt: &[u32],
        options: &GenerationOptions,
        answers: usize,
    ) -> Result<(), RerouteError> {
        let Prefill {
            logits, mut cache, ..
        } = prefill;
        let vocab_size = decoder.config().vocab_size;
        decoder.check_cache(&cache, 1)?;
        check_logits(&logits, [1, vocab_size])?;
        options.sampling.check_vocabulary(vocab_size)?;
        let writer = |stream| Writer::new(stream, prompt, options.clone());
        let mut writers = (0..answers).map(writer).collect::<Result<Vec<_>, _>>()?;
        // The last token is not fed, and there may be no position for so many.
        let room = decoder.config().context().0;
        let room = room.saturating_sub(cache.next_position(0) as usize);
        cache.reserve(0, options.max_new_tokens.saturating_sub(1).min(room))?;
        let row = read_back(logits, "logits")?;
        for writer in &mut writers {
            writer.start(row.clone());
        }
        for _ in 0..answers {
            self.cache.extend(cache.clone())?;
        }
        self.writers.extend(writers);
        Ok(())
    }

    /// Why an answer has ended, if it has.
    pub fn finish(&self, index: usize) -> Option<FinishReason> {
        self.writers.get(index)?.finish
    }

    /// Every answer that goes on grows by a token: its index, and the token.
    ///
    /// With `apart` every answer runs through the decoder by itself: how many others there are then
    /// changes no bit of it in any type, and the weights are read once for each.
    ///
    /// # Errors
    /// Of one answer, which ends with it: [`RerouteError::NotANumber`] if its logits are not finite. Of
    /// all: a device that does not answer.
    pub fn step(&mut self, decoder: &Decoder<B>, apart: bool) -> Result<Vec<Step>, RerouteError> {
        let token = |(index, writer): (usize, &Writer)| match writer.next {
            Next::Feed(token) => Some((index, token)),
            _ => None,
        };
        let fed: Vec<(usize, u32)> = self.writers.iter().enumerate().filter_map(token).collect();
        let together = if apart { 1 } else { fed.len().max(1) };
        for fed in fed.chunks(together) {
            let logits = decoder.decode(fed, &mut self.cache)?;
            let logits = read_back(logits, "logits")?;
            let rows = logits.chunks_exact(decoder.config().vocab_size);
            for (&(index, _), row) in fed.iter().zip(rows) {
                self.writers[index].next = Next::Choose(row.to_vec());
            }
        }
        let mut chosen = Vec::new();
        for (index, writer) in self.writers.iter_mut().enumerate() {
            let Next::Choose(row) = mem::replace(&mut writer.next, Next::Nothing) else {
                continue;
            };
            let has_room = self.cache.next_position(index) < decoder.config().context().0 as i64;
            let token = match writer.choose(row, has_room) {
                Ok(token) => Ok(token),
                Err(row) => Err(decoder.not_a_number(&self.cache, index, &row)?),
            };
            chosen.push((index, token));
        }
        Ok(chosen)
    }

    /// Takes an answer out, as far as it has come; its cache can be resumed from.
    ///
    /// # Errors
    /// [`RerouteError::Sample`] if there is no such answer.
    pub fn leave(&mut self, index: usize) -> Result<(Generation, KvCache<B>), RerouteError> {
        let cache = self.cache.remove(index)?;
        Ok((self.writers.remove(index).into_generation(), cache))
    }
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
    if prompts.len() != samples {
        return Err(RerouteError::Prompt(format!(
            "{samples} samples are cached, but {} prompts were given",
            prompts.len()
        )));
    }
    check_logits(&logits, [samples, vocab_size])?;
    options.sampling.check_vocabulary(vocab_size)?;
    let writers = prompts.iter().enumerate();
    let writers = writers.map(|(sample, prompt)| Writer::new(sample, prompt, options.clone()));
    let mut writers = writers.collect::<Result<Vec<_>, _>>()?;
    let rows = read_back(logits, "logits")?;
    for (writer, row) in writers.iter_mut().zip(rows.chunks_exact(vocab_size)) {
        writer.start(row.to_vec());
    }
    let mut batch = Batch {
        cache: mem::replace(cache, KvCache::of(0, 0)),
        writers,
    };
    let mut failed = Vec::new();
    failed.resize_with(samples, || None);
    let outcome = batch.run(decoder, &mut failed, on_token);
    *cache = batch.cache;
    outcome?;
    let writers = batch.writers.into_iter().zip(failed);
    let generation = |(writer, failed): (Writer, Option<RerouteError>)| match failed {
        Some(error) => Err(error),
        None => Ok(writer.into_generation()),
    };
    Ok(writers.map(generation).collect())
}

/// One row of logits for each sample, one number for each token.
fn check_logits<B: Backend>(
    logits: &Tensor<B, 2>,
    expected: [usize; 2],
) -> Result<(), RerouteError> {
    match logits.dims() == expected {
        true => Ok(()),
        false => Err(RerouteError::Prompt(format!(
            "logits are {:?}, expected {expected:?}: a row for each sample that is cached",
            logits.dims()
        ))),
    }
}

impl<B: Backend> Batch<B> {
    /// Steps until all answers have ended or `on_token` breaks.
    fn run(
        &mut self,
        decoder: &Decoder<B>,
        failed: &mut [Option<RerouteError>],
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<(), RerouteError> {
        loop {
            let chosen = self.step(decoder, false)?;
            if chosen.is_empty() {
                return Ok(());
            }
            let mut chosen = chosen.into_iter();
            while let Some((sample, token)) = chosen.next() {
                match token.map(|chosen| on_token(sample, chosen.token)) {
                    Ok(ControlFlow::Continue(())) => {}
                    Ok(ControlFlow::Break(())) => {
                        self.writers[sample].finish = None;
                        // Nobody has been told of the others.
                        let others = chosen.filter(|(_, token)| token.is_ok());
                        others.for_each(|(sample, _)| self.writers[sample].forget());
                        return Ok(());
                    }
                    Err(error) => failed[sample] = Some(error),
                }
            }
        }
    }
}

/// One sample's growing answer.
struct Writer {
    options: GenerationOptions,
    sampler: Sampler,
    next: Next,
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
    logprobs: Vec<TokenLogprobs>,
    finish: Option<FinishReason>,
}

/// What comes next for an answer.
enum Next {
    /// A token from these logits.
    Choose(Vec<f32>),
    /// The logits behind this token.
    Feed(u32),
    /// It has ended.
    Nothing,
}

impl Writer {
    fn new(
        stream: usize,
        prompt: &[u32],
        options: GenerationOptions,
    ) -> Result<Self, RerouteError> {
        let mut sampler = Sampler::new(&options.sampling, stream)?;
        sampler.see(prompt);
        Ok(Self {
            sampler,
            next: Next::Nothing,
            tokens: Vec::new(),
            logits: Vec::new(),
            logprobs: Vec::new(),
            finish: (options.max_new_tokens == 0).then_some(FinishReason::Length),
            options,
        })
    }

    /// Begins with the logits behind the prompt, unless nothing is to be generated.
    fn start(&mut self, row: Vec<f32>) {
        if self.finish.is_none() {
            self.next = Next::Choose(row);
        }
    }

    /// Chooses the next token; `has_room` says that it could be fed. Logits that are not finite come back
    /// as they were.
    fn choose(&mut self, mut row: Vec<f32>, has_room: bool) -> Result<Chosen, Vec<f32>> {
        let (logits, count) = (self.options.logits, self.options.logprobs);
        let as_they_come = (logits || count.is_some()).then(|| row.clone());
        let Some(token) = self.sampler.next(&mut row) else {
            return Err(row);
        };
        self.tokens.push(token);
        let mut logprobs = None;
        if let Some(row) = as_they_come {
            logprobs = count.and_then(|count| TokenLogprobs::of(&row, token, count));
            self.logits.extend(logits.then_some(row));
        }
        self.logprobs.extend(logprobs.clone());
        self.finish = self.ends(token, has_room);
        self.next = match self.finish {
            Some(_) => Next::Nothing,
            None => Next::Feed(token),
        };
        Ok(Chosen {
            token,
            logprobs,
            finish: self.finish,
        })
    }

    /// Takes the last token back.
    fn forget(&mut self) {
        self.tokens.pop();
        self.logits.pop();
        self.logprobs.pop();
        self.finish = None;
    }

    /// Why the answer ends with this token, if it does.
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

    fn into_generation(self) -> Generation {
        Generation {
            tokens: self.tokens,
            logits: self.logits,
            logprobs: self.logprobs,
            finish: self.finish.unwrap_or(FinishReason::Cancelled),
        }
    }
}
