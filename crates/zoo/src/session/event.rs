use std::fmt;

use burn::tensor::backend::Backend;
use reroute::TokenLogprobs;

use super::past::Past;
use crate::{Answer, ZooError};

/// What a request is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(super) u64);

impl RequestId {
    /// Of a request that was never admitted.
    pub(super) fn none() -> Self {
        Self(0)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What has become of a request.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<B: Backend> {
    /// An answer has grown.
    Token {
        /// The request.
        id: RequestId,
        /// Which of its answers, from 0.
        index: usize,
        /// The token.
        token: u32,
        /// The text that is complete with it: whole characters, perhaps none. All of them together are the
        /// [`Answer::text`] of an answer that has ended; one that is cancelled may have a little more, which
        /// was held back.
        text: String,
        /// How likely the token was, if asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// An answer has ended. When all of a request's have, the request has.
    Finished {
        /// The request.
        id: RequestId,
        /// Which of its answers, from 0.
        index: usize,
        /// The answer.
        answer: Box<Answer>,
        /// What it leaves behind, if asked for.
        past: Option<Past<B>>,
    },
    /// A request has failed, with all its answers.
    Failed {
        /// The request.
        id: RequestId,
        /// Why.
        error: ZooError,
    },
}

impl<B: Backend> Event<B> {
    /// The request that it is about.
    pub fn id(&self) -> RequestId {
        match self {
            Self::Token { id, .. } | Self::Finished { id, .. } | Self::Failed { id, .. } => *id,
        }
    }
}
