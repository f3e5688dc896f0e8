//! What the tests of this module share: folders with images and data in them.

#[cfg(test)]
use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;

use super::{Data, DataError, Example, ImageSource, OnBadLine, Piece, Problem, read};

/// A folder with three files that are there: a.png, b.png and ü/ö c.png.
pub(super) struct Folder(TempDir);

impl Folder {
    pub(super) fn new() -> Self {
        let folder = Self(tempfile::tempdir().expect("a folder"));
        fs::create_dir(folder.path("ü")).expect("a folder in it");
        for name in ["a.png", "b.png", "ü/ö c.png"] {
            fs::write(folder.path(name), name).expect("a file");
        }
        folder
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn file(&self, name: &str) -> ImageSource {
        ImageSource::File(self.path(name))
    }

    /// Reads data of such content.
    pub(super) fn read(
        &self,
        content: impl AsRef<[u8]>,
        on_bad: OnBadLine,
    ) -> Result<Data, DataError> {
        let path = self.path("data.jsonl");
        fs::write(&path, content).expect("the data");
        read(&path, self.0.path(), on_bad)
    }

    /// The example that an entry is.
    pub(super) fn example(&self, entry: &Value) -> Example {
        let read = self.read(entry.to_string(), OnBadLine::Stop);
        let mut data = read.unwrap_or_else(|error| panic!("{error}"));
        data.examples.pop().expect("an example")
    }

    /// What is wrong with an entry.
    pub(super) fn problem(&self, entry: &Value) -> Problem {
        match self.read(entry.to_string(), OnBadLine::Stop) {
            Err(DataError::Entry { place, problem }) => {
                assert_eq!((place.line, place.entry), (1, false));
                problem
            }
            other => panic!("{other:?}"),
        }
    }
}

/// What is wrong with an entry, in words.
pub(super) fn words(entry: &Value) -> String {
    Folder::new().problem(entry).to_string()
}

pub(super) fn said(text: &str) -> Piece {
    Piece::Text(text.into())
}
