//! What is where: `objects` of ms-swift.

use std::borrow::Cow;

use serde_json::Value;

use super::entry::{Fields, field, text};
use super::{BoxIn, Piece, Problem};

/// What is put where texts have `<ref-object>` and `<bbox>`.
#[derive(Debug, Default)]
pub(super) struct Objects {
    /// Names and descriptions.
    pub(super) labels: Vec<String>,
    /// Corners, in order of size.
    pub(super) boxes: Vec<[f64; 4]>,
    /// Which image each box is on; where there are none, all are on the first.
    images: Vec<u64>,
    unit: Option<BoxIn>,
}

impl Objects {
    /// The objects of an entry, if it has some.
    pub(super) fn read(fields: &Fields) -> Result<Self, Problem> {
        let value = match field(fields, "objects") {
            None => return Ok(Self::default()),
            Some(Value::String(json)) => match json.trim() {
                "" => return Ok(Self::default()),
                json => Cow::Owned(serde_json::from_str(json).map_err(|error| wrong_json(&error))?),
            },
            Some(value) => Cow::Borrowed(value),
        };
        let fields = match &*value {
            Value::Null => return Ok(Self::default()),
            Value::Object(fields) => fields,
            _ => return Err(misshapen()),
        };
        let label = |label: &Value| match label {
            Value::String(label) if !label.trim().is_empty() => Ok(label.clone()),
            _ => Err(shape("objects.ref", "a list of names or descriptions")),
        };
        let labels = list(fields, "ref", "objects.ref")?.iter().map(label);
        let unit = unit(fields)?;
        let boxes = list(fields, "bbox", "objects.bbox")?.iter();
        let boxes: Vec<_> = boxes
            .map(|corners| ordered("objects.bbox", corners, unit))
            .collect::<Result<_, _>>()?;
        let image = |image: &Value| image.as_u64().ok_or_else(wrong_images);
        let images = list(fields, "image_id", "objects.image_id")?;
        let images: Vec<_> = images.iter().map(image).collect::<Result<_, _>>()?;
        match images.is_empty() || images.len() == boxes.len() {
            true => Ok(Self {
                labels: labels.collect::<Result<_, _>>()?,
                boxes,
                images,
                unit: Some(unit),
            }),
            false => Err(wrong_images()),
        }
    }

    /// A box as a piece.
    pub(super) fn piece(&self, at: usize) -> Option<Piece> {
        Some(Piece::Box {
            corners: *self.boxes.get(at)?,
            image: self.images.get(at).map_or(0, |&image| image as usize),
            unit: self.unit.unwrap_or(BoxIn::Pixels),
        })
    }

    /// Fails if a box is on none of the images.
    pub(super) fn check_images(&self, images: usize) -> Result<(), Problem> {
        let first = self.boxes.first().map(|_| 0);
        let mut used = self.images.iter().copied().chain(first);
        match used.find(|&image| image >= images as u64) {
            None => Ok(()),
            Some(image) => Err(Problem::BoxImage { image, images }),
        }
    }
}

/// A value that is not what it should be.
pub(super) fn shape(what: &str, wanted: &'static str) -> Problem {
    let what = what.to_owned();
    Problem::Shape { what, wanted }
}

fn misshapen() -> Problem {
    shape(
        "objects",
        "an object with ref and bbox, or one as JSON in a string",
    )
}

fn wrong_json(error: &serde_json::Error) -> Problem {
    let at = format!("column {} of objects", error.column());
    Problem::json(
        error,
        at,
        "write objects as an object, or as JSON in a string",
    )
}

fn wrong_images() -> Problem {
    shape(
        "objects.image_id",
        "a list with the image of each box of objects.bbox, counted from 0",
    )
}

/// The list under a key; none is an empty one.
fn list<'v>(fields: &'v Fields, key: &str, what: &str) -> Result<&'v [Value], Problem> {
    match field(fields, key) {
        None => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(shape(what, "a list")),
    }
}

/// What boxes are counted in.
pub(super) fn unit(fields: &Fields) -> Result<BoxIn, Problem> {
    match text(fields, "bbox_type")? {
        None | Some("real") => Ok(BoxIn::Pixels),
        Some("norm1") => Ok(BoxIn::Normalized),
        Some("norm1000") => Ok(BoxIn::Thousandths),
        Some(found) => Err(Problem::BoxType {
            found: found.into(),
        }),
    }
}

