//! One running batch: requests come and go while others run, each with its own pictures, routing,
//! sampling and limits.
//!
//! ```no_run
//! use reroute_zoo::session::{Event, Request, Session, SessionOptions, Turn};
//! use reroute_zoo::{Question, Schedule, Vlm, ZooError};
//!
//! fn answers<B: burn::tensor::backend::Backend>(
//!     vlm: &Vlm<B>,
//!     questions: &[Question],
//! ) -> Result<Vec<String>, ZooError> {
//!     let mut session = Session::new(vlm, SessionOptions::default())?;
//!     let mut ids = Vec::new();
//!     for question in questions {
//!         let turns = vec![Turn::from(question)];
//!         ids.push(session.admit(Request::new(turns, Schedule::dense(), vlm.generation_defaults()))?);
//!     }
//!     let mut texts = vec![String::new(); questions.len()];
//!     while !session.is_idle() {
//!         for event in session.step() {
//!             match event {
//!                 Event::Finished { id, answer, .. } => {
//!                     // Whoever is done first comes first.
//!                     let at = ids.iter().position(|other| *other == id);
//!                     texts[at.expect("it was admitted")] = answer.text;
//!                 }
//!                 Event::Failed { error, .. } => return Err(error),
//!                 _ => {}
//!             }
//!         }
//!     }
//!     Ok(texts)
//! }
//! ```
//!
//! A step runs a few layers of the prefill that is on its way, and one token of every answer that goes on.
//! A prompt is never cut between its rows, because a decision ranks all of them; so running answers wait a
//! few layers, never a prefill. Pictures go through the tower one a step. They are preprocessed when a
//! request is admitted, under a [`Service`] in the thread that asks.
//!
//! A request may borrow its plan or scorer, which then must outlive the session; owned ones (`plan.clone()`,
//! an `Arc`) need not.
//!
//! **Equal answers.** Every prompt is prefilled by itself, and what an answer attends to is its own. Only
//! the products with the weights see the rows of all running answers at once, and a backend may round
//! differently for another number of rows. Bounds that a test keeps, in largest logits of a row: 2·10⁻⁶ in
//! f32 (found: 4·10⁻⁷ on `flex`), which changes a token only where two are as good as equal, 2⁻¹⁰ in f16 and
//! 2⁻⁷ in bf16, a last place (found: nothing). With [`SessionOptions::apart`] every
//! answer is computed as if it were alone, bit for bit, and the weights are read once for each; prompts
//! then do not go on from others, either, because fewer rows may round differently, too.
//!
//! **Caches.** A picture that was seen before skips the tower. A prompt that begins like one that has
//! ended goes on from its keys and values, where that is the same computation: without decisions or under
//! *reroute* as [`Decoder::resume`](reroute::Decoder::resume) says, under *remove* up to the first picture.

mod answering;
mod desk;
mod event;
mod memory;
mod outgoing;
mod past;
mod pictures;
mod prefixes;
mod recent;
mod request;
mod run;
mod service;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::backend::Backend;
use reroute::{Batch, FinishReason, Prefilling};

use crate::{Answer, VisualTokens, Vlm, ZooError};
use answering::{Answering, Prefilled};
use desk::{Desk, Ready};
use memory::Need;
use prefixes::Prefixes;

pub use event::{Event, RequestId};
pub use memory::MemoryLimit;
pub use past::Past;
pub use request::{Part, Request, Turn};
pub use service::{Answers, Asking, Service};

/// How a session runs.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// What it may take of memory; `None` counts nothing.
    pub memory: Option<MemoryLimit>,
    /// Bytes of pictures that are kept for requests to come, and as many of prompts; 0 keeps none.
    pub cache_bytes: u64,
    /// Requests that wait to be started by a step, in the order in which they came; a further one is refused.
    pub max_waiting: usize,
    /// Answers that are generated side by side; further requests wait.
    pub max_answers: usize,
    /// Layers of a prefill in one step: what a running answer waits for a prompt at most.
    pub layers_per_step: usize,
    /// Compute every answer as if it were alone: one by one, and no prompt from the keys and values of
    /// another.
    pub apart: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            memory: None,
            cache_bytes: 256 << 20,
            max_waiting: 1024,
            max_answers: 64,
            layers_per_step: 2,
            apart: false,
        }
    }
}

/// One running batch; see the [module](self).
pub struct Session<'v, B: Backend> {
    vlm: &'v Vlm<B>,
    desk: Arc<Desk<B>>,
    requests: u64,
    waiting: VecDeque<Waiting<'v, B>>,
    prefilling: Option<Underway<'v, B>>,
    batch: Batch<B>,
    /// One for each answer of the batch.
    answers: Vec<Answering<'v>>,
    prefixes: Prefixes<B>,
}

/// A request that is to be prefilled.
struct Waiting<'v, B: Backend> {
    id: RequestId,
    ready: Ready<'v, B>,
    /// How many of its pictures are seen.
    seen: usize,
    /// Their tokens.
    tokens: VisualTokens<B>,
    /// What that took.
    vision: Duration,
}

/// A request that is being prefilled.
struct Underway<'v, B: Backend> {
    id: RequestId,
    request: Request<'v, B>,
    ids: Vec<u32>,
    need: Need,
    prefilled: Prefilled,
    prefilling: Prefilling<'v, B>,
    elapsed: Duration,
}

