//! Where a run stands, on the disk: what is trained, the moments of the optimizer, and the step.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::Optimizer;
use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Tensor, TensorData};
use reroute_zoo::Model;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::trainer::diverged;
use crate::{TuneError, host};

const TRAINED: &str = "trained.safetensors";
const MOMENTS: &str = "optimizer.bin";
const PROGRESS: &str = "progress.json";
/// What is trained, at its best.
const BEST: &str = "best.safetensors";
/// What the folder of a checkpoint is called, before its step.
const PREFIX: &str = "checkpoint-";
/// And behind it, if the model was measured there.
const VALIDATED: &str = "-validated";
/// Checkpoints that are kept.
const KEPT: usize = 2;

type Moments = BinBytesRecorder<FullPrecisionSettings>;

/// How far a run is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Steps that are done.
    pub(crate) step: usize,
    /// Those that were done at the last validation.
    pub(crate) validated: usize,
    /// The best loss of a validation, and its step.
    pub(crate) best: Option<(f64, usize)>,
    /// SHA-256 of what was trained then.
    pub(crate) best_checksum: String,
    /// Validations since then.
    pub(crate) without_better: usize,
    /// By what the optimizer knows parameters.
    ids: BTreeMap<String, String>,
    /// SHA-256 of the files beside it.
    checksums: BTreeMap<String, String>,
}

/// Writes a checkpoint; one that is half written has another name. Of older ones the last stays.
pub(crate) fn save<B: AutodiffBackend, O: Optimizer<Model<B>, B>>(
    folder: &Path,
    model: &Model<B>,
    optimizer: &O,
    progress: &Progress,
) -> Result<PathBuf, TuneError> {
    let mut name = format!("{PREFIX}{}", progress.step);
    if progress.validated == progress.step {
        name.push_str(VALIDATED);
    }
    let (unfinished, to) = (folder.join(format!(".{name}.partial")), folder.join(name));
    // The same step is the same, unless a kill or a hand has spoilt it.
    if to.exists() && read(&to).is_ok() {
        return Ok(to);
    }
    let values = Values::of(model)?;
    if !values.are_finite() {
        return Err(diverged("model", progress.step, f64::NAN));
    }
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(TuneError::io(&unfinished))?;
    }
    fs::create_dir_all(&unfinished).map_err(TuneError::io(&unfinished))?;
    let broken = |reason: String| TuneError::Checkpoint {
        path: to.clone(),
        reason,
    };
    let moments = Moments::default().record(optimizer.to_record(), ());
    let moments = moments.map_err(|error| broken(error.to_string()))?;
    let mut progress = progress.clone();
    progress.ids = values.ids();
    for (file, bytes) in [
        (TRAINED, values.bytes().map_err(broken)?),
        (MOMENTS, moments),
    ] {
        put(&unfinished.join(file), &bytes)?;
        progress.checksums.insert(file.into(), checksum(&bytes));
    }
    let described = serde_json::to_vec_pretty(&progress);
    let described = described.map_err(|error| broken(error.to_string()))?;
    put(&unfinished.join(PROGRESS), &described)?;
    if to.exists() {
        fs::remove_dir_all(&to).map_err(TuneError::io(&to))?;
    }
    fs::rename(&unfinished, &to).map_err(TuneError::io(&to))?;
    sync(folder)?;
    for old in all(folder)?.into_values().rev().skip(KEPT) {
        fs::remove_dir_all(&old).map_err(TuneError::io(&old))?;
    }
    Ok(to)
}

/// The last checkpoint whose files are what they were, in a model and an optimizer; the others as they are if
/// there is none.
pub(crate) fn resume<B: AutodiffBackend, O: Optimizer<Model<B>, B>>(
    folder: &Path,
    model: Model<B>,
    optimizer: O,
    device: &B::Device,
) -> Result<(Model<B>, O, Progress), TuneError> {
    let mut why = None;
    for path in all(folder)?.into_values().rev() {
        match read(&path) {
            Ok((progress, trained, moments)) => {
                let broken = |reason: String| TuneError::Checkpoint {
                    path: path.clone(),
                    reason,
                };
                let model = Values::into(model, &trained, &progress.ids).map_err(broken)?;
                let record = Moments::default().load(moments, device);
                let record = record.map_err(|error| broken(error.to_string()))?;
                return Ok((model, optimizer.load_record(record), progress));
            }
            Err(error) => {
                why.get_or_insert(error);
            }
        }
    }
    match why {
        Some(error) => Err(error),
        None => Ok((model, optimizer, Progress::default())),
    }
}

