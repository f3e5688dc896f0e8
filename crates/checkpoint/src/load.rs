//! Filling a module with the weights of a checkpoint.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reroute_kernels::Format;

use crate::codes::StoredCodes;
use crate::inventory::{Path, inventory};
use crate::mismatch::ModuleMismatch;
use crate::plan::{Assignment, plan};
use crate::{CheckpointError, Layout, NameTable, Shards};

/// How weights are loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Element type of the loaded parameters: F32, F16 or BF16, whatever the files hold.
    pub dtype: DType,
    /// How the modules named `Linear` keep their weight.
    pub linear: Layout,
    /// Patterns (see [`crate::Rule`]) of module paths that a checkpoint may hold though this module
    /// has no such parameter: the head of a model with tied embeddings, layers that are cut off.
    pub unused: Vec<String>,
}

impl LoadOptions {
    /// Weights as they lie in the files, all of them used.
    pub fn new(dtype: DType) -> Self {
        Self {
            dtype,
            linear: Layout::AsStored,
            unused: Vec::new(),
        }
    }
}

/// How far loading has come, counted in bytes of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Read so far.
    pub loaded_bytes: u64,
    /// To be read in all.
    pub total_bytes: u64,
}

/// Loads every float parameter of a module, on the device on which the module was made.
///
/// A list of parameters is one tensor of the checkpoint in blocks of rows (its slowest axis): a
/// module can keep in pieces what is too large for its device in one.
///
/// Names, shapes and dtypes are compared first, and all that does not fit is reported in one
/// [`CheckpointError::Module`]; no weight has been read then. Parameters are never initialised, so
/// a module that comes fresh from its config costs no memory before its weights arrive.
/// `progress` is called after each tensor; breaking stops, with [`CheckpointError::Stopped`].
pub fn load_into<B: Backend, M: Module<B>>(
    module: M,
    shards: &Shards,
    table: &NameTable,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
) -> Result<M, CheckpointError> {
    Loading::begin(&module, shards, table, options, progress)?.fill(module)
}

/// Which tensor goes to which parameter, by path.
pub(crate) type Parts = BTreeMap<String, Assignment>;

/// Puts tensors in the place of the parameters that they are assigned to; others stay.
pub(crate) fn put<B: Backend, M: Module<B>>(
    module: M,
    shards: &Shards,
    plan: Parts,
    dtype: DType,
    progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
) -> Result<M, CheckpointError> {
    Loading::new(shards, plan, dtype, progress).fill(module)
}

/// [`load_into`] in steps, for modules of which some weights stay in fewer bits.
pub struct Loading<'a> {
    shards: &'a Shards,
    dtype: DType,
    /// Keys are module paths.
    plan: Parts,
    loaded_bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
}

