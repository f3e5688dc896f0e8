//! What an interrupted run has already written, so that the next one goes on from there.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions, TryLockError, remove_file};
use std::hash::{Hash, Hasher};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::source::{BLOCK_BYTES, Made};
use crate::write::partial;
use crate::{ConvertError, Plan};

/// Longest journal that is read: far more lines than there are tensors.
const MAX_BYTES: u64 = 64 << 20;

/// What the line of the plan begins with.
const TITLE: &str = "convert ";
/// What the line of a file of the target begins with.
const FILE: &str = "file ";
/// What the journal calls files of weights, and all others.
const WEIGHTS: &str = "weights";
const WHOLE: &str = "whole";

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

/// A file that a run writes. Whoever replaces it makes it begin in another way.
pub(crate) struct Own {
    name: String,
    /// Whether there is nothing behind its beginning: of all but files of weights, which begin with
    /// a header.
    is_whole: bool,
    /// Length of its beginning.
    bytes: u64,
    /// XXH3 of these bytes.
    checksum: u64,
}

/// A tensor that is in its file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Done {
    /// XXH3 of its bytes.
    pub(crate) checksum: u64,
    /// Values that were beyond the range of its type.
    pub(crate) overflows: u64,
    /// What it is off by since it became codes.
    pub(crate) error: f64,
}

