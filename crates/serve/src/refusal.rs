//! Why a request gets no answer: as HTTP says it, in the shape that OpenAI's clients read.

use std::fmt::Display;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use reroute_zoo::ZooError;
use reroute_zoo::reroute::RerouteError;
use serde_json::{Value, json};

use crate::app::json_response;

/// Seconds after which whoever was turned away may ask again.
const RETRY_AFTER: &str = "1";

/// Most characters of a message: it may quote what was sent.
const LONGEST: usize = 4000;

/// The beginning of a text that would be too long.
fn clipped(text: String) -> String {
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Why a request gets no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    /// What of the request is wrong: `messages[0].content[1].image_url.url`.
    param: Option<String>,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, kind: &'static str, message: impl Display) -> Self {
        Self {
            status,
            kind,
            code: None,
            param: None,
            message: clipped(message.to_string()),
        }
    }

    /// Something in the request is wrong.
    pub(crate) fn bad(param: impl Into<String>, message: impl Display) -> Self {
        Self {
            param: Some(clipped(param.into())),
            ..Self::malformed(message)
        }
    }

    /// The request is wrong as a whole.
    pub(crate) fn malformed(message: impl Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// The request is wrong, by its status.
    pub(crate) fn wrong(status: StatusCode, message: impl Display) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// It is known elsewhere, and not here.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Display) -> Self {
        Self {
            code: Some("unsupported_parameter"),
            ..Self::bad(param, message)
        }
    }

    pub(crate) fn model(id: &str, known: &[&str]) -> Self {
        let known = known.join(", ");
        Self {
            code: Some("model_not_found"),
            param: Some("model".into()),
            ..Self::wrong(
                StatusCode::NOT_FOUND,
                format_args!("there is no model {id:?} here; there are: {known}"),
            )
        }
    }

    pub(crate) fn unauthorized() -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::wrong(
                StatusCode::UNAUTHORIZED,
                "this server wants its API key: Authorization: Bearer KEY",
            )
        }
    }

    /// Too much is under way.
    pub(crate) fn busy(message: impl Display) -> Self {
        Self {
            code: Some("rate_limit_exceeded"),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    pub(crate) fn closing() -> Self {
        Self {
            code: Some("shutting_down"),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "server_error",
                "this server is shutting down: ask another, or again later",
            )
        }
    }

    pub(crate) fn timeout(seconds: u64) -> Self {
        Self {
            code: Some("timeout"),
            ..Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "server_error",
                format_args!(
                    "there is no whole answer after {seconds} s: ask for fewer tokens, or raise --time-limit"
                ),
            )
        }
    }

    pub(crate) fn internal(message: impl Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// A request that the session does not take, or that fails in it.
    pub(crate) fn of(error: &ZooError) -> Self {
        let bad = |param: &str| Self::bad(param, error);
        match error {
            ZooError::Busy { .. } => Self::busy(error),
            ZooError::Memory { .. } => bad("messages"),
            ZooError::Answers { .. } => bad("n"),
            ZooError::Session { .. } | ZooError::Past => Self::internal(error),
            ZooError::Reducer(_) => bad("routing"),
            ZooError::Reroute(RerouteError::ContextLength { .. }) => Self {
                code: Some("context_length_exceeded"),
                ..bad("messages")
            },
            ZooError::Reroute(RerouteError::Sampling { option, .. }) => bad(option),
            ZooError::Reroute(_) => Self::internal(error),
            _ => bad("messages"),
        }
    }

    /// What it is called in the metrics.
    pub(crate) fn outcome(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "busy",
            StatusCode::SERVICE_UNAVAILABLE => "closing",
            StatusCode::GATEWAY_TIMEOUT => "timeout",
            status if status.is_server_error() => "failed",
            _ => "refused",
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.json());
        let (headers, status) = (response.headers_mut(), self.status);
        if [
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::SERVICE_UNAVAILABLE,
        ]
        .contains(&status)
        {
            let seconds = header::HeaderValue::from_static(RETRY_AFTER);
            headers.insert(header::RETRY_AFTER, seconds);
        }
        if status == StatusCode::UNAUTHORIZED {
            let scheme = header::HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}
