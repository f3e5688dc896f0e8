//! Weights in PyTorch's files. `burn-store` interprets the pickle's data and runs none of its code.
//!
//! Its own tensors are read twice into memory, forget strides, and have zeros where bytes are
//! missing. So it is only asked where every tensor lies; the bytes are read block by block from the
//! archive, whose checksums have been compared.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use burn_store::pytorch::pickle_reader::{PickleError, read_pickle};
use reroute_checkpoint::{CheckpointError, Folder, INDEX_MAX_BYTES, IndexMismatch, NewTensor};
use serde::Deserialize;
use zip::{CompressionMethod, ZipArchive};

use crate::ConvertError;
use crate::source::{BLOCK_BYTES, Stamp};

mod opcodes;
mod tensor;

use tensor::Stored;

const SINGLE: &str = "pytorch_model.bin";
const INDEX: &str = "pytorch_model.bin.index.json";
/// Longest pickle that is read, in bytes: it holds names and shapes, data lies beside it.
const PICKLE_MAX_BYTES: u64 = 16 << 20;

/// The pickles of one folder. Their data is read on demand.
pub(crate) struct Pickles {
    pub(crate) files: Vec<Stamp>,
    tensors: BTreeMap<String, Placed>,
}

/// Position of a file, and where a tensor lies in it.
type Placed = (usize, Stored);

#[derive(Deserialize)]
struct Index {
    /// Tensor name → file name.
    weight_map: BTreeMap<String, String>,
}

impl Pickles {
    /// The files that an index lists, which must agree with it, or the only one.
    pub(crate) fn open(path: &Path, folder: &Folder) -> Result<Self, ConvertError> {
        let mut pickles = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        if !folder.has(INDEX) {
            if !folder.has(SINGLE) {
                let problem = format!("it has neither {SINGLE} nor {INDEX}; finish the download");
                return Err(refuse(path, &problem));
            }
            for (name, stored) in pickles.add(folder.path(SINGLE)?)? {
                pickles.insert(name, stored)?;
            }
            return Ok(pickles);
        }
        let index: Index = folder.read_json(INDEX, INDEX_MAX_BYTES)?;
        let listed = index.weight_map.iter();
        let listed: BTreeMap<_, _> = listed.map(|(a, b)| (a.as_str(), b.as_str())).collect();
        let names: BTreeSet<&str> = listed.values().copied().collect();
        // All are there, before the first one is read.
        let files = names.iter().map(|name| folder.path(name));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let mut found = Vec::new();
        for (name, file) in names.into_iter().zip(files) {
            let tensors = pickles.add(file)?.into_iter();
            found.extend(tensors.map(|tensor| (tensor, name)));
        }
        let stored = found
            .iter()
            .map(|((tensor, _), file)| (tensor.as_str(), *file));
        let index = path.join(INDEX).display().to_string();
        IndexMismatch::check(index, &listed, &stored.collect()).map_err(CheckpointError::Index)?;
        for ((name, stored), _) in found {
            pickles.insert(name, stored)?;
        }
        Ok(pickles)
    }

    fn insert(&mut self, name: String, stored: Placed) -> Result<(), ConvertError> {
        match self.tensors.entry(name) {
            Entry::Vacant(entry) => {
                entry.insert(stored);
                Ok(())
            }
            Entry::Occupied(entry) => Err(ConvertError::Duplicate {
                name: entry.key().clone(),
            }),
        }
    }

