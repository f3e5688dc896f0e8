use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use reroute::{
    FinishReason, GenerationOptions, KvCache, Prefill, PrefillOptions, Prompt, RoutingTrace,
    generate,
};
use vision_encoder::RgbImage;

use crate::messages::{Content, Message, Role};
use crate::tokenizer::trimmed;
use crate::{KeptVisuals, Routing, VideoTime, View, Visual, Vlm, ZooError};

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
        let visual = |view: &View| match &view.time {
            None => Content::Image,
            Some(VideoTime { seconds, .. }) => Content::Video {
                seconds: seconds.clone(),
            },
        };
        let text = Content::Text(self.text.clone());
        Message {
            role: Role::User,
            content: views.iter().map(visual).chain([text]).collect(),
        }
    }
}

/// The answer to a [`Question`].
#[derive(Debug, Clone)]
pub struct Answer {
    /// Generated text, without special tokens.
    pub text: String,
    /// Generated token ids, including the stop token.
    pub tokens: Vec<u32>,
    /// Why generation ended.
    pub finish: FinishReason,
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
    /// Wall-clock times of the whole batch.
    pub timings: Timings,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Vision tower and projector.
    pub vision: Duration,
    /// All prompts through the decoder, routing included.
    pub prefill: Duration,
    /// All generated tokens.
    pub decode: Duration,
}

/// Prompts that have been prefilled.
pub(crate) struct Prefilled<B: Backend> {
    /// Token ids of each sample.
    pub(crate) ids: Vec<Vec<u32>>,
    /// Views of each sample.
    pub(crate) views: Vec<Vec<View>>,
    pub(crate) reduction: Option<KeptVisuals>,
    pub(crate) prompt: Prompt<B>,
    pub(crate) prefill: Prefill<B>,
    pub(crate) timings: Timings,
}

impl<B: Backend> Vlm<B> {
    /// Answers one question. `on_text` receives the answer piece by piece as it is generated.
    pub fn ask<'a>(
        &self,
        question: &Question,
        routing: impl Into<Routing<'a, B>>,
        options: &GenerationOptions,
        on_text: impl FnMut(&str),
    ) -> Result<Answer, ZooError> {
        let questions = std::slice::from_ref(question);
        let mut stream = self.tokenizer().stream(trimmed(on_text));
        let mut on_token = |_, id| {
            stream.push(id);
            ControlFlow::Continue(())
        };
        let mut answers = self.ask_batch(questions, routing, options, &mut on_token)?;
        stream.finish();
        Ok(answers.remove(0))
    }

    /// Answers several questions in one batch, each routed by its own scores. `on_token` receives
    /// (question, token id) as soon as a token is chosen; breaking ends all answers.
    pub fn ask_batch<'a>(
        &self,
        questions: &[Question],
        routing: impl Into<Routing<'a, B>>,
        options: &GenerationOptions,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Answer>, ZooError> {
        let routing = routing.into();
        let (mut ids, mut views, mut pixels) = (Vec::new(), Vec::new(), Vec::new());
        let mut texts = Vec::new();
        for question in questions {
            let prepared = self.prepare(&question.visuals)?;
            let (seen, prepared): (Vec<View>, Vec<_>) = prepared.into_iter().unzip();
            ids.push(self.encode_messages(&[question.message(&seen)], &seen)?);
            texts.extend(seen.iter().map(|_| question.text.as_str()));
            views.push(seen);
            pixels.extend(prepared);
        }
        let mut timings = Timings::default();
        let started = Instant::now();
        let tokens = self.see(&views.concat(), pixels, &texts, routing.encoder.as_ref())?;
        self.finish(started, &mut timings.vision);

        let started = Instant::now();
        let (prompt, _) = self.prompt(&ids, &views, &tokens)?;
        let decoder = self.model().decoder();
        let Routing {
            schedule, scorer, ..
        } = routing;
        let cache = KvCache::new(decoder.layers().len(), prompt.samples.len())?;
        let options_of_prefill = PrefillOptions::default();
        let prefill = decoder.resume_by(scorer, cache, &prompt, schedule, options_of_prefill)?;
        self.finish(started, &mut timings.prefill);
        let prefilled = Prefilled {
            ids,
            views,
            reduction: tokens.kept,
            prompt,
            prefill,
            timings,
        };
        Ok(self.answer(prefilled, options, on_token)?.0)
    }

    /// Generates the answers to prefilled prompts.
    pub(crate) fn answer(
        &self,
        prefilled: Prefilled<B>,
        options: &GenerationOptions,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<(Vec<Answer>, KvCache<B>), ZooError> {
        let Prefilled {
            ids,
            views,
            reduction,
            prompt,
            prefill,
            mut timings,
        } = prefilled;
        let mut kept = reduction.map(|kept| [kept.images, kept.videos].map(Vec::into_iter));
        let decoder = self.model().decoder();
        let started = Instant::now();
        let mut cache = prefill.cache;
        let held = |sample| (cache.lengths(sample), cache.bytes(sample));
        let held: Vec<(Vec<usize>, Vec<u64>)> = (0..ids.len()).map(held).collect();
        let generations = generate(decoder, prefill.logits, &mut cache, &ids, options, on_token)?;
        self.finish(started, &mut timings.decode);

        let mut answers = Vec::new();
        for (sample, (generation, views)) in generations.into_iter().zip(views).enumerate() {
            let generation = generation?;
            let layout = &prompt.samples[sample];
            let (kv_rows, kv_bytes) = held[sample].clone();
            let text = self.tokenizer().decode(&generation.tokens)?;
            let cells = views.iter().enumerate().map(|(view, seen)| {
                let kind = usize::from(seen.time.is_some());
                let kept = kept.as_mut().and_then(|kept| kept[kind].next());
                let places = match kept {
                    Some(kept) => kept.places,
                    None => (0..seen.token_count()).map(Some).collect(),
                };
                places.into_iter().map(move |place| (view, place))
            });
            let cells = cells.flatten().collect();
            let computed = prefill.trace.rows.iter().map(|rows| vec![rows[sample]]);
            answers.push(Answer {
                text: text.trim().to_string(),
                tokens: generation.tokens,
                finish: generation.finish,
                prompt_rows: layout.rows,
                visual_tokens: layout.visual.len(),
                views,
                cells,
                trace: RoutingTrace {
                    decisions: prefill.trace.of_sample(sample).cloned().collect(),
                    rows: computed.collect(),
                },
                kv_rows,
                kv_bytes,
                timings,
            });
        }
        Ok((answers, cache))
    }

    /// Waits for the device, so that the time belongs to what was asked of it.
    pub(crate) fn finish(&self, started: Instant, elapsed: &mut Duration) {
        // A failed synchronisation shows again, with its reason, when results are read.
        let _ = B::sync(self.device());
        *elapsed = started.elapsed();
    }
}
