//! Everything that can be wrong with training data.

use std::io;
use std::path::{Path, PathBuf};

use super::Place;

/// Characters of a name from outside that messages show.
const SHOWN_CHARS: usize = 100;

/// Keys of an entry that messages show.
const SHOWN_KEYS: usize = 12;

/// Why training data cannot be read, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file cannot be read.
    #[error("{} cannot be read: {source}; check the path and the permissions", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system says.
        source: io::Error,
    },

    /// An entry is wrong.
    #[error("{place}: {problem}")]
    Entry {
        /// Where it is.
        place: Place,
        /// What is wrong with it.
        problem: Problem,
    },

    /// There is nothing to learn from.
    #[error("{} {}", file.display(), nothing(*skipped, first.as_deref()))]
    Nothing {
        /// The file.
        file: PathBuf,
        /// How many entries were left out.
        skipped: usize,
        /// What is wrong with the first of these.
        first: Option<Box<DataError>>,
    },
}

impl DataError {
    /// The entry that is wrong, if it is one.
    pub fn place(&self) -> Option<&Place> {
        match self {
            Self::Entry { place, .. } => Some(place),
            Self::Read { .. } | Self::Nothing { .. } => None,
        }
    }
}

/// What is wrong with an entry, and what to do about it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A line or an entry of an array is too long.
    #[error(
        "this is more than {most} bytes, the most that is read of an entry; keep the images in files"
    )]
    TooLong {
        /// The most that is read.
        most: usize,
    },

    /// An array is too long.
    #[error(
        "up to here the array has {most} bytes, the most that is read of one; write it as JSON Lines, one \
         object a line (jq -c '.[]')"
    )]
    TooLarge {
        /// The most that is read.
        most: u64,
    },

    /// It is no JSON.
    #[error("this is no JSON ({reason}, {at}); {remedy}")]
    Json {
        /// What the parser says.
        reason: String,
        /// Where in the line or the file.
        at: String,
        /// What to do.
        remedy: &'static str,
    },

    /// It is JSON, but no object.
    #[error("this is {found}; an example is an object, as {{\"messages\": […], \"images\": […]}}")]
    NotObject {
        /// What it is.
        found: &'static str,
    },

    /// The examples are inside of it.
    #[error(
        "this is one object with a list under {}, and examples inside of an object are not read; write the list \
         alone (jq .NAME), or one example a line",
        quoted(key)
    )]
    Wrapped {
        /// Where they are.
        key: String,
    },

    /// It has none of the forms that are known.
    #[error(
        "this has no form that is known; its keys are {}, and an example has conversations, messages, prompt and \
         completion, query and response, or image, expression and box",
        list_of(keys)
    )]
    UnknownForm {
        /// Its keys.
        keys: Vec<String>,
    },

    /// It asks for what is not done.
    #[error(
        "this has {}, which would change what is learned and is not supported; take the key out if it means \
         nothing here, or leave the entry out",
        quoted(key)
    )]
    Refused {
        /// The key.
        key: String,
    },

    /// A value is of the wrong kind.
    #[error("{what} should be {wanted}; correct it, or leave the entry out")]
    Shape {
        /// Which value.
        what: String,
        /// What it should be.
        wanted: &'static str,
    },

    /// Nobody who takes part.
    #[error(
        "turn {turn} is of {}, who takes no part here; known are system, user (human) and assistant (gpt): leave \
         out entries with others, such as calls of tools",
        quoted(role)
    )]
    Role {
        /// Which turn, from 1.
        turn: usize,
        /// Whose it is said to be.
        role: String,
    },

    /// Somebody speaks out of turn.
    #[error(
        "turn {turn} is of the {found}, where it is the {wanted}'s; questions and answers alternate, a question \
         being first: join turns of one speaker, or take out what is too much"
    )]
    Order {
        /// Which turn, from 1.
        turn: usize,
        /// Whose it is.
        found: &'static str,
        /// Whose it should be.
        wanted: &'static str,
    },

    /// There is a system prompt where none can be.
    #[error(
        "turn {turn} is a system prompt, of which there is one at most, in the beginning; join it with the first, \
         or take it out"
    )]
    System {
        /// Which turn, from 1.
        turn: usize,
    },

    /// The system prompt shows an image.
    #[error("an image stands in the system prompt; put it into a question")]
    SystemImage,

    /// Nobody answers.
    #[error("the conversation has no answer to learn; add one, or leave the entry out")]
    NoAnswer,

    /// The last question has no answer.
    #[error("the conversation ends with a question; add the answer, or take the question out")]
    Unanswered,

    /// An answer says nothing.
    #[error(
        "turn {turn} is an empty answer; write what is to be learned, or take the exchange out"
    )]
    EmptyAnswer {
        /// Which turn, from 1.
        turn: usize,
    },

    /// A question asks and shows nothing.
    #[error("turn {turn} is an empty question; write what is asked, or take the exchange out")]
    EmptyQuestion {
        /// Which turn, from 1.
        turn: usize,
    },

    /// There are not as many marks as things to put there.
    #[error(
        "the texts have {mark} {marks} times, and {given} {} in {of}; write {mark} once for each, where it \
         belongs{}",
        match given { 1 => "is", _ => "are" },
        match *mark { "<image>" => ", or nowhere at all: all then stand before the first question", _ => "" }
    )]
    Count {
        /// The mark.
        mark: &'static str,
        /// How often it is there.
        marks: usize,
        /// How many there are to put there.
        given: usize,
        /// Where these are.
        of: &'static str,
    },

    /// A part says that it shows another image than the next.
    #[error(
        "a part shows image {found}, counted from 0, where {wanted} is the next; put the images in the order in \
         which they are shown"
    )]
    ImageOrder {
        /// The image that it names.
        found: String,
        /// The next.
        wanted: usize,
    },

    /// An image is somewhere in a network.
    #[error(
        "image {} is not on this machine, and nothing is fetched; download it and name the file",
        quoted(url)
    )]
    Url {
        /// Where it is.
        url: String,
    },

    /// An image is not there.
    #[error(
        "image {} is not there; relative paths are looked up below the folder of images: name it with \
         --images DIR, or correct the path",
        shown_path(image)
    )]
    Missing {
        /// Where it should be.
        image: PathBuf,
    },

    /// An image in the data cannot be decoded.
    #[error(
        "an image is no base64 ({reason}); encode it again, as data:image/png;base64,…, or name a file instead"
    )]
    Base64 {
        /// What is wrong.
        reason: String,
    },

    /// An image in the data is too large.
    #[error("an image in the data is larger than {most} bytes; keep it in a file and name that")]
    ImageTooLarge {
        /// The most that is read.
        most: usize,
    },

    /// Several images, where one is meant.
    #[error(
        "there {} where the box needs one; for several write messages with objects, as ms-swift has them",
        match found { 0 => "is no image".into(), found => format!("are {found} images") }
    )]
    OneImage {
        /// How many there are.
        found: usize,
    },

    /// A point, where boxes are known.
    #[error(
        "{} is a point, and points are not supported; give a box, as [x1, y1, x2, y2], or leave the entry out",
        numbers(point)
    )]
    Point {
        /// It.
        point: [f64; 2],
    },

    /// A box has no area.
    #[error(
        "{} is an empty box; give two opposite corners, as [x1, y1, x2, y2], or leave the entry out",
        numbers(corners)
    )]
    EmptyBox {
        /// The corners.
        corners: [f64; 4],
    },

    /// A box is counted in something else.
    #[error(
        "{} is not within 0 and {most}; is bbox_type right? real counts in pixels, norm1 to 1, norm1000 to 1000",
        numbers(corners)
    )]
    Range {
        /// The corners.
        corners: [f64; 4],
        /// The end of the image.
        most: f64,
    },

    /// Boxes are counted in something unknown.
    #[error(
        "bbox_type {} is not known; known are real (pixels), norm1 and norm1000",
        quoted(found)
    )]
    BoxType {
        /// What the data say.
        found: String,
    },

    /// A box is on an image that is not there.
    #[error(
        "a box is on image {image}, counted from 0, and there {}; correct image_id, or add the image",
        match images { 1 => "is 1 image".into(), images => format!("are {images} images") }
    )]
    BoxImage {
        /// Which it is said to be on.
        image: u64,
        /// How many there are.
        images: usize,
    },
}

