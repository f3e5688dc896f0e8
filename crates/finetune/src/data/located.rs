//! Examples that ask where one thing is.

use serde_json::Value;

use super::entry::{Fields, field, refuse, text};
use super::objects::{ordered, shape, unit};
use super::{Exchange, Piece, Problem};

/// The exchange of an entry that asks for one box. With an answer of another kind it would ask for that.
pub(super) fn located(fields: &Fields, images: usize) -> Result<Exchange, Problem> {
    refuse(fields, &["answer", "response", "objects"])?;
    let (key, asked) = match text(fields, "expression")? {
        Some(asked) => ("expression", asked),
        None => ("question", text(fields, "question")?.unwrap_or_default()),
    };
    if asked.trim().is_empty() {
        return Err(shape(key, "what is to be found, as text"));
    }
    if images != 1 {
        return Err(Problem::OneImage { found: images });
    }
    let (key, corners) = match field(fields, "box") {
        Some(corners) => ("box", corners),
        None => ("bbox", field(fields, "bbox").unwrap_or(&Value::Null)),
    };
    let unit = unit(fields)?;
    let answer = Piece::Box {
        corners: ordered(key, corners, unit)?,
        image: 0,
        unit,
    };
    Ok(Exchange {
        question: vec![Piece::Label(asked.into())],
        answer: vec![answer],
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::BoxIn;
    use super::super::testing::Folder;
    use super::*;

    fn label(text: &str) -> Piece {
        Piece::Label(text.into())
    }

    fn pixels(corners: [f64; 4]) -> Piece {
        Piece::Box {
            corners,
            image: 0,
            unit: BoxIn::Pixels,
        }
    }

    #[test]
    fn one_box_is_asked_for() {
        let folder = Folder::new();
        let example = folder
            .example(&json!({"image": "a.png", "expression": "the red cup", "box": [4, 3, 2, 1]}));
        assert_eq!(example.images, [folder.file("a.png")]);
        let (question, answer) = (
            vec![label("the red cup")],
            vec![pixels([2.0, 1.0, 4.0, 3.0])],
        );
        assert_eq!(example.exchanges, [Exchange { question, answer }]);

        let mut entry = json!({"images": ["a.png"], "question": "the cup", "bbox": [0, 0, 500, 1000], "bbox_type": "norm1000"});
        let unit = BoxIn::Thousandths;
        let corners = [0.0, 0.0, 500.0, 1000.0];
        let answer = folder.example(&entry).exchanges.remove(0).answer;
        assert_eq!(
            answer,
            [Piece::Box {
                corners,
                image: 0,
                unit
            }]
        );

        entry["answer"] = json!("red");
        assert_eq!(
            folder.problem(&entry),
            Problem::Refused {
                key: "answer".into()
            }
        );
        entry["answer"] = json!(null);
        entry["question"] = json!(" ");
        assert!(
            folder
                .problem(&entry)
                .to_string()
                .starts_with("question should be what is to be found")
        );
        entry["question"] = json!("the cup");
        entry["bbox"] = json!([[0, 0, 1, 1]]);
        assert!(matches!(folder.problem(&entry), Problem::Shape { .. }));
        for (images, found) in [(json!([]), 0), (json!(["a.png", "b.png"]), 2)] {
            entry["images"] = images;
            assert_eq!(folder.problem(&entry), Problem::OneImage { found });
        }
    }
}
