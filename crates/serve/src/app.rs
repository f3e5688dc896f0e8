//! What is asked for where, and by whom.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use burn::tensor::backend::Backend;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;
use tokio::sync::{Semaphore, watch};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tower_http::set_header::SetResponseHeaderLayer;

use crate::answer::now;
use crate::limits::{Budget, Limits};
use crate::metrics::Metrics;
use crate::models::Models;
use crate::pictures::Sources;
use crate::refusal::Refusal;
use crate::server::Settings;
use crate::{chat, page};

const NOTHING: &str = "there is nothing here: answers are at POST /v1/chat/completions, so that a client's base URL ends in /v1";
/// How long a page may go on as it was allowed to.
const CORS_TIME: Duration = Duration::from_secs(3600);

/// How far a server is from its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Open,
    /// What runs goes on, nothing begins.
    Closing,
    /// Nothing goes on.
    Ended,
}

/// What all requests have in common.
pub(crate) struct App<B: Backend> {
    pub(crate) models: Models<B>,
    pub(crate) sources: Sources,
    pub(crate) metrics: Arc<Metrics>,
    /// One for each request that has come whole and is not answered.
    pub(crate) places: Arc<Semaphore>,
    /// One for each request that is read or preprocessed.
    pub(crate) workers: Arc<Semaphore>,
    pub(crate) fetches: Arc<Semaphore>,
    pub(crate) inbox: Arc<Budget>,
    settings: Settings,
    origins: Option<AllowOrigin>,
    phase: watch::Sender<Phase>,
    created: u64,
}

impl<B: Backend> App<B> {
    pub(crate) fn new(
        models: Models<B>,
        sources: Sources,
        settings: Settings,
    ) -> Result<Self, &'static str> {
        let limits = &settings.limits;
        let count = |limit: usize| limit.clamp(1, Semaphore::MAX_PERMITS);
        Ok(Self {
            models,
            sources,
            metrics: Arc::new(Metrics::new()),
            places: Arc::new(Semaphore::new(count(limits.places()))),
            workers: Arc::new(Semaphore::new(count(limits.workers))),
            fetches: Arc::new(Semaphore::new(count(limits.fetches))),
            inbox: Budget::new(limits.inbox_bytes),
            origins: origins(&settings.cors)?,
            phase: watch::Sender::new(Phase::Open),
            created: now(),
            settings,
        })
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.settings.limits
    }

    pub(crate) fn is_open(&self) -> bool {
        *self.phase.borrow() == Phase::Open
    }

    /// Nothing begins any more.
    pub(crate) fn close(&self) {
        self.phase.send_replace(Phase::Closing);
    }

    /// Nothing goes on any more.
    pub(crate) fn end(&self) {
        self.phase.send_replace(Phase::Ended);
    }

    /// Waits until nothing is under way.
    pub(crate) async fn idle(&self) {
        let places = self.limits().places().clamp(1, Semaphore::MAX_PERMITS);
        let places = u32::try_from(places).unwrap_or(u32::MAX);
        let _ = self.places.acquire_many(places).await;
    }

    /// Waits until nothing may go on.
    pub(crate) async fn ended(&self) {
        let mut phase = self.phase.subscribe();
        let _ = phase.wait_for(|phase| *phase == Phase::Ended).await;
    }

    /// Whether the head of a request names this server: a page of another origin whose name leads here a moment later
    /// (DNS rebinding) has that name in it. Such a page has no key.
    fn is_meant(&self, headers: &HeaderMap) -> bool {
        let is_own = |host: &HeaderValue| {
            let name = host_name(host.to_str().unwrap_or_default()).to_ascii_lowercase();
            let address = name.trim_start_matches('[').trim_end_matches(']');
            address.parse::<IpAddr>().is_ok()
                || name == "localhost"
                || name.ends_with(".localhost")
                || self.settings.hosts.contains(&name)
        };
        self.settings.api_key.is_some() || headers.get_all(header::HOST).iter().all(is_own)
    }

    /// Whether the head of a request has the key, if there must be one. Comparing takes the same time wherever
    /// two keys of one length differ.
    fn is_allowed(&self, headers: &HeaderMap) -> bool {
        let Some(key) = &self.settings.api_key else {
            return true;
        };
        let given = headers.get(header::AUTHORIZATION);
        let given = given.map(HeaderValue::as_bytes).unwrap_or_default();
        let scheme = given.get(..7).unwrap_or_default();
        let is_bearer = scheme.eq_ignore_ascii_case(b"Bearer ");
        let given = given.get(7..).unwrap_or_default();
        is_bearer && bool::from(given.ct_eq(key.as_bytes()))
    }
}

/// The name of a `Host` header, without its port.
fn host_name(host: &str) -> &str {
    let port = host.rfind(':').filter(|&at| !host[at..].contains(']'));
    &host[..port.unwrap_or(host.len())]
}

