//! What an interrupted run has already written, so that the next one goes on from there.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions, TryLockError, remove_file};
use std::hash::{Hash, Hasher};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use crate::write::partial;
use crate::{ConvertError, Plan};

/// Longest journal that is read: far more lines than there are tensors.
const MAX_BYTES: u64 = 64 << 20;

/// What the line of the plan begins with.
const TITLE: &str = "convert ";
/// What the line of a file of the target begins with.
const FILE: &str = "file ";

/// A line that names the plan, one per file that it writes, then one per finished tensor, in the
/// order of writing.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    /// All lines before those of tensors.
    head: String,
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
    /// Goes on with the journal of the same plan, or begins one; what another plan has left is removed
    /// then.
    pub(crate) fn open(plan: &Plan) -> Result<Self, ConvertError> {
        let path = plan.journal.clone();
        let failed = ConvertError::io(&path);
        let title = format!("{TITLE}{:016x}", fingerprint(plan)?);
        let mut options = OpenOptions::new();
        let options = options.create(true).read(true).write(true).truncate(false);
        let mut file = options.open(&path).map_err(&failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ConvertError::Busy { path: path.clone() }),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let text = read(&mut file);
        if !text.is_empty() && !text.starts_with(TITLE) {
            return Err(ConvertError::Occupied { path: path.clone() });
        }
        let mut lines = text.lines();
        let mut done = Vec::new();
        if lines.next() == Some(&title) {
            let lines = lines.skip_while(|line| line.starts_with(FILE));
            done.extend(lines.map_while(Done::parse));
        } else {
            names(&text).try_for_each(|name| remove_left(&plan.folder.join(name)))?;
        }
        let mut head = format!("{title}\n");
        for name in plan.names() {
            head.extend([FILE, name, "\n"]);
        }
        let kept = present(plan, done.len());
        drop(failed);
        let mut journal = Self {
            path,
            file,
            head,
            done,
        };
        journal.forget(kept)?;
        Ok(journal)
    }

    /// Keeps the first tensors only.
    pub(crate) fn forget(&mut self, kept: usize) -> Result<(), ConvertError> {
        self.done.truncate(kept);
        let mut text = self.head.clone();
        self.done
            .iter()
            .for_each(|done| text.push_str(&done.line()));
        let mut write = || {
            self.file.set_len(0)?;
            self.file.rewind()?;
            self.file.write_all(text.as_bytes())
        };
        write().map_err(ConvertError::io(&self.path))
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

/// Names of the files in the folder of a journal that the run which began it writes.
pub(crate) fn files(journal: &Path) -> Vec<String> {
    let text = File::open(journal).map(|mut file| read(&mut file));
    names(&text.unwrap_or_default())
        .map(str::to_owned)
        .collect()
}

/// Whole lines. What is no text is no journal of ours.
fn read(file: &mut File) -> String {
    let mut text = String::new();
    let _ = file.take(MAX_BYTES).read_to_string(&mut text);
    // The last line may have been cut off.
    text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
    text
}

/// Names of the files that the lines of a journal list.
fn names(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().skip(1);
    let names = lines.map_while(|line| line.strip_prefix(FILE));
    names.filter(|name| Path::new(name).file_name() == Some(OsStr::new(name)))
}

/// Removes a file that an interrupted run has left, finished or not.
fn remove_left(path: &Path) -> Result<(), ConvertError> {
    for path in [partial(path), path.to_path_buf()] {
        match remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(ConvertError::io(&path)(error));
            }
            _ => {}
        }
    }
    Ok(())
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
        let mut add = || {
            path.canonicalize()?.hash(&mut hasher);
            let metadata = path.metadata()?;
            metadata.len().hash(&mut hasher);
            metadata.modified()?.hash(&mut hasher);
            Ok(())
        };
        add().map_err(ConvertError::io(&path))?;
    }
    Ok(hasher.finish())
}
