use burn::module::Module;
use burn::tensor::backend::Backend;
use reducers::Cost;
use reroute_family::{Arithmetic, Memory, Picture};

use crate::{Schedule, View, Vlm};

/// What a session may take of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimit {
    /// Bytes of weights, keys and values, caches and what is computed, together.
    pub bytes: u64,
    /// How the backend keeps numbers; by default in the model's type, without loops of its own.
    pub arithmetic: Option<Arithmetic>,
}

/// What a request needs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Need {
    /// Keys and values that an answer may grow to; for a later turn, what that chooses from.
    pub(super) kv: u64,
    /// How many answers there are.
    pub(super) answers: u64,
    /// What is computed, at its peak.
    pub(super) working: u64,
}

impl Need {
    /// Of a prompt of `rows` rows with these pictures, of which `visual` tokens enter the decoder, and
    /// its answers of so many tokens.
    pub(super) fn of<B: Backend>(
        vlm: &Vlm<B>,
        limit: &MemoryLimit,
        (rows, views, visual): (usize, &[View], usize),
        schedule: &Schedule,
        (answers, new_tokens): (usize, usize),
        keep_pool: bool,
    ) -> Self {
        let config = vlm.config();
        let seen = views.iter().map(View::token_count);
        let text = rows.saturating_sub(seen.fold(0, usize::saturating_add));
        let patches = views.iter().map(|view| view.grid.patches()).max();
        let picture = Picture {
            resized: [0, 0],
            patches: patches.unwrap_or(0),
            visual_tokens: visual,
        };
        let bytes = vlm.dtype().size();
        let arithmetic = limit.arithmetic.unwrap_or(Arithmetic {
            bytes,
            threads: None,
        });
        let kv = vlm.kv_type();
        let memory = Memory::of(&**config, &picture, text, schedule, arithmetic, kv);
        let shape = config.decoder().shape();
        let longest = text.saturating_add(new_tokens);
        let kv = Cost::of(&shape, schedule, visual, longest, kv).total_kv_bytes();
        let row = (config.decoder().hidden_size as u64) * bytes as u64;
        let pool = if keep_pool {
            row.saturating_mul(rows as u64)
        } else {
            0
        };
        Self {
            kv: kv.saturating_add(pool),
            answers: answers as u64,
            working: memory.activations,
        }
    }

    /// All of it.
    pub(super) fn total(&self) -> u64 {
        self.kv
            .saturating_mul(self.answers)
            .saturating_add(self.working)
    }
}

/// Bytes of the weights.
pub(super) fn weights<B: Backend>(vlm: &Vlm<B>) -> u64 {
    (vlm.model().num_params() as u64).saturating_mul(vlm.dtype().size() as u64)
}
