//! The order that people expect of names with numbers in them: 2 before 10.

use std::path::{Path, PathBuf};

/// A piece of a name. Digits are compared as the number that they write, however long it is.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Its length without leading zeros, and its digits.
    Number(usize, String),
    /// What is between digits.
    Text(String),
}

/// What to sort a path by: the parts of its name, then the path itself.
pub fn key(path: &Path) -> (Vec<Part>, PathBuf) {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let chars: Vec<char> = name.chars().collect();
    let runs = chars.chunk_by(|a, b| a.is_ascii_digit() == b.is_ascii_digit());
    let parts = runs.map(|run| {
        let text: String = run.iter().collect();
        match run[0].is_ascii_digit() {
            true => {
                let digits = text.trim_start_matches('0');
                Part::Number(digits.len(), digits.to_owned())
            }
            false => Part::Text(text),
        }
    });
    (parts.collect(), path.to_path_buf())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::key;

    #[test]
    fn numbers_in_names_count_as_numbers() {
        let long = "7".repeat(50);
        let sorted = [
            "1.png",
            "2.png",
            "10.png",
            "frame_1.png",
            "frame_002.png",
            "frame_3 (1).png",
            "frame_3 (2).png",
            "frame_3 (10).png",
            "frame_10.png",
            "frame_b.png",
            &format!("z{long}.png"),
            &format!("z{long}0.png"),
        ];
        let sorted = sorted.map(PathBuf::from);
        let mut names = sorted.clone();
        names.reverse();
        names.sort_by_cached_key(|path| key(path));
        assert_eq!(names, sorted);
        // The same number in two spellings: any order, but always one.
        let mut twice = [PathBuf::from("1.png"), PathBuf::from("01.png")];
        twice.sort_by_cached_key(|path| key(path));
        assert_eq!(twice[0], PathBuf::from("01.png"));
    }
}
