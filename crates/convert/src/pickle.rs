//! Weights in PyTorch's files, through `burn-store`, which interprets the pickle's data and runs none
//! of its code.
//!
//! `burn-store` puts zeros where a file lacks bytes, and takes every tensor for contiguous, as those
//! of a saved model are. So the archive is checked first.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use burn_store::TensorSnapshot;
use burn_store::pytorch::PytorchReader;
use checkpoint::{Dtype, Folder, INDEX_MAX_BYTES, NewTensor};
use serde::Deserialize;
use zip::{CompressionMethod, ZipArchive};

use crate::ConvertError;

const SINGLE: &str = "pytorch_model.bin";
const INDEX: &str = "pytorch_model.bin.index.json";
/// No tensor that a model needs is larger; `burn-store` would believe a pickle that says so.
const TENSOR_MAX_BYTES: u64 = 16 << 30;

/// The pickles of one folder. Their data is read on demand.
pub(crate) struct Pickles {
    pub(crate) files: Vec<PathBuf>,
    tensors: BTreeMap<String, (PathBuf, TensorSnapshot)>,
}

#[derive(Deserialize)]
struct Index {
    /// Tensor name → file name.
    weight_map: BTreeMap<String, String>,
}

/// Whether a folder has weights in pickles.
pub(crate) fn has_pickles(folder: &Folder) -> bool {
    folder.has(INDEX) || folder.has(SINGLE)
}

impl Pickles {
    pub(crate) fn open(path: &Path, folder: &Folder) -> Result<Self, ConvertError> {
        let mut names = vec![SINGLE.to_owned()];
        if folder.has(INDEX) {
            let index: Index = folder.read_json(INDEX, INDEX_MAX_BYTES)?;
            names = index.weight_map.into_values().collect();
            names.sort();
            names.dedup();
        }
        let mut pickles = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for name in names {
            let file = path.join(&name);
            if !folder.has(&name) {
                return Err(refuse(&file, "it is not there; finish the download"));
            }
            pickles.add(file)?;
        }
        Ok(pickles)
    }

    fn add(&mut self, file: PathBuf) -> Result<(), ConvertError> {
        let stored_bytes = check_archive(&file)?;
        let reader =
            PytorchReader::new(&file).map_err(|error| refuse(&file, &error.to_string()))?;
        let mut needed_bytes = 0_u64;
        for (name, snapshot) in reader.into_tensors() {
            let tensor = new_tensor(&name, &snapshot);
            let bytes = tensor.and_then(|tensor| tensor.bytes().ok());
            let Some(bytes) = bytes.filter(|&bytes| bytes <= TENSOR_MAX_BYTES) else {
                let problem =
                    format!("tensor {name:?} is too large, or of a type that is not read");
                return Err(refuse(&file, &problem));
            };
            needed_bytes = needed_bytes.saturating_add(bytes);
            if self
                .tensors
                .insert(name.clone(), (file.clone(), snapshot))
                .is_some()
            {
                return Err(ConvertError::Duplicate { name });
            }
        }
        if needed_bytes > stored_bytes {
            let problem = format!(
                "its tensors need {needed_bytes} bytes, it has {stored_bytes}: it lacks some, or \
                 tensors share them; save it as safetensors instead"
            );
            return Err(refuse(&file, &problem));
        }
        self.files.push(file);
        Ok(())
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = NewTensor> {
        let tensors = self.tensors.iter();
        tensors.filter_map(|(name, (_, snapshot))| new_tensor(name, snapshot))
    }

    /// Reads one tensor.
    pub(crate) fn read(&self, name: &str) -> Result<TensorData, ConvertError> {
        let found = self.tensors.get(name);
        let (file, snapshot) = found.ok_or_else(|| refuse(Path::new(name), "no such tensor"))?;
        let data = snapshot.to_data();
        data.map_err(|error| refuse(file, &format!("tensor {name:?}: {error:?}")))
    }
}

fn new_tensor(name: &str, snapshot: &TensorSnapshot) -> Option<NewTensor> {
    let dtype = match snapshot.dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        _ => return None,
    };
    Some(NewTensor {
        name: name.to_owned(),
        dtype,
        shape: snapshot.shape.to_vec(),
    })
}

/// Reads a whole archive and compares its checksums; returns the size of the tensors in it, in bytes.
fn check_archive(path: &Path) -> Result<u64, ConvertError> {
    let file = File::open(path).map_err(ConvertError::io(path))?;
    let damaged = "it is no archive of PyTorch 1.6 or later, or it is cut off; download it again, or \
                   save it with a current PyTorch";
    let archive = ZipArchive::new(BufReader::new(file));
    let mut archive = archive.map_err(|_| refuse(path, damaged))?;
    let mut stored_bytes = 0_u64;
    for at in 0..archive.len() {
        let entry = archive.by_index(at);
        let mut entry = entry.map_err(|error| refuse(path, &error.to_string()))?;
        if entry.compression() != CompressionMethod::Stored {
            return Err(refuse(path, "it is compressed, which PyTorch never does"));
        }
        let read = io::copy(&mut entry, &mut io::sink());
        let bytes = read.map_err(|error| refuse(path, &format!("{error}; download it again")))?;
        if entry.name().contains("/data/") {
            stored_bytes += bytes;
        }
    }
    Ok(stored_bytes)
}

fn refuse(path: &Path, problem: &str) -> ConvertError {
    ConvertError::Pickle {
        path: path.to_path_buf(),
        problem: problem.to_owned(),
    }
}
