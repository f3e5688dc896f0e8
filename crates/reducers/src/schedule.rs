//! At which layers to decide, how many visual tokens to keep, and what becomes of the rest.
//!
//! [`Schedule`] is always valid. Its JSON form is what users write by hand:
//!
//! ```json
//! {"action": "reroute", "monotonic": false, "stages": [
//!     {"layer": 2, "keep_ratio": 0.45},
//!     {"layer": 15, "keep_count": 64, "score": {"attention": {"heads": "max"}}}
//! ]}
//! ```
//!
//! Everything but `stages` may be left out. The action is then *remove*; all else stands for Reroute's
//! own way (arXiv 2606.12412): last row, mean of heads, f32, the decision layer's own projections,
//! original positions. A key that nobody knows is refused, and so is one that stands twice.

pub(crate) mod file;

use std::iter::{once, repeat_n};

use serde::{Deserialize, Serialize};

use crate::{DecoderShape, Keep, ReducerError, Score};

/// What becomes of the visual tokens a decision does not select.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// They are gone: later decisions choose among those kept (FastV, arXiv 2403.06764;
    /// PyramidDrop, arXiv 2410.17247).
    #[default]
    Remove,
    /// They bypass the layers of the stage, hidden states unchanged, and are candidates again at
    /// the next decision (Reroute, arXiv 2606.12412).
    Reroute,
}

/// The rotary positions of the tokens that are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// Every token keeps its own, with gaps where tokens are absent.
    #[default]
    Gap,
    /// From each decision on, `0, 1, 2, …` again, and generated tokens go on from there (original
    /// PyramidDrop). Grounding suffers: positions no longer say where in the picture a token is
    /// (arXiv 2506.21873 measures 15 instead of 51 % on RefCOCO).
    Renumber,
}

/// What a decision remembers of earlier ones: a candidate is ranked by what it scores here and what it scored
/// before, each as its share of all candidates' scores at that decision (of their magnitudes, where some are
/// negative). Costs nothing, and keeps what the last row has read already from being swapped out
/// (`docs/routing.md`, memory).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScoreMemory {
    /// Nothing: every decision ranks by its own scores, as published.
    #[default]
    Off,
    /// The sum of its shares so far.
    Sum,
    /// The largest of its shares so far.
    Max,
    /// Its share here, and so many times what was remembered before; between 0 and 1.
    Decay(f32),
}

impl ScoreMemory {
    /// What is remembered with this share.
    pub fn with(self, before: Option<f32>, share: f32) -> f32 {
        match (self, before) {
            (Self::Off, _) | (_, None) => share,
            (Self::Sum, Some(before)) => before + share,
            (Self::Max, Some(before)) => before.max(share),
            (Self::Decay(rate), Some(before)) => rate * before + share,
        }
    }

    fn check(self) -> Result<(), ReducerError> {
        match self {
            Self::Decay(rate) if !(rate > 0.0 && rate < 1.0) => Err(ReducerError::Combination {
                stage: 0,
                reason: format!(
                    "a memory that decays by {rate} is none; take a number between 0 and 1, or \"sum\""
                ),
            }),
            _ => Ok(()),
        }
    }
}

/// What becomes of a deferred token's hidden state while it waits, under [`Action::Reroute`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Waiting {
    /// It bypasses the layers of the stage unchanged, as published.
    #[default]
    Untouched,
    /// It rides along: at the end of the stage it receives the mean of what the stage's layers have added to
    /// the sample's active visual tokens (`docs/routing.md`, waiting).
    RideAlong,
    /// It takes a shortcut: at the end of the stage it receives what a low-rank map of its own state says that the
    /// layers would have added. The map was fitted for these layers on pictures, and is the model's.
    Shortcut,
}

/// In which form hidden states pass from layer to layer under [`Action::Reroute`]. Results are the
/// same to the last bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HiddenLayout {
    /// Active rows only, until the next decision.
    #[default]
    Stagewise,
    /// All rows, deferred ones as they wait: for those who read the hidden states of every row
    /// between layers. Costs a gather and a scatter per layer.
    PerLayer,
}

/// One decision, and the layers that live with it: up to the next decision, or to the last layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// The decision layer, counted from 0. Its *input* is scored, and it already runs on the
    /// selection.
    pub layer: usize,
    /// How many visual tokens to keep.
    pub keep: Keep,
    /// Which they are.
    pub score: Score,
    /// Keeps, among them, the tokens at every so many rows and columns of each picture (FEATHER).
    pub stride: Option<usize>,
}

