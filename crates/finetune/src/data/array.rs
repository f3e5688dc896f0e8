//! The entries of an array, read without holding the others.

use std::cell::Cell;
use std::fmt;
use std::io::{self, BufRead, ErrorKind, Read};
use std::path::Path;

use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde_json::Value;

use super::file::{ENTRY_MAX_BYTES, Take, unreadable};
use super::{DataError, Place, Problem};

/// Most bytes of an array; lines may be any number.
const ARRAY_MAX_BYTES: u64 = 1 << 30;

/// Reads all entries of an array, which is behind so many line breaks of the file.
pub(super) fn each_entry(
    path: &Path,
    reader: impl BufRead,
    breaks: usize,
    take: &mut Take,
) -> Result<(), DataError> {
    let of_entry = Cell::new(0);
    let mut deserializer = serde_json::Deserializer::from_reader(Bounded {
        reader,
        left: ARRAY_MAX_BYTES,
        of_entry: &of_entry,
    });
    let (mut count, mut stopped) = (0, None);
    let entries = Entries {
        path,
        of_entry: &of_entry,
        take,
        count: &mut count,
        stopped: &mut stopped,
    };
    let read = deserializer.deserialize_seq(entries);
    let read = read.and_then(|()| deserializer.end());
    if let Some(stopped) = stopped {
        return Err(stopped);
    }
    let Err(error) = read else {
        return Ok(());
    };
    let problem = match error.is_io() {
        true => match io::Error::from(error) {
            source if source.kind() != ErrorKind::FileTooLarge => {
                return Err(unreadable(path, source));
            }
            _ if of_entry.get() > ENTRY_MAX_BYTES => Problem::TooLong {
                most: ENTRY_MAX_BYTES,
            },
            _ => Problem::TooLarge {
                most: ARRAY_MAX_BYTES,
            },
        },
        false => wrong(&error, breaks),
    };
    let place = in_array(path, count + 1);
    Err(DataError::Entry { place, problem })
}

fn in_array(path: &Path, entry: usize) -> Place {
    Place {
        file: path.to_owned(),
        line: entry,
        entry: true,
    }
}

fn wrong(error: &serde_json::Error, breaks: usize) -> Problem {
    let (line, column) = (error.line() + breaks, error.column());
    let at = format!("line {line}, column {column} of the file");
    let remedy = match error.is_eof() {
        true => "the array has no end: is the copy complete?",
        false => {
            "correct it there (JSON has no NaN, no comments and no commas at the end), or write one object a line, \
             of which wrong ones can be skipped"
        }
    };
    Problem::json(error, at, remedy)
}

/// A reader that ends an array, or an entry of it, that is too long: with [`ErrorKind::FileTooLarge`].
struct Bounded<'a, R> {
    reader: R,
    /// Bytes that the array may still have.
    left: u64,
    /// Bytes that the entry has so far.
    of_entry: &'a Cell<usize>,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.of_entry.set(self.of_entry.get() + read);
        let left = self.left.checked_sub(read as u64);
        match left.filter(|_| self.of_entry.get() <= ENTRY_MAX_BYTES) {
            Some(left) => {
                self.left = left;
                Ok(read)
            }
            None => Err(ErrorKind::FileTooLarge.into()),
        }
    }
}

/// Takes the entries of an array as they come.
struct Entries<'a, 't> {
    path: &'a Path,
    of_entry: &'a Cell<usize>,
    take: &'a mut Take<'t>,
    /// How many have been taken.
    count: &'a mut usize,
    /// Why no more are.
    stopped: &'a mut Option<DataError>,
}

impl<'de> Visitor<'de> for Entries<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of examples")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.of_entry.set(0);
        while let Some(entry) = entries.next_element::<Value>()? {
            *self.count += 1;
            if let Err(error) = (self.take)(in_array(self.path, *self.count), Ok(entry)) {
                *self.stopped = Some(error);
                return Err(A::Error::custom("stopped"));
            }
            self.of_entry.set(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::OnBadLine;
    use super::super::testing::Folder;
    use super::*;

    const GOOD: &str = r#"{"query": "Who?", "response": "I."}"#;

    #[test]
    fn wrong_json_stops_and_says_where() {
        let folder = Folder::new();
        let words = |text: &str| {
            let error = folder.read(text, OnBadLine::Skip).expect_err("wrong");
            error.to_string()
        };
        let cut = words(&format!("\n[{GOOD},\n{GOOD}"));
        assert!(
            cut.contains("entry 3") && cut.contains("has no end"),
            "{cut}"
        );
        let comma = words(&format!("\n[{GOOD},\n]"));
        assert!(
            comma.contains("trailing comma, line 3, column 1 of the file"),
            "{comma}"
        );
        let two = words(&format!("[{GOOD}] {GOOD}"));
        assert!(two.contains("trailing characters"), "{two}");
        let deep = words(&"[".repeat(10_000));
        assert!(deep.contains("recursion limit"), "{deep}");
    }

    #[test]
    fn an_array_has_an_end() {
        let entry = Cell::new(0);
        let mut reader = Bounded {
            reader: &[b' '; 100][..],
            left: 99,
            of_entry: &entry,
        };
        let error = reader.read_to_end(&mut Vec::new()).expect_err("too long");
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        let problem = Problem::TooLarge {
            most: ARRAY_MAX_BYTES,
        };
        assert!(problem.to_string().contains("JSON Lines"));
    }
}
