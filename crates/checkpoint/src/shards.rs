//! Which tensor lies where: one `model.bpk` or `model.safetensors`, or the shards that an index
//! lists or whose names say that all are there.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{DType, TensorData};
use safetensors::Dtype;
use serde::Deserialize;
use xxhash_rust::xxh3::Xxh3;

use crate::convert::{self, BLOCK_BYTES, Layout};
use crate::folder::{Source, is_plain_name};
use crate::header::{self, Entries};
use crate::mapped::Mapped;
use crate::mismatch::IndexMismatch;
use crate::quantised::{self, Coded, own};
use crate::sharding::Numbered;
use crate::{CheckpointError, Folder, INDEX_MAX_BYTES, TensorError, burnpack};

const BURNPACK: &str = "model.bpk";
pub(crate) const SINGLE: &str = "model.safetensors";
/// Name of the file that says which tensor lies in which safetensors file.
pub const INDEX: &str = "model.safetensors.index.json";

/// Note in a Burnpack file: the [fingerprint](Shards::fingerprint) of what it was converted from.
pub const CONVERTED_FROM: &str = "converted_from";
/// Bytes at both ends of a tensor that a fingerprint is made of.
const SAMPLE_BYTES: u64 = 256;
/// Times of files closer than this say nothing: some systems count in steps of it.
const SAME_TIME: Duration = Duration::from_secs(2);

/// All tensors of a checkpoint. Their headers are checked; their data is read on demand.
#[derive(Debug, Clone)]
pub struct Shards {
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorInfo>,
    converted_from: Option<String>,
}

/// One file of weights.
#[derive(Debug, Clone)]
pub(crate) struct Shard {
    /// For messages.
    file: String,
    /// What kind of file it is.
    form: &'static str,
    source: Source,
    /// A Burnpack file on disk is mapped.
    mapped: Option<Arc<Mapped>>,
}

/// What a header says about one tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Length of every axis, slowest first.
    pub shape: Vec<usize>,
    /// What `shape` and `dtype` need, in bytes. A weight that is made while it is read takes less in the file.
    pub bytes: u64,
    /// Position in the list of files.
    pub(crate) shard: usize,
    /// From the start of the file, or of the weight that is made of others, in bytes.
    pub(crate) offset: u64,
    /// How it is made of other tensors, if it is: then it is f32, and larger than in the file.
    pub(crate) coded: Option<Box<Coded>>,
}

impl TensorInfo {
    /// Whether the file has it in fewer bits, of which it is made while it is read.
    pub fn is_widened(&self) -> bool {
        match self.coded.as_deref() {
            Some(Coded::Arranged(arranged)) => arranged.parts.iter().any(Self::is_widened),
            coded => coded.is_some(),
        }
    }

    /// What people call the form that it has in its file.
    fn form(&self) -> String {
        match self.coded.as_deref() {
            Some(Coded::Arranged(arranged)) => arranged.parts[0].form(),
            Some(coded) => coded.name().to_owned(),
            None => format!("{:?}", self.dtype),
        }
    }

    /// Moves on in a list of files what comes from them.
    fn move_shard(&mut self, by: usize) {
        self.shard += by;
        if let Some(Coded::Arranged(arranged)) = self.coded.as_deref_mut() {
            arranged
                .parts
                .iter_mut()
                .for_each(|part| part.move_shard(by));
        }
    }

    /// The same tensor with fewer rows.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Self {
        let mut part = self.clone();
        let Some(height) = part.shape.first_mut().filter(|height| **height > 0) else {
            return part;
        };
        let row_bytes = self.bytes / *height as u64;
        let (start, end) = (rows.start.min(*height), rows.end.min(*height));
        *height = end.saturating_sub(start);
        part.bytes = row_bytes * *height as u64;
        part.offset += row_bytes * start as u64;
        part
    }
}

/// The part of the index that matters.
#[derive(Deserialize)]
struct Index {
    /// Tensor name → file name.
    weight_map: Entries<String>,
}

