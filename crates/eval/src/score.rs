//! How right an answer is, by the rules of lmms-eval 0.7.

mod boxes;
mod words;

use reroute_zoo::grounding::{BoundingBox, BoxUnits, iou};
use serde::{Deserialize, Serialize};

use crate::Truth;

pub use boxes::{harness_iou, release_box};
pub use words::{evalai, exact, leave_one_out, yes_or_no};

/// From which IoU on a box is right.
pub const RIGHT: f64 = 0.5;

/// How right an answer is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// From 0 to 1; what is averaged to the accuracy.
    pub score: f64,
    /// What was right, where a share of it is counted: yes or no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yes: Option<bool>,
    /// What was answered: `yes`, `no`, or something else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<bool>,
    /// The box that was answered, in pixels of the picture as given.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "box")]
    pub found: Option<BoundingBox>,
    /// Its intersection over union with the right one; 0 without a box.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iou: Option<f64>,
    /// The same as the release divides boxes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_iou: Option<f64>,
}

/// An answer, and what is needed to score it.
pub struct Answered<'a> {
    /// Its text.
    pub text: &'a str,
    /// The first box that it names, in pixels of the picture as given.
    pub found: Option<BoundingBox>,
    /// Units that the model writes boxes in.
    pub units: BoxUnits,
    /// Width and height of the picture as given.
    pub picture: [usize; 2],
}

impl Truth {
    /// How right an answer is.
    pub fn score(&self, answered: &Answered<'_>) -> Score {
        // The harness takes white space off before anything else.
        let text = answered.text.trim();
        let plain = |score| Score {
            score,
            ..Score::default()
        };
        match self {
            Self::Box(truth) => {
                let overlap = answered.found.map_or(0.0, |found| iou(&found, truth));
                let [width, height] = answered.picture.map(|side| side as f64);
                let [x1, y1, x2, y2] = *truth;
                let share = [x1 / width, y1 / height, x2 / width, y2 / height];
                let release = release_box(text, answered.units, answered.picture);
                Score {
                    score: f64::from(overlap >= RIGHT),
                    found: answered.found,
                    iou: Some(overlap),
                    release_iou: Some(harness_iou(&share, &release)),
                    ..Score::default()
                }
            }
            Self::Answers(answers) => plain(leave_one_out(text, answers)),
            Self::AnyOf(answers) => {
                let is_right = answers.iter().any(|answer| exact(text, answer));
                plain(f64::from(is_right))
            }
            Self::Answer(answer) => plain(f64::from(exact(text, answer))),
            Self::Yes(yes) => {
                let said = yes_or_no(text);
                Score {
                    yes: Some(*yes),
                    said,
                    ..plain(f64::from(said == Some(*yes)))
                }
            }
        }
    }
}
