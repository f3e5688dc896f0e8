use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use reroute::{FinishReason, GenerationOptions, RoutingTrace, TokenLogprobs};
use vision_encoder::RgbImage;

use crate::messages::Message;
use crate::session::{Event, Request, Session, SessionOptions, Turn};
use crate::{Routing, View, Visual, Vlm, ZooError};

/// A question about any number of images and videos.
#[derive(Debug, Clone)]
pub struct Question {
    /// What it is about, in the order in which the text speaks of them.
    pub visuals: Vec<Visual>,
    /// The user's text. Special tokens in it are ordinary text.
    pub text: String,
}

impl Question {
    /// A question about images.
    pub fn about(images: Vec<RgbImage>, text: impl Into<String>) -> Self {
        Self {
            visuals: images.into_iter().map(Visual::Image).collect(),
            text: text.into(),
        }
    }

    /// The question as a turn of a conversation: what it is about, then the text.
    pub(crate) fn message(&self, views: &[View]) -> Message {
        Turn::from(self).message(&mut views.iter())
    }
}

/// The answer to a [`Question`].
#[derive(Debug, Clone)]
pub struct Answer {
    /// Generated text, without special tokens.
    pub text: String,
    /// Generated token ids, including the stop token, and those that made a stop string.
    pub tokens: Vec<u32>,
    /// How likely each token was, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Logits behind each token, `[tokens][vocab_size]`, if asked for.
    pub logits: Vec<Vec<f32>>,
    /// Why generation ended.
    pub finish: FinishReason,
    /// The stop string that ended it.
    pub stopped_by: Option<String>,
    /// Rows of the prompt; in a conversation, of all of it.
    pub prompt_rows: usize,
    /// Visual tokens of the prompt, after a reduction before the decoder.
    pub visual_tokens: usize,
    /// How each image and video of the prompt was seen.
    pub views: Vec<View>,
    /// Of each visual token of the prompt, the view it belongs to and its place there; `None` for a
    /// token without one (see [`reducers::encoder::Reduction`]).
    pub cells: Vec<(usize, Option<usize>)>,
    /// What routing did; decisions of this sample only. Its rows are those that were computed: in a
    /// conversation, earlier turns have computed the others.
    pub trace: RoutingTrace,
    /// Rows that each layer has cached after the prefill.
    pub kv_rows: Vec<usize>,
    /// Bytes of keys and values per layer after the prefill.
    pub kv_bytes: Vec<u64>,
    /// Where its time went.
    pub timings: Timings,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Vision tower and projector.
    pub vision: Duration,
    /// The prompt through the decoder, routing included.
    pub prefill: Duration,
    /// The generated tokens, side by side with those of others.
    pub decode: Duration,
}

impl<B: Backend> Vlm<B> {
    /// Answers one question. `on_text` receives the answer piece by piece as it is generated.
    pub fn ask<'a>(
        &'a self,
        question: &Question,
        routing: impl Into<Routing<'a, B>>,
        options: &GenerationOptions,
        on_text: impl FnMut(&str),
    ) -> Result<Answer, ZooError> {
        let request = Request::new(vec![question.into()], routing, options.clone());
        Ok(self.single(0).serve(request, on_text)?.0)
    }

    /// Answers several questions in one batch, each routed by its own scores. `on_token` receives
    /// (question, token id) as soon as a token is chosen; breaking ends all answers.
    ///
    /// # Errors
    /// That of the first question that fails; a [`Session`] goes on with the others.
    pub fn ask_batch<'a>(
        &'a self,
        questions: &[Question],
        routing: impl Into<Routing<'a, B>>,
        options: &GenerationOptions,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Answer>, ZooError> {
        let (mut session, routing) = (self.single(0), routing.into());
        let mut ids = Vec::new();
        for question in questions {
            let turns = vec![question.into()];
            ids.push(session.admit(Request::new(turns, routing.clone(), options.clone()))?);
        }
        let mut answers: Vec<Option<Answer>> = vec![None; questions.len()];
        let mut told = vec![0; questions.len()];
        let mut broken = false;
        let mut events = session.prefill_all();
        while !(broken || events.is_empty() && session.is_idle()) {
            for event in events {
                let of = |id| ids.iter().position(|&other| other == id).unwrap_or(0);
                match event {
                    Event::Token { id, token, .. } if !broken => {
                        told[of(id)] += 1;
                        broken = on_token(of(id), token).is_break();
                    }
                    Event::Token { .. } => {}
                    Event::Finished { id, answer, .. } => answers[of(id)] = Some(*answer),
                    Event::Failed { error, .. } => return Err(error),
                }
            }
            events = if broken { Vec::new() } else { session.step() };
        }
        let ended = answers.into_iter().zip(&ids).zip(told);
        let ended = ended.filter_map(|((answer, &id), told)| {
            let answer = answer.or_else(|| Some(session.cancel(id).pop()?.1))?;
            Some(self.cut(answer, told))
        });
        Ok(ended.collect())
    }

    /// An answer of which no more tokens have been told.
    fn cut(&self, answer: Answer, told: usize) -> Answer {
        if told == answer.tokens.len() {
            return answer;
        }
        let mut tokens = answer.tokens;
        tokens.truncate(told);
        let text = self.tokenizer().decode(&tokens).unwrap_or_default();
        Answer {
            text: text.trim().into(),
            tokens,
            finish: FinishReason::Cancelled,
            ..answer
        }
    }

    /// A session for what is asked at once; it keeps no more than so many bytes for what comes later.
    pub(crate) fn single(&self, cache_bytes: u64) -> Session<'_, B> {
        let options = SessionOptions {
            cache_bytes,
            max_waiting: usize::MAX,
            max_answers: usize::MAX,
            layers_per_step: usize::MAX,
            ..Default::default()
        };
        Session::unlimited(self, options)
    }

    /// Waits for the device, so that the time belongs to what was asked of it.
    pub(crate) fn finish(&self, started: Instant, elapsed: &mut Duration) {
        // A failed synchronisation shows again, with its reason, when results are read.
        let _ = B::sync(self.device());
        *elapsed = started.elapsed();
    }
}
