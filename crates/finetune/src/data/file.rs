//! The entries of a file, one after the other: the lines of JSON Lines, or what is in an array.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;

use serde_json::Value;

use super::{DataError, Place, Problem, array};

/// Most bytes of an entry.
pub(super) const ENTRY_MAX_BYTES: usize = 16 << 20;

/// What some programs write in front of UTF-8.
const MARK: &[u8] = b"\xEF\xBB\xBF";

/// What takes the entries. Its error ends the reading.
pub(super) type Take<'a> = dyn FnMut(Place, Result<Value, Problem>) -> Result<(), DataError> + 'a;

/// Reads all entries of a file.
pub(super) fn each_entry(path: &Path, take: &mut Take) -> Result<(), DataError> {
    let failed = |source| unreadable(path, source);
    let mut reader = opened(path).map_err(failed)?;
    let (breaks, first) = skip_blank(&mut reader).map_err(failed)?;
    match first {
        None => Ok(()),
        Some(b'[') => array::each_entry(path, reader, breaks, take),
        Some(_) => lines(path, reader, breaks, take),
    }
}

pub(super) fn unreadable(path: &Path, source: io::Error) -> DataError {
    let file = path.to_owned();
    DataError::Read { file, source }
}

/// The file from behind its byte order mark.
fn opened(path: &Path) -> io::Result<impl BufRead> {
    let mut file = File::open(path)?;
    let mut start = Vec::new();
    file.by_ref()
        .take(MARK.len() as u64)
        .read_to_end(&mut start)?;
    if start == MARK {
        start.clear();
    }
    Ok(BufReader::new(Cursor::new(start).chain(file)))
}

/// Goes on to the first byte that is not blank; how many line breaks are before it, and which it is.
fn skip_blank(reader: &mut impl BufRead) -> io::Result<(usize, Option<u8>)> {
    let mut breaks = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let blank = buffer.iter().take_while(|byte| byte.is_ascii_whitespace());
        let (blank, ended) = blank.fold((0, 0), |(blank, ended), &byte| {
            (blank + 1, ended + usize::from(byte == b'\n'))
        });
        let (first, is_end) = (buffer.get(blank).copied(), buffer.is_empty());
        reader.consume(blank);
        breaks += ended;
        if first.is_some() || is_end {
            return Ok((breaks, first));
        }
    }
}

/// Takes the lines, of which the first is behind so many breaks.
fn lines(
    path: &Path,
    mut reader: impl BufRead,
    breaks: usize,
    take: &mut Take,
) -> Result<(), DataError> {
    let failed = |source| unreadable(path, source);
    let mut buffer = Vec::new();
    for line in breaks + 1.. {
        buffer.clear();
        let mut start = reader.by_ref().take(ENTRY_MAX_BYTES as u64 + 1);
        if start.read_until(b'\n', &mut buffer).map_err(failed)? == 0 {
            break;
        }
        let place = Place {
            file: path.to_owned(),
            line,
            entry: false,
        };
        if buffer.len() > ENTRY_MAX_BYTES && !buffer.ends_with(b"\n") {
            reader.skip_until(b'\n').map_err(failed)?;
            take(
                place,
                Err(Problem::TooLong {
                    most: ENTRY_MAX_BYTES,
                }),
            )?;
            continue;
        }
        let text = buffer.trim_ascii_end();
        if !text.is_empty() {
            take(
                place,
                serde_json::from_slice(text).map_err(|error| wrong_line(&error)),
            )?;
        }
    }
    Ok(())
}

