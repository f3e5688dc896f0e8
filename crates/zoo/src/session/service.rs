use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use burn::tensor::backend::Backend;

use super::desk::{Desk, Ready};
use super::{Event, Request, RequestId, Session, SessionOptions};
use crate::{Vlm, ZooError};

/// A session in a thread of its own, that any number of others ask.
///
/// When it is dropped, what runs is ended.
pub struct Service<B: Backend> {
    vlm: Arc<dyn Deref<Target = Vlm<B>> + Send + Sync>,
    desk: Arc<Desk<B>>,
    load: Arc<Load>,
    /// Behind a lock, so that every standard library shares it.
    inbox: Mutex<Option<Sender<Asked<B>>>>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// How many requests and answers a service has.
#[derive(Default)]
struct Load {
    /// Requests on their way to the session.
    asked: AtomicUsize,
    /// Requests that it has, and that no step has started.
    queued: AtomicUsize,
    /// What [`Session::load`] said last.
    waiting: AtomicUsize,
    running: AtomicUsize,
    /// What [`Session::bytes`] said last.
    bytes: AtomicU64,
}

impl Load {
    fn of(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::Relaxed)
    }
}

/// The place of a request on its way, which is given back however it ends.
struct Place(Arc<Load>);

impl Place {
    fn of(load: &Arc<Load>) -> Self {
        load.asked.fetch_add(1, Ordering::Relaxed);
        Self(load.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.asked.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Who is told of events, in the thread of the session.
type OnEvent<B> = Box<dyn FnMut(Event<B>) + Send>;

/// A request on its way to the session, and back.
struct Asked<B: Backend> {
    ready: Ready<'static, B>,
    answers: usize,
    place: Place,
    on_event: OnEvent<B>,
    gone: Arc<AtomicBool>,
}

/// A request that somebody waits for; see [`Service::ask_with`]. Dropped, it cancels the request.
#[derive(Debug)]
pub struct Asking {
    gone: Arc<AtomicBool>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
    }
}

/// What becomes of a request, as it comes: an iterator that ends with the request. Every answer ends with
/// [`Event::Finished`], or the request with [`Event::Failed`], also where the service ends before. Dropped
/// before, it cancels the request.
pub struct Answers<B: Backend> {
    events: Receiver<Event<B>>,
    _asking: Asking,
    /// Answers that are still to end.
    left: usize,
}

impl<B: Backend> Service<B> {
    /// Starts the thread; the model is an `Arc`, or lives as long as the program.
    ///
    /// # Errors
    /// Those of [`Session::new`]; [`ZooError::Session`] if there can be no further thread.
    pub fn start<V>(vlm: V, options: SessionOptions) -> Result<Self, ZooError>
    where
        V: Deref<Target = Vlm<B>> + Send + Sync + 'static,
    {
        let desk = Desk::new(&vlm, options)?;
        let vlm: Arc<dyn Deref<Target = Vlm<B>> + Send + Sync> = Arc::new(vlm);
        let load = Arc::new(Load::default());
        let (inbox, asked) = channel();
        let closing = Arc::new(AtomicBool::new(false));
        let (model, counter, told, closed) =
            (vlm.clone(), desk.clone(), load.clone(), closing.clone());
        let run = move || {
            // A rule of the caller's own may panic: what runs has failed, and others are served again.
            let serve = || {
                let session = Session::at(&model, counter.clone());
                serve(session, &asked, &told, &closed)
            };
            while catch_unwind(AssertUnwindSafe(serve)).is_err() {}
        };
        let thread = thread::Builder::new().name("reroute-session".into());
        let thread = thread.spawn(run).map_err(|error| ZooError::Session {
            reason: error.to_string(),
        })?;
        Ok(Self {
            vlm,
            desk,
            load,
            inbox: Mutex::new(Some(inbox)),
            closing,
            thread: Some(thread),
        })
    }

    /// Asks. The request is preprocessed in the thread that calls; one that is refused fails as its first
    /// event.
    pub fn ask(&self, request: Request<'static, B>) -> Answers<B> {
        let (events, received) = channel();
        let answers = request.answers;
        let tell = move |event| {
            // Whoever has gone is noticed by the session.
            let _ = events.send(event);
        };
        Answers {
            _asking: self.ask_with(request, tell),
            events: received,
            left: answers.max(1),
        }
    }

    /// The same where nobody waits in a thread: `on_event` is called for each event, in the thread of the session,
    /// whose steps wait for it; for that of a request that is refused before this returns. It is dropped when the
    /// request ends, also where a service ends before, and then was not called for the end of every answer.
    pub fn ask_with(
        &self,
        request: Request<'static, B>,
        on_event: impl FnMut(Event<B>) + Send + 'static,
    ) -> Asking {
        let mut on_event: OnEvent<B> = Box::new(on_event);
        let gone = Arc::new(AtomicBool::new(false));
        let answers = request.answers;
        let place = Place::of(&self.load);
        // Without its own.
        let before = Load::of(&self.load.asked).saturating_sub(1) + Load::of(&self.load.queued);
        let ready = self.desk.check_room(before);
        match ready.and_then(|()| self.desk.prepare(&self.vlm, request)) {
            Ok(ready) => self.send(Asked {
                ready,
                answers,
                place,
                on_event,
                gone: gone.clone(),
            }),
            Err(error) => {
                let id = RequestId::none();
                on_event(Event::Failed { id, error });
            }
        }
        Asking { gone }
    }

    /// Requests that wait, and answers that are being generated, as of the last step.
    pub fn load(&self) -> (usize, usize) {
        let load = &self.load;
        let waiting = Load::of(&load.asked) + Load::of(&load.waiting);
        (waiting, Load::of(&load.running))
    }

    /// Bytes of keys and values of running answers, and of caches, as of the last step.
    pub fn bytes(&self) -> u64 {
        self.load.bytes.load(Ordering::Relaxed)
    }

    fn send(&self, asked: Asked<B>) {
        if let Ok(inbox) = self.inbox.lock()
            && let Some(inbox) = &*inbox
        {
            // Without a thread behind it, its answers say so.
            let _ = inbox.send(asked);
        }
    }
}

impl<B: Backend> Drop for Service<B> {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        if let Ok(mut inbox) = self.inbox.lock() {
            inbox.take();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl<B: Backend> Iterator for Answers<B> {
    type Item = Event<B>;

    fn next(&mut self) -> Option<Event<B>> {
        if self.left == 0 {
            return None;
        }
        let event = self.events.recv().unwrap_or_else(|_| Event::Failed {
            id: RequestId::none(),
            error: ZooError::Session {
                reason: "the service has ended, or a rule in it has panicked".into(),
            },
        });
        match event {
            Event::Finished { .. } => self.left -= 1,
            Event::Failed { .. } => self.left = 0,
            Event::Token { .. } => {}
        }
        Some(event)
    }
}

/// Those who wait for events of a request.
struct Listener<B: Backend> {
    on_event: OnEvent<B>,
    gone: Arc<AtomicBool>,
    /// Answers that are still to end.
    answers: usize,
}

/// Runs a session until nobody can ask any more.
fn serve<B: Backend>(
    mut session: Session<'_, B>,
    inbox: &Receiver<Asked<B>>,
    load: &Load,
    closing: &AtomicBool,
) {
    let mut listeners: HashMap<RequestId, Listener<B>> = HashMap::new();
    loop {
        let (waiting, running) = session.load();
        load.queued.store(session.waiting.len(), Ordering::Relaxed);
        load.waiting.store(waiting, Ordering::Relaxed);
        load.running.store(running, Ordering::Relaxed);
        load.bytes.store(session.bytes(), Ordering::Relaxed);
        loop {
            let asked = match session.is_idle() {
                true => inbox.recv().map_err(|_| TryRecvError::Disconnected),
                false => inbox.try_recv(),
            };
            match asked {
                _ if closing.load(Ordering::Relaxed) => return,
                Ok(asked) => {
                    if !asked.gone.load(Ordering::Relaxed) {
                        load.queued.fetch_add(1, Ordering::Relaxed);
                        load.waiting.fetch_add(1, Ordering::Relaxed);
                        let listener = Listener {
                            on_event: asked.on_event,
                            gone: asked.gone,
                            answers: asked.answers,
                        };
                        listeners.insert(session.take(asked.ready), listener);
                    }
                    drop(asked.place);
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        listeners.retain(|&id, listener| {
            let stays = !listener.gone.load(Ordering::Relaxed);
            if !stays {
                session.cancel(id);
            }
            stays
        });
        for event in session.step() {
            let id = event.id();
            let Some(listener) = listeners.get_mut(&id) else {
                continue;
            };
            match event {
                Event::Finished { .. } => listener.answers -= 1,
                Event::Failed { .. } => listener.answers = 0,
                Event::Token { .. } => {}
            }
            let ended = listener.answers == 0;
            (listener.on_event)(event);
            if ended {
                listeners.remove(&id);
            }
        }
    }
}

impl<B: Backend> fmt::Debug for Service<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut service = f.debug_struct("Service");
        let (waiting, answers) = self.load();
        service
            .field("waiting", &waiting)
            .field("answers", &answers);
        service.finish_non_exhaustive()
    }
}