impl Problem {
    /// What a parser says, which was `at` this place.
    pub(super) fn json(error: &serde_json::Error, at: String, remedy: &'static str) -> Self {
        let text = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        Self::Json {
            reason: text.strip_suffix(&place).unwrap_or(&text).to_owned(),
            at,
            remedy,
        }
    }
}

/// Why there is nothing to learn from, as the end of a sentence.
fn nothing(skipped: usize, first: Option<&DataError>) -> String {
    match first {
        None => "is empty; write one example a line, or an array of them".into(),
        Some(first) => format!("has no example: of {skipped} entries none is right; {first}"),
    }
}

/// A name from outside, harmless to a terminal and of bounded length.
fn quoted(name: &str) -> String {
    match name.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{:?}", format!("{}…", &name[..end])),
        None => format!("{name:?}"),
    }
}

fn shown_path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

fn list_of(keys: &[String]) -> String {
    let shown: Vec<_> = keys
        .iter()
        .take(SHOWN_KEYS)
        .map(|key| quoted(key))
        .collect();
    match keys.len() {
        0 => "none".into(),
        len if len > SHOWN_KEYS => format!("{} and more", shown.join(", ")),
        _ => shown.join(", "),
    }
}

fn numbers(corners: &[f64]) -> String {
    let shown: Vec<_> = corners.iter().map(f64::to_string).collect();
    format!("[{}]", shown.join(", "))
}