impl Stage {
    /// A stage that keeps the tokens with the highest default score.
    pub fn new(layer: usize, keep: Keep) -> Self {
        Self {
            layer,
            keep,
            score: Score::default(),
            stride: None,
        }
    }

    /// A stage that keeps a share of the original visual tokens.
    pub fn ratio(layer: usize, ratio: f64) -> Self {
        Self::new(layer, Keep::Ratio(ratio))
    }

    /// A stage that keeps a number of visual tokens.
    pub fn count(layer: usize, count: usize) -> Self {
        Self::new(layer, Keep::Count(count))
    }

    /// The same stage with another score.
    pub fn by(self, score: Score) -> Self {
        Self { score, ..self }
    }

    /// The same stage, evenly spread tokens first.
    pub fn with_stride(self, stride: usize) -> Self {
        Self {
            stride: Some(stride),
            ..self
        }
    }
}

/// A valid schedule: stages by strictly increasing layer, each keeping something.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "file::ScheduleFile", into = "file::ScheduleFile")]
pub struct Schedule {
    action: Action,
    monotonic: bool,
    memory: ScoreMemory,
    waiting: Waiting,
    positions: Positions,
    layout: HiddenLayout,
    stages: Vec<Stage>,
}

impl Schedule {
    /// Checks the stages and puts them to use.
    ///
    /// `monotonic` means something for [`Action::Reroute`] only: a decision then ranks the tokens
    /// the previous one did not select behind all others. Removal is monotonic by nature.
    ///
    /// # Errors
    /// [`ReducerError::LayerOrder`], [`ReducerError::KeepRatio`], [`ReducerError::KeepCount`] or
    /// [`ReducerError::Combination`], naming the stage.
    pub fn new(action: Action, monotonic: bool, stages: Vec<Stage>) -> Result<Self, ReducerError> {
        for (
            stage,
            &Stage {
                layer,
                keep,
                score,
                stride,
            },
        ) in stages.iter().enumerate()
        {
            if let Some(Stage {
                layer: previous, ..
            }) = stage.checked_sub(1).map(|before| stages[before])
                && layer <= previous
            {
                return Err(ReducerError::LayerOrder {
                    stage,
                    layer,
                    previous,
                });
            }
            keep.check(stage)?;
            score.check(stage, layer)?;
            if stride == Some(0) {
                return Err(ReducerError::Combination {
                    stage,
                    reason: "a stride of 0 never moves on; use at least 1".into(),
                });
            }
            if action == Action::Reroute && stage > 0 && !score.sees_deferred() {
                return Err(ReducerError::Combination {
                    stage,
                    reason: "deferred tokens took no part in the layer before, so its attention \
                             cannot rank them; score with \"this\" layer, or remove"
                        .into(),
                });
            }
        }
        Ok(Self {
            action,
            monotonic,
            memory: ScoreMemory::default(),
            waiting: Waiting::default(),
            positions: Positions::default(),
            layout: HiddenLayout::default(),
            stages,
        })
    }

    /// The same schedule with other positions.
    ///
    /// # Errors
    /// [`ReducerError::Combination`] for [`Positions::Renumber`] with [`Action::Reroute`]: a token
    /// that may come back needs its place.
    pub fn with_positions(self, positions: Positions) -> Result<Self, ReducerError> {
        if (self.action, positions) == (Action::Reroute, Positions::Renumber) {
            return Err(ReducerError::Combination {
                stage: 0,
                reason: "a rerouted token may come back and needs its place; \
                         use \"gap\" positions, or remove"
                    .into(),
            });
        }
        Ok(Self { positions, ..self })
    }

    /// The same schedule with another memory of scores.
    ///
    /// # Errors
    /// [`ReducerError::Combination`] for a decay that is not between 0 and 1.
    pub fn with_memory(self, memory: ScoreMemory) -> Result<Self, ReducerError> {
        memory.check()?;
        Ok(Self { memory, ..self })
    }

    /// The same schedule with something else that becomes of what waits.
    ///
    /// # Errors
    /// [`ReducerError::Combination`] for anything but [`Waiting::Untouched`] with [`Action::Remove`], where nothing waits.
    pub fn with_waiting(self, waiting: Waiting) -> Result<Self, ReducerError> {
        if self.action == Action::Remove && waiting != Waiting::Untouched {
            return Err(ReducerError::Combination {
                stage: 0,
                reason: "what is removed does not wait, so it receives nothing; reroute, or leave \
                         \"waiting\" out"
                    .into(),
            });
        }
        Ok(Self { waiting, ..self })
    }

    /// The same schedule with another layout of hidden states.
    pub fn with_layout(self, layout: HiddenLayout) -> Self {
        Self { layout, ..self }
    }

