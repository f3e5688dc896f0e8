//! Data of one's own: lines of JSON.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;

use crate::EvalError;
use crate::sample::{PictureAt, Sample, Truth};

/// Most bytes of a line, and of a picture.
const LINE_MAX_BYTES: u64 = 1 << 20;
const PICTURE_MAX_BYTES: u64 = 256 << 20;

const WANTED: &str = "a line is an object with image (a path beside the file), question or expression, and one of answer \
                      (text), answers (texts, any of which is right) and box ([x1, y1, x2, y2] in pixels of the picture)";

#[derive(Deserialize)]
struct Line {
    image: String,
    #[serde(default)]
    question: Option<String>,
    #[serde(default)]
    expression: Option<String>,
    #[serde(default)]
    answer: Option<String>,
    #[serde(default)]
    answers: Option<Vec<String>>,
    #[serde(default, rename = "box", alias = "bbox")]
    corners: Option<[f64; 4]>,
    #[serde(default)]
    id: Option<serde_json::Value>,
    #[serde(default)]
    category: Option<String>,
}

/// Reads all lines; pictures are not opened.
pub(crate) fn read(path: &Path) -> Result<Vec<Sample>, EvalError> {
    let file = opened(path)?;
    let beside = path.parent().unwrap_or(Path::new("."));
    let (mut reader, mut samples, mut line) = (BufReader::new(file), Vec::new(), 0);
    loop {
        let mut text = Vec::new();
        let read = (&mut reader)
            .take(LINE_MAX_BYTES + 1)
            .read_until(b'\n', &mut text);
        if read.map_err(EvalError::io(path))? == 0 {
            return Ok(samples);
        }
        line += 1;
        let refuse = |reason: String| EvalError::Line {
            path: path.to_owned(),
            line,
            reason,
        };
        if text.len() as u64 > LINE_MAX_BYTES {
            return Err(refuse(
                "it is longer than 1 MiB; give one sample a line".into(),
            ));
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&text);
        if text.trim_ascii_start().first() != Some(&b'{') {
            return Err(refuse(format!("it is no object; {WANTED}")));
        }
        let read: Line =
            serde_json::from_slice(text).map_err(|error| refuse(format!("{error}; {WANTED}")))?;
        let question = match (read.question, read.expression) {
            (Some(question), None) | (None, Some(question)) => question,
            _ => {
                let reason = format!("it should have one of question and expression; {WANTED}");
                return Err(refuse(reason));
            }
        };
        let truth = match (read.corners, read.answers, read.answer) {
            (Some(corners), None, None) => {
                let [x1, y1, x2, y2] = corners;
                if !(x1 < x2 && y1 < y2) {
                    let reason = "the box should be [x1, y1, x2, y2] with x1 < x2 and y1 < y2";
                    return Err(refuse(reason.into()));
                }
                if corners.iter().all(|side| (0.0..=1.0).contains(side)) {
                    let reason = "the box is at most a pixel large: give it in pixels of the picture, not in shares";
                    return Err(refuse(reason.into()));
                }
                Truth::Box(corners)
            }
            (None, Some(answers), None) if !answers.is_empty() => Truth::AnyOf(answers),
            (None, None, Some(answer)) => Truth::Answer(answer),
            _ => {
                let reason = format!("it should have one of answer, answers and box; {WANTED}");
                return Err(refuse(reason));
            }
        };
        let id = match read.id {
            Some(serde_json::Value::String(id)) => id,
            Some(id) => id.to_string(),
            None => line.to_string(),
        };
        samples.push(Sample {
            index: samples.len(),
            id,
            question,
            truth,
            category: read.category,
            picture: PictureAt::File(beside.join(read.image)),
        });
    }
}

/// A file that has an end: no folder, and no pipe that nobody may ever write to.
fn opened(path: &Path) -> Result<File, EvalError> {
    let kind = std::fs::metadata(path).map_err(EvalError::io(path))?;
    match kind.is_file() {
        true => File::open(path).map_err(EvalError::io(path)),
        false => Err(EvalError::io(path)(std::io::Error::other(
            "it is no file; name one",
        ))),
    }
}

/// The bytes of a picture.
pub(crate) fn picture(path: &Path) -> Result<Vec<u8>, EvalError> {
    let file = opened(path)?;
    let mut bytes = Vec::new();
    let read = file.take(PICTURE_MAX_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(EvalError::io(path))?;
    match bytes.len() as u64 > PICTURE_MAX_BYTES {
        true => Err(EvalError::io(path)(std::io::Error::other(
            "it is larger than 256 MiB",
        ))),
        false => Ok(bytes),
    }
}