/// Missing shards that are looked for; a few of them are named.
const MAX_MISSING: usize = 1000;

impl Shards {
    /// Finds the weights of a folder and checks all their headers.
    ///
    /// A Burnpack file goes before the safetensors files that it was converted from, and is refused
    /// beside others. An index is believed to the letter, and the files must agree with it; without
    /// one, the numbers in the names of shards say whether all are there.
    pub fn open(folder: &Folder) -> Result<Self, CheckpointError> {
        if let Some(weights) = folder.made_weights() {
            return Ok(weights.clone());
        }
        if folder.has(BURNPACK) {
            let converted = Self::open_file(folder, BURNPACK)?;
            converted.check_source(folder)?;
            return Ok(converted);
        }
        Self::open_safetensors(folder)
    }

    fn open_safetensors(folder: &Folder) -> Result<Self, CheckpointError> {
        let mut shards = Self::open_stored(folder)?;
        quantised::assemble(folder, &mut shards.tensors)?;
        Ok(shards)
    }

    /// Safetensors files, as they are stored.
    fn open_stored(folder: &Folder) -> Result<Self, CheckpointError> {
        if folder.has(INDEX) {
            Self::open_index(folder)
        } else if folder.has(SINGLE) {
            Self::open_file(folder, SINGLE)
        } else if folder
            .find(|name| Numbered::parse(name).is_some())
            .is_some()
        {
            Self::open_numbered(folder)
        } else {
            Err(no_weights(folder))
        }
    }

    /// Refuses a Burnpack file beside safetensors files that it was not converted from. Where it does
    /// not say from what, they must not be newer.
    fn check_source(&self, folder: &Folder) -> Result<(), CheckpointError> {
        let is_source = |name: &str| is_weights_file(name) && name != BURNPACK;
        let Some(original) = folder.find(is_source) else {
            return Ok(());
        };
        let is_stale = match &self.converted_from {
            Some(known) => {
                let found = Self::open_safetensors(folder).and_then(|shards| shards.fingerprint());
                !found.is_ok_and(|found| found == *known)
            }
            None => {
                let converted = folder.modified(BURNPACK);
                let newest = (folder.names().into_iter())
                    .filter(|name| is_source(name))
                    .filter_map(|name| folder.modified(&name))
                    .max();
                let limit = converted.and_then(|time| time.checked_add(SAME_TIME));
                newest
                    .zip(limit)
                    .is_some_and(|(newest, limit)| newest > limit)
            }
        };
        match is_stale {
            true => Err(CheckpointError::Stale {
                folder: folder.describe(),
                converted: BURNPACK.to_owned(),
                original,
            }),
            false => Ok(()),
        }
    }

    /// Opens one file of weights, Burnpack if its name ends in `.bpk`, safetensors otherwise.
    pub(crate) fn open_file(folder: &Folder, name: &str) -> Result<Self, CheckpointError> {
        let mut shards = Self::empty();
        let tensors = shards.add(folder, name)?;
        shards.tensors.extend(tensors);
        Ok(shards)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// What the headers say about all of them.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// What the header says about a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// What kind of files these are, and how many tensors they hold of each type, for people.
    pub fn form(&self) -> String {
        let kind = self.shards.first().map_or("nothing", |shard| shard.form);
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for info in self.tensors.values() {
            *counts.entry(info.form()).or_default() += 1;
        }
        let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
        counts.sort_by(|(a, m), (b, n)| n.cmp(m).then(a.cmp(b)));
        let counts = counts
            .iter()
            .map(|(name, count)| format!("{count} tensors of {name}"));
        let files = match self.shards.len() {
            1 => "1 file".to_owned(),
            files => format!("{files} files"),
        };
        format!("{kind}, {files}: {}", counts.collect::<Vec<_>>().join(", "))
    }

    /// Whether tensors are made of others while they are read.
    pub fn is_widened(&self) -> bool {
        self.tensors.values().any(TensorInfo::is_widened)
    }

    /// Size of all tensors as they are read, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|info| info.bytes).sum()
    }

