//! A question about a picture, and its known answer.

use std::path::PathBuf;

use serde::Serialize;

use reroute_zoo::grounding::BoundingBox;

/// A question about a picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Its place in the split, from 0; of an annotation with several expressions each counts.
    pub index: usize,
    /// What the data call it.
    pub id: String,
    /// The question, or the expression.
    pub question: String,
    /// What is right.
    pub truth: Truth,
    /// What kind of question it is (POPE: random, popular, adversarial).
    pub category: Option<String>,
    /// Where its picture is.
    pub picture: PictureAt,
}

/// What is right.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Truth {
    /// `x1, y1, x2, y2` in pixels of the picture as given.
    Box(BoundingBox),
    /// What several people have answered (TextVQA).
    Answers(Vec<String>),
    /// Answers of which any is right, compared as one is.
    AnyOf(Vec<String>),
    /// One answer (GQA).
    Answer(String),
    /// Yes or no (POPE).
    Yes(bool),
}

/// Where a picture is. They are in the order in which they are best read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PictureAt {
    /// In a table.
    Table {
        /// Which, of those that have pictures.
        table: usize,
        /// Its row, from 0.
        row: usize,
    },
    /// A file.
    File(PathBuf),
}