    /// Reads where the tensors of a file lie.
    fn add(&mut self, file: PathBuf) -> Result<Vec<(String, Placed)>, ConvertError> {
        let refused = |problem: String| refuse(&file, &problem);
        let stamp = Stamp::of(file.clone())?;
        let archive = Archive::open(&file)?;
        let mut pickle = archive.pickle;
        opcodes::check(&mut pickle).map_err(refused)?;
        let root = read_pickle(&mut pickle.as_slice());
        // What is wrong may be quoted in full.
        let short = |error: PickleError| error.to_string().chars().take(200).collect();
        let root = root.map_err(short).map_err(refused)?;
        let mut found = Vec::new();
        tensor::find(&root, "", &archive.storages, &mut found).map_err(refused)?;
        if found.is_empty() {
            return Err(refused("it holds no tensor; is it the model?".to_owned()));
        }
        let at = self.files.len();
        self.files.push(stamp);
        let found = found.into_iter();
        Ok(found.map(|(name, stored)| (name, (at, stored))).collect())
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = NewTensor> {
        let tensors = self.tensors.iter();
        tensors.map(|(name, (_, stored))| NewTensor {
            name: name.clone(),
            dtype: stored.dtype,
            shape: stored.shape.clone(),
        })
    }

    /// Hands on the bytes of a tensor in blocks of whole elements.
    pub(crate) fn for_each_block(
        &self,
        name: &str,
        each: &mut dyn FnMut(&[u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let found = self.tensors.get(name);
        let (file, stored) = found.ok_or_else(|| refuse(Path::new(name), "no such tensor"))?;
        let path = &self.files[*file].path;
        let failed = ConvertError::io(path);
        let mut file = File::open(path).map_err(&failed)?;
        file.seek(SeekFrom::Start(stored.start)).map_err(&failed)?;
        let mut left = stored.bytes;
        let mut block = Vec::new();
        while left > 0 {
            block.resize(left.min(BLOCK_BYTES as u64) as usize, 0);
            file.read_exact(&mut block).map_err(&failed)?;
            left -= block.len() as u64;
            each(&block)?;
        }
        Ok(())
    }
}

/// One file, all checksums of which are right.
struct Archive {
    /// What says which tensors there are.
    pickle: Vec<u8>,
    storages: Storages,
}

/// Key of a storage → first byte in the file, and length.
type Storages = BTreeMap<String, (u64, u64)>;

impl Archive {
    fn open(path: &Path) -> Result<Self, ConvertError> {
        let refused = |problem: &str| refuse(path, problem);
        let file = File::open(path).map_err(ConvertError::io(path))?;
        let archive = ZipArchive::new(BufReader::new(file));
        let mut archive = archive.map_err(|_| {
            refused(
                "it is no archive of PyTorch 1.6 or later, or it is cut off; download it again, or \
                 save it with a current PyTorch",
            )
        })?;
        let (mut pickle, mut storages) = (None, Storages::new());
        let mut unclaimed = path.metadata().map_err(ConvertError::io(path))?.len();
        for at in 0..archive.len() {
            let entry = archive.by_index(at);
            let mut entry = entry.map_err(|error| refused(&error.to_string()))?;
            if entry.compression() != CompressionMethod::Stored {
                return Err(refused("it is compressed, which PyTorch never does"));
            }
            // What is read is bounded by the one, what is noted by the other.
            if entry.compressed_size() != entry.size() {
                return Err(refused("its lengths disagree; do not trust it"));
            }
            let left = unclaimed.checked_sub(entry.size());
            unclaimed = left.ok_or_else(|| refused("its parts overlap; do not trust it"))?;
            // All entries lie in one folder.
            let name = entry.name().split_once('/').map_or("", |(_, name)| name);
            let name = name.to_owned();
            let damaged = |error: io::Error| refused(&format!("{error}; download it again"));
            if name == "data.pkl" || name == "byteorder" {
                let mut content = Vec::new();
                if entry.size() > PICKLE_MAX_BYTES {
                    return Err(refused("its pickle is too long for names and shapes"));
                }
                entry.read_to_end(&mut content).map_err(damaged)?;
                match name.as_str() {
                    "data.pkl" => pickle = Some(content),
                    _ if content.starts_with(b"big") => {
                        return Err(refused("it was saved on a big-endian machine"));
                    }
                    _ => {}
                }
            }
            // The checksum is compared at the end.
            io::copy(&mut entry, &mut io::sink()).map_err(damaged)?;
            if let (Some(key), Some(start)) = (name.strip_prefix("data/"), entry.data_start()) {
                storages.insert(key.to_owned(), (start, entry.size()));
            }
        }
        let pickle = pickle.ok_or_else(|| refused("it has no data.pkl; download it again"))?;
        Ok(Self { pickle, storages })
    }
}

fn refuse(path: &Path, problem: &str) -> ConvertError {
    ConvertError::Pickle {
        path: path.to_path_buf(),
        problem: problem.to_owned(),
    }
}
