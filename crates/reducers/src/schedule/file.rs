//! The JSON form of a schedule, as users write it: parsed here, checked by [`Schedule::new`].

use serde::de::Error;
use serde::{Deserialize, Serialize};
use serde_json::Number;

use super::{Action, HiddenLayout, Positions, Schedule, ScoreMemory, Stage, Waiting};
use crate::keep::Rounding;
use crate::plan::EncoderFile;
use crate::{Keep, ReducerError, Score};

/// A schedule as written. A key that nobody knows is refused: in a file written by hand it is a
/// typing error.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ScheduleFile {
    #[serde(default)]
    action: Action,
    #[serde(default)]
    monotonic: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    memory: ScoreMemory,
    #[serde(default, skip_serializing_if = "is_default")]
    waiting: Waiting,
    #[serde(default, skip_serializing_if = "is_default")]
    positions: Positions,
    #[serde(default, skip_serializing_if = "is_default")]
    layout: HiddenLayout,
    stages: Vec<StageFile>,
}

/// The same and what comes before the decoder; one of the two may be left out.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PlanFile {
    #[serde(default)]
    pub(crate) encoder: Option<EncoderFile>,
    action: Option<Action>,
    #[serde(default)]
    monotonic: bool,
    #[serde(default)]
    memory: ScoreMemory,
    #[serde(default)]
    waiting: Waiting,
    #[serde(default)]
    positions: Positions,
    #[serde(default)]
    layout: HiddenLayout,
    stages: Option<Vec<StageFile>>,
}

impl PlanFile {
    /// What happens in the decoder; nothing, if that is left out and the tokens are `reduced` before.
    ///
    /// # Errors
    /// If the file says neither.
    pub(crate) fn schedule(self, reduced: bool) -> serde_json::Result<ScheduleFile> {
        let says_nothing = |stages: &Vec<StageFile>| stages.is_empty() && self.action.is_none();
        let stages = match self.stages {
            Some(stages) if reduced || !says_nothing(&stages) => stages,
            None if reduced => Vec::new(),
            _ => {
                return Err(serde_json::Error::custom(
                    "there are no `stages`, and no `encoder` either",
                ));
            }
        };
        Ok(ScheduleFile {
            action: self.action.unwrap_or_default(),
            monotonic: self.monotonic,
            memory: self.memory,
            waiting: self.waiting,
            positions: self.positions,
            layout: self.layout,
            stages,
        })
    }
}

/// A stage as written. Whole numbers are read as any number, so that the refusal of -1 or 2.5 can
/// name the stage.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StageFile {
    layer: Number,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keep_ratio: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keep_count: Option<Number>,
    /// Of a keep ratio.
    #[serde(default, skip_serializing_if = "is_default")]
    rounding: Rounding,
    #[serde(default, skip_serializing_if = "is_default")]
    score: Score,
    #[serde(default, skip_serializing_if = "is_default")]
    stride: Option<usize>,
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl TryFrom<ScheduleFile> for Schedule {
    type Error = ReducerError;

    fn try_from(file: ScheduleFile) -> Result<Self, ReducerError> {
        let stages = file
            .stages
            .into_iter()
            .enumerate()
            .map(|(index, stage)| stage.resolve(index));
        let stages = stages.collect::<Result<_, _>>()?;
        Ok(Schedule::new(file.action, file.monotonic, stages)?
            .with_memory(file.memory)?
            .with_waiting(file.waiting)?
            .with_positions(file.positions)?
            .with_layout(file.layout))
    }
}

impl StageFile {
    fn resolve(self, stage: usize) -> Result<Stage, ReducerError> {
        let layer = whole(&self.layer).ok_or_else(|| ReducerError::Layer {
            stage,
            layer: self.layer.to_string(),
        })?;
        let keep = match (self.keep_ratio, self.keep_count) {
            (Some(ratio), None) => self.rounding.keep(ratio),
            (None, Some(count)) => {
                Keep::Count(whole(&count).ok_or_else(|| ReducerError::KeepCount {
                    stage,
                    count: count.to_string(),
                })?)
            }
            _ => return Err(ReducerError::KeepChoice { stage }),
        };
        Ok(Stage {
            layer,
            keep,
            score: self.score,
            stride: self.stride,
        })
    }
}