    /// The same decisions with another action: *reroute* makes the recoverable twin of a removal,
    /// of equal tokens per layer, operations and cache. Nothing waits under *remove*.
    ///
    /// # Errors
    /// As [`Schedule::new`] and [`Schedule::with_positions`].
    pub fn with_action(&self, action: Action) -> Result<Self, ReducerError> {
        Ok(Self::new(action, self.monotonic, self.stages.clone())?
            .with_memory(self.memory)?
            .with_waiting(match action {
                Action::Reroute => self.waiting,
                Action::Remove => Waiting::Untouched,
            })?
            .with_positions(self.positions)?
            .with_layout(self.layout))
    }

    /// The plain model: no decision, every layer works on every token.
    pub fn dense() -> Self {
        Self {
            action: Action::Remove,
            monotonic: false,
            memory: ScoreMemory::default(),
            waiting: Waiting::default(),
            positions: Positions::default(),
            layout: HiddenLayout::default(),
            stages: Vec::new(),
        }
    }

    /// Reads the JSON form.
    ///
    /// # Errors
    /// [`ReducerError::Json`] if the text is not of this form, otherwise as [`Schedule::new`].
    pub fn from_json(text: &str) -> Result<Self, ReducerError> {
        serde_json::from_str::<file::ScheduleFile>(text)
            .map_err(|source| ReducerError::Json { source })?
            .try_into()
    }

    /// What becomes of the tokens not selected.
    pub fn action(&self) -> Action {
        self.action
    }

    /// Whether a rerouted token, once deferred, ranks behind all others at the next decision.
    pub fn monotonic(&self) -> bool {
        self.monotonic
    }

    /// What a decision remembers of earlier ones.
    pub fn memory(&self) -> ScoreMemory {
        self.memory
    }

    /// What becomes of a deferred token's hidden state.
    pub fn waiting(&self) -> Waiting {
        self.waiting
    }

    /// The positions of the tokens that are kept.
    pub fn positions(&self) -> Positions {
        self.positions
    }

    /// The form in which hidden states pass from layer to layer.
    pub fn layout(&self) -> HiddenLayout {
        self.layout
    }

    /// The stages, by increasing layer.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Whether there is no decision at all.
    pub fn is_dense(&self) -> bool {
        self.stages.is_empty()
    }

    /// The stage whose decision is taken at `layer`, if any.
    pub fn decision_at(&self, layer: usize) -> Option<usize> {
        self.stages
            .binary_search_by_key(&layer, |stage| stage.layer)
            .ok()
    }

    /// Checks that every decision lies within a decoder of `num_layers` layers.
    ///
    /// # Errors
    /// [`ReducerError::LayerDepth`], naming the first stage that does not.
    pub fn check_depth(&self, num_layers: usize) -> Result<(), ReducerError> {
        match self
            .stages
            .iter()
            .position(|stage| stage.layer >= num_layers)
        {
            None => Ok(()),
            Some(stage) => Err(ReducerError::LayerDepth {
                stage,
                layer: self.stages[stage].layer,
                num_layers,
            }),
        }
    }

    /// Checks that a decoder has every layer and head that is named.
    ///
    /// # Errors
    /// Those of [`check_depth`](Self::check_depth), and [`ReducerError::Head`].
    pub fn check(&self, shape: &DecoderShape) -> Result<(), ReducerError> {
        self.check_depth(shape.num_layers.into())?;
        self.stages.iter().try_for_each(|stage| match stage.score {
            Score::Attention(attention) => attention.check_heads(shape.num_attention_heads),
            _ => Ok(()),
        })
    }

    /// Visual tokens kept by each stage, of `visual_tokens`. Under [`Action::Remove`] no stage
    /// keeps more than the one before it kept.
    pub fn keep_counts(&self, visual_tokens: usize) -> Vec<usize> {
        let mut pool = visual_tokens;
        self.stages
            .iter()
            .map(|stage| {
                let count = stage.keep.count(visual_tokens).min(pool);
                if self.action == Action::Remove {
                    pool = count;
                }
                count
            })
            .collect()
    }

    /// Visual tokens each of `num_layers` layers works on, of `visual_tokens`.
    pub fn visual_tokens_per_layer(
        &self,
        num_layers: usize,
        visual_tokens: usize,
    ) -> impl Iterator<Item = usize> + use<> {
        let runs = self.runs(num_layers, visual_tokens).into_iter();
        runs.flat_map(|(layers, tokens)| repeat_n(tokens, layers))
    }