/// Keeps what is trained as the best so far; returns its SHA-256.
pub(crate) fn keep_best<B: Backend>(folder: &Path, model: &Model<B>) -> Result<String, TuneError> {
    let to = folder.join(BEST);
    let bytes = Values::of(model)?.bytes();
    let bytes = bytes.map_err(|reason| TuneError::Checkpoint {
        path: to.clone(),
        reason,
    })?;
    let partial = folder.join(format!(".{BEST}.partial"));
    put(&partial, &bytes)?;
    fs::rename(&partial, &to).map_err(TuneError::io(&to))?;
    sync(folder)?;
    Ok(checksum(&bytes))
}

/// The model as it was at its best.
pub(crate) fn best<B: Backend>(
    folder: &Path,
    model: Model<B>,
    progress: &Progress,
) -> Result<Model<B>, TuneError> {
    let lost = |reason: String| TuneError::Best {
        path: folder.join(BEST),
        reason,
    };
    let bytes = fs::read(folder.join(BEST)).map_err(|error| lost(error.to_string()))?;
    if progress.best_checksum != checksum(&bytes) {
        return Err(lost("it is not what was written".into()));
    }
    let ids = Values::of(&model)?.ids();
    Values::into(model, &bytes, &ids).map_err(lost)
}

/// SHA-256 of all that is trained.
pub(crate) fn trained<B: Backend>(model: &Model<B>) -> Result<String, TuneError> {
    let mut digest = Sha256::new();
    for (path, _, data) in Values::of(model)?.found {
        digest.update(path);
        digest.update(data.as_bytes());
    }
    Ok(hex(&digest.finalize()))
}

/// Whether there is a checkpoint.
pub(crate) fn has_any(folder: &Path) -> Result<bool, TuneError> {
    Ok(!all(folder)?.is_empty())
}

/// Tells a model from others: SHA-256 of the first numbers of every parameter in floats.
pub(crate) fn fingerprint<B: Backend>(model: &Model<B>) -> Result<String, TuneError> {
    let mut first = First::default();
    model.visit(&mut first);
    match first.failed {
        Some(error) => Err(error),
        None => Ok(checksum(&first.bytes)),
    }
}

/// Checkpoints by their steps, those that were measured behind those of the same step that were not.
fn all(folder: &Path) -> Result<BTreeMap<(usize, bool), PathBuf>, TuneError> {
    let entries = fs::read_dir(folder).map_err(TuneError::io(folder))?;
    let step = |path: &Path| {
        let name = path.file_name()?.to_str()?.strip_prefix(PREFIX)?;
        match name.strip_suffix(VALIDATED) {
            Some(step) => Some((step.parse().ok()?, true)),
            None => Some((name.parse().ok()?, false)),
        }
    };
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths
        .filter_map(|path| Some((step(&path)?, path)))
        .collect())
}

/// The files of a checkpoint.
fn read(path: &Path) -> Result<(Progress, Vec<u8>, Vec<u8>), TuneError> {
    let broken = |reason: String| TuneError::Checkpoint {
        path: path.to_owned(),
        reason,
    };
    let file = |name: &str| {
        let read = fs::read(path.join(name));
        read.map_err(|error| broken(format!("{name}: {error}")))
    };
    let progress = serde_json::from_slice::<Progress>(&file(PROGRESS)?);
    let progress = progress.map_err(|error| broken(error.to_string()))?;
    let checked = |name: &str| {
        let bytes = file(name)?;
        match progress.checksums.get(name) == Some(&checksum(&bytes)) {
            true => Ok(bytes),
            false => Err(broken(format!("{name} is not what was written"))),
        }
    };
    let (trained, moments) = (checked(TRAINED)?, checked(MOMENTS)?);
    Ok((progress, trained, moments))
}

