//! What stands where the texts have marks.

use super::conversation::Part;
use super::objects::Objects;
use super::{Exchange, ImageSource, Piece, Problem};

/// Where an image stands.
pub(super) const IMAGE: &str = "<image>";

/// Where the name of an object stands.
const LABEL: &str = "<ref-object>";

/// Where a box stands.
const BOX: &str = "<bbox>";

/// What is put where the marks are, in order.
#[derive(Debug)]
pub(super) struct Marks {
    /// The images that the entry lists, and behind them those that turns bring along.
    pub(super) images: Vec<ImageSource>,
    objects: Objects,
    /// How many images are listed.
    listed: usize,
    /// How often each mark has been met.
    met_images: usize,
    met_labels: usize,
    met_boxes: usize,
}

impl Marks {
    pub(super) fn new(images: Vec<ImageSource>, objects: Objects) -> Self {
        Self {
            listed: images.len(),
            images,
            objects,
            met_images: 0,
            met_labels: 0,
            met_boxes: 0,
        }
    }

    /// The pieces of a turn.
    pub(super) fn pieces(&mut self, parts: Vec<Part>) -> Result<Vec<Piece>, Problem> {
        let mut pieces = Vec::new();
        for part in parts {
            match part {
                Part::Text(text) => self.split(&text, &mut pieces),
                Part::Listed(Some(index)) if index != self.met_images => {
                    return Err(Problem::ImageOrder {
                        found: index.to_string(),
                        wanted: self.met_images,
                    });
                }
                Part::Listed(_) => self.image(&mut pieces),
                Part::Image(image) => {
                    pieces.push(Piece::Image(self.images.len()));
                    self.images.push(image);
                }
            }
        }
        Ok(pieces)
    }

    fn image(&mut self, pieces: &mut Vec<Piece>) {
        pieces.push(Piece::Image(self.met_images));
        self.met_images += 1;
    }

    /// Splits a text at its marks. A line break between the text and the images that it begins or ends with
    /// is taken out: prompts are written with it, and templates write their own.
    fn split(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let mut rest = text;
        while let Some(behind) = rest.strip_prefix(IMAGE) {
            self.image(pieces);
            let broken = behind.strip_prefix("\r\n");
            rest = broken.or(behind.strip_prefix('\n')).unwrap_or(behind);
        }
        let mut at_end = 0;
        while let Some(before) = rest.strip_suffix(IMAGE) {
            at_end += 1;
            let broken = before.strip_suffix("\r\n");
            rest = broken.or(before.strip_suffix('\n')).unwrap_or(before);
        }
        self.split_within(rest, pieces);
        for _ in 0..at_end {
            self.image(pieces);
        }
    }

    fn split_within(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let (mut from, mut at) = (0, 0);
        while let Some(next) = text[at..].find('<') {
            let (start, rest) = (at + next, &text[at + next..]);
            let Some(mark) = [IMAGE, LABEL, BOX]
                .into_iter()
                .find(|mark| rest.starts_with(mark))
            else {
                at = start + 1;
                continue;
            };
            push_text(pieces, &text[from..start]);
            match mark {
                IMAGE => self.image(pieces),
                LABEL => {
                    let label = self.objects.labels.get(self.met_labels);
                    pieces.extend(label.cloned().map(Piece::Label));
                    self.met_labels += 1;
                }
                _ => {
                    pieces.extend(self.objects.piece(self.met_boxes));
                    self.met_boxes += 1;
                }
            }
            at = start + mark.len();
            from = at;
        }
        push_text(pieces, &text[from..]);
    }

    /// Puts images without marks before the first question; fails unless everything has its place.
    pub(super) fn finish(&mut self, exchanges: &mut [Exchange]) -> Result<(), Problem> {
        let is_unmarked = self.met_images == 0 && self.images.len() == self.listed;
        if let (true, Some(first)) = (is_unmarked, exchanges.first_mut()) {
            first
                .question
                .splice(..0, (0..self.listed).map(Piece::Image));
            self.met_images = self.listed;
        }
        for (mark, marks, given, of) in [
            (IMAGE, self.met_images, self.listed, "images"),
            (
                LABEL,
                self.met_labels,
                self.objects.labels.len(),
                "objects.ref",
            ),
            (
                BOX,
                self.met_boxes,
                self.objects.boxes.len(),
                "objects.bbox",
            ),
        ] {
            if marks != given {
                return Err(Problem::Count {
                    mark,
                    marks,
                    given,
                    of,
                });
            }
        }
        self.objects.check_images(self.images.len())
    }
}

