//! `POST /v1/chat/completions`: from a body to a request of a running batch, and back.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::body::BodyDataStream;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use burn::tensor::backend::Backend;
use futures_util::StreamExt;
use reroute_zoo::messages::Role;
use reroute_zoo::reducers::Plan;
use reroute_zoo::session::{self, Asking, Event, Part, Turn};
use reroute_zoo::{Answer, GenerationOptions, SamplingOptions, Vlm};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout};

use crate::answer::{self, Head};
use crate::app::{App, json_response};
use crate::limits::Held;
use crate::metrics::Ticket;
use crate::pictures::{Room, is_remote};
use crate::refusal::Refusal;
use crate::request::{Chat, Piece};
use crate::{map, stream};

/// More is no limit.
const MAX_TIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// For a body to come: whoever sends none takes a place.
const BODY_TIME: Duration = Duration::from_secs(60);
/// For what is left of a body that nobody reads: whoever sends it would not see the answer otherwise.
const DISCARD_TIME: Duration = Duration::from_secs(2);

/// A request of a running batch, and what is held for it. Dropped, it is cancelled.
pub(crate) struct Asked<B: Backend> {
    pub(crate) head: Head,
    pub(crate) vlm: Arc<Vlm<B>>,
    pub(crate) routing: (String, Plan),
    pub(crate) answers: usize,
    pub(crate) logprobs: bool,
    pub(crate) trace: bool,
    pub(crate) deadline: Instant,
    stream: bool,
    /// What the session had said at once.
    first: Option<Event<B>>,
    events: mpsc::Receiver<Event<B>>,
    _asking: Asking,
    _held: Vec<Held>,
    _place: OwnedSemaphorePermit,
}

/// Answers a request.
pub(crate) async fn completions<B: Backend>(
    State(app): State<Arc<App<B>>>,
    request: Request,
) -> Response {
    let ticket = Ticket::new(app.metrics.clone());
    let deadline = Instant::now() + app.limits().time.min(MAX_TIME);
    let (parts, body) = request.into_parts();
    let mut body = body.into_data_stream();
    let asked = within(
        &app,
        deadline,
        ask(&app, &parts.headers, &mut body, deadline),
    )
    .await;
    let answered = match asked {
        Ok(asked) if asked.stream => return stream::respond(app, asked, ticket),
        Ok(asked) => within(&app, deadline, whole(&app, asked)).await,
        Err(refusal) => Err(refusal),
    };
    match answered {
        Ok(response) => {
            ticket.end("answered");
            response
        }
        Err(refusal) => {
            ticket.end(refusal.outcome());
            discard(&mut body).await;
            refusal.into_response()
        }
    }
}

/// Something that is given up at the deadline, and when the server ends.
pub(crate) async fn within<B: Backend, T, E: From<Refusal>>(
    app: &App<B>,
    deadline: Instant,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::select! {
        done = work => done,
        () = sleep_until(deadline) => Err(Refusal::timeout(app.limits().time.as_secs()).into()),
        () = app.ended() => Err(Refusal::closing().into()),
    }
}

