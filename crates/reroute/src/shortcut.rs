//! Calibrated shortcuts: what the layers of a stage would have added to a row that waits, as a low-rank map of its
//! state (`docs/routing.md`, waiting).

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Tensor, TensorData};
use reducers::{Schedule, Waiting};
use reroute_layers::indices;
use serde::{Deserialize, Serialize};

use crate::{Decoder, KvCache, Prompt, RerouteError};

/// The map for one stage: `h ↦ h + up · (down · h) + shift`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shortcut {
    /// The layers that it stands for: those of a stage.
    pub layers: Range<usize>,
    /// `[rank, hidden_size]`, row by row.
    pub down: Vec<f32>,
    /// `[hidden_size, rank]`, row by row.
    pub up: Vec<f32>,
    /// `[hidden_size]`
    pub shift: Vec<f32>,
}

impl Shortcut {
    /// Numbers that a state is mapped down to.
    pub fn rank(&self) -> usize {
        self.down.len() / self.shift.len().max(1)
    }

    /// Floating-point operations on one row: `4 · rank · hidden_size`.
    pub fn flops(&self) -> f64 {
        4.0 * self.down.len() as f64
    }

    /// What is added to states.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, rows]` in f32; returns the same
    pub(crate) fn update<B: Backend>(&self, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        let (rank, features) = (self.rank(), self.shift.len());
        let tensor = |values: &[f32], shape: [usize; 2]| {
            let data = TensorData::new(values.to_vec(), shape);
            Tensor::<B, 2>::from_data(data, (&hidden_states.device(), hidden_states.dtype()))
        };
        let down = tensor(&self.down, [rank, features]);
        let up = tensor(&self.up, [features, rank]);
        let shift = tensor(&self.shift, [features, 1]);
        up.matmul(down.matmul(hidden_states)) + shift
    }

    fn refused(&self, reason: impl Into<String>) -> RerouteError {
        RerouteError::Shortcut {
            layers: self.layers.clone(),
            reason: reason.into(),
        }
    }

    fn check(&self, layers: usize, hidden_size: usize) -> Result<(), RerouteError> {
        if self.layers.is_empty() || self.layers.end >= layers {
            return Err(self.refused(format!(
                "ends before no decision of a decoder of {layers} layers: it was fitted for another model"
            )));
        }
        let (features, rank) = (self.shift.len(), self.rank());
        if features != hidden_size {
            return Err(self.refused(format!(
                "has {features} features, expected hidden_size {hidden_size}: it was fitted for another model"
            )));
        }
        let sizes = [self.down.len(), self.up.len()];
        if rank == 0 || rank > features || sizes != [rank * features; 2] {
            return Err(self.refused(format!(
                "has maps of {sizes:?} numbers, expected rank · {hidden_size} each, of rank 1 to {hidden_size}"
            )));
        }
        let mut all = { self.down.iter() }.chain(&self.up).chain(&self.shift);
        match all.all(|x| x.is_finite()) {
            true => Ok(()),
            false => Err(self.refused("has numbers that are not finite: fit it again")),
        }
    }
}

/// The shortcuts of a decoder, one for each stage that they were fitted for; as JSON, an object with a list of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "File", into = "File")]
pub struct Shortcuts(Arc<Vec<Shortcut>>);

impl Shortcuts {
    /// Shortcuts by their layers; of two for the same layers the later one.
    pub fn new(shortcuts: impl IntoIterator<Item = Shortcut>) -> Self {
        let mut all: Vec<Shortcut> = Vec::new();
        for shortcut in shortcuts {
            all.retain(|other| other.layers != shortcut.layers);
            all.push(shortcut);
        }
        all.sort_unstable_by_key(|shortcut| (shortcut.layers.start, shortcut.layers.end));
        Self(all.into())
    }

    /// All of them, by their layers.
    pub fn iter(&self) -> impl Iterator<Item = &Shortcut> {
        self.0.iter()
    }

    /// Whether all fit a decoder.
    pub(crate) fn check(&self, layers: usize, hidden_size: usize) -> Result<(), RerouteError> {
        self.iter()
            .try_for_each(|shortcut| shortcut.check(layers, hidden_size))
    }

    /// The one for these layers.
    pub(crate) fn find(&self, layers: &Range<usize>) -> Option<&Shortcut> {
        self.iter().find(|shortcut| shortcut.layers == *layers)
    }
}