impl Journal {
    /// Goes on with the journal of the same plan, or begins one; what another plan has left is removed
    /// then.
    pub(crate) fn open(plan: &Plan) -> Result<Self, ConvertError> {
        let path = plan.journal.clone();
        let failed = ConvertError::io(&path);
        let mut head = String::new();
        for own in plan.own_files() {
            head.push_str(&own?.line());
        }
        let title = format!("{TITLE}{:016x}", fingerprint(plan, &head));
        let mut options = OpenOptions::new();
        let options = options.create(true).read(true).write(true).truncate(false);
        let mut file = options.open(&path).map_err(&failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ConvertError::Busy { path: path.clone() }),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let text = read(&mut file).map_err(&failed)?;
        let text = text.ok_or_else(|| ConvertError::Occupied { path: path.clone() })?;
        let own: Vec<Own> = files_of(&text).collect();
        // Another run may have ended since the plan was made.
        if let Err(error) = plan.check_free(&own) {
            if text.is_empty() {
                remove_file(&path).map_err(&failed)?;
            }
            return Err(error);
        }
        let mut lines = text.lines();
        let mut done = Vec::new();
        if lines.next() == Some(&title) {
            let lines = lines.skip_while(|line| line.starts_with(FILE));
            done.extend(lines.map_while(Done::parse));
        } else if plan.is_in_place() && own.iter().any(|own| own.is(&plan.folder, &own.name)) {
            // What another plan has left may be what this one reads.
            return Err(ConvertError::Occupied { path: path.clone() });
        } else {
            own.iter().try_for_each(|own| own.remove(&plan.folder))?;
        }
        let kept = present(plan, done.len());
        drop(failed);
        let mut journal = Self {
            path,
            file,
            head: format!("{title}\n{head}"),
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

    /// Everything is in place. Who waits for the lock finds nothing to go on with.
    pub(crate) fn remove(self) -> Result<(), ConvertError> {
        let removed = self.file.set_len(0).and_then(|()| remove_file(&self.path));
        removed.map_err(ConvertError::io(&self.path))
    }
}

/// The files in the folder of a journal that the run which began it writes.
pub(crate) fn files(journal: &Path) -> Vec<Own> {
    let text = File::open(journal).and_then(|mut file| read(&mut file));
    let text = text.ok().flatten().unwrap_or_default();
    files_of(&text).collect()
}

/// Whole lines; `None` if it is no journal.
fn read(file: &mut File) -> io::Result<Option<String>> {
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    if !bytes.is_empty() && !bytes.starts_with(TITLE.as_bytes()) {
        return Ok(None);
    }
    // The last line may have been cut off.
    let end = bytes.iter().rposition(|&byte| byte == b'\n');
    bytes.truncate(end.map_or(0, |end| end + 1));
    Ok(String::from_utf8(bytes).ok())
}

fn files_of(text: &str) -> impl Iterator<Item = Own> {
    let lines = text.lines().skip(1);
    let files = lines.map_while(|line| line.strip_prefix(FILE));
    files.filter_map(Own::parse)
}

impl Own {
    /// A file of weights with this header.
    pub(crate) fn weights(name: &str, header: &[u8]) -> Self {
        Self {
            is_whole: false,
            ..Self::whole(name, header)
        }
    }

    /// A file with this content.
    pub(crate) fn whole(name: &str, beginning: &[u8]) -> Self {
        Self {
            name: name.to_owned(),
            is_whole: true,
            bytes: beginning.len() as u64,
            checksum: xxh3_64(beginning),
        }
    }

    fn line(&self) -> String {
        let kind = if self.is_whole { WHOLE } else { WEIGHTS };
        format!(
            "{FILE}{kind} {} {:016x} {}\n",
            self.bytes, self.checksum, self.name
        )
    }

    /// Of a line without its first word. Names that lead elsewhere are none.
    fn parse(line: &str) -> Option<Self> {
        let (kind, line) = line.split_once(' ')?;
        let (bytes, line) = line.split_once(' ')?;
        let (checksum, name) = line.split_once(' ')?;
        let is_plain = Path::new(name).file_name() == Some(OsStr::new(name));
        is_plain.then_some(Self {
            name: name.to_owned(),
            is_whole: kind == WHOLE,
            bytes: bytes.parse().ok()?,
            checksum: u64::from_str_radix(checksum, 16).ok()?,
        })
    }

    /// Whether this is what a run has written, or is writing, under a name of the folder.
    pub(crate) fn is(&self, folder: &Path, name: &str) -> bool {
        self.name == name && self.begins(&folder.join(name)).unwrap_or(false)
    }

    /// Whether a run writes this name, whatever it holds so far.
    pub(crate) fn is_named(&self, name: &str) -> bool {
        self.name == name
    }

    fn begins(&self, path: &Path) -> io::Result<bool> {
        let found = path.symlink_metadata()?;
        if !found.is_file() || self.is_whole && found.len() != self.bytes {
            return Ok(false);
        }
        let mut hasher = Xxh3::new();
        let mut beginning = File::open(path)?.take(self.bytes);
        let mut block = vec![0; BLOCK_BYTES];
        loop {
            match beginning.read(&mut block)? {
                0 => return Ok(hasher.digest() == self.checksum),
                bytes => hasher.update(&block[..bytes]),
            }
        }
    }

    /// Removes what an interrupted run has left, finished or not.
    fn remove(&self, folder: &Path) -> Result<(), ConvertError> {
        let path = folder.join(&self.name);
        let finished = self.is(folder, &self.name).then_some(&path);
        for path in [&partial(&path)].into_iter().chain(finished) {
            match remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(ConvertError::io(path)(error));
                }
                _ => {}
            }
        }
        Ok(())
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
        let Self {
            checksum,
            overflows,
            error,
        } = self;
        format!("{checksum:016x} {overflows} {error:e}\n")
    }

    fn parse(line: &str) -> Option<Self> {
        let (checksum, line) = line.split_once(' ')?;
        let (overflows, error) = line.split_once(' ')?;
        Some(Self {
            error: error.parse().ok()?,
            checksum: u64::from_str_radix(checksum, 16).ok()?,
            overflows: overflows.parse().ok()?,
        })
    }
}

/// Equal for two plans that write the same: the beginnings of the files of the target, what random numbers are drawn
/// by, and the names, lengths and times of those of the source.
fn fingerprint(plan: &Plan, head: &str) -> u64 {
    let mut hasher = Xxh3::new();
    head.hash(&mut hasher);
    for file in &plan.files {
        file.path.hash(&mut hasher);
        for source in &file.sources {
            if let Made::Random(seed) = source.made {
                seed.hash(&mut hasher);
            }
        }
    }
    for stamp in &plan.sources {
        stamp.hash_resolved(&mut hasher);
    }
    hasher.finish()
}
