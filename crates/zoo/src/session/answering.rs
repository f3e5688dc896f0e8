use std::sync::Arc;
use std::time::Duration;

use burn::tensor::backend::Backend;
use reroute::{Chosen, FinishReason, Generation, KvCache, RoutingTrace};

use super::event::RequestId;
use super::outgoing::Outgoing;
use super::past::{Past, Row};
use crate::{Answer, KeptVisuals, TextStream, Timings, View, Vlm};

/// What all answers to one prompt have in common.
pub(super) struct Prefilled {
    pub(super) views: Vec<View>,
    pub(super) kept: Option<KeptVisuals>,
    pub(super) prompt_rows: usize,
    pub(super) visual_tokens: usize,
    pub(super) trace: RoutingTrace,
    pub(super) kv_rows: Vec<usize>,
    pub(super) kv_bytes: Vec<u64>,
    pub(super) timings: Timings,
    /// What stands in the rows of the prompt.
    pub(super) rows: Vec<Row>,
    /// Whether the rows of the answer stand where they would in a longer prompt.
    pub(super) keeps_answer: bool,
    /// Whether a later request may find it.
    pub(super) is_shared: bool,
    pub(super) keep_past: bool,
    /// Bytes that each answer may grow to.
    pub(super) most_bytes: u64,
}

/// An answer on its way.
pub(super) struct Answering<'v> {
    pub(super) id: RequestId,
    /// Which of the request's answers.
    pub(super) index: usize,
    pub(super) prefilled: Arc<Prefilled>,
    stream: TextStream<'v>,
    outgoing: Outgoing,
    pub(super) decode: Duration,
}

impl<'v> Answering<'v> {
    pub(super) fn new<B: Backend>(
        vlm: &'v Vlm<B>,
        id: RequestId,
        index: usize,
        prefilled: Arc<Prefilled>,
        stop: &[String],
    ) -> Self {
        Self {
            id,
            index,
            prefilled,
            stream: vlm.tokenizer().stream(),
            outgoing: Outgoing::new(stop),
            decode: Duration::ZERO,
        }
    }

    /// What goes out for a token, and why the answer ends with it, if it does.
    pub(super) fn push(&mut self, chosen: &Chosen) -> (String, Option<FinishReason>) {
        let piece = self.stream.push(chosen.token);
        let mut text = self.outgoing.push(&piece);
        if self.outgoing.stopped() {
            return (text, Some(FinishReason::Stop));
        }
        if chosen.finish.is_some() {
            text.push_str(&self.flush());
        }
        (text, chosen.finish)
    }

    /// What goes out when nothing follows.
    fn flush(&mut self) -> String {
        let rest = self.stream.rest();
        let text = self.outgoing.push(&rest);
        text + &self.outgoing.finish()
    }

    /// The answer, as far as it has come.
    pub(super) fn finish(mut self, generation: Generation, finish: FinishReason) -> Answer {
        self.flush();
        let prefilled = &*self.prefilled;
        let (cells, trace) = (prefilled.cells(), prefilled.trace.clone());
        let (text, stopped_by) = self.outgoing.into_text();
        Answer {
            text,
            stopped_by,
            tokens: generation.tokens,
            logprobs: generation.logprobs,
            logits: generation.logits,
            finish,
            prompt_rows: prefilled.prompt_rows,
            visual_tokens: prefilled.visual_tokens,
            views: prefilled.views.clone(),
            cells,
            trace,
            kv_rows: prefilled.kv_rows.clone(),
            kv_bytes: prefilled.kv_bytes.clone(),
            timings: Timings {
                decode: self.decode,
                ..prefilled.timings
            },
        }
    }
}

impl Prefilled {
    /// See [`Answer::cells`].
    fn cells(&self) -> Vec<(usize, Option<usize>)> {
        let kept = self.kept.as_ref();
        let mut kept = kept.map(|kept| [kept.images.iter(), kept.videos.iter()]);
        let cells = self.views.iter().enumerate().map(|(view, seen)| {
            let kind = usize::from(seen.time.is_some());
            let kept = kept.as_mut().and_then(|kept| kept[kind].next());
            let places = match kept {
                Some(kept) => kept.places.clone(),
                None => (0..seen.token_count()).map(Some).collect(),
            };
            places.into_iter().map(move |place| (view, place))
        });
        cells.flatten().collect()
    }

    /// What an answer leaves behind.
    pub(super) fn past<B: Backend>(
        &self,
        model: u64,
        tokens: &[u32],
        mut cache: KvCache<B>,
    ) -> Past<B> {
        let mut rows = self.rows.clone();
        if self.keeps_answer {
            rows.extend(tokens.iter().map(|&id| Row::Text(id)));
        }
        // The last token has not been fed, or the answer is computed again where it stands in the text.
        rows.truncate(cache.rows(0));
        // There is one sample.
        let _ = cache.truncate(0, rows.len());
        let _ = cache.compact(0);
        Past { model, cache, rows }
    }
}
