//! What a request becomes before a session runs it.

use std::sync::Arc;

use burn::tensor::backend::Backend;
use reducers::{Action, Rest};
use reroute::RerouteError;

use super::memory::{self, Need};
use super::past::Past;
use super::pictures::{Pictures, Shown};
use super::{Request, SessionOptions};
use crate::messages::Role;
use crate::{View, Vlm, ZooError};

/// Where requests are checked and preprocessed: by the session, or by the threads that ask a service.
pub(super) struct Desk<B: Backend> {
    pub(super) options: SessionOptions,
    /// Bytes of the weights.
    pub(super) weights: u64,
    pub(super) pictures: Pictures<B>,
}

/// A request that can be run.
pub(super) struct Ready<'a, B: Backend> {
    pub(super) request: Request<'a, B>,
    pub(super) ids: Vec<u32>,
    pub(super) shown: Vec<Shown>,
    pub(super) need: Need,
}

impl<B: Backend> Desk<B> {
    /// # Errors
    /// [`ZooError::Memory`] if not even the weights fit.
    pub(super) fn new(vlm: &Vlm<B>, options: SessionOptions) -> Result<Arc<Self>, ZooError> {
        let weights = memory::weights(vlm);
        if let Some(limit) = options.memory.filter(|limit| weights > limit.bytes) {
            return Err(ZooError::Memory {
                needed: weights,
                what: "the weights",
                available: limit.bytes,
            });
        }
        Ok(Self::of(vlm, options, weights))
    }

    /// The same where nobody counts memory.
    pub(super) fn unlimited(vlm: &Vlm<B>, options: SessionOptions) -> Arc<Self> {
        Self::of(vlm, options, 0)
    }

    fn of(vlm: &Vlm<B>, options: SessionOptions, weights: u64) -> Arc<Self> {
        Arc::new(Self {
            pictures: Pictures::new(vlm, options.cache_bytes),
            options,
            weights,
        })
    }

    /// # Errors
    /// [`ZooError::Busy`] if no more may wait.
    pub(super) fn check_room(&self, waiting: usize) -> Result<(), ZooError> {
        match waiting >= self.options.max_waiting.max(1) {
            true => Err(ZooError::Busy { waiting }),
            false => Ok(()),
        }
    }

    /// Preprocesses a request and counts what it needs.
    pub(super) fn prepare<'a>(
        &self,
        vlm: &Vlm<B>,
        request: Request<'a, B>,
    ) -> Result<Ready<'a, B>, ZooError> {
        self.check(vlm, &request)?;
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
        let need = self.need(vlm, &request, ids.len(), &views);
        if let Some(limit) = self.options.memory
            && self.weights.saturating_add(need.total()) > limit.bytes
        {
            return Err(ZooError::Memory {
                needed: need.total(),
                what: "this request",
                available: limit.bytes - self.weights,
            });
        }
        Ok(Ready {
            request,
            ids,
            shown,
            need,
        })
    }

    /// Answers side by side.
    pub(super) fn max_answers(&self) -> usize {
        self.options.max_answers.max(1)
    }

    /// What can be told of a request without its pictures.
    fn check(&self, vlm: &Vlm<B>, request: &Request<'_, B>) -> Result<(), ZooError> {
        let (asked, most) = (request.answers, self.max_answers());
        if asked == 0 || asked > most {
            return Err(ZooError::Answers { asked, most });
        }
        let last = request.turns.last();
        if last.is_none_or(|turn| turn.role != Role::User) {
            return Err(ZooError::Turns);
        }
        let foreign = |past: &Past<B>| past.model != vlm.identity();
        if request.past.as_ref().is_some_and(foreign) {
            return Err(ZooError::Past);
        }
        let sampling = &request.options.sampling;
        sampling.validate()?;
        sampling.check_vocabulary(vlm.config().decoder().vocab_size)?;
        Ok(())
    }

    /// What a request needs; nothing if nobody counts.
    fn need(&self, vlm: &Vlm<B>, request: &Request<'_, B>, rows: usize, views: &[View]) -> Need {
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
        let room = vlm.config().decoder().context().0;
        let most = request.options.max_new_tokens;
        let new_tokens = most.min(room.saturating_sub(rows) + 1);
        Need::of(
            vlm,
            &limit,
            (rows, views, entering),
            &request.routing.schedule,
            (request.answers, new_tokens),
            self.keeps_pool(request),
        )
    }

    /// Whether a prefill keeps what a later one chooses from.
    pub(super) fn keeps_pool(&self, request: &Request<'_, B>) -> bool {
        let later = request.keep_past || self.options.cache_bytes > 0;
        later && request.routing.schedule.action() == Action::Reroute
    }
}