/// Left, top, right and bottom of a box, of which two opposite corners are given: JSON
/// has no NaN, and its parser refuses numbers beyond all bounds.
pub(super) fn ordered(what: &str, value: &Value, unit: BoxIn) -> Result<[f64; 4], Problem> {
    let items = value.as_array().map_or(&[][..], Vec::as_slice);
    let numbers: Vec<f64> = items.iter().take(5).map_while(Value::as_f64).collect();
    let corners = match numbers[..] {
        [x, y] if items.len() == 2 => return Err(Problem::Point { point: [x, y] }),
        [x1, y1, x2, y2] if items.len() == 4 => [x1, y1, x2, y2],
        _ => return Err(shape(what, "boxes, each of four numbers: [x1, y1, x2, y2]")),
    };
    let [x1, y1, x2, y2] = corners;
    if x1 == x2 || y1 == y2 {
        return Err(Problem::EmptyBox { corners });
    }
    let most = match unit {
        BoxIn::Pixels => f64::INFINITY,
        BoxIn::Normalized => 1.0,
        BoxIn::Thousandths => 1000.0,
    };
    let is_within = |corner: &f64| (0.0..=most).contains(corner);
    match unit == BoxIn::Pixels || corners.iter().all(is_within) {
        true => Ok([x1.min(x2), y1.min(y2), x1.max(x2), y1.max(y2)]),
        false => Err(Problem::Range { corners, most }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{Folder, said};
    use super::*;

    fn entry(question: &str, answer: &str, images: &Value, objects: &Value) -> Value {
        json!({
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": images,
            "objects": objects,
        })
    }

    fn of_one_box(objects: &Value) -> Value {
        entry("<image>Where?", "<bbox>", &json!("a.png"), objects)
    }

    fn label(text: &str) -> Piece {
        Piece::Label(text.into())
    }

    fn pixels(corners: [f64; 4], image: usize) -> Piece {
        let unit = BoxIn::Pixels;
        Piece::Box {
            corners,
            image,
            unit,
        }
    }

    #[test]
    fn objects_stand_where_the_marks_are() {
        let folder = Folder::new();
        let mut objects = json!({
            "ref": ["dog", "eine Frau – 女人"],
            "bbox": [[331.5, 1594.8, 853.5, 761.4], [9, 8, 1, 2]],
        });
        let images = json!(["a.png", "b.png"]);
        let read = |objects: &Value| {
            let text = "<ref-object><bbox> and <ref-object>: <bbox>";
            let example = folder.example(&entry("<image><image>", text, &images, objects));
            example.exchanges[0].answer.clone()
        };
        let (first, second) = ([331.5, 761.4, 853.5, 1594.8], [1.0, 2.0, 9.0, 8.0]);
        let mut wanted = [
            label("dog"),
            pixels(first, 0),
            said(" and "),
            label("eine Frau – 女人"),
            said(": "),
            pixels(second, 0),
        ];
        assert_eq!(read(&objects), wanted);
        // In a string, with images.
        objects["image_id"] = json!([0, 1]);
        objects["bbox_type"] = json!("real");
        wanted[5] = pixels(second, 1);
        assert_eq!(read(&json!(objects.to_string())), wanted);
    }

    #[test]
    fn objects_stand_in_any_turn_of_any_form() {
        let example = Folder::new().example(&json!({
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "What is in <bbox>?"},
                {"from": "gpt", "value": "<ref-object>"},
                {"from": "human", "value": "<ref-object>"},
                {"from": "gpt", "value": "<bbox>"},
            ],
            "objects": {"ref": ["a", "b"], "bbox": [[0, 0, 1, 1], [0.25, 0, 1, 1]], "bbox_type": "norm1"},
        }));
        let place = |left| Piece::Box {
            corners: [left, 0.0, 1.0, 1.0],
            image: 0,
            unit: BoxIn::Normalized,
        };
        let [first, second] = &example.exchanges[..] else {
            panic!("{example:?}");
        };
        assert_eq!(
            first.question,
            [Piece::Image(0), said("What is in "), place(0.0), said("?")]
        );
        assert_eq!(first.answer, [label("a")]);
        assert_eq!(second.question, [label("b")]);
        assert_eq!(second.answer, [place(0.25)]);
    }

    #[test]
    fn no_objects_are_none() {
        for none in [
            json!(null),
            json!({}),
            json!(""),
            json!("{}"),
            json!("null"),
            json!({"ref": null, "bbox": []}),
        ] {
            let entry = entry("Who?", "I.", &json!(null), &none);
            assert_eq!(Folder::new().example(&entry).exchanges.len(), 1);
        }
    }

    #[test]
    fn marks_and_objects_are_as_many() {
        let count = |question, answer, objects| {
            let entry = entry(question, answer, &json!("a.png"), &objects);
            match Folder::new().problem(&entry) {
                Problem::Count {
                    mark, marks, given, ..
                } => (mark, marks, given),
                other => panic!("{other}"),
            }
        };
        let objects = json!({"ref": ["a"], "bbox": [[0, 0, 1, 1]]});
        assert_eq!(
            count("<bbox>", "!", objects.clone()),
            ("<ref-object>", 0, 1)
        );
        assert_eq!(
            count("<ref-object>", "!", objects.clone()),
            ("<bbox>", 0, 1)
        );
        assert_eq!(
            count("<ref-object>", "<bbox><bbox>", objects),
            ("<bbox>", 2, 1)
        );
        assert_eq!(
            count("<ref-object>?", "!", json!(null)),
            ("<ref-object>", 1, 0)
        );
    }

    #[test]
    fn wrong_boxes_are_refused() {
        let folder = Folder::new();
        let with = |kind: &str, corners: Value| {
            folder.problem(&of_one_box(&json!({"bbox": [corners], "bbox_type": kind})))
        };
        assert_eq!(
            with("real", json!([615, 226])),
            Problem::Point {
                point: [615.0, 226.0]
            }
        );
        let corners = [5.0, 1.0, 5.0, 3.0];
        assert_eq!(with("real", json!(corners)), Problem::EmptyBox { corners });
        assert!(
            Problem::EmptyBox { corners }
                .to_string()
                .starts_with("[5, 1, 5, 3] is an empty box")
        );
        let corners = [1.0, 3.0, 5.0, 3.0];
        assert_eq!(
            with("norm1000", json!(corners)),
            Problem::EmptyBox { corners }
        );
        for (kind, corners, most) in [
            ("norm1", [0.0, 0.0, 1.5, 1.0], 1.0),
            ("norm1", [-0.5, 0.0, 1.0, 1.0], 1.0),
            ("norm1000", [0.0, 0.0, 1000.5, 1.0], 1000.0),
        ] {
            assert_eq!(with(kind, json!(corners)), Problem::Range { corners, most });
        }
        assert!(matches!(with("norm2", json!([])), Problem::BoxType { .. }));
        for wrong in [
            json!([1, 2, 3]),
            json!([1, 2, 3, 4, 5]),
            json!([1, 2, null, 4]),
            json!(["1", 2, 3, 4]),
            json!([1, 2, "x"]),
            json!([[1, 2], [3, 4]]),
            json!(7),
            json!([]),
        ] {
            assert!(matches!(with("real", wrong), Problem::Shape { .. }));
        }
    }

    #[test]
    fn boxes_are_on_images_that_are_there() {
        let folder = Folder::new();
        let objects = |image: Value| json!({"bbox": [[0, 0, 1, 1]], "image_id": image});
        assert_eq!(
            folder.problem(&of_one_box(&objects(json!([1])))),
            Problem::BoxImage {
                image: 1,
                images: 1
            }
        );
        for wrong in [json!([-1]), json!([0, 0]), json!(["0"]), json!([0.5])] {
            let problem = folder.problem(&of_one_box(&objects(wrong)));
            assert!(
                problem
                    .to_string()
                    .starts_with("objects.image_id should be a list"),
                "{problem}"
            );
        }
        let problem = folder.problem(&entry(
            "Where?",
            "<bbox>",
            &json!(null),
            &objects(json!(null)),
        ));
        assert_eq!(
            problem,
            Problem::BoxImage {
                image: 0,
                images: 0
            }
        );
    }

    #[test]
    fn wrong_json_in_a_string_says_where() {
        let problem = Folder::new().problem(&of_one_box(&json!("{\"bbox\": [[NaN]]}")));
        let words = problem.to_string();
        assert!(
            words.contains("(expected value, column 12 of objects)"),
            "{words}"
        );
    }

    #[test]
    fn objects_of_another_kind_are_refused() {
        for wrong in [
            json!("7"),
            json!([]),
            json!(3),
            json!({"ref": "a"}),
            json!({"ref": [1]}),
            json!({"ref": [" "]}),
            json!({"bbox": {}}),
        ] {
            let problem = Folder::new().problem(&of_one_box(&wrong));
            assert!(matches!(problem, Problem::Shape { .. }), "{problem}");
        }
    }
}
