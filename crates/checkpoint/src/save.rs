//! Writing the parameters of a module as a checkpoint folder.

mod error;
mod staging;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{BasicOps, DType, Int, Tensor};
use safetensors::Dtype;
use serde_json::Value;

pub use self::error::SaveError;
use self::staging::Staging;
use crate::convert::BLOCK_BYTES;
use crate::inventory::{InCodes, Path as ModulePath, inventory, inventory_with};
use crate::plan::plan;
use crate::shards::is_weights_file;
use crate::{
    CONFIG, CONFIG_MAX_BYTES, CheckpointError, CodeFormat, Companions, Folder, Format, INDEX,
    Layout, NameTable, Narrow, NewTensor, Shards, TOKENIZER_MAX_BYTES, TensorInfo, WeightsFile,
    burnpack, coded_tensor, codes_note, forget_quantization, is_weight, json_bytes, set_codes,
    set_dtype, shard_index, shard_name, split,
};

/// Most numbers that are copied from a device at a time (8 MiB in f32), or one row of a tensor.
const COPIED: usize = 2 << 20;

/// A module and how it is written: in the layout of Hugging Face, as transformers and [`load_into`]
/// read it.
///
/// [`load_into`]: crate::load_into
pub struct Save<'a, M> {
    /// What is written.
    pub module: &'a M,
    /// A module as the `config.json` of `like` describes it; its parameters are not touched.
    pub described: &'a M,
    /// The names that a checkpoint may use.
    pub table: &'a NameTable,
    /// The name to write for the parameter at a path of the module.
    pub file_name: &'a dyn Fn(&str) -> Option<String>,
    /// How the modules named `Linear` keep their weight.
    pub linear: Layout,
    /// The checkpoint that all but the parameters is copied from: `config.json`, tokenizer, templates, and
    /// what its weights hold for others that no such module needs ([`NameTable::ignore`]), as the norm behind
    /// the last layer of a vision tower.
    pub like: &'a Folder,
    /// Weights that are in codes of fewer bits, by path: their format and columns. They are written as
    /// [`coded_tensor`] lays them out.
    pub codes: BTreeMap<String, (CodeFormat, usize)>,
    /// Type of all other weights: F32, F16 or BF16.
    pub dtype: DType,
    /// Largest file of weights, in bytes of data; one larger tensor is a file, too.
    pub max_shard_bytes: u64,
}

/// What has been written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Saved {
    /// Names of the files of weights, in order.
    pub files: Vec<String>,
    /// Length of these files, in bytes.
    pub bytes: u64,
    /// Small files of the folder that it was saved like which are too large to be any, and not copied.
    pub left_out: Vec<String>,
}

/// A tensor of `like` that no parameter stands for.
struct Carried {
    stored_name: String,
    from: Dtype,
}

/// What files say of the codes of a tensor, by its name.
type Notes = BTreeMap<String, (String, String)>;

/// One file of weights.
struct NewFile {
    name: String,
    tensors: Vec<NewTensor>,
    layout: WeightsFile,
}

