//! From a method and a budget to a plan.

use std::cmp::Reverse;

use crate::encoder::{EncoderMethod, EncoderShape, Nuwa};
use crate::{
    Action, Attention, EncoderPlan, HeadReduce, Keep, Plan, Positions, Profile, Query,
    ReducerError, Rest, Schedule, Score, ScoreDtype, ScoreLayer, ScoreMemory, Stage, budget,
};

use super::Preset;

/// Visual tokens the budgets are named after: 24 × 24 patches (LLaVA-1.5).
const REFERENCE_TOKENS: f64 = 576.0;
/// Depths that layers are given for: LLaVA-1.5-7B and Qwen2.5-VL-7B.
const LLAVA_DEPTH: usize = 32;
const QWEN_DEPTH: usize = 28;

/// Budgets that methods are compared at, as tokens of 576.
const BUDGETS: [usize; 3] = [192, 128, 64];
/// Nüwa for Qwen2.5-VL: budget (75, 50 and 25 % of 576), share kept by stage 1, and share of those
/// kept by stage 2.
const NUWA_QWEN: [(usize, f64, f64); 3] = [(432, 0.85, 0.70), (288, 0.60, 0.66), (144, 0.35, 0.42)];
/// Stage 1 of Nüwa for LLaVA-1.5 keeps 7/4 of the budget for the first half of the layers, stage 2
/// then 1/4 of it: 112 → 16, 224 → 32, 336 → 48.
pub(super) const ENTERING: f64 = 1.75;

/// How a method fills a budget.
#[derive(Debug, Clone)]
pub(super) enum Recipe {
    /// No reduction.
    Dense,
    /// A schedule in the decoder.
    Decoder(DecoderRecipe),
    /// The budget's tokens are all that enters the decoder.
    Encoder(fn() -> EncoderMethod),
    /// More than the budget enters the decoder, whose second half selects among them.
    Late(LateRecipe),
    /// Nüwa's two stages.
    Nuwa(NuwaForm),
}

/// A reduction before the decoder, and decisions from the middle of it on.
#[derive(Debug, Clone)]
pub(super) struct LateRecipe {
    pub(super) method: fn() -> EncoderMethod,
    /// What enters the decoder, in terms of the budget.
    pub(super) entering: f64,
    /// Remove: one decision. Reroute: four.
    pub(super) action: Action,
    pub(super) score: fn(&EncoderShape) -> Score,
}

/// Decisions in the decoder.
#[derive(Debug, Clone)]
pub(super) struct DecoderRecipe {
    pub(super) action: Action,
    /// See [`Schedule::new`].
    pub(super) monotonic: bool,
    /// See [`Schedule::with_memory`].
    pub(super) memory: ScoreMemory,
    pub(super) positions: Positions,
    /// Decision layers in a decoder of 32 layers.
    pub(super) layers: &'static [usize],
    /// How a ratio becomes a count.
    pub(super) keep: fn(f64) -> Keep,
    pub(super) score: Score,
    /// See [`Stage::stride`], of the first decision.
    pub(super) stride: Option<usize>,
    /// Shape of the keep ratios when they are solved for a budget.
    pub(super) profile: Profile,
    /// Released keep ratios by budget in tokens of 576, one ratio per decision layer.
    pub(super) released: &'static [(usize, &'static [f64])],
    /// Budgets that ratios are solved for.
    pub(super) exact: &'static [usize],
}

/// What becomes of the tokens that stage 2 of Nüwa does not select.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NuwaForm {
    /// Removed, as released.
    Released,
    /// Rerouted: four decisions that keep as many as stage 2.
    Reroute,
    /// Rerouted from early on, in a pyramid of the same average.
    Pyramid,
    /// Rerouted, and what stage 1 does not keep is a candidate of the decisions too.
    FullPool,
}

impl Recipe {
    /// The method before the decoder, if there is one.
    pub(super) fn encoder_method(&self) -> Option<EncoderMethod> {
        match self {
            Self::Dense | Self::Decoder(_) => None,
            Self::Encoder(method) => Some(method()),
            Self::Late(recipe) => Some((recipe.method)()),
            Self::Nuwa(_) => Some(EncoderMethod::Nuwa(Nuwa::default())),
        }
    }

    /// Whether it numbers positions anew.
    pub(super) fn renumbers(&self) -> bool {
        matches!(self, Self::Decoder(recipe) if recipe.positions == Positions::Renumber)
    }
}

