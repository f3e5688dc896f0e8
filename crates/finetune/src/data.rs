//! Training data as people have it: conversations about images, in the forms that LLaVA, Qwen-VL, ms-swift,
//! TRL and mlx-vlm read.
//!
//! A file is JSON Lines, one object a line, or one JSON array. Every entry says by its keys which form it has:
//!
//! | Keys | Form |
//! |---|---|
//! | `conversations` | LLaVA: `from` and `value` |
//! | `messages` | Turns of `role` and `content` |
//! | `prompt`, `completion` | The same, divided as TRL has it |
//! | `query`, `response`, `history` | ms-swift 2 |
//! | `image`, `expression` or `question`, `box` or `bbox` | What is asked for, and where it is |
//!
//! `objects` of ms-swift goes with all but the last. Where the texts do not say where the images stand, these
//! stand before the first question.

mod array;
mod conversation;
mod entry;
mod error;
mod file;
mod images;
mod llava;
mod located;
mod marks;
mod messages;
mod objects;
#[cfg(test)]
mod testing;

use std::fmt;
use std::path::{Path, PathBuf};

pub use error::{DataError, Problem};

/// A conversation to learn from. It has at least one exchange.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Where it was read.
    pub source: Place,
    /// The images that it shows. Those of the entry's own list come first, then those that messages bring
    /// along.
    pub images: Vec<ImageSource>,
    /// Instructions that come before the conversation. Empty where the data say that there are none.
    pub system: Option<String>,
    /// Questions and their answers, in order.
    pub exchanges: Vec<Exchange>,
}

/// Where an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// The line, or the entry of an array; the first is 1.
    pub line: usize,
    /// Whether the file is an array, whose entries are counted.
    pub entry: bool,
}

/// Where the content of an image is.
#[derive(Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A file, which was there when the data were read.
    File(PathBuf),
    /// An encoded image (PNG, JPEG, …) out of the data themselves.
    Bytes(Vec<u8>),
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Exchange {
    /// What is asked and shown. One that is a single [`Piece::Label`] is to be asked with the model's own
    /// prompt for grounding; the image is the one that the box of the answer is on.
    pub question: Vec<Piece>,
    /// What is to be answered. An image in it is shown, there is nothing to learn about it.
    pub answer: Vec<Piece>,
}

/// A part of a question or an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Text, never empty.
    Text(String),
    /// One of [`Example::images`].
    Image(usize),
    /// Name or description of an object, to be written as the model marks such (`<ref-object>`).
    Label(String),
    /// Where an object is, to be written as the model writes boxes (`<bbox>`).
    Box {
        /// Left, top, right, bottom; finite, with the left below the right and the top below the bottom.
        /// Pixels may lie outside of the image, whose size is not known here.
        corners: [f64; 4],
        /// The one of [`Example::images`] that it is on.
        image: usize,
        /// What the corners are counted in.
        unit: BoxIn,
    },
}

/// What the corners of a box are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BoxIn {
    /// Pixels of the image as given (`real`).
    Pixels,
    /// Shares of the image, 0 to 1 (`norm1`).
    Normalized,
    /// Thousandths of the image, 0 to 1000 (`norm1000`).
    Thousandths,
}

/// What to do about an entry that is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBadLine {
    /// Stop there.
    Stop,
    /// Go on without it.
    Skip,
}

/// What a file holds.
#[derive(Debug)]
pub struct Data {
    /// The examples, in order; at least one.
    pub examples: Vec<Example>,
    /// What was wrong with the entries that are left out, in order.
    pub skipped: Vec<DataError>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = match self.entry {
            true => "entry",
            false => "line",
        };
        write!(f, "{}, {counted} {}", self.file.display(), self.line)
    }
}

impl fmt::Debug for ImageSource {
    /// Of bytes, how many there are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
        }
    }
}

/// Reads training data. Relative paths of images are below `images_below`.
///
/// # Errors
/// [`DataError::Entry`] for an entry that is wrong, unless such are skipped; wrong JSON in an array, behind which
/// nothing can be found, is never skipped. [`DataError::Read`] if the file cannot be read, and
/// [`DataError::Nothing`] if no example is left.
pub fn read(path: &Path, images_below: &Path, on_bad: OnBadLine) -> Result<Data, DataError> {
    let (mut examples, mut skipped) = (Vec::new(), Vec::new());
    file::each_entry(path, &mut |place, entry| {
        let example = entry.and_then(|value| entry::example(&place, &value, images_below));
        match (example, on_bad) {
            (Ok(example), _) => examples.push(example),
            (Err(problem), OnBadLine::Stop) => return Err(DataError::Entry { place, problem }),
            (Err(problem), OnBadLine::Skip) => skipped.push(DataError::Entry { place, problem }),
        }
        Ok(())
    })?;
    match examples.is_empty() {
        false => Ok(Data { examples, skipped }),
        true => Err(DataError::Nothing {
            file: path.to_owned(),
            skipped: skipped.len(),
            first: skipped.into_iter().next().map(Box::new),
        }),
    }
}