impl<M> Save<'_, M> {
    /// Writes the folder beside `to` and puts it there when all of it is on the disk.
    ///
    /// What is at `to` must be a checkpoint of which every file has a successor, and is there until then:
    /// whatever fails, and whenever the process is killed, `to` is the old checkpoint or the new one, whole.
    /// Two folders change places in one step on Linux and macOS; where a file system cannot, a process that
    /// is killed between two renames leaves the old one beside it, and the next save puts it back. What a
    /// killed process has left (`.NAME.partial-…`) is removed by the next save to the same place.
    ///
    /// `to` may be `like`, and it may be where the module came from: a file that is mapped lives on until it is
    /// used no more (where a system does not allow that, it refuses, and nothing has changed).
    ///
    /// Parameters are copied from their device a few rows at a time: memory does not grow with the model. A
    /// list of parameters is one tensor, as when it is loaded. Numbers are rounded to the nearest, ties to
    /// even.
    ///
    /// # Errors
    /// [`SaveError::OtherModel`] with the name or path of each parameter that does not belong to what `like`
    /// describes; [`SaveError::Overflow`] for a finite value that the type asked for does not have.
    pub fn write<B: Backend>(&self, to: &Path) -> Result<Saved, SaveError>
    where
        M: Module<B>,
    {
        let dtype = burnpack::stored_dtype(self.dtype);
        let dtype = dtype.filter(|dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16));
        let dtype = dtype.ok_or(SaveError::Dtype { dtype: self.dtype })?;
        let weights = weights_of(self.like)?;
        let (tensors, carried, notes) = self.tensors::<B>(weights.as_ref(), dtype)?;
        let files = self.files(tensors, &notes)?;
        let companions = self.like.companions()?;
        let small = self.small_files(&companions, &files, dtype)?;
        let bytes = files.iter().map(|file| file.layout.bytes).sum();
        let small_bytes: usize = small.values().map(Vec::len).sum();
        let replaces = |name: &str| small.contains_key(name) || is_weights_file(name);
        let staging = Staging::begin(to, bytes + small_bytes as u64, &replaces)?;
        for (name, content) in &small {
            staging.put(name, content)?;
        }
        let names = files.iter().map(|file| file.name.clone()).collect();
        let mut writer = Writer {
            file_name: self.file_name,
            linear: self.linear,
            codes: &self.codes,
            files: FileWriter::new(&staging, dtype, files),
            path: ModulePath::default(),
            failure: None,
        };
        self.module.visit(&mut writer);
        let mut files = writer.failure.map_or(Ok(writer.files), Err)?;
        if let Some(weights) = &weights {
            for tensor in carried {
                files.carry(weights, &tensor)?;
            }
        }
        files.finish()?;
        Shards::open(&Folder::open(staging.path())?)?; // Every file is as long as its header says.
        staging.finish()?;
        Ok(Saved {
            files: names,
            bytes,
            left_out: companions.too_large,
        })
    }

    /// Name and content of everything but the weights.
    fn small_files(
        &self,
        companions: &Companions,
        files: &[NewFile],
        dtype: Dtype,
    ) -> Result<BTreeMap<String, Vec<u8>>, SaveError> {
        let mut small = BTreeMap::new();
        for name in &companions.names {
            small.insert(name.clone(), self.like.read(name, TOKENIZER_MAX_BYTES)?);
        }
        if files.len() > 1 {
            let shards = files.iter();
            let shards = shards.map(|file| (file.name.as_str(), &file.tensors[..]));
            small.insert(INDEX.to_owned(), shard_index(shards));
        }
        let mut config: Value = self.like.read_json(CONFIG, CONFIG_MAX_BYTES)?;
        set_dtype(&mut config, dtype);
        forget_quantization(&mut config);
        let formats = self.codes.values().map(|(format, _)| *format);
        set_codes(&mut config, formats.collect());
        small.insert(CONFIG.to_owned(), json_bytes(&config));
        Ok(small)
    }

    /// Everything that will be written, in order: parameters, then what is carried over; and what is said of
    /// codes.
    fn tensors<B: Backend>(
        &self,
        weights: Option<&Shards>,
        dtype: Dtype,
    ) -> Result<(Vec<NewTensor>, Vec<Carried>, Notes), SaveError>
    where
        M: Module<B>,
    {
        let mut tensors = Vec::new();
        let mut nameless = Vec::new();
        let (mut coded, mut notes) = (Vec::new(), Notes::new());
        for (path, parameter) in inventory_with(self.module, self.linear, &self.codes) {
            let Some(name) = (self.file_name)(&path) else {
                nameless.push(path);
                continue;
            };
            if let Some(&(format, columns)) = self.codes.get(&path) {
                let Some(codes) = coded_tensor(&name, format, [parameter.shape[0], columns]) else {
                    nameless.push(path);
                    continue;
                };
                coded.push((tensors.len(), codes));
                notes.insert(name.clone(), codes_note(&name, format, columns));
            }
            tensors.push(NewTensor {
                name,
                dtype,
                shape: parameter.shape,
            });
        }
        let mut names: BTreeSet<String> =
            tensors.iter().map(|tensor| tensor.name.clone()).collect();
        let mut carried = Vec::new();
        for stored_name in weights.into_iter().flat_map(Shards::names) {
            let info = weights.and_then(|weights| weights.info(stored_name));
            let info = info.filter(|info| is_weight(info.dtype));
            let (Some(info), true) = (info, self.table.ignores(stored_name)) else {
                continue;
            };
            let name = self.spelling(stored_name);
            if names.insert(name.clone()) {
                carried.push(Carried {
                    stored_name: stored_name.to_owned(),
                    from: info.dtype,
                });
                tensors.push(NewTensor {
                    name,
                    dtype,
                    shape: info.shape.clone(),
                });
            }
        }
        self.check::<B>(&tensors, nameless)?;
        for (at, codes) in coded {
            tensors[at] = codes;
        }
        Ok((tensors, carried, notes))
    }

    /// What a tensor that no parameter stands for is called beside the names that are written.
    fn spelling(&self, stored_name: &str) -> String {
        let path = self.table.module_path(stored_name);
        let name = path.and_then(|path| (self.file_name)(&path));
        let name = name.filter(|name| self.table.ignores(name));
        name.unwrap_or_else(|| stored_name.to_owned())
    }

    /// What will be written must fit the model that `like` describes, as if it were loaded.
    fn check<B: Backend>(
        &self,
        tensors: &[NewTensor],
        nameless: Vec<String>,
    ) -> Result<(), SaveError>
    where
        M: Module<B>,
    {
        let mut infos = BTreeMap::new();
        for tensor in tensors {
            let info = TensorInfo {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                bytes: tensor.bytes()?,
                shard: 0,
                offset: 0,
                coded: None,
            };
            infos.insert(tensor.name.clone(), info);
        }
        let expected = inventory(self.described, self.linear).into_iter().collect();
        let mismatch = plan(&expected, &infos, self.table, &[]).err();
        let mut mismatch = mismatch.unwrap_or_default();
        mismatch.unknown.extend(nameless);
        if mismatch.is_empty() {
            return Ok(());
        }
        Err(SaveError::OtherModel {
            like: self.like.describe(),
            mismatch: Box::new(mismatch),
        })
    }

    fn files(&self, tensors: Vec<NewTensor>, notes: &Notes) -> Result<Vec<NewFile>, SaveError> {
        let groups = split(tensors, self.max_shard_bytes, NewTensor::bytes)?;
        let count = groups.len();
        let file = |(at, tensors): (usize, Vec<NewTensor>)| {
            let notes = tensors.iter().filter_map(|tensor| notes.get(&tensor.name));
            let notes = notes.cloned().collect();
            Ok(NewFile {
                name: shard_name(at, count),
                layout: WeightsFile::with_notes(Format::Safetensors, &tensors, &notes)?,
                tensors,
            })
        };
        groups.into_iter().enumerate().map(file).collect()
    }
}

