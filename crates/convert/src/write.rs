//! Writing a plan: stream, read again, compare, rename.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use reroute_checkpoint::{Dtype, Narrow};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::codes::Coder;
use crate::journal::{Done, Journal};
use crate::plan::PlannedFile;
use crate::source::{BLOCK_BYTES, Recoded, Weights};
use crate::{ConvertError, Plan};

/// What is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Tensors are written.
    Write,
    /// A file is read again.
    Verify,
}

/// How far a conversion has come, in bytes of all files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is going on.
    pub phase: Phase,
    /// Written and verified so far; every byte counts twice.
    pub done_bytes: u64,
    /// To be written and verified in all.
    pub total_bytes: u64,
}

/// What a conversion has come to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Tensors that an interrupted run had written before.
    pub resumed: usize,
    /// Tensors with finite values beyond the range of their new type, and how many. They became the
    /// largest value of that type, as [`Job::clamp`](crate::Job::clamp) asked.
    pub overflows: Vec<(String, u64)>,
    /// Weights that became codes, and what the numbers that they stand for are off by: the root of the mean
    /// square, as a share of that of the weight.
    pub errors: Vec<(String, f64)>,
}

impl Plan {
    /// Bytes that are still to be written: an interrupted run has left some.
    pub fn missing_bytes(&self) -> u64 {
        let written = self.files.iter().map(|file| {
            let length = |path: &Path| path.metadata().map_or(0, |metadata| metadata.len());
            length(&file.path)
                .max(length(&partial(&file.path)))
                .min(file.layout.bytes)
        });
        self.total_bytes() - written.sum::<u64>()
    }

    /// Writes everything. Files have their names only when they are whole and verified.
    pub fn write(&self, progress: &mut dyn FnMut(Progress)) -> Result<Report, ConvertError> {
        self.check_space()?;
        fs::create_dir_all(&self.folder).map_err(ConvertError::io(&self.folder))?;
        let journal = Journal::open(self)?;
        let mut run = Run {
            plan: self,
            resumed: journal.done.len(),
            journal,
            done_bytes: 0,
            total_bytes: 2 * self.total_bytes(),
            progress,
        };
        let mut first = 0;
        for file in &self.files {
            if let Err(error) = run.write(file, first) {
                if let ConvertError::Damaged { path, .. } = &error {
                    fs::remove_file(path).map_err(ConvertError::io(path))?;
                    run.journal.forget(first)?;
                } else if self.check_sources().is_err() {
                    // Its tensors are of different sources.
                    run.journal.forget(first)?;
                }
                return Err(error);
            }
            first += file.tensors.len();
        }
        for companion in self.companions.contents() {
            let (name, content) = companion?;
            self.check_sources()?;
            put(&self.folder.join(name), &content)?;
        }
        let sources = self.files.iter().flat_map(|file| &file.sources);
        let done = sources.zip(&run.journal.done);
        let lost = done.clone().filter(|(_, done)| done.overflows > 0);
        let overflows = lost
            .map(|(source, done)| (source.tensor.name.clone(), done.overflows))
            .collect();
        let made = done.filter(|(source, _)| matches!(source.codes, Some(Recoded::Made(_))));
        let errors = made
            .map(|(source, done)| (source.tensor.name.clone(), done.error))
            .collect();
        let resumed = run.resumed;
        // The names, too, must outlive a loss of power, where a system can be asked for that.
        let _ = File::open(&self.folder).and_then(|folder| folder.sync_all());
        run.journal.remove()?;
        Ok(Report {
            resumed,
            overflows,
            errors,
        })
    }

    fn check_space(&self) -> Result<(), ConvertError> {
        let companions = self.companions.sources();
        let companions = companions.filter_map(|path| Some(path.metadata().ok()?.len()));
        let needed = self.missing_bytes() + companions.sum::<u64>();
        // The folder is made later.
        let is_there = |folder: &&Path| folder.is_dir();
        let folder = self.folder.ancestors().find(is_there);
        let folder = folder.unwrap_or(Path::new("."));
        let available = fs4::available_space(folder).map_err(ConvertError::io(folder))?;
        if needed <= available {
            return Ok(());
        }
        Err(ConvertError::DiskFull {
            path: self.folder.clone(),
            needed,
            available,
        })
    }
}

