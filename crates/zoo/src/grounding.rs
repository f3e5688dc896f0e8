//! Grounding: from an expression to a prompt, from an answer to a box.

use serde::Deserialize;

/// The prompt that LLaVA-1.5 was trained on for referring expressions (arXiv 2310.03744, Table 9).
const LLAVA_PROMPT: &str = "Bounding box coordinates are specified in the format (top-left x, \
    top-left y, bottom-right x, bottom-right y). All values are floating point numbers bounded \
    between 0 and 1. Please provide the bounding box coordinate of the region this sentence \
    describes: {expression}";

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
}

impl GroundingFormat {
    /// LLaVA-1.5 as published.
    pub fn llava() -> Self {
        Self {
            prompt: LLAVA_PROMPT.into(),
            units: BoxUnits::Normalized,
        }
    }

    /// The question for an expression.
    pub fn question(&self, expression: &str) -> String {
        self.prompt.replace("{expression}", expression)
    }
}

/// A box `[x1, y1, x2, y2]`, corners ordered.
pub type BoundingBox = [f64; 4];

/// Finds the first group of four numbers in brackets, else in parentheses, and orders its corners.
///
/// Numbers are decimal, optionally negative, without exponents.
pub fn parse_box(answer: &str) -> Option<BoundingBox> {
    let [x1, y1, x2, y2] = group(answer, '[', ']').or_else(|| group(answer, '(', ')'))?;
    Some([x1.min(x2), y1.min(y2), x1.max(x2), y1.max(y2)])
}

fn group(answer: &str, open: char, close: char) -> Option<[f64; 4]> {
    answer.split(open).skip(1).find_map(|rest| {
        let inside = rest.split_once(close)?.0;
        let numbers: Vec<f64> = inside.split(',').map(number).collect::<Option<_>>()?;
        numbers.try_into().ok()
    })
}

fn number(text: &str) -> Option<f64> {
    let text = text.trim();
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let decimal = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    (decimal(whole) && decimal(fraction)).then(|| text.parse().ok())?
}

/// Intersection over union of two boxes in the same units.
pub fn iou(a: &BoundingBox, b: &BoundingBox) -> f64 {
    let side = |low: f64, high: f64| (high - low).max(0.0);
    let area = |b: &BoundingBox| side(b[0], b[2]) * side(b[1], b[3]);
    let width = side(a[0].max(b[0]), a[2].min(b[2]));
    let height = side(a[1].max(b[1]), a[3].min(b[3]));
    let shared = width * height;
    let all = area(a) + area(b) - shared;
    if all > 0.0 { shared / all } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_found_where_answers_put_them() {
        let cases = [
            ("[0.1, 0.2, 0.3, 0.4]", Some([0.1, 0.2, 0.3, 0.4])),
            ("It is at [0.1,0.2,0.3,0.4].", Some([0.1, 0.2, 0.3, 0.4])),
            ("(0.1, 0.2, 0.3, 0.4)", Some([0.1, 0.2, 0.3, 0.4])),
            (
                "{\"bbox_2d\": [10, 20, 30, 40]}",
                Some([10.0, 20.0, 30.0, 40.0]),
            ),
            (
                "[1, 2] then [0.5, 0.6, 0.1, 0.2]",
                Some([0.1, 0.2, 0.5, 0.6]),
            ),
            ("[[1, 2, 3, 4]]", Some([1.0, 2.0, 3.0, 4.0])),
            ("[-0.5, 0, 1, 1]", Some([-0.5, 0.0, 1.0, 1.0])),
            ("[1e3, 0, 1, 1]", None),
            ("[0.1, 0.2, 0.3]", None),
            ("[0.1, 0.2, 0.3, 0.4", None),
            ("[nan, inf, 0, 0]", None),
            ("[1., 2, 3, 4]", None),
            ("no box", None),
            ("", None),
        ];
        for (answer, expected) in cases {
            assert_eq!(parse_box(answer), expected, "{answer}");
        }
    }

    #[test]
    fn iou_of_boxes() {
        let unit = [0.0, 0.0, 1.0, 1.0];
        assert_eq!(iou(&unit, &unit), 1.0);
        assert_eq!(iou(&unit, &[0.5, 0.0, 1.5, 1.0]), 1.0 / 3.0);
        assert_eq!(iou(&unit, &[2.0, 2.0, 3.0, 3.0]), 0.0);
        assert_eq!(iou(&[0.0; 4], &[0.0; 4]), 0.0);
    }
}
