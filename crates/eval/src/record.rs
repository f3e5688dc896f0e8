//! What is written of a run: a header that says what was measured, and a line for every sample.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::{EvalError, Fingerprint, GroundingPrompt, Score, Shard, Task};

/// Most bytes of a line.
const LINE_MAX_BYTES: usize = 16 << 20;

/// All that decides the numbers, in the order in which differences are told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Of the form of these files.
    pub version: u32,
    /// What is measured.
    pub task: Task,
    /// Which split.
    pub split: String,
    /// The data.
    pub data: Fingerprint,
    /// Samples of the split that count: all, or the first so many.
    pub samples: usize,
    /// The part of them that is here.
    pub shard: Shard,
    /// The model and how it is opened, as whoever opened it says.
    pub model: Value,
    /// What the routing is called.
    pub routing: String,
    /// What it is.
    pub plan: Value,
    /// How boxes are asked for.
    pub prompt: GroundingPrompt,
    /// How the model writes boxes.
    pub grounding: String,
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// Whether every answer was computed as if it were alone (`--batch 1`).
    pub apart: bool,
}

/// The present form of records.
pub(crate) const VERSION: u32 = 1;

/// What has become of a sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its index in the split.
    pub sample: usize,
    /// What the data call it.
    pub id: String,
    /// XXH3 of its picture's bytes: samples of one picture are not independent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub picture: Option<String>,
    /// What kind of question it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    /// What was answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Whether the answer is not whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut_off: bool,
    /// How right that is.
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub score: Option<Score>,
    /// Visual tokens of the prompt, after a reduction before the decoder.
    #[serde(default)]
    pub visual_tokens: usize,
    /// Those that a layer worked on, on average.
    #[serde(default)]
    pub average_tokens: f64,
    /// Why there is no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Record {
    /// Whether it says one of what was measured and why nothing was, in numbers that can be averaged.
    fn is_sound(&self) -> bool {
        let is_share = |share: &f64| (0.0..=1.0).contains(share);
        let all = self.visual_tokens as f64;
        (0.0..=all).contains(&self.average_tokens)
            && match &self.score {
                None => self.error.is_some(),
                Some(score) => {
                    let shares = [Some(score.score), score.iou, score.release_iou];
                    self.error.is_none() && shares.iter().flatten().all(is_share)
                }
            }
    }
}

/// The records of one routing, by sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Records {
    /// What was measured.
    pub header: Header,
    /// Of each sample the last.
    pub records: BTreeMap<usize, Record>,
}

impl Header {
    /// Refuses to go on with records of something else; names the first difference.
    pub(crate) fn check(&self, path: &Path, now: &Self) -> Result<(), EvalError> {
        let Some((field, was, now)) = self.differs(now) else {
            return Ok(());
        };
        Err(EvalError::OtherRun {
            path: path.to_owned(),
            field,
            was,
            now,
        })
    }

    /// The first difference: where, and both values.
    pub(crate) fn differs(&self, other: &Self) -> Option<(String, String, String)> {
        let (Ok(this), Ok(other)) = (serde_json::to_value(self), serde_json::to_value(other))
        else {
            return None;
        };
        const ORDER: [&str; 13] = [
            "version",
            "task",
            "split",
            "data",
            "samples",
            "shard",
            "model",
            "routing",
            "plan",
            "prompt",
            "grounding",
            "max_new_tokens",
            "apart",
        ];
        ORDER.into_iter().find_map(|field| {
            let (a, b) = (&this[field], &other[field]);
            (a != b).then(|| deepest(field.to_string(), a, b))
        })
    }
}

/// Goes down to where two values differ.
fn deepest(field: String, a: &Value, b: &Value) -> (String, String, String) {
    if let (Value::Object(fields), Value::Object(others)) = (a, b) {
        let mut names = fields.keys().chain(others.keys());
        if let Some(name) = names.find(|name| fields.get(*name) != others.get(*name)) {
            let of = |fields: &serde_json::Map<String, Value>| fields.get(name).cloned();
            let (a, b) = (
                of(fields).unwrap_or_default(),
                of(others).unwrap_or_default(),
            );
            return deepest(format!("{field}.{name}"), &a, &b);
        }
    }
    let shown = |value: &Value| match value.to_string() {
        long if long.len() > 200 => format!("{}…", long.chars().take(200).collect::<String>()),
        short => short,
    };
    (field, shown(a), shown(b))
}

/// What the records of a routing are called.
pub fn file_name(routing: &str, shard: Shard) -> String {
    let plain = |letter: char| match letter {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '@' | '-' | '_' | '.' => letter,
        _ => '_',
    };
    let routing: String = routing.chars().map(plain).collect();
    format!("records-{routing}{}.jsonl", shard.suffix())
}

