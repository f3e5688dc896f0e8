use burn::tensor::backend::Backend;
use reducers::{Action, Schedule};
use reroute::KvCache;

use super::past::{Past, Row};
use super::recent::Recent;

/// Prompts that have ended, with their answers.
pub(super) struct Prefixes<B: Backend> {
    kept: Recent<u64, Past<B>>,
    count: u64,
}

impl<B: Backend> Prefixes<B> {
    pub(super) fn new(most_bytes: u64) -> Self {
        Self {
            kept: Recent::new(most_bytes),
            count: 0,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.kept.bytes()
    }

    /// Forgets the oldest until no more than so many bytes are left.
    pub(super) fn shrink(&mut self, bytes: u64) {
        self.kept.shrink(bytes);
    }

    /// Keeps a prompt; those that it begins with are not needed any more.
    pub(super) fn keep(&mut self, past: Past<B>) {
        let begins = |kept: &Past<B>| past.shared(&kept.rows) == kept.rows.len();
        let kept = self.kept.iter();
        let shorter: Vec<u64> = kept
            .filter(|(_, kept)| begins(kept))
            .map(|(key, _)| *key)
            .collect();
        for key in shorter {
            self.kept.remove(&key);
        }
        self.count += 1;
        let bytes = past.bytes();
        self.kept.insert(self.count, past, bytes);
    }

    /// Keys and values of the longest beginning that a prompt has in common with one that was kept.
    ///
    /// What can be taken over of it, [`Decoder::begin`](reroute::Decoder::begin) decides. But under *remove*
    /// it would see what another prompt has kept of its pictures, where this one is to choose by itself.
    pub(super) fn find(
        &mut self,
        rows: &[Row],
        schedule: &Schedule,
        first_visual: Option<usize>,
    ) -> Option<KvCache<B>> {
        let removes = schedule.action() == Action::Remove && !schedule.is_dense();
        let most = first_visual.filter(|_| removes).unwrap_or(rows.len());
        let shared = self
            .kept
            .iter()
            .map(|(key, past)| (past.shared(rows), *key));
        let (shared, key) = shared.max()?;
        let shared = shared.min(most);
        let past = self.kept.get(&key).filter(|_| shared > 0)?;
        let mut cache = past.cache.clone();
        cache.truncate(0, shared).ok()?;
        // What it is copied into when it grows is then of this prompt's size.
        cache.compact(0).ok()?;
        Some(cache)
    }
}
