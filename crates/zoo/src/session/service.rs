use std::collections::HashMap;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use burn::tensor::backend::Backend;

use super::{Event, Request, RequestId, Session, SessionOptions};
use crate::{Vlm, ZooError};

/// A session in a thread of its own, that any number of others ask.
///
/// When it is dropped, what runs is ended.
pub struct Service<B: Backend> {
    /// Behind a lock, so that every standard library shares it.
    inbox: Mutex<Option<Sender<Asked<B>>>>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A request on its way to the session, and back.
struct Asked<B: Backend> {
    request: Request<'static, B>,
    events: Sender<Event<B>>,
    gone: Arc<AtomicBool>,
}

/// What becomes of a request, as it comes: an iterator that ends with the request. Every answer ends with
/// [`Event::Finished`], or the request with [`Event::Failed`], also where the service ends before. Dropped
/// before, it cancels the request.
pub struct Answers<B: Backend> {
    events: Receiver<Event<B>>,
    gone: Arc<AtomicBool>,
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
        V: Deref<Target = Vlm<B>> + Send + 'static,
    {
        drop(Session::new(&vlm, options.clone())?);
        let (inbox, asked) = channel();
        let closing = Arc::new(AtomicBool::new(false));
        let closed = closing.clone();
        let run = move || {
            while let Ok(session) = Session::new(&vlm, options.clone()) {
                // A rule of the caller's own may panic: what runs has failed, and others are served again.
                let served = AssertUnwindSafe(|| serve(session, &asked, &closed));
                if catch_unwind(served).is_ok() {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("reroute-session".into());
        let thread = thread.spawn(run).map_err(|error| ZooError::Session {
            reason: error.to_string(),
        })?;
        Ok(Self {
            inbox: Mutex::new(Some(inbox)),
            closing,
            thread: Some(thread),
        })
    }

    /// Asks. A request that is refused fails as its first event.
    pub fn ask(&self, request: Request<'static, B>) -> Answers<B> {
        let (events, answers) = channel();
        let left = request.answers.max(1);
        let gone = Arc::new(AtomicBool::new(false));
        let asked = Asked {
            request,
            events,
            gone: gone.clone(),
        };
        if let Ok(inbox) = self.inbox.lock()
            && let Some(inbox) = &*inbox
        {
            let _ = inbox.send(asked);
        }
        Answers {
            events: answers,
            gone,
            left,
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

impl<B: Backend> Drop for Answers<B> {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
    }
}

/// Those who wait for events of a request.
struct Listener<B: Backend> {
    events: Sender<Event<B>>,
    gone: Arc<AtomicBool>,
    /// Answers that are still to end.
    answers: usize,
}

/// Runs a session until nobody can ask any more.
fn serve<B: Backend>(
    mut session: Session<'_, B>,
    inbox: &Receiver<Asked<B>>,
    closing: &AtomicBool,
) {
    let mut listeners: HashMap<RequestId, Listener<B>> = HashMap::new();
    loop {
        // One a step: its pictures are preprocessed here, and running answers shall not wait for more.
        let asked = match session.is_idle() {
            true => inbox.recv().map_err(|_| TryRecvError::Disconnected),
            false => inbox.try_recv(),
        };
        match asked {
            _ if closing.load(Ordering::Relaxed) => return,
            Ok(asked) if asked.gone.load(Ordering::Relaxed) => continue,
            Ok(asked) => admit(&mut session, &mut listeners, asked),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return,
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
            // Whoever has gone is noticed above.
            let _ = listener.events.send(event);
            if ended {
                listeners.remove(&id);
            }
        }
    }
}

fn admit<B: Backend>(
    session: &mut Session<'_, B>,
    listeners: &mut HashMap<RequestId, Listener<B>>,
    asked: Asked<B>,
) {
    let Asked {
        request,
        events,
        gone,
    } = asked;
    let answers = request.answers;
    match session.admit(request) {
        Ok(id) => {
            let listener = Listener {
                events,
                gone,
                answers,
            };
            listeners.insert(id, listener);
        }
        Err(error) => {
            let id = RequestId::none();
            let _ = events.send(Event::Failed { id, error });
        }
    }
}