/// Reads a request and hands it to its model.
async fn ask<B: Backend>(
    app: &Arc<App<B>>,
    headers: &HeaderMap,
    body: &mut BodyDataStream,
    deadline: Instant,
) -> Result<Asked<B>, Refusal> {
    if !app.is_open() {
        return Err(Refusal::closing());
    }
    let kind = headers.get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        // Pages of other origins may send anything else without being asked first.
        let message = "a request is JSON: Content-Type: application/json";
        return Err(Refusal::wrong(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    if let Some(coding) = headers.get(header::CONTENT_ENCODING)
        && !coding.as_bytes().eq_ignore_ascii_case(b"identity")
    {
        let message = "a body is sent as it is: leave Content-Encoding out";
        return Err(Refusal::wrong(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    // Nobody need send first what is refused.
    let most = app.limits().body_bytes;
    let length = headers.get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > most as u64) {
        return Err(too_large(most));
    }
    let read = timeout(BODY_TIME, read(app, body)).await;
    let (body, held) = read.map_err(|_| {
        let message = "the body comes too slowly: send smaller pictures";
        Refusal::wrong(StatusCode::REQUEST_TIMEOUT, message)
    })??;
    if !app.is_open() {
        return Err(Refusal::closing());
    }
    // Whoever sends slowly has none: connections and memory are the limits of bodies.
    let place = app.places.clone().try_acquire_owned();
    let place = place.map_err(|_| {
        let places = app.limits().places();
        Refusal::busy(format_args!(
            "{places} requests are under way already: ask again later"
        ))
    })?;
    let limits = app.limits().clone();
    let parse = move || Chat::parse(&body, &limits);
    let chat = blocking(&app.workers, parse).await??;
    let mut held = vec![held];
    // Nothing is fetched for what would not be answered.
    app.models.find(chat.model.as_deref())?;
    let fetched = fetch(app, &chat, &mut held).await?;
    let hand_over = {
        let app = app.clone();
        move || hand_over(&app, chat, fetched, deadline, held, place)
    };
    blocking(&app.workers, hand_over).await?
}

/// Work for a thread that may wait, of which there are as many as there are permits. It ends also when nobody waits
/// for it any more, and gives its permit back then.
async fn blocking<T: Send + 'static>(
    permits: &Arc<Semaphore>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    let permit = permits.clone().acquire_owned().await;
    let permit = permit.map_err(|_| Refusal::closing())?;
    let work = move || {
        let done = work();
        drop(permit);
        done
    };
    let failed = |_| Refusal::internal("something went wrong with this request");
    spawn_blocking(work).await.map_err(failed)
}

fn too_large(most: usize) -> Refusal {
    let message = format_args!("the body is larger than {most} bytes: send smaller pictures");
    Refusal::wrong(StatusCode::PAYLOAD_TOO_LARGE, message)
}

/// The body of a request.
async fn read<B: Backend>(
    app: &App<B>,
    body: &mut BodyDataStream,
) -> Result<(Vec<u8>, Held), Refusal> {
    let (most, mut bytes) = (app.limits().body_bytes, Vec::new());
    let mut held = app.inbox.take(0).ok_or_else(full)?;
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|_| Refusal::malformed("the body is cut off"))?;
        if bytes.len() + chunk.len() > most {
            return Err(too_large(most));
        }
        // Before it is whole: many may come at once.
        if !held.grow(chunk.len() as u64) {
            return Err(full());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok((bytes, held))
}

/// Bodies and pictures of others take all that there is for them.
pub(crate) fn full() -> Refusal {
    Refusal::busy("the requests under way take all memory for bodies and pictures: ask again later")
}

/// Reads what is left of a body, and forgets it.
pub(crate) async fn discard(body: &mut BodyDataStream) {
    let rest = async { while let Some(Ok(_)) = body.next().await {} };
    let _ = timeout(DISCARD_TIME, rest).await;
}

/// The bytes of each picture that is on the network, in order.
async fn fetch<B: Backend>(
    app: &App<B>,
    chat: &Chat,
    held: &mut Vec<Held>,
) -> Result<Vec<Vec<u8>>, Refusal> {
    for picture in chat.pictures() {
        app.sources.check(picture)?;
    }
    let mut fetched = Vec::new();
    for picture in chat.pictures().filter(|picture| is_remote(&picture.url)) {
        let Some(fetch) = app.sources.fetch.clone() else {
            continue;
        };
        let url = picture.url.clone();
        let bytes = blocking(&app.fetches, move || fetch.get(&url)).await?;
        let bytes = bytes.map_err(|error| Refusal::bad(&picture.place, error))?;
        held.push(app.inbox.take(bytes.len() as u64).ok_or_else(full)?);
        fetched.push(bytes);
    }
    Ok(fetched)
}

/// Decodes pictures and hands the request to its model, which preprocesses it here.
fn hand_over<B: Backend>(
    app: &App<B>,
    chat: Chat,
    fetched: Vec<Vec<u8>>,
    deadline: Instant,
    mut held: Vec<Held>,
    place: OwnedSemaphorePermit,
) -> Result<Asked<B>, Refusal> {
    let limits = app.limits();
    let served = app.models.find(chat.model.as_deref())?;
    let vlm = &served.vlm;
    let options = options(&chat, vlm.generation_defaults(), limits.tokens);
    let routing = app.models.plan(chat.routing)?;
    let (mut turns, mut fetched) = (Vec::new(), fetched.into_iter());
    let mut room = Room::new(limits, &app.inbox);
    for said in chat.messages {
        let mut parts = Vec::new();
        for piece in said.pieces {
            parts.push(match piece {
                Piece::Text(text) => Part::Text(text),
                Piece::Picture(picture) => {
                    let bytes = { is_remote(&picture.url) }
                        .then(|| fetched.next())
                        .flatten();
                    app.sources.open(&picture, bytes, &mut room)?.into()
                }
            });
        }
        let role = said.role;
        turns.push(Turn { role, parts });
    }
    if chat.grounding {
        ground(vlm, &mut turns)?;
    }
    held.append(&mut room.held);
    // As many as there can be, so that the running batch never waits for whoever reads.
    let events = options.max_new_tokens.saturating_add(1);
    let events = events.saturating_mul(chat.n).saturating_add(1);
    let logprobs = options.logprobs.is_some();
    let mut request = session::Request::new(turns, routing.1.clone(), options);
    request.answers = chat.n;
    request.stop = chat.stop;
    let (send, mut events) = mpsc::channel(events.min(Semaphore::MAX_PERMITS));
    let asking = served.service.ask_with(request, move |event| {
        let _ = send.try_send(event);
    });
    // What the session does not take it says at once.
    let first = match events.try_recv() {
        Ok(Event::Failed { error, .. }) => return Err(Refusal::of(&error)),
        Ok(event) => Some(event),
        Err(_) => None,
    };
    Ok(Asked {
        head: Head::new(&served.id, chat.include_usage),
        vlm: vlm.clone(),
        routing,
        answers: chat.n,
        logprobs,
        trace: chat.trace,
        deadline,
        stream: chat.stream,
        first,
        events,
        _asking: asking,
        _held: held,
        _place: place,
    })
}

/// How the answers are generated.
fn options(chat: &Chat, defaults: GenerationOptions, most: usize) -> GenerationOptions {
    let own = SamplingOptions::default();
    GenerationOptions {
        max_new_tokens: chat.max_tokens.unwrap_or(defaults.max_new_tokens.min(most)),
        sampling: SamplingOptions {
            temperature: chat.temperature.unwrap_or(own.temperature),
            top_p: chat.top_p.unwrap_or(own.top_p),
            top_k: chat.top_k.unwrap_or(own.top_k),
            repetition_penalty: chat.repetition_penalty.unwrap_or(own.repetition_penalty),
            presence_penalty: chat.presence_penalty.unwrap_or(own.presence_penalty),
            frequency_penalty: chat.frequency_penalty.unwrap_or(own.frequency_penalty),
            logit_bias: chat.logit_bias.clone(),
            // Without a seed of its own a request draws what no other draws.
            seed: chat.seed.unwrap_or_else(rand::random),
            ..own
        },
        logprobs: chat.logprobs,
        ..defaults
    }
}

/// Makes the last text of the user the question for what it names.
fn ground<B: Backend>(vlm: &Vlm<B>, turns: &mut [Turn]) -> Result<(), Refusal> {
    let last = turns.last_mut().filter(|turn| turn.role == Role::User);
    let mut texts = last
        .into_iter()
        .flat_map(|turn| turn.parts.iter_mut().rev());
    let text = texts.find_map(|part| match part {
        Part::Text(text) => Some(text),
        Part::Visual(_) => None,
    });
    let message = "grounding needs a text in the last message: what is to be found";
    let text = text.ok_or_else(|| Refusal::bad("grounding", message))?;
    *text = vlm.grounding().question(text.trim());
    Ok(())
}

/// The whole response, when all answers have ended.
async fn whole<B: Backend>(app: &App<B>, mut asked: Asked<B>) -> Result<Response, Refusal> {
    let mut answers: Vec<Option<Answer>> = vec![None; asked.answers];
    while answers.iter().any(Option::is_none) {
        match asked.next().await? {
            Event::Token { .. } => drop(app.metrics.generated_tokens.inc()),
            Event::Finished { index, answer, .. } => {
                asked.count(app, &answer, answers.iter().all(Option::is_none));
                if let Some(place) = answers.get_mut(index) {
                    *place = Some(*answer);
                }
            }
            _ => {}
        }
    }
    let answers: Vec<Answer> = answers.into_iter().flatten().collect();
    let choices = answers.iter().enumerate();
    let choices =
        choices.map(|(index, answer)| answer::choice(&asked.vlm, index, answer, asked.logprobs));
    let choices = choices.collect();
    let first = answers.first();
    let reroute = first.and_then(|answer| asked.traced(answer));
    let prompt = first.map_or(0, |answer| answer.prompt_rows);
    let tokens = answers.iter().map(|answer| answer.tokens.len()).sum();
    let usage = answer::usage(prompt, tokens);
    let response = asked.head.completion(choices, usage, reroute);
    Ok(json_response(StatusCode::OK, &response))
}

impl<B: Backend> Asked<B> {
    /// What has become of it next.
    pub(crate) async fn next(&mut self) -> Result<Event<B>, Refusal> {
        let event = match self.first.take() {
            Some(first) => Some(first),
            None => self.events.recv().await,
        };
        match event {
            Some(Event::Failed { error, .. }) => Err(Refusal::of(&error)),
            Some(event) => Ok(event),
            None => Err(Refusal::internal("the running batch has failed: ask again")),
        }
    }

    /// What is told of the routing of an answer, if it was asked for.
    pub(crate) fn traced(&self, answer: &Answer) -> Option<serde_json::Value> {
        let (name, plan) = &self.routing;
        { self.trace }.then(|| map::trace(&self.vlm, (name, plan), answer))
    }

    /// Counts an answer.
    pub(crate) fn count(&self, app: &App<B>, answer: &Answer, is_first: bool) {
        let (name, plan) = &self.routing;
        let routing = (name.as_str(), &plan.schedule);
        app.metrics.answered(&self.vlm, routing, answer, is_first);
    }
}