    /// How many layers in a row work on how many visual tokens.
    fn runs(&self, num_layers: usize, visual_tokens: usize) -> Vec<(usize, usize)> {
        let decided = self.stages.iter().map(|stage| stage.layer.min(num_layers));
        let starts: Vec<usize> = once(0).chain(decided).chain([num_layers]).collect();
        let counts = once(visual_tokens).chain(self.keep_counts(visual_tokens));
        let layers = starts.windows(2).map(|at| at[1] - at[0]);
        layers.zip(counts).collect()
    }

    /// Visual tokens a layer works on, on average: the budget a schedule is named after.
    pub fn average_tokens(&self, num_layers: usize, visual_tokens: usize) -> f64 {
        let runs = self.runs(num_layers, visual_tokens).into_iter();
        let total: u128 = runs
            .map(|(layers, tokens)| layers as u128 * tokens as u128)
            .sum();
        total as f64 / num_layers.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Schedule, Stage};
    use crate::ReducerError;

    #[test]
    fn a_dense_schedule_keeps_every_token_in_every_layer() {
        let dense = Schedule::dense();
        assert!(dense.is_dense());
        assert!(dense.keep_counts(576).is_empty());
        let per_layer: Vec<usize> = dense.visual_tokens_per_layer(4, 576).collect();
        assert_eq!(per_layer, [576; 4]);
        assert_eq!(dense.average_tokens(32, 576), 576.0);
        assert_eq!(dense.average_tokens(0, 576), 0.0);
        let most = usize::MAX;
        assert_eq!(dense.average_tokens(most, most), most as f64);
        assert_eq!(dense.visual_tokens_per_layer(most, most).next(), Some(most));
    }

    #[test]
    fn removal_never_brings_tokens_back_but_rerouting_may() {
        let stages = vec![
            Stage::ratio(1, 0.25),
            Stage::ratio(2, 0.5),
            Stage::count(3, 999),
        ];
        let remove = Schedule::new(Action::Remove, false, stages.clone()).unwrap();
        let reroute = Schedule::new(Action::Reroute, false, stages).unwrap();
        assert_eq!(remove.keep_counts(64), [16, 16, 16]);
        assert_eq!(reroute.keep_counts(64), [16, 32, 64]);
        let per_layer: Vec<usize> = reroute.visual_tokens_per_layer(5, 64).collect();
        assert_eq!(per_layer, [64, 16, 32, 64, 64]);
        let shallow: Vec<usize> = reroute.visual_tokens_per_layer(2, 64).collect();
        assert_eq!(shallow, [64, 16]);
    }

    #[test]
    fn the_layer_sum_of_reroute_pdrop_at_192_is_6127() {
        let stages =
            [(2, 0.4502), (7, 0.4502), (15, 0.2251), (23, 0.1126)].map(|(l, r)| Stage::ratio(l, r));
        let schedule = Schedule::new(Action::Reroute, false, stages.into()).unwrap();
        assert_eq!(
            schedule.visual_tokens_per_layer(32, 576).sum::<usize>(),
            6127
        );
        assert_eq!(schedule.average_tokens(32, 576), 6127.0 / 32.0);
    }

    #[test]
    fn bad_ratios_and_counts_are_refused_by_stage() {
        for ratio in [f64::NAN, f64::INFINITY, 0.0, -0.5, 2.0] {
            let stages = vec![Stage::ratio(1, 1.0), Stage::ratio(2, ratio)];
            let error = Schedule::new(Action::Remove, false, stages).unwrap_err();
            assert!(
                matches!(error, ReducerError::KeepRatio { stage: 1, .. }),
                "{error}"
            );
        }
        let error = Schedule::new(Action::Remove, false, vec![Stage::count(1, 0)]).unwrap_err();
        assert!(
            matches!(error, ReducerError::KeepCount { stage: 0, .. }),
            "{error}"
        );
    }

    #[test]
    fn layers_must_increase_and_exist() {
        for layers in [[3, 3], [7, 3]] {
            let stages = layers.map(|layer| Stage::count(layer, 8)).into();
            let error = Schedule::new(Action::Remove, false, stages).unwrap_err();
            assert!(
                matches!(
                    error,
                    ReducerError::LayerOrder {
                        stage: 1,
                        layer: 3,
                        ..
                    }
                ),
                "{error}"
            );
        }
        let schedule = Schedule::new(Action::Remove, false, vec![Stage::count(3, 8)]).unwrap();
        assert!(schedule.check_depth(4).is_ok());
        let error = schedule.check_depth(3).unwrap_err();
        assert!(
            matches!(
                error,
                ReducerError::LayerDepth {
                    stage: 0,
                    layer: 3,
                    num_layers: 3
                }
            ),
            "{error}"
        );
    }
}
