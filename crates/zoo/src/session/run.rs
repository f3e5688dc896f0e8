//! What happens in a step.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use reducers::{Positions, Score, Stage};
use reroute::{FinishReason, KvCache, RerouteError};

use super::answering::{Answering, Prefilled};
use super::desk::Ready;
use super::memory::Need;
use super::past::{Past, rows};
use super::pictures::Shown;
use super::{Event, RequestId, Session, Underway, Waiting};
use crate::vlm::sample;
use crate::{Answer, Timings, View, ZooError};

/// Whether a decision is by chance: it would fall otherwise among other rows.
fn draws(stage: &Stage) -> bool {
    matches!(stage.score, Score::Random(_))
}

impl<'v, B: Backend> Session<'v, B> {
    /// Whether a further request may start, as far as its answers go.
    pub(super) fn has_room(&self) -> bool {
        let Some(next) = self.waiting.front() else {
            return false;
        };
        let running = self.answers.len();
        running.saturating_add(next.ready.request.answers) <= self.desk.max_answers()
            && self.fits(next.ready.need)
    }

    /// Whether what runs leaves room for more, caches forgotten.
    fn fits(&self, need: Need) -> bool {
        let Some(limit) = self.desk.options.memory else {
            return true;
        };
        self.reserved().saturating_add(need.total()) <= limit.bytes
    }

    /// Bytes of the weights, of the prefill on its way, and those that running answers may grow to.
    fn reserved(&self) -> u64 {
        let underway = self.prefilling.as_ref();
        let underway = underway.map(|underway| underway.need.total());
        let running = self.answers.iter();
        let running = running.map(|answer| answer.prefilled.most_bytes);
        running
            .chain(underway)
            .fold(self.desk.weights, u64::saturating_add)
    }

    /// Sees a picture of the next request if there is room for it, or starts it if there is none left to be
    /// seen, or runs layers of the one that is on its way.
    pub(super) fn advance(&mut self, layers: usize, events: &mut Vec<Event<B>>) {
        while self.prefilling.is_none()
            && self.has_room()
            && let Some(mut waiting) = self.waiting.pop_front()
        {
            let id = waiting.id;
            if waiting.seen < waiting.ready.shown.len() {
                match self.see_next(&mut waiting) {
                    Ok(()) => self.waiting.push_front(waiting),
                    Err(error) => events.push(Event::Failed { id, error }),
                }
                return;
            }
            match self.start(waiting) {
                Ok(underway) => self.prefilling = Some(underway),
                Err(error) => events.push(Event::Failed { id, error }),
            }
        }
        let Some(mut underway) = self.prefilling.take() else {
            return;
        };
        let id = underway.id;
        match underway.run(layers) {
            Ok(()) if underway.prefilling.layers_left() > 0 => self.prefilling = Some(underway),
            Ok(()) => {
                if let Err(error) = self.join(underway) {
                    events.push(Event::Failed { id, error });
                }
            }
            Err(error) => events.push(Event::Failed { id, error }),
        }
    }

    /// Sees one more picture.
    fn see_next(&mut self, waiting: &mut Waiting<'v, B>) -> Result<(), ZooError> {
        self.make_room(waiting.ready.need);
        let started = Instant::now();
        let shown = &mut waiting.ready.shown[waiting.seen];
        let step = waiting.ready.request.routing.encoder.as_ref();
        let tokens = self.desk.pictures.see(self.vlm, shown, step)?;
        let before = mem::take(&mut waiting.tokens);
        waiting.tokens = before.followed_by(tokens)?;
        waiting.seen += 1;
        let mut elapsed = Duration::ZERO;
        self.vlm.finish(started, &mut elapsed);
        waiting.vision += elapsed;
        Ok(())
    }