/// A plan that is being written.
struct Run<'a> {
    plan: &'a Plan,
    journal: Journal,
    /// Tensors that an interrupted run had written.
    resumed: usize,
    done_bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl Run<'_> {
    /// Writes one file, of which the first tensor is the `first` of all.
    fn write(&mut self, planned: &PlannedFile, first: usize) -> Result<(), ConvertError> {
        let count = planned.tensors.len();
        let path = partial(&planned.path);
        if self.journal.done.len() >= first + count && planned.path.exists() {
            let before = self.done_bytes;
            self.advance(planned.layout.bytes, Phase::Write);
            // It was right once, but may have come to harm since.
            match self.verify(&planned.path, planned, first) {
                Err(ConvertError::Damaged { .. }) => {
                    self.journal.forget(first)?;
                    self.resumed = self.resumed.min(first);
                    self.done_bytes = before;
                }
                verified => return verified,
            }
        }
        let mut file = open(&path)?;
        let failed = ConvertError::io(&path);
        let written = self.journal.done.len().saturating_sub(first).min(count);
        let start = match written.checked_sub(1) {
            Some(last) => planned.end(last),
            None => {
                file.set_len(0).map_err(&failed)?;
                file.write_all(&planned.layout.header).map_err(&failed)?;
                planned.layout.header.len() as u64
            }
        };
        file.set_len(start).map_err(&failed)?;
        self.advance(start, Phase::Write);
        for at in written..count {
            file.set_len(planned.layout.offsets[at]).map_err(&failed)?;
            file.seek(SeekFrom::End(0)).map_err(&failed)?;
            let done = self.write_tensor(&mut file, planned, at)?;
            self.journal.add(done)?;
        }
        file.sync_all().map_err(&failed)?;
        self.verify(&path, planned, first)?;
        self.plan.check_sources()?;
        fs::rename(&path, &planned.path).map_err(&failed)
    }

    fn write_tensor(
        &mut self,
        file: &mut File,
        planned: &PlannedFile,
        at: usize,
    ) -> Result<Done, ConvertError> {
        let source = &planned.sources[at];
        let (from, to) = (source.tensor.dtype, planned.tensors[at].dtype);
        let columns = source.tensor.shape.last().copied().unwrap_or(0);
        let mut coder = match source.codes {
            Some(Recoded::Made(format)) => Some(Coder::new(from, format, columns)),
            _ => None,
        };
        let mut narrow = match source.codes {
            Some(_) => Narrow::new(to, to),
            None => Narrow::new(from, to),
        };
        let mut hasher = Xxh3::new();
        let mut buffer = Vec::new();
        let weights: &Weights = &self.plan.weights[source.weights];
        weights.stream(source, &mut |block| {
            let codes = match &mut coder {
                Some(coder) => Some(coder.block(block).ok_or_else(|| ConvertError::NotCoded {
                    name: source.tensor.name.clone(),
                    format: coder.format().name(),
                })?),
                None => None,
            };
            let block = narrow.block(codes.as_deref().unwrap_or(block), &mut buffer);
            hasher.update(block);
            self.done_bytes += block.len() as u64;
            report(
                &mut *self.progress,
                self.done_bytes,
                self.total_bytes,
                Phase::Write,
            );
            file.write_all(block)
                .map_err(ConvertError::io(&planned.path))
        })?;
        let values = narrow.overflows + coder.as_ref().map_or(0, Coder::overflows);
        if values > 0 && !self.plan.clamp {
            return Err(ConvertError::Overflow {
                name: source.tensor.name.clone(),
                values,
                dtype: coder.map_or(to, |_| Dtype::F32),
            });
        }
        Ok(Done {
            checksum: hasher.digest(),
            overflows: values,
            error: coder.map_or(0.0, |coder| coder.error()),
        })
    }

    /// Reads a file again and compares it with what was written.
    fn verify(
        &mut self,
        path: &Path,
        planned: &PlannedFile,
        first: usize,
    ) -> Result<(), ConvertError> {
        let failed = ConvertError::io(path);
        let mut file = File::open(path).map_err(&failed)?;
        let mut block = Vec::new();
        let mut checksum = |start: u64, end: u64| {
            let mut hasher = Xxh3::new();
            let mut left = end.saturating_sub(start);
            file.seek(SeekFrom::Start(start)).map_err(&failed)?;
            while left > 0 {
                block.resize(left.min(BLOCK_BYTES as u64) as usize, 0);
                file.read_exact(&mut block).map_err(&failed)?;
                hasher.update(&block);
                left -= block.len() as u64;
                self.done_bytes += block.len() as u64;
                report(
                    &mut *self.progress,
                    self.done_bytes,
                    self.total_bytes,
                    Phase::Verify,
                );
            }
            Ok::<_, ConvertError>(hasher.digest())
        };
        let damaged = |what: &str| ConvertError::Damaged {
            path: path.to_path_buf(),
            what: what.to_owned(),
        };
        if path.metadata().map_err(&failed)?.len() != planned.layout.bytes {
            return Err(damaged("its length"));
        }
        let header = &planned.layout.header;
        if checksum(0, header.len() as u64)? != xxh3_64(header) {
            return Err(damaged("the header"));
        }
        for (at, tensor) in planned.tensors.iter().enumerate() {
            let found = checksum(planned.layout.offsets[at], planned.end(at))?;
            if self.journal.done[first + at].checksum != found {
                return Err(damaged(&tensor.name));
            }
        }
        Ok(())
    }

    fn advance(&mut self, bytes: u64, phase: Phase) {
        self.done_bytes += bytes;
        report(
            &mut *self.progress,
            self.done_bytes,
            self.total_bytes,
            phase,
        );
    }
}

fn report(progress: &mut dyn FnMut(Progress), done_bytes: u64, total_bytes: u64, phase: Phase) {
    progress(Progress {
        phase,
        done_bytes,
        total_bytes,
    });
}

/// Opens an unfinished file, or begins one. A link would lead to a file of others.
fn open(path: &Path) -> Result<File, ConvertError> {
    if path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
        return Err(ConvertError::Occupied {
            path: path.to_path_buf(),
        });
    }
    let mut options = OpenOptions::new();
    let file = options.create(true).truncate(false).write(true).open(path);
    file.map_err(ConvertError::io(path))
}

/// Writes a small file under a temporary name, reads it again and renames it.
fn put(path: &Path, content: &[u8]) -> Result<(), ConvertError> {
    let temporary = partial(path);
    let write = || {
        let mut file = open(&temporary)?;
        let failed = ConvertError::io(&temporary);
        file.set_len(0).map_err(&failed)?;
        file.write_all(content).map_err(&failed)?;
        file.sync_all().map_err(&failed)?;
        fs::read(&temporary).map_err(&failed)
    };
    if write()? != content {
        fs::remove_file(&temporary).map_err(ConvertError::io(&temporary))?;
        return Err(ConvertError::Damaged {
            path: temporary,
            what: "all of it".to_owned(),
        });
    }
    fs::rename(&temporary, path).map_err(ConvertError::io(path))
}

/// The name of a file that is not finished.
pub(crate) fn partial(path: &Path) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}