fn checksum(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes as people write them.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a file to the disk.
fn put(path: &Path, bytes: &[u8]) -> Result<(), TuneError> {
    let mut file = File::create(path).map_err(TuneError::io(path))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.map_err(TuneError::io(path))
}

/// What a folder is called to the disk, where folders can be synced.
fn sync(folder: &Path) -> Result<(), TuneError> {
    match cfg!(unix) {
        true => File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(TuneError::io(folder)),
        false => Ok(()),
    }
}

/// What is trained, by path.
#[derive(Default)]
pub(crate) struct Values {
    path: Vec<String>,
    found: Vec<(String, ParamId, TensorData)>,
    failed: Option<TuneError>,
}

impl Values {
    fn of<B: Backend>(model: &Model<B>) -> Result<Self, TuneError> {
        let mut values = Self::default();
        model.visit(&mut values);
        match values.failed.take() {
            Some(error) => Err(error),
            None => Ok(values),
        }
    }

    fn are_finite(&self) -> bool {
        let all = self.found.iter();
        { all }.all(|(_, _, data)| data.iter::<f32>().all(f32::is_finite))
    }

    fn ids(&self) -> BTreeMap<String, String> {
        let ids = self.found.iter();
        ids.map(|(path, id, _)| (path.clone(), id.serialize()))
            .collect()
    }

    fn bytes(&self) -> Result<Vec<u8>, String> {
        let mut views = Vec::new();
        for (path, _, data) in &self.found {
            let shape = data.shape.iter().copied().collect();
            let view = TensorView::new(safetensors::Dtype::F32, shape, data.as_bytes());
            views.push((path.clone(), view.map_err(|error| error.to_string())?));
        }
        safetensors::serialize(views, None).map_err(|error| error.to_string())
    }

    /// The model with values that were saved, under the ids that they had.
    fn into<B: Backend>(
        model: Model<B>,
        bytes: &[u8],
        ids: &BTreeMap<String, String>,
    ) -> Result<Model<B>, String> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
        let mut put = Put {
            path: Vec::new(),
            tensors,
            ids,
            wrong: None,
        };
        let model = model.map(&mut put);
        match put.wrong {
            Some(path) => Err(format!("{path} is not in it in the shape that it has now")),
            None => Ok(model),
        }
    }
}

impl<B: Backend> ModuleVisitor<B> for Values {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.is_require_grad() {
            match host::data(param.val()) {
                Ok(data) => self.found.push((self.path.join("."), param.id, data)),
                Err(error) => {
                    self.failed.get_or_insert(error);
                }
            }
        }
    }
}

struct Put<'a> {
    path: Vec<String>,
    tensors: SafeTensors<'a>,
    ids: &'a BTreeMap<String, String>,
    wrong: Option<String>,
}

impl<B: Backend> ModuleMapper<B> for Put<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if !param.is_require_grad() {
            return param;
        }
        let path = self.path.join(".");
        let saved = self.tensors.tensor(&path).ok();
        let id = self
            .ids
            .get(&path)
            .and_then(|id| ParamId::try_deserialize(id));
        let value = param.val();
        let (shape, device) = (value.dims(), value.device());
        match (saved.filter(|saved| saved.shape() == shape), id) {
            (Some(saved), Some(id)) => {
                let numbers = saved.data().as_chunks().0.iter();
                let numbers: Vec<f32> = numbers.map(|&bytes| f32::from_le_bytes(bytes)).collect();
                let data = TensorData::new(numbers, shape);
                let value = Tensor::from_data(data, (&device, DType::F32));
                Param::initialized(id, value.require_grad())
            }
            _ => {
                self.wrong.get_or_insert(path);
                param
            }
        }
    }
}

/// The first numbers of every parameter.
#[derive(Default)]
struct First {
    bytes: Vec<u8>,
    failed: Option<TuneError>,
}

/// Of a parameter.
const FIRST: usize = 64;

impl<B: Backend> ModuleVisitor<B> for First {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let value = param.val().detach();
        let count = value.shape().num_elements();
        let first = value.reshape([count]).narrow(0, 0, count.min(FIRST));
        match host::data(first) {
            Ok(data) => self.bytes.extend(data.as_bytes()),
            Err(error) => {
                self.failed.get_or_insert(error);
            }
        }
    }
}
