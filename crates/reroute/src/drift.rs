//! What waiting costs a row: how far it has drifted from what it would have become.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::{Action, HiddenLayout, Schedule, Scorer};
use reroute_layers::indices;

use crate::host::read_back;
use crate::{Decoder, HiddenStates, KvCache, Prompt, RerouteError};

/// The rows that waited until a decision, beside the same rows of the plain model.
#[derive(Debug, Clone, PartialEq)]
pub struct Drift {
    /// The decision layer, before whose input the rows are compared.
    pub layer: usize,
    /// Index of the sample in the batch.
    pub sample: usize,
    /// The visual tokens that waited, as indices in visual order, ascending.
    pub tokens: Vec<usize>,
    /// Of each, the length of the difference over the length of what it would have become.
    pub distances: Vec<f32>,
    /// The mean of the same over the visual tokens that did not wait: what they lack is that others
    /// were not there to be attended to.
    pub active_mean: f32,
}

impl Drift {
    /// The mean over the tokens that waited.
    pub fn mean(&self) -> f32 {
        mean(&self.distances)
    }

    /// The largest of the tokens that waited.
    pub fn largest(&self) -> f32 {
        self.distances.iter().copied().fold(0.0, f32::max)
    }
}

impl<B: Backend> Decoder<B> {
    /// The drift at every decision but the first, under [`Action::Reroute`]; nothing under
    /// [`Action::Remove`], where nothing waits. Runs the prompt twice, under the schedule and
    /// without: for inspection only.
    ///
    /// `scorer` ranks instead of the schedule's own scores, as in [`resume_by`](Self::resume_by).
    ///
    /// # Errors
    /// Those of [`prefill`](Self::prefill).
    pub fn drift(
        &self,
        scorer: Option<&dyn Scorer<B>>,
        prompt: &Prompt<B>,
        schedule: &Schedule,
    ) -> Result<Vec<Drift>, RerouteError> {
        if schedule.action() == Action::Remove {
            return Ok(Vec::new());
        }
        // The layers before all decisions but the first.
        let later = schedule.stages().iter().skip(1);
        let inputs: Vec<usize> = later.map(|stage| stage.layer - 1).collect();
        let run = |schedule: Schedule| {
            let cache = KvCache::new(self.layers().len(), prompt.samples.len())?;
            let mut prefilling = self.begin(cache, prompt.clone(), schedule, false)?;
            for layer in 0..self.layers().len() {
                prefilling.step(scorer, inputs.contains(&layer))?;
            }
            prefilling.finish(scorer)
        };
        let routed = run(schedule.clone().with_layout(HiddenLayout::PerLayer))?;
        let dense = run(Schedule::dense())?;

        let mut drifts = Vec::new();
        for (sample, range) in prompt.ranges().into_iter().enumerate() {
            let decisions: Vec<_> = routed.trace.of_sample(sample).collect();
            for (input, pair) in decisions.windows(2).enumerate() {
                let (before, layer) = (pair[0], pair[1].layer);
                let visual = &prompt.samples[sample].visual;
                let rows: Vec<usize> = visual.iter().map(|v| range.start + v).collect();
                let distances = distances(
                    &routed.hidden_states[input],
                    &dense.hidden_states[input],
                    &rows,
                )?;
                let waited = |token: &usize| before.selected.binary_search(token).is_err();
                let (waiting, active): (Vec<usize>, Vec<usize>) = (0..rows.len()).partition(waited);
                let of = |tokens: &[usize]| -> Vec<f32> {
                    tokens.iter().map(|&token| distances[token]).collect()
                };
                drifts.push(Drift {
                    layer,
                    sample,
                    distances: of(&waiting),
                    active_mean: mean(&of(&active)),
                    tokens: waiting,
                });
            }
        }
        Ok(drifts)
    }
}

/// Of each row, the length of the difference over the length in the plain model.
fn distances<B: Backend>(
    routed: &HiddenStates<B>,
    dense: &HiddenStates<B>,
    rows: &[usize],
) -> Result<Vec<f32>, RerouteError> {
    let of = |states: &HiddenStates<B>| {
        let at = |row: &usize| states.rows.partition_point(|other| other < row);
        let at: Vec<usize> = rows.iter().map(at).collect();
        let at = indices(&at, &states.values.device());
        states.values.clone().select(1, at)
    };
    let length = |x: Tensor<B, 2>| (x.clone() * x).sum_dim(0).sqrt();
    let (routed, dense) = (of(routed), of(dense));
    let relative = length(routed - dense.clone()) / length(dense).clamp_min(1e-12);
    read_back(relative, "hidden states")
}

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len().max(1) as f32
}
