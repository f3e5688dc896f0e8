//! From an example to a lesson: pictures decoded and preprocessed, boxes in the model's own units.

use std::borrow::Cow;

use reroute_zoo::grounding::BoundingBox;
use reroute_zoo::messages::{Content, Message, Role};
use reroute_zoo::vision_encoder::Geometry;
use reroute_zoo::{DecodeLimits, Lesson, Prepared, RgbImage, Tutor, View, Visual, decode};

use crate::TuneError;
use crate::data::{BoxIn, Example, Exchange, ImageSource, Piece};
use crate::notation::{alone, label, seen, written};

/// Makes lessons of examples, in any thread.
#[derive(Debug, Clone)]
pub struct Preparation {
    tutor: Tutor,
}

/// What is asked about one picture, and the box that is the right answer.
#[derive(Debug, Clone)]
pub struct Sought {
    /// The question.
    pub text: String,
    /// Corners in pixels of the picture as given.
    pub corners: BoundingBox,
}

impl Preparation {
    /// For a model.
    pub fn new(tutor: Tutor) -> Self {
        Self { tutor }
    }

    /// The lesson of an example.
    ///
    /// # Errors
    /// [`TuneError::Example`] for a picture that cannot be read, a box that the model does not see, and what
    /// the model cannot take.
    pub fn lesson(&self, example: &Example) -> Result<Lesson, TuneError> {
        let refused = |reason: String| TuneError::Example {
            place: example.source.to_string(),
            reason,
        };
        let mut shown: Vec<(View, Prepared)> = Vec::new();
        for image in &example.images {
            let visual = Visual::Image(picture(image).map_err(refused)?);
            let prepared = self.tutor.preprocessor().prepare(&visual);
            shown.push(prepared.map_err(|error| refused(error.to_string()))?);
        }
        let views: Vec<&View> = shown.iter().map(|(view, _)| view).collect();
        let mut exchanges = Vec::new();
        // Pictures stand in the order in which questions show them.
        let mut order = Vec::new();
        let all = example
            .exchanges
            .iter()
            .flat_map(|exchange| &exchange.question);
        let is_shown = { all }.any(|piece| matches!(piece, Piece::Image(_)));
        for (at, exchange) in example.exchanges.iter().enumerate() {
            let mut content: Vec<Content> = Vec::new();
            // What no question shows stands before the first.
            if at == 0 && !is_shown {
                order.extend(0..shown.len());
                content.extend(shown.iter().map(|_| Content::Image));
            }
            for piece in self.asked(&exchange.question).as_ref() {
                if let Piece::Image(index) = piece {
                    order.push(*index);
                    content.push(Content::Image);
                    continue;
                }
                let text = self.text(piece, &views).map_err(refused)?;
                match content.last_mut() {
                    // One text: no special token may come about where two meet.
                    Some(Content::Text(before)) => before.push_str(&text),
                    _ => content.push(Content::Text(text)),
                }
            }
            let question = Message {
                role: Role::User,
                content,
            };
            let answer = self.answer(exchange, &views).map_err(refused)?;
            exchanges.push((question, answer));
        }
        let shown = order.iter().filter_map(|&index| shown.get(index).cloned());
        let lesson = self
            .tutor
            .lesson(example.system.as_deref(), &exchanges, shown.collect());
        lesson.map_err(|error| refused(error.to_string()))
    }

    /// What is sought, if an example is one question about one picture, which comes first, and its answer is
    /// one box.
    pub fn sought(&self, example: &Example) -> Option<(Sought, RgbImage)> {
        let ([exchange], [image], None) =
            (&example.exchanges[..], &example.images[..], &example.system)
        else {
            return None;
        };
        let (mut boxes, mut text) = (Vec::new(), String::new());
        for piece in &exchange.answer {
            match piece {
                Piece::Box { corners, unit, .. } => boxes.push((*corners, *unit)),
                Piece::Label(_) => {}
                Piece::Text(text) if !text.contains(char::is_alphanumeric) => {}
                _ => return None,
            }
        }
        let &[(corners, unit)] = &boxes[..] else {
            return None;
        };
        let asked = self.asked(&exchange.question);
        let spoken = match asked.as_ref() {
            [Piece::Image(_), spoken @ ..] => spoken,
            spoken => spoken,
        };
        for piece in spoken {
            match piece {
                Piece::Text(part) | Piece::Label(part) => text.push_str(part),
                Piece::Image(_) | Piece::Box { .. } => return None,
            }
        }
        let image = picture(image).ok()?;
        let corners = in_pixels(corners, unit, [image.width(), image.height()]);
        Some((Sought { text, corners }, image))
    }

