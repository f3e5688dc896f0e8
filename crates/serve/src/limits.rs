//! What a server takes at most.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a server takes at most, of one request and of all together.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of the body of a request.
    pub body_bytes: usize,
    /// Bytes of all text in a request.
    pub text_bytes: usize,
    /// Pictures in a request, frames of videos among them.
    pub pictures: usize,
    /// Pixels of all pictures of a request together.
    pub pixels: u64,
    /// Tokens of an answer; what a request gets that does not say how many is no more, either.
    pub tokens: usize,
    /// Answers to one request.
    pub choices: usize,
    /// From the first byte of a request to the last of its answer.
    pub time: Duration,
    /// For whoever reads nothing of what is written: then the connection is closed.
    pub silence: Duration,
    /// Requests that wait while all places of running answers are taken; a further one is turned away.
    pub queue: usize,
    /// Answers of a model that are generated side by side.
    pub answers: usize,
    /// Bytes of bodies and decoded pictures of all requests under way.
    pub inbox_bytes: u64,
    /// Requests that are read and preprocessed at the same time.
    pub workers: usize,
    /// Pictures that are fetched at the same time.
    pub fetches: usize,
    /// Open connections; further ones wait until one is closed.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 32 << 20,
            text_bytes: 1 << 20,
            pictures: 16,
            pixels: 64_000_000,
            tokens: 4096,
            choices: 8,
            time: Duration::from_secs(300),
            silence: Duration::from_secs(60),
            queue: 64,
            answers: 32,
            inbox_bytes: 2 << 30,
            workers: 2,
            fetches: 8,
            connections: 1024,
        }
    }
}

impl Limits {
    /// Requests that may be under way.
    pub(crate) fn places(&self) -> usize {
        self.queue.saturating_add(self.answers.max(1))
    }
}

/// Bytes that all requests under way share.
#[derive(Debug)]
pub(crate) struct Budget {
    most: u64,
    held: AtomicU64,
}

/// A share of a budget, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    bytes: u64,
    budget: Arc<Budget>,
}

impl Budget {
    pub(crate) fn new(most: u64) -> Arc<Self> {
        let held = AtomicU64::new(0);
        Arc::new(Self { most, held })
    }

    pub(crate) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// So many bytes, if they are left.
    pub(crate) fn take(self: &Arc<Self>, bytes: u64) -> Option<Held> {
        let mut held = Held {
            bytes: 0,
            budget: self.clone(),
        };
        held.grow(bytes).then_some(held)
    }
}

impl Held {
    /// Takes so many bytes more, if they are left.
    pub(crate) fn grow(&mut self, bytes: u64) -> bool {
        let most = self.budget.most;
        let more = |held: u64| held.checked_add(bytes).filter(|&held| held <= most);
        let held = &self.budget.held;
        let taken = held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        self.bytes += if taken.is_ok() { bytes } else { 0 };
        taken.is_ok()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::Budget;

    #[test]
    fn what_is_held_is_given_back() {
        let budget = Budget::new(10);
        let mut held = budget.take(4).expect("there is room");
        assert!(held.grow(2) && !held.grow(5));
        assert!(budget.take(5).is_none());
        assert!(budget.take(u64::MAX).is_none());
        drop(budget.take(4).expect("there is room"));
        assert_eq!(budget.held(), 6);
        drop(held);
        assert_eq!(budget.held(), 0);
    }
}