    /// Tells these tensors from others of the same names and shapes by the bytes at both ends of each,
    /// whatever files they lie in.
    pub fn fingerprint(&self) -> Result<String, CheckpointError> {
        let mut hasher = Xxh3::new();
        for (name, info) in &self.tensors {
            hasher.update(format!("{name:?} {} {:?}", info.dtype, info.shape).as_bytes());
            let shard = self.find(name)?.1;
            let sample = info.bytes.min(SAMPLE_BYTES);
            for skipped in [0, info.bytes - sample] {
                let mut part = info.clone();
                (part.offset, part.bytes) = (info.offset + skipped, sample);
                let mut bytes = Vec::new();
                let read = self.reader(&part);
                let read = read.and_then(|mut reader| Ok(reader.read_to_end(&mut bytes)?));
                read.map_err(|source| shard.error(name, source))?;
                hasher.update(&bytes);
            }
        }
        Ok(format!("{:016x}", hasher.digest()))
    }

    /// The fingerprint of what a Burnpack file was converted from, if it says so.
    pub fn converted_from(&self) -> Option<&str> {
        self.converted_from.as_deref()
    }

    /// Paths of the files, links resolved. Embedded files have none.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let sources = self.shards.iter().map(|shard| &shard.source);
        sources.filter_map(|source| match source {
            Source::Disk(path) => Some(path.as_path()),
            Source::Memory(_) => None,
        })
    }

    /// Hands on the bytes of one tensor as its [`TensorInfo`] has it, in blocks of whole elements.
    pub fn for_each_block<E: From<CheckpointError>>(
        &self,
        name: &str,
        each: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (info, shard) = self.find(name)?;
        let failed = |source: io::Error| shard.error(name, source.into());
        let reader = self.reader(info);
        let mut reader = reader.map_err(|source| shard.error(name, source))?;
        let mut left = info.bytes;
        let mut block = Vec::new();
        while left > 0 {
            block.resize(left.min(BLOCK_BYTES as u64) as usize, 0);
            reader.read_exact(&mut block).map_err(failed)?;
            left -= block.len() as u64;
            each(&block)?;
        }
        Ok(())
    }

    /// Reads one tensor and converts it to `dtype` (F32, F16 or BF16), block by block. Nothing is read or
    /// copied if the file is mapped and has the tensor as it is wanted.
    ///
    /// # Shapes
    /// - returns the shape in the file; reversed for [`Layout::Transposed`], which takes only
    ///   tensors of two axes
    pub fn read(
        &self,
        name: &str,
        dtype: DType,
        layout: Layout,
    ) -> Result<TensorData, CheckpointError> {
        self.read_info(name, dtype, layout, |info| info.clone())
    }

    /// Reads some of the rows (the slowest axis) of a tensor, as [`read`](Self::read) does.
    ///
    /// Rows that the tensor does not have are left out.
    pub fn read_rows(
        &self,
        name: &str,
        rows: Range<usize>,
        dtype: DType,
    ) -> Result<TensorData, CheckpointError> {
        self.read_info(name, dtype, Layout::AsStored, |info| info.rows(rows))
    }

    fn read_info(
        &self,
        name: &str,
        dtype: DType,
        layout: Layout,
        part: impl FnOnce(&TensorInfo) -> TensorInfo,
    ) -> Result<TensorData, CheckpointError> {
        let (whole, shard) = self.find(name)?;
        let part = part(whole);
        if let (Some(mapped), Layout::AsStored, None) = (&shard.mapped, layout, &whole.coded)
            && let Some(data) = mapped.tensor(name, whole, &part, dtype)
        {
            return Ok(data);
        }
        let read = || convert::read(&mut self.reader(&part)?, &part, dtype, layout);
        read().map_err(|source| shard.error(name, source))
    }

    /// Delivers the bytes of a tensor.
    pub(crate) fn reader(&self, info: &TensorInfo) -> Result<Box<dyn Read + '_>, TensorError> {
        match &info.coded {
            Some(coded) => coded.open(self, info),
            None => Ok(self.stored(info)?),
        }
    }

    /// Delivers the bytes of a tensor as they are stored.
    pub(crate) fn stored(&self, info: &TensorInfo) -> io::Result<Box<dyn Read>> {
        let shard = self.shards.get(info.shard).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(shard.reader(info)?))
    }

    pub(crate) fn find(&self, name: &str) -> Result<(&TensorInfo, &Shard), CheckpointError> {
        let info = self.tensors.get(name);
        let found = info.and_then(|info| Some((info, self.shards.get(info.shard)?)));
        found.ok_or_else(|| CheckpointError::NoSuchTensor {
            name: name.to_owned(),
        })
    }

    pub(crate) fn empty() -> Self {
        Self {
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            converted_from: None,
        }
    }

    /// A further file; returns its position.
    pub(crate) fn push(&mut self, form: &'static str, file: String, source: Source) -> usize {
        self.shards.push(Shard {
            file,
            form,
            source,
            mapped: None,
        });
        self.shards.len() - 1
    }

    /// Takes in the files of others; returns their tensors.
    pub(crate) fn join(&mut self, others: Self) -> BTreeMap<String, TensorInfo> {
        let mut tensors = others.tensors;
        for info in tensors.values_mut() {
            info.move_shard(self.shards.len());
        }
        self.shards.extend(others.shards);
        tensors
    }

    /// A further tensor; returns one of the same name.
    pub(crate) fn insert(&mut self, name: String, info: TensorInfo) -> Option<TensorInfo> {
        self.tensors.insert(name, info)
    }

    /// Reads one file's header; the caller decides which of its tensors count.
    fn add(
        &mut self,
        folder: &Folder,
        name: &str,
    ) -> Result<Vec<(String, TensorInfo)>, CheckpointError> {
        let source = folder.locate(name)?;
        let file = folder.path_of(name);
        let (form, contents, mapped) = if name.ends_with(".bpk") {
            let mut contents = burnpack::read(&source, &file)?;
            self.converted_from = contents.notes.remove(CONVERTED_FROM);
            let mapped = Mapped::open(&source, &file)?;
            ("Burnpack", contents, mapped)
        } else {
            ("safetensors", header::read(&source, &file)?, None)
        };
        let mut tensors = contents.tensors;
        for (_, info) in &mut tensors {
            info.shard = self.shards.len();
        }
        let assembled = own::assemble(&contents.notes, &mut tensors);
        assembled.map_err(|(name, source)| CheckpointError::Tensor {
            name,
            file: file.clone(),
            source,
        })?;
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        self.shards.push(Shard {
            file,
            form,
            source,
            mapped: mapped.map(Arc::new),
        });
        Ok(tensors)
    }

    fn open_index(folder: &Folder) -> Result<Self, CheckpointError> {
        let file = folder.path_of(INDEX);
        let index: Index = folder.read_json(INDEX, INDEX_MAX_BYTES)?;
        if let Some(key) = index.weight_map.first_duplicate() {
            let key = key.to_owned();
            return Err(CheckpointError::DuplicateKey { file, key });
        }
        let weight_map: BTreeMap<&str, &str> = (index.weight_map.0.iter())
            .map(|(tensor, shard)| (tensor.as_str(), shard.as_str()))
            .collect();
        let names: BTreeSet<&str> = weight_map.values().copied().collect();
        check_shard_names(folder, &file, names.iter().copied())?;
        let mut shards = Self::empty();
        let mut found = Vec::new();
        for shard in names {
            let tensors = shards.add(folder, shard)?;
            found.extend(tensors.into_iter().map(|tensor| (tensor, shard)));
        }
        let stored = found.iter();
        let stored = stored.map(|((tensor, _), shard)| (tensor.as_str(), *shard));
        IndexMismatch::check(file, &weight_map, &stored.collect())
            .map_err(CheckpointError::Index)?;
        shards.tensors = found.into_iter().map(|(tensor, _)| tensor).collect();
        Ok(shards)
    }

    /// Opens shards without an index: all whose names say that they belong together.
    fn open_numbered(folder: &Folder) -> Result<Self, CheckpointError> {
        let names = folder.names().into_iter();
        let found: BTreeSet<Numbered> = names.filter_map(|name| Numbered::parse(&name)).collect();
        let counts: BTreeSet<u32> = found.iter().map(|shard| shard.of).collect();
        let (Some(&of), 1) = (counts.first(), counts.len()) else {
            return Err(CheckpointError::SeveralSets {
                folder: folder.describe(),
                counts: counts.into_iter().collect(),
            });
        };
        let wanted = (1..=of).map(|at| Numbered { of, at });
        let missing = wanted.clone().filter(|shard| !found.contains(shard));
        // A name may claim billions.
        let missing = missing.take(MAX_MISSING).map(|shard| shard.name());
        let missing: Vec<String> = missing.collect();
        if !missing.is_empty() {
            return Err(CheckpointError::MissingShards {
                folder: folder.describe(),
                shards: missing,
                repository: folder.repository(),
            });
        }
        let mut shards = Self::empty();
        for shard in wanted {
            for (tensor, info) in shards.add(folder, &shard.name())? {
                if let Some((key, _)) = shards.tensors.remove_entry(&tensor) {
                    let file = folder.path_of(&shard.name());
                    return Err(CheckpointError::DuplicateKey { file, key });
                }
                shards.tensors.insert(tensor, info);
            }
        }
        Ok(shards)
    }
}

