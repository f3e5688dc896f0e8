//! What keeping keys and values in a narrower type changes.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::{KvType, Schedule, Scorer};

use crate::host::read_back;
use crate::{Decoder, KvCache, PrefillOptions, Prompt, RerouteError, RoutingTrace};

/// Logits of a decoder beside those that it has with keys and values in the type of its weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvError {
    /// The type that they are kept in.
    pub kv: KvType,
    /// The type of the weights.
    pub against: KvType,
    /// The largest difference of a logit, over the largest logit behind the same token.
    pub largest: f32,
    /// Tokens whose logits were compared: the last of the prompt, and those of the answer.
    pub tokens: usize,
    /// Of these, how many have the same likeliest token behind them.
    pub same: usize,
    /// Visual tokens that decisions have selected.
    pub selected: usize,
    /// Of these, how many are selected in the type of the weights too.
    pub selected_in_both: usize,
}

impl<B: Backend> Decoder<B> {
    /// What the type of keys and values ([`kv_type`](Self::kv_type)) changes of the logits behind the prompt
    /// of one sample, and behind each token of `answer`. Runs both twice: for inspection only.
    ///
    /// `scorer` ranks instead of the schedule's own scores, as in [`resume_by`](Self::resume_by).
    ///
    /// # Errors
    /// Those of [`prefill`](Self::prefill) and [`decode`](Self::decode); [`RerouteError::Cache`] for several
    /// samples.
    pub fn kv_error(
        &self,
        scorer: Option<&dyn Scorer<B>>,
        prompt: &Prompt<B>,
        schedule: &Schedule,
        answer: &[u32],
    ) -> Result<KvError, RerouteError> {
        let run = |decoder: &Self| {
            let cache = KvCache::new(decoder.layers().len(), 1)?;
            let options = PrefillOptions::default();
            let prefill = decoder.resume_by(scorer, cache, prompt, schedule, options)?;
            let mut logits = vec![prefill.logits];
            let mut cache = prefill.cache;
            for &token in answer {
                logits.push(decoder.decode(&[(0, token)], &mut cache)?);
            }
            let logits = read_back(Tensor::cat(logits, 0), "logits")?;
            Ok::<_, RerouteError>((logits, prefill.trace))
        };
        let mut plain = self.clone();
        plain.set_kv_type(None)?;
        let (given, trace) = run(self)?;
        let (expected, expected_trace) = run(&plain)?;

        let vocab_size = self.config().vocab_size;
        let rows = given.chunks_exact(vocab_size);
        let rows = rows.zip(expected.chunks_exact(vocab_size));
        let [selected, selected_in_both] = overlap(&trace, &expected_trace);
        Ok(KvError {
            kv: self.kv_type(),
            against: plain.kv_type(),
            largest: rows.clone().map(relative).fold(0.0, f32::max),
            tokens: rows.len(),
            same: rows.filter(|(a, b)| likeliest(a) == likeliest(b)).count(),
            selected,
            selected_in_both,
        })
    }
}

/// The largest difference over the largest expected number.
fn relative((given, expected): (&[f32], &[f32])) -> f32 {
    let differences = given.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let largest = expected
        .iter()
        .map(|x| x.abs())
        .fold(f32::MIN_POSITIVE, f32::max);
    differences.fold(0.0, f32::max) / largest
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> usize {
    let at = 0..logits.len();
    at.reduce(|a, b| if logits[b] > logits[a] { b } else { a })
        .unwrap_or(0)
}

/// Tokens that one trace has selected, and how many of them the other has at the same decision.
fn overlap(trace: &RoutingTrace, other: &RoutingTrace) -> [usize; 2] {
    let pairs = trace.decisions.iter().zip(&other.decisions);
    pairs.fold([0; 2], |[all, both], (one, other)| {
        let same = |token: &&usize| other.selected.binary_search(token).is_ok();
        let selected = &one.selected;
        [
            all + selected.len(),
            both + selected.iter().filter(same).count(),
        ]
    })
}