impl Recipe {
    /// Budgets, and whether ratios are solved for them.
    pub(super) fn budgets(&self) -> Vec<(Option<usize>, bool)> {
        let as_named = |budgets: Vec<usize>| {
            let named = budgets.into_iter().map(|budget| (Some(budget), false));
            named.collect()
        };
        match self {
            Self::Dense => vec![(None, false)],
            Self::Decoder(recipe) => {
                let released = recipe.released.iter().map(|&(budget, _)| (budget, false));
                let exact = recipe.exact.iter().map(|&budget| (budget, true));
                let mut all: Vec<(usize, bool)> = released.chain(exact).collect();
                all.sort_by_key(|&(budget, exact)| (Reverse(budget), exact));
                let all = all.into_iter();
                all.map(|(budget, exact)| (Some(budget), exact)).collect()
            }
            Self::Encoder(_) | Self::Late(_) => as_named(BUDGETS.to_vec()),
            Self::Nuwa(_) => {
                let mut all = NUWA_QWEN.map(|(budget, ..)| budget).to_vec();
                all.extend(BUDGETS);
                all.sort_by_key(|&budget| Reverse(budget));
                as_named(all)
            }
        }
    }

    pub(super) fn plan(
        &self,
        preset: &Preset,
        num_layers: usize,
        encoder: &EncoderShape,
    ) -> Result<Plan, ReducerError> {
        let share = preset.share();
        match self {
            Self::Dense => Ok(Schedule::dense().into()),
            Self::Decoder(recipe) => Ok(recipe.schedule(preset, num_layers)?.into()),
            Self::Encoder(method) => Ok(Plan {
                encoder: Some(before(method(), Keep::Rounded(share))),
                schedule: Schedule::dense(),
            }),
            Self::Late(recipe) => {
                let layers: &[usize] = match recipe.action {
                    Action::Remove => &[16],
                    Action::Reroute => &[16, 20, 24, 28],
                };
                let layers = preset.layers(layers, LLAVA_DEPTH, num_layers)?;
                let of_entering = 1.0 / recipe.entering;
                let ratios = budget::solve(Profile::Uniform, &layers, num_layers, of_entering)?;
                let score = (recipe.score)(encoder);
                let stages = layers.into_iter().zip(ratios);
                let stage = |(layer, ratio)| Stage::new(layer, Keep::Rounded(ratio)).by(score);
                let keep = Keep::Rounded(share * recipe.entering);
                Ok(Plan {
                    encoder: Some(before((recipe.method)(), keep)),
                    schedule: Schedule::new(recipe.action, false, stages.map(stage).collect())?,
                })
            }
            Self::Nuwa(form) => form.plan(preset, num_layers, encoder),
        }
    }
}

fn before(method: EncoderMethod, keep: Keep) -> EncoderPlan {
    EncoderPlan {
        method,
        keep,
        rest: Rest::Drop,
        positions: Positions::Gap,
    }
}

impl DecoderRecipe {
    pub(super) fn schedule(
        &self,
        preset: &Preset,
        num_layers: usize,
    ) -> Result<Schedule, ReducerError> {
        let layers = preset.layers(self.layers, LLAVA_DEPTH, num_layers)?;
        self.schedule_at(layers, preset, num_layers)
    }

    pub(super) fn schedule_at(
        &self,
        layers: Vec<usize>,
        preset: &Preset,
        num_layers: usize,
    ) -> Result<Schedule, ReducerError> {
        let of_budget = |&&(budget, _): &&(usize, _)| Some(budget) == preset.budget;
        let ratios = match self.released.iter().find(of_budget) {
            Some(&(_, ratios)) if !preset.exact => ratios.to_vec(),
            _ => budget::solve(self.profile, &layers, num_layers, preset.share())?,
        };
        let stages = layers.into_iter().zip(ratios);
        let stages = stages.map(|(layer, ratio)| Stage::new(layer, (self.keep)(ratio)));
        let mut stages: Vec<Stage> = stages.map(|stage| stage.by(self.score)).collect();
        if let Some(first) = stages.first_mut() {
            first.stride = self.stride;
        }
        Schedule::new(self.action, self.monotonic, stages)?
            .with_memory(self.memory)?
            .with_positions(self.positions)
    }
}