/// Whether a folder's weights are looked for in a file of this name.
pub(crate) fn is_weights_file(name: &str) -> bool {
    [BURNPACK, SINGLE, INDEX].contains(&name) || Numbered::parse(name).is_some()
}

impl Shard {
    /// Delivers the bytes of a tensor.
    fn reader(&self, info: &TensorInfo) -> io::Result<impl Read + use<>> {
        let (mut reader, _) = self.source.open()?;
        reader.seek(SeekFrom::Start(info.offset))?;
        Ok(reader.take(info.bytes))
    }

    pub(crate) fn error(&self, name: &str, source: TensorError) -> CheckpointError {
        CheckpointError::Tensor {
            name: name.to_owned(),
            file: self.file.clone(),
            source,
        }
    }
}

/// Every shard must have an innocent name and exist, before the first one is opened.
fn check_shard_names<'a>(
    folder: &Folder,
    index: &str,
    shards: impl Iterator<Item = &'a str>,
) -> Result<(), CheckpointError> {
    let mut missing = Vec::new();
    for shard in shards {
        if !is_plain_name(shard) || !shard.ends_with(".safetensors") {
            return Err(CheckpointError::ShardName {
                index: index.to_owned(),
                shard: shard.to_owned(),
            });
        }
        if !folder.has(shard) {
            missing.push(shard.to_owned());
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::MissingShards {
        folder: folder.describe(),
        shards: missing,
        repository: folder.repository(),
    })
}

fn no_weights(folder: &Folder) -> CheckpointError {
    let is_pickle = |name: &str| {
        let stem = name.strip_suffix(".bin");
        stem.is_some_and(|stem| stem.starts_with("pytorch_model"))
            || name.ends_with(".pt")
            || name.ends_with(".pth")
    };
    let folder_name = folder.describe();
    match folder.find(is_pickle) {
        Some(file) => CheckpointError::Pickle {
            folder: folder_name,
            file,
        },
        None => CheckpointError::NoWeights {
            folder: folder_name,
            repository: folder.repository(),
        },
    }
}
