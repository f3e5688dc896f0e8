//! The whole way of a picture's tokens: what enters the decoder of them, and what its layers then work
//! on.

use serde::{Deserialize, Serialize};

use crate::encoder::EncoderMethod;
use crate::keep::Rounding;
use crate::schedule::file::{PlanFile, is_default};
use crate::{Cost, DecoderShape, Keep, KvType, Positions, ReducerError, Schedule, Score, Stage};

/// A reduction before the decoder, a schedule in it, or both.
///
/// Its JSON form is that of a [`Schedule`] with one key more; with `encoder`, `stages` may be left
/// out.
///
/// ```
/// let plan = reducers::Plan::from_json(
///     r#"{"encoder": {"method": {"random-tokens": {"seed": 1}}, "keep_ratio": 0.25},
///         "action": "reroute", "stages": [{"layer": 16, "keep_count": 16}]}"#,
/// )?;
/// assert_eq!(plan.entering(576), 144);
/// # Ok::<(), reducers::ReducerError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Before the decoder.
    pub encoder: Option<EncoderPlan>,
    /// In the decoder. Its keep ratios are shares of the tokens that enter it.
    pub schedule: Schedule,
}

/// A reduction before the decoder, of every picture (and time step of a video) by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "EncoderFile", into = "EncoderFile")]
pub struct EncoderPlan {
    /// Which tokens, and what they are made of.
    pub method: EncoderMethod,
    /// How many of a picture.
    pub keep: Keep,
    /// What becomes of the others.
    pub rest: Rest,
    /// The positions of those kept.
    pub positions: Positions,
}

/// What becomes of the tokens that a reduction before the decoder does not keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rest {
    /// The decoder never sees them.
    #[default]
    Drop,
    /// They enter it as the encoder made them. A first decision by [`Score::Encoder`](crate::Score)
    /// defers them at once; later ones may call them.
    Defer,
}

/// An encoder plan as written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EncoderFile {
    method: EncoderMethod,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keep_ratio: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keep_count: Option<usize>,
    /// Of a keep ratio.
    #[serde(default, skip_serializing_if = "is_default")]
    rounding: Rounding,
    #[serde(default, skip_serializing_if = "is_default")]
    rest: Rest,
    #[serde(default, skip_serializing_if = "is_default")]
    positions: Positions,
}

impl TryFrom<EncoderFile> for EncoderPlan {
    type Error = ReducerError;

    fn try_from(file: EncoderFile) -> Result<Self, ReducerError> {
        let keep = match (file.keep_ratio, file.keep_count) {
            (Some(ratio), None) => file.rounding.keep(ratio),
            (None, Some(count)) => Keep::Count(count),
            _ => return Err(ReducerError::EncoderKeep),
        };
        keep.check(0).map_err(|_| ReducerError::EncoderKeep)?;
        file.method.check()?;
        Ok(Self {
            method: file.method,
            keep,
            rest: file.rest,
            positions: file.positions,
        })
    }
}

impl From<EncoderPlan> for EncoderFile {
    fn from(plan: EncoderPlan) -> Self {
        Self {
            method: plan.method,
            keep_ratio: plan.keep.ratio(),
            keep_count: match plan.keep {
                Keep::Count(count) => Some(count),
                _ => None,
            },
            rounding: Rounding::of(plan.keep),
            rest: plan.rest,
            positions: plan.positions,
        }
    }
}

impl From<Schedule> for Plan {
    fn from(schedule: Schedule) -> Self {
        Self {
            encoder: None,
            schedule,
        }
    }
}

impl Plan {
    /// Reads the JSON form.
    ///
    /// # Errors
    /// [`ReducerError::Json`] if the text is not of this form, [`ReducerError::EncoderKeep`] and
    /// [`ReducerError::Unsupported`] for settings of `encoder`, [`ReducerError::NoSalience`] if a
    /// decision ranks by a reduction that is not there, otherwise as [`Schedule::new`].
    pub fn from_json(text: &str) -> Result<Self, ReducerError> {
        let json = |source| ReducerError::Json { source };
        let mut file: PlanFile = serde_json::from_str(text).map_err(json)?;
        let encoder = file.encoder.take().map(EncoderPlan::try_from).transpose()?;
        let schedule = file.schedule(encoder.is_some()).map_err(json)?;
        let plan = Self {
            encoder,
            schedule: schedule.try_into()?,
        };
        plan.check()?;
        Ok(plan)
    }

    /// Whether a decision that ranks by the reduction has one to rank by.
    fn check(&self) -> Result<(), ReducerError> {
        let defers = |encoder: &EncoderPlan| encoder.rest == Rest::Defer;
        let ranks_by_it = |stage: &Stage| stage.score == Score::Encoder;
        match self.schedule.stages().iter().any(ranks_by_it) {
            true if !self.encoder.as_ref().is_some_and(defers) => Err(ReducerError::NoSalience),
            _ => Ok(()),
        }
    }

    /// The JSON form.
    pub fn to_json(&self) -> serde_json::Value {
        let mut json = serde_json::json!(self.schedule);
        if let Some(encoder) = &self.encoder {
            json["encoder"] = serde_json::json!(encoder);
        }
        json
    }

    /// Visual tokens that enter the decoder, of a picture of `visual_tokens`.
    pub fn entering(&self, visual_tokens: usize) -> usize {
        match &self.encoder {
            Some(encoder) if encoder.rest == Rest::Drop => encoder.keep.count(visual_tokens),
            _ => visual_tokens,
        }
    }

    /// Visual tokens each of `num_layers` layers works on, of a picture of `visual_tokens`.
    pub fn visual_tokens_per_layer(
        &self,
        num_layers: usize,
        visual_tokens: usize,
    ) -> impl Iterator<Item = usize> + use<> {
        let entering = self.entering(visual_tokens);
        self.schedule.visual_tokens_per_layer(num_layers, entering)
    }

    /// Visual tokens a layer works on, on average.
    pub fn average_tokens(&self, num_layers: usize, visual_tokens: usize) -> f64 {
        let entering = self.entering(visual_tokens);
        self.schedule.average_tokens(num_layers, entering)
    }

    /// The decoder's cost of a prompt with one picture of `visual_tokens` before reduction; see
    /// [`Cost::of`].
    pub fn cost(
        &self,
        shape: &DecoderShape,
        visual_tokens: usize,
        text_tokens: usize,
        kv: KvType,
    ) -> Cost {
        let entering = self.entering(visual_tokens);
        Cost::of(shape, &self.schedule, entering, text_tokens, kv)
    }
}