    /// Packs the prompt of a request whose pictures are seen, and looks for what is known of it.
    fn start(&mut self, waiting: Waiting<'v, B>) -> Result<Underway<'v, B>, ZooError> {
        let Waiting {
            id,
            ready,
            tokens,
            vision,
            ..
        } = waiting;
        let Ready {
            mut request,
            ids,
            shown,
            need,
        } = ready;
        self.make_room(need);
        let vlm = self.vlm;
        let keys: Vec<_> = shown
            .iter()
            .map(|shown| (shown.view.clone(), shown.key))
            .collect();
        let is_shared = self.desk.options.cache_bytes > 0 && shown.iter().all(Shown::is_known);
        let views: Vec<View> = keys.iter().map(|(view, _)| view.clone()).collect();
        let started = Instant::now();
        let all = ([ids], [views]);
        let (prompt, mut kept) = vlm.prompt(&all.0, &all.1, &tokens)?;
        let ([ids], [views]) = all;
        let schedule = request.routing.schedule.clone().into_owned();
        let rows = rows(
            &kept.remove(0),
            vlm.config().slots(),
            &keys,
            tokens.kept.as_ref(),
        );
        let layout = &prompt.samples[0];
        let prefilled = Prefilled {
            keeps_answer: vlm.config().keeps_answer(&sample(&[], &views)),
            prompt_rows: layout.rows,
            visual_tokens: layout.visual.len(),
            kept: tokens.kept,
            is_shared: is_shared
                && !self.desk.options.apart
                && request.routing.scorer.is_none()
                && !schedule.stages().iter().any(draws)
                && schedule.positions() == Positions::Gap,
            keep_past: request.keep_past,
            most_bytes: need.kv,
            views,
            rows,
            timings: Timings {
                vision,
                ..Timings::default()
            },
            trace: Default::default(),
            kv_rows: Vec::new(),
            kv_bytes: Vec::new(),
        };
        let decoder = vlm.model().decoder();
        let past = match request.past.take() {
            Some(mut past) => {
                let known = past.shared(&prefilled.rows);
                past.cache.truncate(0, known)?;
                past.cache.compact(0)?;
                Some(past.cache)
            }
            None if prefilled.is_shared => {
                let first_visual = layout.visual.first().copied();
                self.prefixes.find(&prefilled.rows, &schedule, first_visual)
            }
            None => None,
        };
        let cache = match past {
            Some(cache) => cache,
            None => KvCache::new(decoder.layers().len(), 1)?,
        };
        let keep_pool = self.desk.keeps_pool(&request);
        let prefilling = decoder.begin(cache, prompt, schedule, keep_pool)?;
        Ok(Underway {
            id,
            request,
            ids,
            need,
            prefilled,
            prefilling,
            elapsed: started.elapsed(),
        })
    }

    /// Forgets what was kept for requests to come, as far as those that run, and one more, need the memory.
    pub(super) fn make_room(&mut self, need: Need) {
        let Some(limit) = self.desk.options.memory else {
            return;
        };
        let taken = self.reserved().saturating_add(need.total());
        let left = limit.bytes.saturating_sub(taken);
        let pictures = &self.desk.pictures;
        pictures.shrink(left / 2);
        self.prefixes.shrink(left.saturating_sub(pictures.bytes()));
    }

    /// The answers to a prefilled prompt begin.
    fn join(&mut self, underway: Underway<'v, B>) -> Result<(), ZooError> {
        let started = Instant::now();
        let vlm = self.vlm;
        let decoder = vlm.model().decoder();
        let Underway {
            id,
            request,
            ids,
            mut prefilled,
            prefilling,
            elapsed,
            ..
        } = underway;
        let mut prefill = prefilling.finish(request.routing.scorer.as_deref())?;
        prefilled.trace = mem::take(&mut prefill.trace);
        prefilled.kv_rows = prefill.cache.lengths(0);
        prefilled.kv_bytes = prefill.cache.bytes(0);
        let answers = request.answers;
        self.batch
            .join(decoder, prefill, &ids, &request.options, answers)?;
        prefilled.timings.prefill = elapsed + started.elapsed();
        let prefilled = Arc::new(prefilled);
        for index in 0..answers {
            let prefilled = prefilled.clone();
            self.answers
                .push(Answering::new(vlm, id, index, prefilled, &request.stop));
        }
        Ok(())
    }

    /// One token of every answer.
    pub(super) fn decode(&mut self, events: &mut Vec<Event<B>>) {
        let empty = (0..self.answers.len()).filter_map(|at| Some((at, Ok(self.batch.finish(at)?))));
        let empty = empty.collect();
        self.end(empty, events);
        let started = Instant::now();
        let decoder = self.vlm.model().decoder();
        let chosen = match self.batch.step(decoder, self.desk.options.apart) {
            Ok(chosen) => chosen,
            Err(error) => return self.fail_all(error.to_string(), events),
        };
        let elapsed = started.elapsed();
        let mut ended = Vec::new();
        for answer in &mut self.answers {
            answer.decode += elapsed;
        }
        for (at, chosen) in chosen {
            let answer = &mut self.answers[at];
            match chosen {
                Ok(chosen) => {
                    let (text, finish) = answer.push(&chosen);
                    events.push(Event::Token {
                        id: answer.id,
                        index: answer.index,
                        token: chosen.token,
                        text,
                        logprobs: chosen.logprobs,
                    });
                    ended.extend(finish.map(|finish| (at, Ok(finish))));
                }
                Err(error) => ended.push((at, Err(error))),
            }
        }
        self.end(ended, events);
    }
}

impl<'v, B: Backend> Session<'v, B> {
    /// Answers end, by their places in the batch; a request of which one fails does as a whole.
    fn end(
        &mut self,
        ended: Vec<(usize, Result<FinishReason, RerouteError>)>,
        events: &mut Vec<Event<B>>,
    ) {
        let mut failed = Vec::new();
        let mut finished = Vec::new();
        // From the last: the places of the others hold.
        for (at, finish) in ended.into_iter().rev() {
            let (id, index) = (self.answers[at].id, self.answers[at].index);
            match finish {
                Err(error) => failed.push((id, error)),
                Ok(finish) => {
                    let left = self.leave(at, finish);
                    finished.extend(left.map(|(answer, past)| Event::Finished {
                        id,
                        index,
                        answer: Box::new(answer),
                        past,
                    }));
                }
            }
        }
        events.extend(finished.into_iter().rev());
        for (id, error) in failed.into_iter().rev() {
            if self.answers.iter().any(|answer| answer.id == id) {
                self.cancel(id);
                let error = error.into();
                events.push(Event::Failed { id, error });
            }
        }
    }

