use std::ops::Range;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::{Action, Positions, Schedule, Stage};

use crate::{KvCache, RerouteError, SampleLayout};

/// The rows of a sample at the first decision of a turn, with the hidden states that they had there: what
/// a later turn needs to choose anew.
#[derive(Debug, Clone)]
pub(crate) struct Pool<B: Backend> {
    /// The decision layer whose input the hidden states are.
    pub(crate) layer: usize,
    /// Consecutive rows, numbered within the sample.
    pub(crate) rows: Range<usize>,
    /// `[hidden_size, rows]`
    pub(crate) hidden_states: Tensor<B, 2>,
}

/// What a turn need not compute again, because earlier ones did.
#[derive(Debug)]
pub(crate) struct Past<B: Backend> {
    /// Of each sample, the leading rows that no layer needs to embed again.
    pub(crate) cached: Vec<usize>,
    /// Of each sample, the rows among them that are deferred until the first decision.
    pub(crate) deferred: Vec<Option<Pool<B>>>,
}

impl<B: Backend> Past<B> {
    /// Nothing.
    pub(crate) fn none(samples: usize) -> Self {
        Self {
            cached: vec![0; samples],
            deferred: vec![None; samples],
        }
    }

    /// Decides what can be taken over under `schedule` and forgets the rest.
    ///
    /// Rows before the first visual token never depend on a decision: every layer keeps them. From
    /// there on, under *reroute*, layers below the first decision keep all rows; from the decision on
    /// they are computed anew, because the turn's own last row chooses which tokens they work on.
    /// Under *remove* every layer keeps what it has; without decisions, the rows before the first that an
    /// earlier turn kept from a layer. A schedule that gives
    /// positions away, or that ranks by what no cache holds, starts from nothing.
    ///
    /// # Errors
    /// [`RerouteError::MixedPositions`] if rows would be kept that an earlier turn renumbered.
    pub(crate) fn take(
        cache: &mut KvCache<B>,
        samples: &[SampleLayout],
        schedule: &Schedule,
    ) -> Result<Self, RerouteError> {
        let mut past = Self::none(samples.len());
        if starts_anew(schedule) {
            for sample in 0..samples.len() {
                cache.take_pool(sample);
                cache.truncate(sample, 0)?;
            }
            return Ok(past);
        }
        let chooses_anew = match schedule.action() {
            Action::Reroute => schedule.stages().first().map(|stage| stage.layer),
            Action::Remove => None,
        };
        for (sample, layout) in samples.iter().enumerate() {
            let pool = cache.take_pool(sample);
            // The last row is always computed: its logits are the answer.
            let known = cache.rows(sample).min(layout.rows - 1);
            let first_visual = layout.visual.first().copied().unwrap_or(layout.rows);
            // Rows that were renumbered are refused below.
            let is_plain = schedule.stages().is_empty()
                && cache.renumbered_from(sample, first_visual).is_none();
            let known = match is_plain {
                // No layer may lack a row before a new one.
                true => known.min(cache.held_by_all(sample)),
                false => known,
            };
            match chooses_anew.filter(|_| first_visual < known) {
                None => cache.truncate(sample, known)?,
                Some(layer) => {
                    let pooled = pool.as_ref().filter(|pool| pool.layer == layer);
                    let pooled = pooled.and_then(|pooled| pooled.slice(first_visual..known));
                    cache.truncate(sample, pooled.as_ref().map_or(first_visual, |p| p.rows.end))?;
                    for above in layer..cache.layers() {
                        cache.truncate_layer(above, sample, first_visual);
                    }
                    past.deferred[sample] = pooled;
                }
            }
            past.cached[sample] = cache.rows(sample);
            if let Some(layer) = cache.renumbered_from(sample, first_visual) {
                return Err(RerouteError::MixedPositions { sample, layer });
            }
        }
        Ok(past)
    }
}

/// Whether earlier turns are of no use to a schedule.
fn starts_anew(schedule: &Schedule) -> bool {
    let unrotated = |stage: &Stage| stage.score.is_unrotated();
    let executed = |stage: &Stage| !stage.score.sees_deferred();
    schedule.positions() == Positions::Renumber
        || schedule.stages().iter().any(unrotated)
        || schedule.action() == Action::Reroute && schedule.stages().iter().any(executed)
}

impl<B: Backend> Pool<B> {
    /// The rows from `wanted.start` to the earlier of the two ends; `None` if there are none.
    fn slice(&self, wanted: Range<usize>) -> Option<Self> {
        let rows = wanted.start..wanted.end.min(self.rows.end);
        let start = rows.start.checked_sub(self.rows.start)?;
        let hidden_states = self.hidden_states.clone();
        (!rows.is_empty()).then(|| Self {
            layer: self.layer,
            hidden_states: hidden_states.narrow(1, start, rows.len()),
            rows,
        })
    }
}