    /// A question that is a label alone is asked as the model is asked for boxes.
    fn asked<'e>(&self, question: &'e [Piece]) -> Cow<'e, [Piece]> {
        let texts = |piece: &&Piece| !matches!(piece, Piece::Image(_));
        let mut spoken = question.iter().filter(texts);
        let (Some(Piece::Label(label)), None) = (spoken.next(), spoken.next()) else {
            return Cow::Borrowed(question);
        };
        let words = Piece::Text(self.tutor.grounding().question(label));
        let images = question.iter().filter(|piece| !texts(piece)).cloned();
        Cow::Owned(images.chain([words]).collect())
    }

    /// An answer as the tokenizer takes it: what people wrote holds no special tokens, what marks boxes may be
    /// some.
    fn answer(&self, exchange: &Exchange, views: &[&View]) -> Result<String, String> {
        let (tokenizer, notation) = (self.tutor.tokenizer(), self.tutor.grounding().notation);
        if let [Piece::Box { .. }] = &exchange.answer[..] {
            let written = self.text(&exchange.answer[0], views)?;
            let of = exchange.question.iter().find_map(|piece| match piece {
                Piece::Label(label) => Some(label.as_str()),
                _ => None,
            });
            let of = tokenizer.disarm(of.unwrap_or("object"));
            return Ok(alone(notation, written, &of));
        }
        let mut answer = String::new();
        for piece in &exchange.answer {
            match piece {
                Piece::Text(text) => answer.push_str(&tokenizer.disarm(text)),
                Piece::Label(of) => answer.push_str(&label(notation, &tokenizer.disarm(of))),
                Piece::Image(_) => {
                    return Err("an answer shows a picture: models answer in text".into());
                }
                Piece::Box { .. } => answer.push_str(&self.text(piece, views)?),
            }
        }
        Ok(answer)
    }

    /// What stands for a piece in a text; nothing for an image.
    fn text(&self, piece: &Piece, views: &[&View]) -> Result<String, String> {
        let (corners, image, unit) = match piece {
            Piece::Text(text) | Piece::Label(text) => return Ok(text.clone()),
            Piece::Image(_) => return Ok(String::new()),
            Piece::Box {
                corners,
                image,
                unit,
            } => (*corners, *image, *unit),
        };
        let view = views
            .get(image)
            .ok_or("a box is in a picture that is not shown")?;
        let corners = in_pixels(corners, unit, view.original);
        let [width, height] = view.original.map(|side| side as f64);
        let is_beyond = |at: f64, end: f64| at < -1.0 || at > end + 1.0;
        let [x1, y1, x2, y2] = corners;
        if [x1, x2].iter().any(|&x| is_beyond(x, width))
            || [y1, y2].iter().any(|&y| is_beyond(y, height))
        {
            return Err(format!(
                "the box {corners:?} lies outside of its picture of {width}×{height} pixels: boxes are in \
                 pixels of the picture as given, x1 y1 x2 y2"
            ));
        }
        let geometry: Geometry = self.tutor.preprocessor().geometry(view);
        let shares = seen(&geometry, corners).ok_or_else(|| {
            format!(
                "the model sees nothing of the box {corners:?}, where pictures are cropped: pad them to a square \
                 (--pad-to-square)"
            )
        })?;
        let resized = view.resized.map(|side| side as f64);
        Ok(written(self.tutor.grounding(), shares, resized))
    }
}

fn in_pixels(corners: BoundingBox, unit: BoxIn, [width, height]: [usize; 2]) -> BoundingBox {
    let [width, height] = match unit {
        BoxIn::Pixels => [1.0, 1.0],
        BoxIn::Normalized => [width as f64, height as f64],
        BoxIn::Thousandths => [width as f64 / 1000.0, height as f64 / 1000.0],
    };
    let [x1, y1, x2, y2] = corners;
    [x1 * width, y1 * height, x2 * width, y2 * height]
}

/// Reads and decodes a picture.
fn picture(source: &ImageSource) -> Result<RgbImage, String> {
    let bytes = match source {
        ImageSource::Bytes(bytes) => Cow::Borrowed(bytes),
        ImageSource::File(path) => {
            let bytes = std::fs::read(path);
            Cow::Owned(bytes.map_err(|error| format!("{}: {error}", path.display()))?)
        }
    };
    decode(&bytes, &DecodeLimits::default()).map_err(|error| match source {
        ImageSource::File(path) => format!("{}: {error}", path.display()),
        ImageSource::Bytes(_) => error.to_string(),
    })
}
