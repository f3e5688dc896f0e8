//! What happens in a step.

use std::mem;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::backend::Backend;
use reducers::{Action, Positions, Rest, Score, Stage};
use reroute::{FinishReason, KvCache, RerouteError};

use super::answering::{Answering, Prefilled};
use super::memory::Need;
use super::past::{Past, rows};
use super::pictures::Shown;
use super::{Event, Request, RequestId, Session, Underway, Waiting};
use crate::messages::Role;
use crate::vlm::sample;
use crate::{Answer, Timings, View, ZooError};

/// Most bytes of pixels that wait for the tower; those beyond are made again when it is their turn.
const MAX_WAITING_BYTES: u64 = 256 << 20;

/// Whether a decision is by chance: it would fall otherwise among other rows.
fn draws(stage: &Stage) -> bool {
    matches!(stage.score, Score::Random(_))
}

impl<'v, B: Backend> Session<'v, B> {
    /// Preprocesses a request and counts what it needs.
    pub(super) fn prepare(&mut self, request: Request<'v, B>) -> Result<Waiting<'v, B>, ZooError> {
        let vlm = self.vlm;
        if request.answers == 0 || request.answers > self.options.max_answers {
            return Err(ZooError::Answers {
                asked: request.answers,
                most: self.options.max_answers,
            });
        }
        if request
            .turns
            .last()
            .is_none_or(|turn| turn.role != Role::User)
        {
            return Err(ZooError::Turns);
        }
        let foreign = |past: &Past<B>| past.model != vlm.identity();
        if request.past.as_ref().is_some_and(foreign) {
            return Err(ZooError::Past);
        }
        let sampling = &request.options.sampling;
        sampling.validate()?;
        sampling.check_vocabulary(vlm.config().decoder().vocab_size)?;
        let step = request.routing.encoder.as_ref();
        let keyed = self.options.cache_bytes > 0 || request.keep_past || request.past.is_some();
        let mut shown = Vec::new();
        for turn in &request.turns {
            let text = turn.said();
            for visual in turn.visuals() {
                shown.push(self.pictures.show(vlm, visual, &text, step, keyed)?);
            }
        }
        let views: Vec<View> = shown.iter().map(|shown| shown.view.clone()).collect();
        let mut seen = views.iter();
        let messages = request.turns.iter().map(|turn| turn.message(&mut seen));
        let messages: Vec<_> = messages.collect();
        let ids = vlm.encode_messages(&messages, &views)?;
        let (available, limit) = vlm.config().decoder().context();
        if ids.len() > available && request.routing.encoder.is_none() {
            return Err(ZooError::Reroute(RerouteError::ContextLength {
                needed: ids.len(),
                available,
                limit,
            }));
        }
        let need = self.need(&request, ids.len(), &views);
        if let Some(limit) = self.options.memory
            && self.weights.saturating_add(need.total()) > limit.bytes
        {
            return Err(ZooError::Memory {
                needed: need.total(),
                what: "this request",
                available: limit.bytes - self.weights,
            });
        }
        let pixels = self.waiting.iter().flat_map(|waiting| &waiting.shown);
        let pixels: u64 = pixels.map(Shown::waiting_bytes).sum();
        if pixels > MAX_WAITING_BYTES {
            shown.iter_mut().for_each(Shown::forget_pixels);
        }
        self.requests += 1;
        Ok(Waiting {
            id: RequestId(self.requests),
            request,
            ids,
            shown,
            need,
        })
    }

    /// What a request needs; nothing if nobody counts.
    fn need(&self, request: &Request<'v, B>, rows: usize, views: &[View]) -> Need {
        let Some(limit) = self.options.memory else {
            return Need::default();
        };
        let keep = request.routing.encoder.as_ref();
        let keep = keep.filter(|step| step.rest == Rest::Drop);
        let entering = |view: &View| {
            let tokens = view.token_count();
            keep.map_or(tokens, |step| step.keep.count(tokens))
        };
        let entering = views.iter().map(entering).fold(0, usize::saturating_add);
        // Beyond the context nothing is generated.
        let room = self.vlm.config().decoder().context().0;
        let new_tokens = request
            .options
            .max_new_tokens
            .min(room.saturating_sub(rows) + 1);
        let answers = (request.answers, new_tokens);
        let keep_pool = self.keeps_pool(request);
        let prompt = (rows, views, entering);
        Need::of(
            self.vlm,
            &limit,
            prompt,
            &request.routing.schedule,
            answers,
            keep_pool,
        )
    }

    /// Whether a prefill keeps what a later one chooses from.
    fn keeps_pool(&self, request: &Request<'v, B>) -> bool {
        let later = request.keep_past || self.options.cache_bytes > 0;
        later && request.routing.schedule.action() == Action::Reroute
    }

    /// Whether a further request may start, as far as its answers go.
    pub(super) fn has_room(&self) -> bool {
        let Some(next) = self.waiting.front() else {
            return false;
        };
        let running = self.answers.len();
        running.saturating_add(next.request.answers) <= self.options.max_answers
            && self.fits(next.need)
    }

    /// Whether what runs leaves room for more, caches forgotten.
    fn fits(&self, need: Need) -> bool {
        let Some(limit) = self.options.memory else {
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
            .fold(self.weights, u64::saturating_add)
    }

    /// Starts the next request if there is room, and runs layers of the one that is on its way.
    pub(super) fn advance(&mut self, layers: usize, events: &mut Vec<Event<B>>) {
        while self.prefilling.is_none()
            && self.has_room()
            && let Some(waiting) = self.waiting.pop_front()
        {
            let id = waiting.id;
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

    /// Sees the pictures, and looks for what is known of the prompt.
    fn start(&mut self, waiting: Waiting<'v, B>) -> Result<Underway<'v, B>, ZooError> {
        let Waiting {
            id,
            mut request,
            ids,
            shown,
            need,
        } = waiting;
        self.make_room(need);
        let vlm = self.vlm;
        let mut timings = Timings::default();
        let started = Instant::now();
        let keys: Vec<_> = shown
            .iter()
            .map(|shown| (shown.view.clone(), shown.key))
            .collect();
        let is_shared = self.options.cache_bytes > 0 && shown.iter().all(Shown::is_known);
        let views: Vec<View> = keys.iter().map(|(view, _)| view.clone()).collect();
        let tokens = self
            .pictures
            .see(vlm, shown, request.routing.encoder.as_ref())?;
        vlm.finish(started, &mut timings.vision);

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
                && !self.options.apart
                && request.routing.scorer.is_none()
                && !schedule.stages().iter().any(draws)
                && schedule.positions() == Positions::Gap,
            keep_past: request.keep_past,
            most_bytes: need.kv,
            views,
            rows,
            timings,
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
        let keep_pool = self.keeps_pool(&request);
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
        let Some(limit) = self.options.memory else {
            return;
        };
        let taken = self.reserved().saturating_add(need.total());
        let left = limit.bytes.saturating_sub(taken);
        self.pictures.shrink(left / 2);
        self.prefixes.shrink(left - self.pictures.bytes());
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
        let chosen = match self.batch.step(decoder, self.options.apart) {
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