/// The weights of a folder, if it has any that are read.
fn weights_of(folder: &Folder) -> Result<Option<Shards>, SaveError> {
    match Shards::open(folder) {
        Ok(shards) => Ok(Some(shards)),
        Err(CheckpointError::NoWeights { .. } | CheckpointError::Pickle { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes one parameter after the other. After a failure it does nothing.
struct Writer<'a> {
    file_name: &'a dyn Fn(&str) -> Option<String>,
    linear: Layout,
    codes: &'a InCodes,
    files: FileWriter<'a>,
    path: ModulePath,
    failure: Option<SaveError>,
}

impl<B: Backend> ModuleVisitor<B> for Writer<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.leave();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.failure.is_none() {
            self.failure = self.write(param).err();
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<B, D, Int>>) {
        let is_codes = self.codes.contains_key(&self.path.parameter().0);
        if self.failure.is_none() && is_codes {
            self.failure = self.write_codes(param.val()).err();
        }
    }
}

impl Writer<'_> {
    /// What the current parameter is called.
    fn name(&self) -> String {
        let (path, _) = self.path.parameter();
        (self.file_name)(&path).unwrap_or(path)
    }

    fn write<B: Backend, const D: usize>(
        &mut self,
        param: &Param<Tensor<B, D>>,
    ) -> Result<(), SaveError> {
        let name = self.name();
        let tensor = param.transform_for_save().val();
        let tensor = match self.path.layout(self.linear) {
            Layout::AsStored => tensor,
            Layout::Transposed => tensor.transpose(),
        };
        let dtype = tensor.dtype();
        let stored = burnpack::stored_dtype(dtype).filter(|stored| is_weight(*stored));
        let Some(stored) = stored else {
            return Err(SaveError::Elements { name, dtype });
        };
        let types = (stored, self.files.dtype);
        self.copy(&name, tensor, types)
    }

    fn write_codes<B: Backend, const D: usize>(
        &mut self,
        words: Tensor<B, D, Int>,
    ) -> Result<(), SaveError> {
        let (name, dtype) = (self.name(), words.dtype());
        match dtype {
            // Their bytes are what is written.
            DType::I32 => self.copy(&name, words, (Dtype::U8, Dtype::U8)),
            _ => Err(SaveError::Elements { name, dtype }),
        }
    }

    /// Writes a tensor, a few rows at a time, from elements of one type to those of another.
    fn copy<B: Backend, const D: usize, K: BasicOps<B>>(
        &mut self,
        name: &str,
        tensor: Tensor<B, D, K>,
        types: (Dtype, Dtype),
    ) -> Result<(), SaveError> {
        let (height, elements) = (tensor.dims()[0], tensor.shape().num_elements());
        let row = (elements / height.max(1)).max(1);
        let rows = (COPIED / row).clamp(1, height.max(1));
        self.files.write(name, types, |each| {
            for first in (0..height).step_by(rows) {
                let part = tensor.clone().narrow(0, first, rows.min(height - first));
                let data = part.try_into_data().map_err(|error| SaveError::Device {
                    name: name.to_owned(),
                    problem: error.to_string(),
                })?;
                data.as_bytes()
                    .chunks(BLOCK_BYTES)
                    .try_for_each(&mut *each)?;
            }
            Ok(())
        })
    }
}

/// Writes tensor behind tensor, file after file.
struct FileWriter<'a> {
    staging: &'a Staging<'a>,
    dtype: Dtype,
    /// Those that have not been begun.
    waiting: std::vec::IntoIter<NewFile>,
    /// The last one that has.
    open: Option<(PathBuf, File)>,
    /// Bytes that it lacks.
    left: u64,
}