/// Shortcuts as they are written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    shortcuts: Vec<Shortcut>,
}

impl From<File> for Shortcuts {
    fn from(file: File) -> Self {
        Self::new(file.shortcuts)
    }
}

impl From<Shortcuts> for File {
    fn from(shortcuts: Shortcuts) -> Self {
        let shortcuts = Arc::unwrap_or_clone(shortcuts.0);
        Self { shortcuts }
    }
}

/// The layers between the decisions of a schedule: what deferred rows wait for.
fn stages(schedule: &Schedule) -> impl Iterator<Item = Range<usize>> {
    let pairs = schedule.stages().windows(2);
    pairs.map(|pair| pair[0].layer..pair[1].layer)
}

/// Visual rows as they would wait for a decision, and what the layers would have made of them.
#[derive(Debug, Clone)]
pub struct Waited<B: Backend> {
    /// The layers that they would not go through.
    pub layers: Range<usize>,
    /// `[hidden_size, visual rows]` in f32, with all that is not of these layers (DeepStack features).
    pub before: Tensor<B, 2>,
    /// The same in the plain model, behind these layers.
    pub after: Tensor<B, 2>,
}

impl<B: Backend> Decoder<B> {
    /// Whether every stage has the shortcut that rows take while they wait.
    pub(crate) fn check_shortcuts(&self, schedule: &Schedule) -> Result<(), RerouteError> {
        let needs = schedule.waiting() == Waiting::Shortcut;
        let mut missing = stages(schedule).filter(|layers| self.shortcuts().find(layers).is_none());
        match missing.next().filter(|_| needs) {
            None => Ok(()),
            Some(layers) => Err(RerouteError::Shortcut {
                layers,
                reason: "is not known: fit it to this routing (`reroute calibrate`), or leave \"waiting\" out"
                    .into(),
            }),
        }
    }

    /// All visual rows of prompts as they would wait for each decision of a schedule but the first, and what
    /// the layers before it would have made of them: what [shortcuts](Shortcut) are fitted to. Runs the plain model.
    ///
    /// # Errors
    /// Those of [`prefill`](Self::prefill).
    pub fn waits(
        &self,
        prompt: &Prompt<B>,
        schedule: &Schedule,
    ) -> Result<Vec<Waited<B>>, RerouteError> {
        self.check(prompt, &schedule.clone().with_waiting(Waiting::Untouched)?)?;
        let stages: Vec<Range<usize>> = stages(schedule).collect();
        let ends = stages.iter().flat_map(|stage| [stage.start, stage.end]);
        let observed: BTreeSet<usize> = ends.filter_map(|layer| layer.checked_sub(1)).collect();
        let cache = KvCache::new(self.layers().len(), prompt.samples.len())?;
        let mut prefilling = self.begin(cache, prompt.clone(), Schedule::dense(), false)?;
        for layer in 0..self.layers().len() {
            prefilling.step(None, observed.contains(&layer))?;
        }
        let outputs = prefilling.finish(None)?.hidden_states;

        let samples = prompt.samples.iter().zip(prompt.ranges());
        let rows = samples.flat_map(|(sample, range)| {
            let visual = sample.visual.iter();
            visual.map(move |row| range.start + row)
        });
        let rows: Vec<usize> = rows.collect();
        let device = prompt.embeddings.device();
        // What leaves a layer, before DeepStack features are added.
        let behind = |layer: Option<usize>| {
            let output = layer.map(|layer| &outputs[observed.range(..layer).count()].values);
            let all = output.unwrap_or(&prompt.embeddings).clone();
            let all = all.select(1, indices(&rows, &device));
            all.cast(FloatDType::F32)
        };
        let waited = stages.into_iter().map(|layers| {
            let first = layers.start.checked_sub(1);
            let added = first.unwrap_or(0)..(layers.end - 1).min(prompt.deepstack.len());
            let added = prompt.deepstack.get(added).into_iter().flatten();
            let before = added.fold(behind(first), |sum, features| {
                sum + features.clone().cast(FloatDType::F32)
            });
            Waited {
                before,
                after: behind(Some(layers.end - 1)),
                layers,
            }
        });
        match rows.is_empty() {
            true => Ok(Vec::new()),
            false => Ok(waited.collect()),
        }
    }
}