impl<'a> Loading<'a> {
    /// Compares names, shapes and dtypes; no weight is read.
    pub fn begin<B: Backend, M: Module<B>>(
        module: &M,
        shards: &'a Shards,
        table: &NameTable,
        options: &LoadOptions,
        progress: &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self, CheckpointError> {
        let plan = assign(module, shards, table, options)?;
        Ok(Self::new(shards, plan, options.dtype, progress))
    }

    fn new(
        shards: &'a Shards,
        plan: Parts,
        dtype: DType,
        progress: &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Self {
        Self {
            shards,
            dtype,
            loaded_bytes: 0,
            total_bytes: plan.values().map(|tensor| tensor.bytes).sum(),
            plan,
            progress,
        }
    }

    /// What `make` makes of the weight at a path, in blocks of so many rows, in fewer bits; [`fill`](Self::fill)
    /// leaves that parameter alone then. `None`, and it is loaded as floats, if it makes nothing, or the file
    /// does not have it in a format that can stay and no other is asked for.
    pub fn codes<T>(
        &mut self,
        path: &str,
        heights: &[usize],
        format: Option<Format>,
        mut make: impl FnMut(StoredCodes) -> Option<T>,
    ) -> Result<Option<Vec<T>>, CheckpointError> {
        let tensor = self.plan.get(path);
        let Some(tensor) = tensor.filter(|tensor| tensor.layout == Layout::AsStored) else {
            return Ok(None);
        };
        let mut made = Vec::with_capacity(heights.len());
        let mut first = 0;
        for height in heights {
            let rows = first..first + height;
            first = rows.end;
            let codes = match format {
                Some(format) => self.shards.codes_as(&tensor.name, rows, format)?,
                None => self.shards.stored_codes(&tensor.name, rows)?,
            };
            match codes.and_then(&mut make) {
                Some(block) => made.push(block),
                None => return Ok(None),
            }
        }
        let bytes = tensor.bytes;
        self.plan.remove(path);
        self.advance(bytes)?;
        Ok(Some(made))
    }

    /// Loads everything else.
    pub fn fill<B: Backend, M: Module<B>>(self, module: M) -> Result<M, CheckpointError> {
        let mut loader = Loader {
            loading: self,
            path: Path::default(),
            failure: None,
        };
        let module = module.map(&mut loader);
        match loader.failure {
            None => Ok(module),
            Some(error) => Err(error),
        }
    }

    fn advance(&mut self, bytes: u64) -> Result<(), CheckpointError> {
        self.loaded_bytes += bytes;
        let progress = LoadProgress {
            loaded_bytes: self.loaded_bytes,
            total_bytes: self.total_bytes,
        };
        match (self.progress)(progress).is_break() {
            true => Err(CheckpointError::Stopped),
            false => Ok(()),
        }
    }
}

/// Compares a module and a checkpoint as [`load_into`] does first, and reads no weight.
pub fn check_fit<B: Backend, M: Module<B>>(
    module: &M,
    shards: &Shards,
    table: &NameTable,
    options: &LoadOptions,
) -> Result<(), CheckpointError> {
    assign(module, shards, table, options).map(drop)
}

/// Compares tensors with the parameters, by path, that they are to take the place of. Of `modules`, the ends
/// of names, nothing may be missing.
pub(crate) fn assign_parts<B: Backend, M: Module<B>>(
    module: &M,
    shards: &Shards,
    parts: &[(String, String)],
    modules: &[String],
) -> Result<Parts, ModuleMismatch> {
    let expected: BTreeMap<_, _> = inventory(module, Layout::AsStored).into_iter().collect();
    let mut mismatch = ModuleMismatch::default();
    let mut assigned = Parts::new();
    for (path, tensor) in parts {
        match (expected.get(path), shards.tensors().get(tensor)) {
            (Some(parameter), Some(info)) => {
                let assignment = Assignment::new(tensor, info, parameter, &mut mismatch);
                assigned.insert(path.clone(), assignment);
            }
            _ => mismatch.unknown.push(tensor.clone()),
        }
    }
    for (path, _) in parts {
        for module in modules.iter().filter_map(|module| below(module, path)) {
            let missing = expected.keys().filter(|path| path.starts_with(&module));
            let missing = missing.filter(|path| !assigned.contains_key(*path));
            mismatch.missing.extend(missing.cloned());
        }
    }
    mismatch.missing.sort();
    mismatch.missing.dedup();
    match mismatch.is_empty() {
        true => Ok(assigned),
        false => Err(mismatch),
    }
}

/// What all paths begin with that are below the module, called by the end of its name, in which a path is.
fn below(module: &str, path: &str) -> Option<String> {
    let last = module.rsplit('.').next()?;
    let segments: Vec<&str> = path.split('.').collect();
    let at = segments.iter().position(|segment| *segment == last)?;
    Some(segments[..=at].join(".") + ".")
}

/// Finds the tensor of every parameter.
fn assign<B: Backend, M: Module<B>>(
    module: &M,
    shards: &Shards,
    table: &NameTable,
    options: &LoadOptions,
) -> Result<Parts, CheckpointError> {
    let expected = inventory(module, options.linear).into_iter().collect();
    plan(&expected, shards.tensors(), table, &options.unused)
        .map_err(|mismatch| CheckpointError::Module(Box::new(mismatch)))
}

/// Puts the planned tensors in the place of the parameters. After a failure it does nothing.
struct Loader<'a> {
    loading: Loading<'a>,
    path: Path,
    failure: Option<CheckpointError>,
}

impl<B: Backend> ModuleMapper<B> for Loader<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.leave();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        // What has no tensor stays: whether everything is to have one, the plan has seen to.
        if self.failure.is_some() || !self.loading.plan.contains_key(&self.path.parameter().0) {
            return param;
        }
        match self.load(param.lazy_shape()[0], &param.lazy_device()) {
            Ok(tensor) => {
                let id = param.id;
                param.transform_for_load(tensor, id)
            }
            Err(error) => {
                self.failure = Some(error);
                param
            }
        }
    }
}

impl Loader<'_> {
    /// Loads the tensor of the current path, or the next `rows` rows of it.
    fn load<B: Backend, const D: usize>(
        &mut self,
        rows: usize,
        device: &B::Device,
    ) -> Result<Tensor<B, D>, CheckpointError> {
        let (dtype, shards) = (self.loading.dtype, self.loading.shards);
        if !B::supports_dtype(device, dtype) {
            return Err(CheckpointError::Backend { dtype });
        }
        let (path, is_block) = self.path.parameter();
        let Some(tensor) = self.loading.plan.get_mut(&path) else {
            return Err(CheckpointError::NoSuchTensor { name: path });
        };
        let data = if is_block {
            let rows = tensor.rows_taken..tensor.rows_taken + rows;
            tensor.rows_taken = rows.end;
            shards.read_rows(&tensor.name, rows, dtype)?
        } else {
            shards.read(&tensor.name, dtype, tensor.layout)?
        };
        let bytes = data.num_elements() as u64 * tensor.element_bytes;
        self.loading.advance(bytes)?;
        // The dtype must be said again, or the data is converted to the device's default.
        Ok(Tensor::from_data(data, (device, dtype)))
    }
}