impl NuwaForm {
    fn plan(
        self,
        preset: &Preset,
        num_layers: usize,
        encoder: &EncoderShape,
    ) -> Result<Plan, ReducerError> {
        let (depth, decisions): (_, &[usize]) = encoder.settings(
            (LLAVA_DEPTH, &[16, 20, 24, 28]),
            (QWEN_DEPTH, &[15, 18, 21, 24]),
        );
        let stage_2 = preset.layers(&decisions[..1], depth, num_layers)?[0];
        let of_budget = |&&(budget, ..): &&(usize, f64, f64)| Some(budget) == preset.budget;
        // Share of all tokens that enters the decoder, and what stage 2 keeps of it.
        let (entering, selected) = match NUWA_QWEN.iter().find(of_budget) {
            Some(&(_, entering, selected)) => (entering, Keep::Ratio(selected)),
            None => {
                let share_of_entering = 1.0 / ENTERING;
                let solved =
                    budget::solve(Profile::Uniform, &[stage_2], num_layers, share_of_entering)?;
                (preset.share() * ENTERING, Keep::Rounded(solved[0]))
            }
        };
        let keep = encoder.settings(Keep::Rounded(entering), Keep::Raised(entering));
        let kept = selected.ratio().unwrap_or(1.0);
        let stages: Vec<Stage> = match self {
            Self::Released => vec![Stage::new(stage_2, selected).by(stage_2_score(encoder))],
            Self::Reroute => {
                let layers = preset.layers(decisions, depth, num_layers)?.into_iter();
                layers.map(|layer| Stage::new(layer, selected)).collect()
            }
            Self::Pyramid => {
                let layers = preset.layers(&[2, 7, 15, 23], LLAVA_DEPTH, num_layers)?;
                let first_half = stage_2 as f64 / num_layers as f64;
                let average = first_half + (1.0 - first_half) * kept;
                let ratios = budget::solve(Profile::Pyramid, &layers, num_layers, average)?;
                let stages = layers.into_iter().zip(ratios);
                let stage = |(layer, ratio)| Stage::new(layer, Keep::Rounded(ratio));
                stages.map(stage).collect()
            }
            Self::FullPool => {
                let layers = preset.layers(decisions, depth, num_layers)?.into_iter();
                let stage = |layer| Stage::new(layer, Keep::Rounded(entering * kept));
                let entry = Stage::new(0, keep).by(Score::Encoder);
                [entry].into_iter().chain(layers.map(stage)).collect()
            }
        };
        let action = match self {
            Self::Released => Action::Remove,
            _ => Action::Reroute,
        };
        let mut encoder = before(EncoderMethod::Nuwa(Nuwa::default()), keep);
        if self == Self::FullPool {
            encoder.rest = Rest::Defer;
        }
        Ok(Plan {
            encoder: Some(encoder),
            schedule: Schedule::new(action, false, stages)?,
        })
    }
}

/// What stage 2 of Nüwa ranks by: the attention of the layer before as executed, of the last row
/// (LLaVA) or the mean of the last three, the highest head (Qwen).
fn stage_2_score(encoder: &EncoderShape) -> Score {
    let (query, heads) = encoder.settings(
        (Query::Last, HeadReduce::Mean),
        (Query::LastMean(3), HeadReduce::Max),
    );
    Score::Attention(Attention {
        layer: ScoreLayer::Previous,
        query,
        heads,
        dtype: ScoreDtype::Model,
        ..Attention::default()
    })
}

impl Preset {
    /// The budget as a share of the visual tokens.
    fn share(&self) -> f64 {
        self.budget
            .map_or(1.0, |budget| budget as f64 / REFERENCE_TOKENS)
    }

    /// Moves decision layers from a reference depth to `num_layers`, halves rounded away from zero.
    fn layers(
        &self,
        layers: &[usize],
        depth: usize,
        num_layers: usize,
    ) -> Result<Vec<usize>, ReducerError> {
        let rescale = |&layer: &usize| {
            let moved = layer as f64 * num_layers as f64 / depth as f64;
            (moved.round() as usize).max(1)
        };
        let layers: Vec<usize> = layers.iter().map(rescale).collect();
        let increasing = layers.windows(2).all(|pair| pair[0] < pair[1]);
        if increasing && layers.iter().all(|&layer| layer < num_layers) {
            Ok(layers)
        } else {
            Err(ReducerError::TooShallow {
                name: self.name.clone(),
                num_layers,
                layers,
            })
        }
    }
}
