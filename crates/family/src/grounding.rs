use serde::Deserialize;

/// A box `[x1, y1, x2, y2]`, corners ordered.
pub type BoundingBox = [f64; 4];

/// How a model is asked for a box and how it answers; `grounding.json` of a checkpoint may set it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct GroundingFormat {
    /// The question, with `{expression}` in it.
    pub prompt: String,
    /// Units of the answered box.
    #[serde(rename = "box")]
    pub units: BoxUnits,
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
    /// A wording with `{expression}` in it, and the units of the box that it is answered with.
    pub fn new(prompt: impl Into<String>, units: BoxUnits) -> Self {
        let prompt = prompt.into();
        Self { prompt, units }
    }

    /// The question for an expression.
    pub fn question(&self, expression: &str) -> String {
        self.prompt.replace("{expression}", expression)
    }
}

impl BoxUnits {
    /// A box in these units, in shares of the width and height of what the model saw.
    ///
    /// `resized` is the width and height of the image as the model saw it, in pixels.
    pub fn normalized(self, answered: BoundingBox, resized: [f64; 2]) -> BoundingBox {
        let [width, height] = match self {
            Self::Normalized => [1.0, 1.0],
            Self::Thousandths => [1000.0, 1000.0],
            Self::ResizedPixels => resized,
        };
        let [x1, y1, x2, y2] = answered;
        [x1 / width, y1 / height, x2 / width, y2 / height]
    }

    /// A box in these units, in pixels of the image as given and not beyond its edges, for models
    /// that see the whole image. `resized` and `original` are width and height in pixels.
    pub fn to_pixels(
        self,
        answered: BoundingBox,
        resized: [f64; 2],
        original: [f64; 2],
    ) -> BoundingBox {
        let [x1, y1, x2, y2] = self.normalized(answered, resized);
        let [width, height] = original;
        let x = |x: f64| (x * width).clamp(0.0, width);
        let y = |y: f64| (y * height).clamp(0.0, height);
        [x(x1), y(y1), x(x2), y(y2)]
    }
}
