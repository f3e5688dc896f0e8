//! What an interrupted run has already written, so that the next one goes on from there.

use std::fs::{File, OpenOptions, TryLockError, remove_file};
use std::hash::{Hash, Hasher};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use crate::write::partial;
use crate::{ConvertError, Plan};

/// Longest journal that is read: far more lines than there are tensors.
const MAX_BYTES: u64 = 64 << 20;

/// One line per finished tensor, in the order of writing, after a line that names the plan.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    /// Of all files of weights, in order.
    pub(crate) done: Vec<Done>,
}

/// A tensor that is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Done {
    /// XXH3 of its bytes.
    pub(crate) checksum: u64,
    /// Values that were beyond the range of its type.
    pub(crate) overflows: u64,
}

impl Journal {
    /// Goes on with the journal of the same plan, or begins one.
    pub(crate) fn open(plan: &Plan) -> Result<Self, ConvertError> {
        let path = plan.journal.clone();
        let failed = ConvertError::io(&path);
        let title = format!("convert {:016x}", fingerprint(plan)?);
        let mut options = OpenOptions::new();
        let options = options.create(true).read(true).write(true).truncate(false);
        let mut file = options.open(&path).map_err(&failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ConvertError::Busy { path: path.clone() }),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let mut text = String::new();
        // What is no text is no journal of ours.
        let _ = (&file).take(MAX_BYTES).read_to_string(&mut text);
        // The last line may have been cut off.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut lines = whole.lines();
        let mut done: Vec<Done> = match lines.next() == Some(&title) {
            true => lines.map_while(Done::parse).collect(),
            false => Vec::new(),
        };
        done.truncate(present(plan, done.len()));
        let mut text = format!("{title}\n");
        done.iter().for_each(|done| text.push_str(&done.line()));
        file.set_len(0).map_err(&failed)?;
        file.rewind().map_err(&failed)?;
        file.write_all(text.as_bytes()).map_err(&failed)?;
        drop(failed);
        Ok(Self { path, file, done })
    }

    pub(crate) fn add(&mut self, done: Done) -> Result<(), ConvertError> {
        let written = self.file.write_all(done.line().as_bytes());
        written.map_err(ConvertError::io(&self.path))?;
        self.done.push(done);
        Ok(())
    }

    /// Everything is in place, or nothing is worth keeping.
    pub(crate) fn remove(self) -> Result<(), ConvertError> {
        remove_file(&self.path).map_err(ConvertError::io(&self.path))
    }
}

/// How many of the first `done` tensors are in files, as far as the lengths of these say.
fn present(plan: &Plan, done: usize) -> usize {
    let mut first = 0;
    for file in &plan.files {
        let count = file.tensors.len();
        if first + count > done || !file.path.exists() {
            let length = partial(&file.path)
                .metadata()
                .map_or(0, |metadata| metadata.len());
            let whole = (0..count).take_while(|&at| file.end(at) <= length).count();
            return done.min(first + whole);
        }
        first += count;
    }
    done
}

impl Done {
    fn line(self) -> String {
        format!("{:016x} {}\n", self.checksum, self.overflows)
    }

    fn parse(line: &str) -> Option<Self> {
        let (checksum, overflows) = line.split_once(' ')?;
        Some(Self {
            checksum: u64::from_str_radix(checksum, 16).ok()?,
            overflows: overflows.parse().ok()?,
        })
    }
}

/// Equal for two plans that write the same: the headers of the target, and the names, lengths and
/// times of the files of the source.
fn fingerprint(plan: &Plan) -> Result<u64, ConvertError> {
    let mut hasher = Xxh3::new();
    for file in &plan.files {
        file.path.hash(&mut hasher);
        file.layout.header.hash(&mut hasher);
    }
    for path in plan.weights.iter().flat_map(|weights| weights.files()) {
        path.hash(&mut hasher);
        let metadata = Path::new(&path)
            .metadata()
            .map_err(ConvertError::io(&path))?;
        metadata.len().hash(&mut hasher);
        metadata
            .modified()
            .map_err(ConvertError::io(&path))?
            .hash(&mut hasher);
    }
    Ok(hasher.finish())
}