/// Adds text to a text before it.
fn push_text(pieces: &mut Vec<Piece>, text: &str) {
    match pieces.last_mut() {
        _ if text.is_empty() => {}
        Some(Piece::Text(before)) => before.push_str(text),
        _ => pieces.push(Piece::Text(text.into())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::testing::{Folder, said};
    use super::*;

    fn entry(turns: &[(&str, &str)], images: &Value) -> Value {
        let turns = turns
            .iter()
            .map(|(role, content)| json!({"role": role, "content": content}));
        json!({"messages": turns.collect::<Value>(), "images": images})
    }

    fn question(text: &str, images: &Value) -> Vec<Piece> {
        let entry = entry(&[("user", text), ("assistant", "!")], images);
        Folder::new().example(&entry).exchanges.remove(0).question
    }

    fn problem(turns: &[(&str, &str)], images: &Value) -> Problem {
        let problem = Folder::new().problem(&entry(turns, images));
        assert!(problem.to_string().contains("; "), "no remedy: {problem}");
        problem
    }

    #[test]
    fn line_breaks_beside_images_at_the_ends_are_taken_out() {
        let image = Piece::Image;
        let (one, two) = (json!("a.png"), json!(["a.png", "b.png"]));
        assert_eq!(
            question("<image>\r\nWhat?", &one),
            [image(0), said("What?")]
        );
        assert_eq!(
            question("<image>\n\nWhat?", &one),
            [image(0), said("\nWhat?")]
        );
        assert_eq!(
            question("What?\r\n<image>", &one),
            [said("What?"), image(0)]
        );
        assert_eq!(question("<image>\n<image>", &two), [image(0), image(1)]);
        assert_eq!(
            question("<image>\nA\n<image>", &two),
            [image(0), said("A"), image(1)]
        );
        let within = [
            said("1: "),
            image(0),
            said("\n2: "),
            image(1),
            said("\nWhich?"),
        ];
        assert_eq!(question("1: <image>\n2: <image>\nWhich?", &two), within);
        let other = "a < b <imag <<image>> ü<";
        assert_eq!(
            question(other, &one),
            [said("a < b <imag <"), image(0), said("> ü<")]
        );
    }

    #[test]
    fn images_without_marks_stand_first() {
        let images = json!(["a.png", "b.png"]);
        let first = [Piece::Image(0), Piece::Image(1), said("\nWhat?")];
        assert_eq!(question("\nWhat?", &images), first);
        assert_eq!(question("", &images), first[..2]);
        assert_eq!(question("Who?", &json!(null)), [said("Who?")]);
    }

    #[test]
    fn marks_and_images_are_as_many() {
        let turns = |text| [("user", text), ("assistant", "!")];
        let count = |marks, given| Problem::Count {
            mark: "<image>",
            marks,
            given,
            of: "images",
        };
        let (one, two) = (json!(["a.png"]), json!(["a.png", "b.png"]));
        assert_eq!(problem(&turns("<image>"), &two), count(1, 2));
        assert_eq!(problem(&turns("<image><image>?"), &one), count(2, 1));
        assert_eq!(problem(&turns("<image>?"), &json!([])), count(1, 0));
        assert!(count(1, 2).to_string().contains("or nowhere at all"));
        // An image of its own is no mark, and leaves no doubt where the others stand.
        let own = json!([{"type": "image", "path": "a.png"}]);
        let messages =
            json!([{"role": "user", "content": own}, {"role": "assistant", "content": "!"}]);
        let both = Folder::new().problem(&json!({"messages": messages, "images": ["a.png"]}));
        assert_eq!(both, count(0, 1));
        let system = [("system", "<image>"), ("user", "?"), ("assistant", "!")];
        assert_eq!(problem(&system, &one), Problem::SystemImage);
    }
}