/// Reads records; a last line that a kill has cut is left out.
pub fn read(path: &Path) -> Result<Records, EvalError> {
    Ok(scan(path)?.0)
}

/// The same, and the bytes that are whole lines.
fn scan(path: &Path) -> Result<(Records, u64), EvalError> {
    let file = File::open(path).map_err(EvalError::io(path))?;
    let mut reader = BufReader::new(file);
    let (mut whole, mut before) = (0, 0);
    let (mut header, mut records) = (None, BTreeMap::new());
    loop {
        let mut text = Vec::new();
        let mut limited = std::io::Read::take(&mut reader, LINE_MAX_BYTES as u64);
        let read = limited
            .read_until(b'\n', &mut text)
            .map_err(EvalError::io(path))?;
        let line = before + 1;
        let refuse = |reason: String| EvalError::Record {
            path: path.to_owned(),
            line,
            reason,
        };
        if read == 0 || text.last() != Some(&b'\n') && read < LINE_MAX_BYTES {
            let header = header.ok_or_else(|| refuse("it has no header".into()))?;
            return Ok((Records { header, records }, whole));
        }
        before = line;
        if let Some(Header { shard, samples, .. }) = &header {
            let read = serde_json::from_slice::<Record>(&text);
            let record = read.map_err(|error| refuse(format!("it is no record: {error}")))?;
            if !record.is_sound() {
                return Err(refuse(
                    "it is no record: it should have a score from 0 to 1, or an error".into(),
                ));
            }
            let here = shard.samples(*samples);
            if !here.contains(&record.sample) {
                return Err(refuse(format!(
                    "sample {} is none of {} to {}",
                    record.sample,
                    here.start,
                    here.end.saturating_sub(1)
                )));
            }
            records.insert(record.sample, record);
        } else {
            let read = serde_json::from_slice::<Header>(&text);
            header = Some(read.map_err(|error| refuse(format!("it is no header: {error}")))?);
        }
        whole += read as u64;
    }
}

/// Records that are being written.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    pub(crate) records: Records,
}

impl Log {
    /// Begins, or goes on behind what is whole. Samples that have failed are tried again.
    pub(crate) fn open(path: PathBuf, header: Header, resume: bool) -> Result<Self, EvalError> {
        // A kill in the first line leaves nothing worth keeping.
        let is_begun = path.exists() && {
            let mut first = String::new();
            let file = File::open(&path).map_err(EvalError::io(&path))?;
            let read = BufReader::new(std::io::Read::take(file, LINE_MAX_BYTES as u64))
                .read_line(&mut first);
            read.is_err() || first.ends_with('\n')
        };
        if is_begun && !resume {
            return Err(EvalError::Taken { path });
        }
        if is_begun {
            let (mut records, whole) = scan(&path)?;
            records.header.check(&path, &header)?;
            records.records.retain(|_, record| record.error.is_none());
            let file = OpenOptions::new().write(true).open(&path);
            let mut file = file.map_err(EvalError::io(&path))?;
            let cut = file
                .set_len(whole)
                .and_then(|()| file.seek(SeekFrom::End(0)));
            cut.map_err(EvalError::io(&path))?;
            return Ok(Self {
                path,
                file,
                records,
            });
        }
        let mut file = File::create(&path).map_err(EvalError::io(&path))?;
        put(&mut file, &header).map_err(EvalError::io(&path))?;
        let records = Records {
            header,
            records: BTreeMap::new(),
        };
        Ok(Self {
            path,
            file,
            records,
        })
    }

    /// Writes a record at once.
    pub(crate) fn push(&mut self, record: Record) -> Result<(), EvalError> {
        put(&mut self.file, &record).map_err(EvalError::io(&self.path))?;
        self.records.records.insert(record.sample, record);
        Ok(())
    }
}

/// A line in one call to the system, so that a kill cuts the last line at most.
fn put(file: &mut File, line: &impl Serialize) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)
}

/// Writes records whole or not at all.
pub(crate) fn write(path: &Path, records: &Records) -> Result<(), EvalError> {
    let mut text = Vec::new();
    let lines = serde_json::to_writer(&mut text, &records.header).and_then(|()| {
        text.push(b'\n');
        for record in records.records.values() {
            serde_json::to_writer(&mut text, record)?;
            text.push(b'\n');
        }
        Ok(())
    });
    lines.map_err(|error| EvalError::io(path)(error.into()))?;
    crate::report::put(path, &text)
}

/// Tells files from others: their XXH3.
pub fn checksum(bytes: &[u8]) -> String {
    format!("{:016x}", xxh3_64(bytes))
}