fn wrong_line(error: &serde_json::Error) -> Problem {
    let at = format!("column {}", error.column());
    let remedy = match error.is_eof() {
        true => {
            "an example ends on its line: write one object a line (jq -c), or an array of them, with no object \
             around"
        }
        false => {
            "write one object a line, or an array of them (JSON has no NaN, no comments and no commas at the end)"
        }
    };
    Problem::json(error, at, remedy)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::super::testing::Folder;
    use super::super::{Data, OnBadLine, read};
    use super::*;

    const GOOD: &str = r#"{"query": "Who?", "response": "Grüße, 世界 🦀"}"#;

    fn lines_of(data: &Data) -> Vec<(usize, bool)> {
        let place = |place: &Place| (place.line, place.entry);
        { data.examples.iter() }
            .map(|example| place(&example.source))
            .collect()
    }

    #[test]
    fn lines_may_be_blank_and_end_as_on_windows() {
        let text = format!("\u{feff}\r\n  \r\n{GOOD}\r\n\r\n\t{GOOD}  \r\n{GOOD}");
        let data = Folder::new().read(text, OnBadLine::Stop).expect("data");
        assert_eq!(lines_of(&data), [(3, false), (5, false), (6, false)]);
    }

    #[test]
    fn an_array_is_read_whatever_the_file_is_called() {
        let text = format!("\u{feff}\n [{GOOD},\r\n{GOOD} ]\n");
        let data = Folder::new().read(text, OnBadLine::Stop).expect("data");
        assert_eq!(lines_of(&data), [(1, true), (2, true)]);
        assert!(
            data.examples[1]
                .source
                .to_string()
                .ends_with("data.jsonl, entry 2")
        );
    }

    #[test]
    fn skipping_goes_on_and_stopping_does_not() {
        let folder = Folder::new();
        let text = format!("{GOOD}\nnonsense\n{{}}\n{GOOD}\n");
        let data = folder.read(&text, OnBadLine::Skip).expect("data");
        assert_eq!(lines_of(&data), [(1, false), (4, false)]);
        let places: Vec<_> = data.skipped.iter().filter_map(DataError::place).collect();
        assert_eq!(
            places.iter().map(|place| place.line).collect::<Vec<_>>(),
            [2, 3]
        );
        let error = folder.read(&text, OnBadLine::Stop).expect_err("line 2");
        assert!(
            error
                .to_string()
                .contains("data.jsonl, line 2: this is no JSON (expected"),
            "{error}"
        );

        let text = format!("[{GOOD}, 7, {{}}, {GOOD}]");
        let data = folder.read(&text, OnBadLine::Skip).expect("data");
        assert_eq!(lines_of(&data), [(1, true), (4, true)]);
        assert_eq!(data.skipped.len(), 2);
        let error = folder.read(&text, OnBadLine::Stop).expect_err("entry 2");
        assert!(
            error
                .to_string()
                .contains("data.jsonl, entry 2: this is a number"),
            "{error}"
        );
    }

    #[test]
    fn wrong_json_says_where() {
        let folder = Folder::new();
        let words = |text: &str| {
            let error = folder.read(text, OnBadLine::Skip).expect_err("wrong");
            error.to_string()
        };
        let nan = words(r#"{"image": "a.png", "expression": "a", "box": [NaN, 0, 1, 1]}"#);
        assert!(
            nan.contains("column 47") && nan.contains("JSON has no NaN"),
            "{nan}"
        );
        let huge = words(r#"{"box": [1e999, 0, 1, 1]}"#);
        assert!(huge.contains("number out of range"), "{huge}");
        let spread = words("{\n  \"data\": [\n    {}\n  ]\n}");
        assert!(
            spread.contains("line 1") && spread.contains("ends on its line"),
            "{spread}"
        );
        let latin = folder.read(b"{\"query\": \"\xFC\"}", OnBadLine::Stop);
        assert!(matches!(
            latin,
            Err(DataError::Entry {
                problem: Problem::Json { .. },
                ..
            })
        ));
    }

    #[test]
    fn too_long_an_entry_is_not_read() {
        let folder = Folder::new();
        let long = json!({"query": "a".repeat(ENTRY_MAX_BYTES), "response": "b"}).to_string();
        let data = folder.read(format!("{GOOD}\n{long}\n{GOOD}"), OnBadLine::Skip);
        let data = data.expect("data");
        assert_eq!(lines_of(&data), [(1, false), (3, false)]);
        assert!(
            data.skipped[0]
                .to_string()
                .contains("line 2: this is more than 16777216 bytes")
        );
        let error = folder.read(format!("[{GOOD}, {long}]"), OnBadLine::Skip);
        let error = error.expect_err("too long");
        assert!(
            error
                .to_string()
                .contains("entry 2: this is more than 16777216 bytes"),
            "{error}"
        );
    }

    #[test]
    fn nothing_is_an_error() {
        let folder = Folder::new();
        for text in ["", "\u{feff}", " \r\n\n", "[]", "[ ]\n"] {
            for on_bad in [OnBadLine::Stop, OnBadLine::Skip] {
                let error = folder.read(text, on_bad).expect_err("nothing");
                assert!(
                    matches!(error, DataError::Nothing { skipped: 0, .. }),
                    "{error}"
                );
                assert!(error.to_string().contains("is empty"), "{error}");
            }
        }
        let error = folder
            .read("{}\n[]\n", OnBadLine::Skip)
            .expect_err("nothing");
        let words = error.to_string();
        assert!(words.contains("of 2 entries none is right"), "{words}");
        assert!(words.contains("line 1: this has no form"), "{words}");
        assert_eq!(error.place(), None);
    }

    #[test]
    fn a_file_that_cannot_be_read_always_stops() {
        let folder = Folder::new();
        for name in ["absent.json", "ü"] {
            let error = read(&folder.path(name), Path::new(""), OnBadLine::Skip);
            assert!(matches!(error, Err(DataError::Read { .. })), "{error:?}");
        }
    }

    #[test]
    fn ten_thousand_lines_are_read_at_once() {
        let folder = Folder::new();
        let line = json!({
            "messages": [
                {"role": "user", "content": "<image>Where is the <ref-object>?"},
                {"role": "assistant", "content": "At <bbox>."},
            ],
            "images": ["a.png"],
            "objects": {"ref": ["cup"], "bbox": [[1, 2, 3, 4]]},
        });
        let lines = format!("{line}\n").repeat(10_000);
        let array = format!("[{}]", vec![line.to_string(); 10_000].join(","));
        fs::write(folder.path("array.json"), array).expect("the data");
        let start = std::time::Instant::now();
        let data = folder.read(lines, OnBadLine::Stop).expect("data");
        assert_eq!(data.examples[9_999].source.line, 10_000);
        let data = read(
            &folder.path("array.json"),
            &folder.path(""),
            OnBadLine::Stop,
        );
        assert_eq!(data.expect("data").examples.len(), 10_000);
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }
}