impl<'a> FileWriter<'a> {
    fn new(staging: &'a Staging<'a>, dtype: Dtype, files: Vec<NewFile>) -> Self {
        Self {
            staging,
            dtype,
            waiting: files.into_iter(),
            open: None,
            left: 0,
        }
    }

    /// Writes the next tensor, which `stream` hands on in blocks of whole elements.
    fn write(
        &mut self,
        name: &str,
        (from, dtype): (Dtype, Dtype),
        stream: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), SaveError>) -> Result<(), SaveError>,
    ) -> Result<(), SaveError> {
        let mut narrow = Narrow::new(from, dtype);
        let mut buffer = Vec::new();
        stream(&mut |block| self.append(narrow.block(block, &mut buffer)))?;
        match narrow.overflows {
            0 => Ok(()),
            values => Err(SaveError::Overflow {
                name: name.to_owned(),
                values,
                dtype,
            }),
        }
    }

    fn carry(&mut self, weights: &Shards, tensor: &Carried) -> Result<(), SaveError> {
        let name = &tensor.stored_name;
        self.write(name, (tensor.from, self.dtype), |each| {
            weights.for_each_block(name, each)
        })
    }

    fn append(&mut self, block: &[u8]) -> Result<(), SaveError> {
        if self.left == 0 {
            self.next()?;
        }
        if let Some((path, file)) = &mut self.open {
            let written = file.write_all(block);
            written.map_err(self.staging.failed(path))?;
        }
        self.left = self.left.saturating_sub(block.len() as u64);
        Ok(())
    }

    /// Ends a file and begins the one behind it, if there is one.
    fn next(&mut self) -> Result<bool, SaveError> {
        if let Some((path, file)) = self.open.take() {
            file.sync_all().map_err(self.staging.failed(&path))?;
        }
        let Some(NewFile { name, layout, .. }) = self.waiting.next() else {
            return Ok(false);
        };
        let mut file = self.staging.create(&name)?;
        let path = self.staging.path().join(name);
        let header = &layout.header;
        file.write_all(header).map_err(self.staging.failed(&path))?;
        self.left = layout.bytes - header.len() as u64;
        self.open = Some((path, file));
        Ok(true)
    }

    /// Ends the last file; those behind it hold nothing.
    fn finish(mut self) -> Result<(), SaveError> {
        while self.next()? {}
        Ok(())
    }
}
