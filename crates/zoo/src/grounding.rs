//! Grounding: from an expression to a prompt, from an answer to boxes.

use burn::tensor::backend::Backend;
use reroute::{FinishReason, GenerationOptions};
use vision_encoder::{Geometry, RgbImage};

use crate::{Answer, Question, Routing, Vlm, ZooError};

pub use reroute_family::{
    BoundingBox, BoxNotation, BoxUnits, GroundingFormat, Named, Place, parse_box, parse_places,
};

/// Something that an answer names in a picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// What the answer calls it, if it says so.
    pub label: Option<String>,
    /// Where it is in pixels of the image as given. Of a box that lies partly outside, the part
    /// within; of what is wholly outside, where that would be.
    pub pixels: Place,
    /// The same in shares of the image's width and height.
    pub normalized: Place,
    /// Whether it lies wholly outside of the image: in what was padded, or beyond.
    pub outside: bool,
}

impl Found {
    /// Takes what a model answered back to the picture. `resized` is the width and height of what the
    /// model saw, in pixels.
    pub fn of(named: Named, units: BoxUnits, resized: [f64; 2], geometry: &Geometry) -> Self {
        let point = |at| geometry.to_original(units.share(at, resized));
        let (pixels, outside) = match named.place {
            Place::Box([x1, y1, x2, y2]) => {
                let ([x1, y1], [x2, y2]) = (point([x1, y1]), point([x2, y2]));
                let all = [x1, y1, x2, y2];
                let part = geometry.within(all);
                (Place::Box(part.unwrap_or(all)), part.is_none())
            }
            Place::Point(at) => {
                let [x, y] = point(at);
                (
                    Place::Point([x, y]),
                    geometry.within([x, y, x, y]).is_none(),
                )
            }
        };
        let [width, height] = geometry.original.map(|side| side as f64);
        let normalized = match pixels {
            Place::Box([x1, y1, x2, y2]) => {
                Place::Box([x1 / width, y1 / height, x2 / width, y2 / height])
            }
            Place::Point([x, y]) => Place::Point([x / width, y / height]),
        };
        Self {
            label: named.label,
            pixels,
            normalized,
            outside,
        }
    }
}

/// Where something is.
#[derive(Debug, Clone)]
pub struct Grounding {
    /// All that the answer names, in its order; one at least.
    pub found: Vec<Found>,
    /// The answer that it was read from. If it was cut off, more may have followed.
    pub answer: Answer,
}

impl Grounding {
    /// The first box, if the answer has one and not just points.
    pub fn first_box(&self) -> Option<&Found> {
        let mut boxes = self.found.iter();
        boxes.find(|found| found.pixels.as_box().is_some())
    }
}

impl<B: Backend> Vlm<B> {
    /// Asks where something is and reads boxes and points out of the answer.
    pub fn ground<'a>(
        &'a self,
        image: &RgbImage,
        expression: &str,
        routing: impl Into<Routing<'a, B>>,
        options: &GenerationOptions,
    ) -> Result<Grounding, ZooError> {
        let question = self.grounding().question(expression);
        let question = Question::about(vec![image.clone()], question);
        let answer = self.ask(&question, routing, options, |_| {})?;
        let found = self.answered(&answer);
        if found.is_empty() {
            return Err(ZooError::NoBox {
                cut_off: answer.finish != FinishReason::Stop,
                answer: answer.text,
            });
        }
        Ok(Grounding { found, answer })
    }

    /// All that an answer names in the first image that it is about.
    pub fn answered(&self, answer: &Answer) -> Vec<Found> {
        let Some(view) = answer.views.first() else {
            return Vec::new();
        };
        let geometry = self.preprocessor().geometry(view);
        let resized = view.resized.map(|side| side as f64);
        // Special tokens tell labels from boxes.
        let marked = self.tokenizer().decode_all(&answer.tokens);
        let named = parse_places(marked.as_deref().unwrap_or(&answer.text));
        let place = |named| Found::of(named, self.grounding().units, resized, &geometry);
        named.into_iter().map(place).collect()
    }

    /// The first box that an answer names in the first image that it is about, `x1, y1, x2, y2` in
    /// pixels of the image as given; `None` if it names none.
    pub fn answered_box(&self, answer: &Answer) -> Option<BoundingBox> {
        let mut found = self.answered(answer).into_iter();
        found.find_map(|found| found.pixels.as_box())
    }
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
    fn boxes_in_pixels_of_the_image_as_given() {
        let (resized, original) = ([420.0, 280.0], Geometry::whole([640, 427]));
        let half = [0.0, 0.0, 320.0, 213.5];
        let pixels = |units: BoxUnits, answered| {
            let named = Named {
                label: None,
                place: Place::Box(answered),
            };
            Found::of(named, units, resized, &original).pixels
        };
        for (units, answered) in [
            (BoxUnits::Normalized, [0.0, 0.0, 0.5, 0.5]),
            (BoxUnits::Thousandths, [0.0, 0.0, 500.0, 500.0]),
            (BoxUnits::ResizedPixels, [0.0, 0.0, 210.0, 140.0]),
        ] {
            assert_eq!(pixels(units, answered), Place::Box(half));
        }
        let beyond = [-10.0, 5.0, 2000.0, 1001.0];
        let pixels = pixels(BoxUnits::Thousandths, beyond);
        assert_eq!(pixels, Place::Box([0.0, 0.005 * 427.0, 640.0, 427.0]));
    }

    #[test]
    fn what_lies_outside_is_said_to() {
        let geometry = Geometry {
            original: [100, 60],
            offset: [0.0, -20.0],
            extent: [100.0, 100.0],
        };
        let found = |place| {
            let label = Some("cup".to_string());
            let named = Named { label, place };
            Found::of(named, BoxUnits::Normalized, [24.0; 2], &geometry)
        };
        let in_padding = found(Place::Box([0.5, 0.0, 0.75, 0.125]));
        assert!(in_padding.outside);
        let where_it_would_be = Place::Box([50.0, -20.0, 75.0, -7.5]);
        assert_eq!(in_padding.pixels, where_it_would_be);
        let partly = found(Place::Box([0.5, 0.0, 0.75, 0.5]));
        assert!(!partly.outside);
        assert_eq!(partly.normalized, Place::Box([0.5, 0.0, 0.75, 0.5]));
        assert!(found(Place::Point([0.5, 0.9])).outside);
        let point = found(Place::Point([0.5, 0.5]));
        assert_eq!(
            (point.pixels, point.outside),
            (Place::Point([50.0, 30.0]), false)
        );
        assert_eq!(point.label.as_deref(), Some("cup"));
    }

    #[test]
    fn a_prompt_must_have_a_place_for_the_expression() {
        let read = |json: &str| serde_json::from_str::<GroundingFormat>(json);
        let good = read(r#"{"prompt": "find {expression}", "box": "normalized"}"#);
        assert_eq!(good.expect("good").question("it"), "find it");
        let error = read(r#"{"prompt": "find it", "box": "normalized"}"#).unwrap_err();
        assert!(error.to_string().contains("{expression}"), "{error}");
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
