//! An answer as server-sent events, a chunk for each piece of text.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderName;
use axum::response::sse::{Event as Message, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use burn::tensor::backend::Backend;
use futures_util::stream::poll_fn;
use reroute_zoo::session::Event;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::answer;
use crate::app::App;
use crate::chat::{Asked, within};
use crate::metrics::Ticket;
use crate::refusal::Refusal;

/// Chunks that wait for whoever reads.
const CHUNKS: usize = 16;
/// From one sign of life to the next, while nothing is said.
const ALIVE: Duration = Duration::from_secs(15);
/// nginx does not collect what has this header.
const UNBUFFERED: (HeaderName, &str) = (HeaderName::from_static("x-accel-buffering"), "no");

/// For what went wrong to reach whoever reads.
const LAST_TIME: Duration = Duration::from_secs(5);
const DONE: &str = "[DONE]";

/// Why a stream ends before its answers.
enum Stop {
    /// Nobody reads any more.
    Gone,
    Refused(Refusal),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Chunks, and who reads them.
struct Chunks(mpsc::Sender<String>);

impl Chunks {
    /// Waits until there is room for a chunk.
    async fn send(&self, chunk: impl ToString) -> Result<(), Stop> {
        let sent = self.0.send(chunk.to_string()).await;
        sent.map_err(|_| Stop::Gone)
    }
}

/// Begins to answer. A task of its own goes on with it: whoever reads slowly, or not at all, holds a few chunks and
/// nothing else, and no longer than any request may take.
pub(crate) fn respond<B: Backend>(app: Arc<App<B>>, asked: Asked<B>, ticket: Ticket) -> Response {
    let (chunks, mut read) = mpsc::channel(CHUNKS);
    tokio::spawn(async move {
        let (chunks, deadline) = (Chunks(chunks), asked.deadline);
        let told = tokio::select! {
            told = within(&app, deadline, tell(&app, asked, &chunks)) => told,
            // Also while nothing is said, as in the queue.
            () = chunks.0.closed() => Err(Stop::Gone),
        };
        match told {
            Ok(()) => ticket.end("answered"),
            Err(Stop::Gone) => {}
            Err(Stop::Refused(refusal)) => {
                ticket.end(refusal.outcome());
                let last = async {
                    chunks.send(refusal.json()).await?;
                    chunks.send(DONE).await
                };
                let _ = timeout(LAST_TIME, last).await;
            }
        }
    });
    let chunks = poll_fn(move |context| {
        let chunk = read.poll_recv(context);
        chunk.map(|chunk| Some(Ok::<_, Infallible>(Message::default().data(chunk?))))
    });
    let sse = Sse::new(chunks).keep_alive(KeepAlive::new().interval(ALIVE));
    ([UNBUFFERED], sse).into_response()
}

async fn tell<B: Backend>(app: &App<B>, mut asked: Asked<B>, chunks: &Chunks) -> Result<(), Stop> {
    for index in 0..asked.answers {
        chunks.send(asked.head.first(index)).await?;
    }
    let (mut left, mut prompt, mut tokens) = (asked.answers, 0, 0);
    while left > 0 {
        match asked.next().await? {
            Event::Token {
                index,
                token,
                text,
                logprobs,
                ..
            } => {
                app.metrics.generated_tokens.inc();
                let entry = logprobs.and_then(|it| answer::entry(&asked.vlm, token, &it));
                if !text.is_empty() || entry.is_some() {
                    let entry = { asked.logprobs }.then(|| entry.into_iter().collect());
                    chunks.send(asked.head.piece(index, &text, entry)).await?;
                }
            }
            Event::Finished { index, answer, .. } => {
                asked.count(app, &answer, left == asked.answers);
                left -= 1;
                prompt = answer.prompt_rows;
                tokens += answer.tokens.len();
                let reroute = asked.traced(&answer);
                chunks
                    .send(asked.head.last(index, &answer, reroute))
                    .await?;
            }
            _ => {}
        }
    }
    if asked.head.include_usage {
        let usage = answer::usage(prompt, tokens);
        chunks.send(asked.head.usage(usage)).await?;
    }
    chunks.send(DONE).await
}
