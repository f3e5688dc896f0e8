//! How a model is asked where something is, and how it answers.

mod places;

use serde::Deserialize;

pub use places::{Named, Place, parse_box, parse_places};

/// A box `[x1, y1, x2, y2]`, corners ordered.
pub type BoundingBox = [f64; 4];

/// What stands for the expression in a prompt.
const EXPRESSION: &str = "{expression}";

/// How a model is asked for a box and how it answers; `grounding.json` of a checkpoint may set it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "GroundingFile")]
pub struct GroundingFormat {
    /// The question, with `{expression}` in it.
    pub prompt: String,
    /// Units of the answered box.
    pub units: BoxUnits,
    /// How the answer writes it.
    pub notation: BoxNotation,
}

/// How a model writes boxes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BoxNotation {
    /// `[0.12, 0.30, 0.56, 0.98]`, or whole numbers (LLaVA).
    #[default]
    Brackets,
    /// `<|box_start|>(120,300),(560,980)<|box_end|>`, and labels between tokens of their own (Qwen2-VL).
    Marks,
    /// Brackets; an answer that is a box alone is a list in JSON (Qwen2.5-VL, Qwen3-VL).
    Json,
}

/// `grounding.json`.
#[derive(Deserialize)]
struct GroundingFile {
    prompt: String,
    r#box: BoxUnits,
    #[serde(default)]
    notation: BoxNotation,
}

impl TryFrom<GroundingFile> for GroundingFormat {
    type Error = String;

    fn try_from(file: GroundingFile) -> Result<Self, String> {
        match file.prompt.contains(EXPRESSION) {
            true => Ok(Self::new(file.prompt, file.r#box).written_as(file.notation)),
            false => Err(format!("the prompt has no {EXPRESSION} in it")),
        }
    }
}

/// Units of a box in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BoxUnits {
    /// Shares of the image's width and height, 0 to 1.
    Normalized,
    /// Thousandths of the image's width and height, 0 to 1000.
    Thousandths,
    /// Pixels of the image after it was resized for the model.
    ResizedPixels,
}

impl GroundingFormat {
    /// A wording with `{expression}` in it, and the units of the box that it is answered with, in brackets.
    pub fn new(prompt: impl Into<String>, units: BoxUnits) -> Self {
        Self {
            prompt: prompt.into(),
            units,
            notation: BoxNotation::default(),
        }
    }

    /// The same with boxes written otherwise.
    pub fn written_as(self, notation: BoxNotation) -> Self {
        Self { notation, ..self }
    }

    /// The question for an expression.
    pub fn question(&self, expression: &str) -> String {
        self.prompt.replace(EXPRESSION, expression)
    }
}

impl BoxUnits {
    /// A box in these units, in shares of the width and height of what the model saw.
    ///
    /// `resized` is the width and height of the image as the model saw it, in pixels.
    pub fn normalized(self, [x1, y1, x2, y2]: BoundingBox, resized: [f64; 2]) -> BoundingBox {
        let [x1, y1] = self.share([x1, y1], resized);
        let [x2, y2] = self.share([x2, y2], resized);
        [x1, y1, x2, y2]
    }

    /// The same of a point.
    pub fn share(self, [x, y]: [f64; 2], resized: [f64; 2]) -> [f64; 2] {
        let [width, height] = match self {
            Self::Normalized => [1.0, 1.0],
            Self::Thousandths => [1000.0, 1000.0],
            Self::ResizedPixels => resized,
        };
        [x / width, y / height]
    }
}