impl<'v, B: Backend> Session<'v, B> {
    /// A session without requests.
    ///
    /// # Errors
    /// [`ZooError::Memory`] if not even the weights fit.
    pub fn new(vlm: &'v Vlm<B>, options: SessionOptions) -> Result<Self, ZooError> {
        Ok(Self::at(vlm, Desk::new(vlm, options)?))
    }

    /// The same where nobody counts memory.
    pub(crate) fn unlimited(vlm: &'v Vlm<B>, options: SessionOptions) -> Self {
        Self::at(vlm, Desk::unlimited(vlm, options))
    }

    /// Runs what was made ready at this desk.
    fn at(vlm: &'v Vlm<B>, desk: Arc<Desk<B>>) -> Self {
        Self {
            requests: 0,
            waiting: VecDeque::new(),
            prefilling: None,
            batch: Batch::new(vlm.model().decoder()),
            answers: Vec::new(),
            prefixes: Prefixes::new(desk.options.cache_bytes),
            vlm,
            desk,
        }
    }

    /// Takes a request. It is preprocessed here, so that a picture or a text that cannot be is refused at
    /// once; the rest happens in [`step`](Self::step).
    ///
    /// # Errors
    /// What is wrong with the request; [`ZooError::Memory`] if it could never fit, with the figures;
    /// [`ZooError::Busy`] if too many wait.
    pub fn admit(&mut self, request: Request<'v, B>) -> Result<RequestId, ZooError> {
        self.desk.check_room(self.waiting.len())?;
        let ready = self.desk.prepare(self.vlm, request)?;
        Ok(self.take(ready))
    }

    /// Takes a request that was made ready at its desk.
    fn take(&mut self, ready: Ready<'v, B>) -> RequestId {
        self.requests += 1;
        let id = RequestId(self.requests);
        self.waiting.push_back(Waiting {
            id,
            ready,
            seen: 0,
            tokens: VisualTokens::default(),
            vision: Duration::ZERO,
        });
        id
    }

    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.prefilling.is_none() && self.answers.is_empty()
    }

    /// Requests that wait, and answers that are being generated.
    pub fn load(&self) -> (usize, usize) {
        let underway = usize::from(self.prefilling.is_some());
        (self.waiting.len() + underway, self.answers.len())
    }

    /// Bytes of keys and values of running answers, and of caches.
    pub fn bytes(&self) -> u64 {
        let cache = self.batch.cache();
        let running = (0..cache.samples()).map(|sample| cache.allocated_bytes(sample));
        running.sum::<u64>() + self.desk.pictures.bytes() + self.prefixes.bytes()
    }

    /// Goes on: sees a picture, starts what fits or runs a few layers of a prefill, and a token of every
    /// answer.
    ///
    /// A device that does not answer fails everything that runs; requests that wait may still be served.
    pub fn step(&mut self) -> Vec<Event<B>> {
        let mut events = Vec::new();
        self.advance(self.desk.options.layers_per_step.max(1), &mut events);
        self.decode(&mut events);
        self.make_room(Need::default());
        events
    }

    /// Serves one request to its end; nothing else runs. `on_text` receives the answer piece by piece.
    pub(crate) fn serve(
        &mut self,
        request: Request<'v, B>,
        mut on_text: impl FnMut(&str),
    ) -> Result<(Answer, Option<Past<B>>), ZooError> {
        self.admit(request)?;
        loop {
            for event in self.step() {
                match event {
                    Event::Token { text, .. } if text.is_empty() => {}
                    Event::Token { text, .. } => on_text(&text),
                    Event::Finished { answer, past, .. } => return Ok((*answer, past)),
                    Event::Failed { error, .. } => return Err(error),
                }
            }
        }
    }

    /// Prefills everything that fits, before any token.
    pub(crate) fn prefill_all(&mut self) -> Vec<Event<B>> {
        let mut events = Vec::new();
        loop {
            self.advance(usize::MAX, &mut events);
            if self.prefilling.is_none() && !self.has_room() {
                return events;
            }
        }
    }

    /// Ends a request, whatever it was at, and gives its memory back: its answers so far that had not ended,
    /// each with its index; nothing if it had none, or is not known.
    pub fn cancel(&mut self, id: RequestId) -> Vec<(usize, Answer)> {
        self.waiting.retain(|waiting| waiting.id != id);
        self.prefilling.take_if(|underway| underway.id == id);
        let mut answers = Vec::new();
        for at in (0..self.answers.len()).rev() {
            let index = self.answers[at].index;
            if self.answers[at].id == id
                && let Some((answer, _)) = self.leave(at, FinishReason::Cancelled)
            {
                answers.insert(0, (index, answer));
            }
        }
        answers
    }
}

impl<B: Backend> fmt::Debug for Session<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut session = f.debug_struct("Session");
        let (waiting, answers) = self.load();
        session
            .field("waiting", &waiting)
            .field("answers", &answers);
        session.finish_non_exhaustive()
    }
}

/// Threads may share a model and hand a session over, on any backend.
#[expect(dead_code, reason = "compiling it is the test")]
fn of_threads<B: Backend>() {
    fn shared<T: Send + Sync>() {}
    fn handed_over<T: Send>() {}
    shared::<Vlm<B>>();
    shared::<Service<B>>();
    handed_over::<Session<'_, B>>();
    handed_over::<Request<'_, B>>();
    handed_over::<Event<B>>();
    handed_over::<Answers<B>>();
}