/// Pages of which origins may ask, if any.
fn origins(cors: &[String]) -> Result<Option<AllowOrigin>, &'static str> {
    if cors.is_empty() {
        return Ok(None);
    }
    if cors.iter().any(|origin| origin == "*") {
        return Ok(Some(AllowOrigin::any()));
    }
    let is_origin = |origin: &String| {
        let rest = origin.split_once("://").map_or("", |(_, rest)| rest);
        !rest.is_empty() && !rest.contains(['/', '?', '#', '@'])
    };
    let origins = cors.iter().filter(|origin| is_origin(origin));
    let origins: Vec<_> = origins
        .filter_map(|it| HeaderValue::from_str(it).ok())
        .collect();
    if origins.len() < cors.len() {
        return Err("an origin is https://example.com (nothing behind it), or * for all");
    }
    Ok(Some(AllowOrigin::list(origins)))
}

/// All that is answered.
pub(crate) fn router<B: Backend>(app: Arc<App<B>>) -> Router {
    let protected = Router::new()
        .route("/v1/chat/completions", post(chat::completions::<B>))
        .route("/v1/models", get(models::<B>))
        .route("/v1/models/{*id}", get(model::<B>))
        .route("/v1/routings", get(routings::<B>))
        .route("/metrics", get(metrics::<B>))
        .layer(from_fn_with_state(app.clone(), authorize::<B>));
    let open = Router::new()
        .route("/health", get(health::<B>))
        .route("/", get(page::index))
        .route("/page.js", get(page::script))
        .route("/style.css", get(page::style))
        .route("/example.png", get(example::<B>));
    let nosniff = HeaderValue::from_static("nosniff");
    let nosniff = SetResponseHeaderLayer::overriding(header::X_CONTENT_TYPE_OPTIONS, nosniff);
    let panicked = |_: Box<dyn std::any::Any + Send>| {
        Refusal::internal("something went wrong with this request").into_response()
    };
    let router = protected
        .merge(open)
        .fallback(|| async { Refusal::wrong(StatusCode::NOT_FOUND, NOTHING) })
        .method_not_allowed_fallback(|| async {
            Refusal::wrong(StatusCode::METHOD_NOT_ALLOWED, "not by this method")
        })
        .layer(nosniff)
        .layer(CatchPanicLayer::custom(panicked));
    let router = match app.origins.clone() {
        None => router,
        Some(origins) => router.layer(
            CorsLayer::new()
                .allow_origin(origins)
                .allow_methods([Method::GET, Method::POST])
                // Clients have headers of their own (`x-stainless-…`), and none means anything here but these.
                .allow_headers(AllowHeaders::mirror_request())
                .max_age(CORS_TIME),
        ),
    };
    router.with_state(app)
}

async fn authorize<B: Backend>(
    State(app): State<Arc<App<B>>>,
    request: Request,
    next: Next,
) -> Response {
    let headers = request.headers();
    let refusal = match (app.is_allowed(headers), app.is_meant(headers)) {
        (true, true) => return next.run(request).await,
        (false, _) => Refusal::unauthorized(),
        (_, false) => {
            let message = "this server has another name: see --allow-host, or set a key";
            Refusal::wrong(StatusCode::FORBIDDEN, message)
        }
    };
    chat::discard(&mut request.into_body().into_data_stream()).await;
    refusal.into_response()
}

/// A response of JSON.
pub(crate) fn json_response(status: StatusCode, value: &Value) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (status, kind, Body::from(value.to_string())).into_response()
}

async fn health<B: Backend>(State(app): State<Arc<App<B>>>) -> Response {
    match app.is_open() {
        true => json_response(StatusCode::OK, &json!({"status": "ok"})),
        false => Refusal::closing().into_response(),
    }
}

async fn models<B: Backend>(State(app): State<Arc<App<B>>>) -> Response {
    json_response(StatusCode::OK, &app.models.list(app.created))
}

async fn model<B: Backend>(
    State(app): State<Arc<App<B>>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Refusal> {
    // A path that is no text is no model's name either.
    let id = id.map_or_else(|_| String::from("\u{FFFD}"), |Path(id)| id);
    let served = app.models.find(Some(&id))?;
    let card = app.models.card(served, app.created);
    Ok(json_response(StatusCode::OK, &card))
}

async fn routings<B: Backend>(State(app): State<Arc<App<B>>>) -> Response {
    json_response(StatusCode::OK, &app.models.routings())
}

async fn metrics<B: Backend>(State(app): State<Arc<App<B>>>) -> Response {
    for served in app.models.all() {
        let (load, bytes) = (served.service.load(), served.service.bytes());
        app.metrics.load(&served.id, load, bytes);
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let text = app.metrics.text(app.inbox.held());
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn example<B: Backend>(State(app): State<Arc<App<B>>>) -> Response {
    page::example(app.settings.example)
}