    /// Takes an answer out of the batch; what it leaves behind is kept for those who asked.
    pub(super) fn leave(
        &mut self,
        at: usize,
        finish: FinishReason,
    ) -> Option<(Answer, Option<Past<B>>)> {
        let answer = self.answers.remove(at);
        let (generation, cache) = self.batch.leave(at).ok()?;
        let (prefilled, is_first) = (answer.prefilled.clone(), answer.index == 0);
        let model = self.vlm.identity();
        let past = |tokens: &[u32]| prefilled.past(model, tokens, cache);
        let past = match prefilled.keep_past {
            true => Some(past(&generation.tokens)),
            false => {
                // A prompt that has ended, not one that was cut off or has failed.
                if prefilled.is_shared && is_first && finish != FinishReason::Cancelled {
                    self.prefixes.keep(past(&generation.tokens));
                }
                None
            }
        };
        Some((answer.finish(generation, finish), past))
    }

    /// Nothing that runs can go on.
    fn fail_all(&mut self, reason: String, events: &mut Vec<Event<B>>) {
        let mut ids: Vec<RequestId> = self.answers.iter().map(|answer| answer.id).collect();
        ids.dedup();
        for id in ids {
            self.cancel(id);
            let reason = reason.clone();
            events.push(Event::Failed {
                id,
                error: ZooError::Session { reason },
            });
        }
    }
}

impl<B: Backend> Underway<'_, B> {
    /// Runs so many layers more.
    fn run(&mut self, layers: usize) -> Result<(), ZooError> {
        let started = Instant::now();
        let scorer = self.request.routing.scorer.as_deref();
        for _ in 0..layers.min(self.prefilling.layers_left()) {
            self.prefilling.step(scorer, false)?;
        }
        self.elapsed += started.elapsed();
        Ok(())
    }
}