fn whole(number: &Number) -> Option<usize> {
    number.as_u64().and_then(|whole| whole.try_into().ok())
}

impl From<Schedule> for ScheduleFile {
    fn from(schedule: Schedule) -> Self {
        let stages = schedule.stages.into_iter().map(|stage| StageFile {
            layer: stage.layer.into(),
            keep_ratio: stage.keep.ratio(),
            keep_count: match stage.keep {
                Keep::Count(count) => Some(count.into()),
                _ => None,
            },
            rounding: Rounding::of(stage.keep),
            score: stage.score,
            stride: stage.stride,
        });
        Self {
            action: schedule.action,
            monotonic: schedule.monotonic,
            memory: schedule.memory,
            waiting: schedule.waiting,
            positions: schedule.positions,
            layout: schedule.layout,
            stages: stages.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Schedule, Waiting};
    use crate::ReducerError;

    #[test]
    fn a_schedule_survives_its_json_form_unchanged() {
        let text = concat!(
            r#"{"action":"reroute","monotonic":true,"stages":["#,
            r#"{"layer":2,"keep_ratio":0.45},{"layer":4,"keep_count":64}]}"#
        );
        let schedule = Schedule::from_json(text).unwrap();
        assert_eq!(schedule.keep_counts(100), [45, 64]);
        assert_eq!(serde_json::to_string(&schedule).unwrap(), text);
    }

    #[test]
    fn no_stages_means_dense() {
        let schedule = Schedule::from_json(r#"{"action": "remove", "stages": []}"#).unwrap();
        assert_eq!(schedule, Schedule::dense());
    }

    #[test]
    fn refusals_name_the_stage_and_the_remedy() {
        for (stages, expected) in [
            (r#"{"layer": 2, "keep_ratio": 0}"#, "stage 0: keep ratio 0"),
            (r#"{"layer": 2, "keep_ratio": 2}"#, "stage 0: keep ratio 2"),
            (
                r#"{"layer": 2, "keep_ratio": -0.5}"#,
                "stage 0: keep ratio -0.5",
            ),
            (r#"{"layer": 2, "keep_count": 0}"#, "stage 0: keep count 0"),
            (
                r#"{"layer": 2, "keep_count": -1}"#,
                "stage 0: keep count -1",
            ),
            (
                r#"{"layer": 2, "keep_count": 2.5}"#,
                "stage 0: keep count 2.5",
            ),
            (r#"{"layer": -2, "keep_count": 2}"#, "stage 0: layer -2"),
            (r#"{"layer": 2}"#, "exactly one of"),
            (
                r#"{"layer": 2, "keep_count": 2, "keep_ratio": 0.5}"#,
                "exactly one of",
            ),
            (
                r#"{"layer": 2, "keep_count": 2}, {"layer": 1, "keep_count": 2}"#,
                "stage 1: layer 1",
            ),
        ] {
            let text =
                format!(r#"{{"action": "remove", "monotonic": false, "stages": [{stages}]}}"#);
            let message = Schedule::from_json(&text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn every_setting_survives_its_json_form() {
        let text = concat!(
            r#"{"action":"remove","monotonic":false,"memory":{"decay":0.5},"positions":"renumber","#,
            r#""layout":"per-layer","#,
            r#""stages":[{"layer":2,"keep_ratio":0.5,"rounding":"half-even","#,
            r#""score":{"attention":{"layer":"previous","query":{"last-mean":3},"heads":"max","#,
            r#""dtype":"model","rope":false,"keys":"candidates"}},"stride":3},"#,
            r#"{"layer":3,"keep_count":9,"score":{"attention":{"layer":"this","query":"last","#,
            r#""heads":{"only":[0,5,127]},"dtype":"f32","rope":true,"keys":"all"}}},"#,
            r#"{"layer":4,"keep_count":9,"score":{"duplication":{"layer":"this","#,
            r#""visual_pivots":2,"text_pivots":1}}},"#,
            r#"{"layer":5,"keep_count":8,"score":{"random":{"seed":7}}},"#,
            r#"{"layer":6,"keep_ratio":0.1,"rounding":"truncate","score":"encoder"}]}"#
        );
        let schedule = Schedule::from_json(text).unwrap();
        assert_eq!(serde_json::to_string(&schedule).unwrap(), text);
        let text = concat!(
            r#"{"action":"reroute","monotonic":false,"waiting":"ride-along","#,
            r#""stages":[{"layer":2,"keep_ratio":0.5}]}"#
        );
        let schedule = Schedule::from_json(text).unwrap();
        assert_eq!(serde_json::to_string(&schedule).unwrap(), text);
        let removing = schedule.with_action(Action::Remove).unwrap();
        assert_eq!(removing.waiting(), Waiting::Untouched);
    }

    #[test]
    fn settings_that_exclude_each_other_are_refused() {
        let attention = |settings: &str| format!(r#""score": {{"attention": {{{settings}}}}}"#);
        for (action, more, layers, score, expected) in [
            (
                "reroute",
                "",
                [1, 2],
                attention(r#""layer": "previous""#),
                "stage 1: deferred tokens took no part",
            ),
            (
                "remove",
                "",
                [0, 2],
                attention(r#""layer": "previous""#),
                "stage 0: layer 0 has no layer before it",
            ),
            (
                "remove",
                "",
                [1, 2],
                attention(r#""query": {"last-mean": 0}"#),
                "stage 0: the mean of the last 0 rows",
            ),
            (
                "remove",
                "",
                [1, 2],
                r#""score": {"duplication": {"visual_pivots": 0, "text_pivots": 0}}"#.into(),
                "stage 0: without a pivot",
            ),
            (
                "remove",
                "",
                [1, 2],
                r#""stride": 0"#.into(),
                "stage 0: a stride of 0",
            ),
            (
                "reroute",
                r#""positions": "renumber","#,
                [1, 2],
                attention(""),
                "needs its place",
            ),
            (
                "remove",
                r#""waiting": "ride-along","#,
                [1, 2],
                attention(""),
                "receives nothing",
            ),
            (
                "reroute",
                "",
                [1, 2],
                attention(r#""heads": {"only": []}"#),
                "stage 0: without a head",
            ),
            (
                "reroute",
                r#""memory": {"decay": 1.0},"#,
                [1, 2],
                attention(""),
                "a number between 0 and 1",
            ),
        ] {
            let [first, second] =
                layers.map(|layer| format!(r#"{{"layer": {layer}, "keep_count": 2, {score}}}"#));
            let text = format!(r#"{{"action": "{action}", {more} "stages": [{first}, {second}]}}"#);
            let message = Schedule::from_json(&text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn what_is_not_a_schedule_is_refused_as_json() {
        for text in [
            "",
            "[]",
            "{",
            r#"{"action": "delete", "stages": []}"#,
            r#"{"action": "remove"}"#,
            r#"{"action": "remove", "stages": [{"layer": 2, "keep": 0.5}]}"#,
            r#"{"action": "remove", "stages": [], "note": "typo"}"#,
            r#"{"action": "remove", "stages": [{"layer": 2, "keep_ratio": 1e999}]}"#,
            r#"{"action": "remove", "stages": [{"layer": 2, "keep_ratio": NaN}]}"#,
            r#"{"stages": [{"layer": 2, "keep_count": 1, "score": {"attention": {"heads": {"only": [128]}}}}]}"#,
        ] {
            let error = Schedule::from_json(text).unwrap_err();
            assert!(
                matches!(error, ReducerError::Json { .. }),
                "{text}: {error}"
            );
        }
    }
}
