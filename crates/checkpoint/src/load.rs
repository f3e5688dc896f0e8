//! Filling a module with the weights of a checkpoint.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::plan::{Assignment, Expected, plan};
use crate::{CheckpointError, Layout, NameTable, Shards};

/// How weights are loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Element type of the loaded parameters: F32 or F16, whatever the files hold.
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
/// Names, shapes and dtypes are compared first, and all that does not fit is reported in one
/// [`CheckpointError::Module`]; no weight has been read then. Parameters are never initialised, so
/// a module that comes fresh from its config costs no memory before its weights arrive.
/// `progress` is called after each tensor.
pub fn load_into<B: Backend, M: Module<B>>(
    module: M,
    shards: &Shards,
    table: &NameTable,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<M, CheckpointError> {
    let mut inventory = Inventory {
        linear: options.linear,
        path: Vec::new(),
        expected: BTreeMap::new(),
    };
    module.visit(&mut inventory);
    let plan = plan(&inventory.expected, shards, table, &options.unused)
        .map_err(|mismatch| CheckpointError::Module(Box::new(mismatch)))?;
    let mut loader = Loader {
        shards,
        dtype: options.dtype,
        loaded_bytes: 0,
        total_bytes: plan.values().map(|tensor| tensor.bytes).sum(),
        plan,
        progress,
        path: Vec::new(),
        failure: None,
    };
    let module = module.map(&mut loader);
    match loader.failure {
        None => Ok(module),
        Some(error) => Err(error),
    }
}

/// Lists the parameters of a module without touching them.
struct Inventory {
    linear: Layout,
    /// Field names from the root, with the kind of container each lies in.
    path: Vec<(String, bool)>,
    expected: BTreeMap<String, Expected>,
}

impl<B: Backend> ModuleVisitor<B> for Inventory {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        let in_linear = container_type == "Struct:Linear";
        self.path.push((name.to_owned(), in_linear));
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let names: Vec<&str> = self.path.iter().map(|(name, _)| name.as_str()).collect();
        let mut shape = param.lazy_shape().to_vec();
        let layout = match self.path.last() {
            Some((name, true)) if name == "weight" => self.linear,
            _ => Layout::AsStored,
        };
        if layout == Layout::Transposed {
            shape.reverse();
        }
        self.expected
            .insert(names.join("."), Expected { shape, layout });
    }
}

/// Puts the planned tensors in the place of the parameters. After a failure it does nothing.
struct Loader<'a> {
    shards: &'a Shards,
    dtype: DType,
    /// Keys are module paths.
    plan: BTreeMap<String, Assignment>,
    loaded_bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(LoadProgress),
    path: Vec<String>,
    failure: Option<CheckpointError>,
}

impl<B: Backend> ModuleMapper<B> for Loader<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if self.failure.is_some() {
            return param;
        }
        match self.load(&param.lazy_device()) {
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
    /// Loads the tensor of the current path.
    fn load<B: Backend, const D: usize>(
        &mut self,
        device: &B::Device,
    ) -> Result<Tensor<B, D>, CheckpointError> {
        if !B::supports_dtype(device, self.dtype) {
            return Err(CheckpointError::Backend { dtype: self.dtype });
        }
        let path = self.path.join(".");
        let Some(tensor) = self.plan.remove(&path) else {
            return Err(CheckpointError::NoSuchTensor { name: path });
        };
        let data = self.shards.read(&tensor.name, self.dtype, tensor.layout)?;
        self.loaded_bytes += tensor.bytes;
        (self.progress)(LoadProgress {
            loaded_bytes: self.loaded_bytes,
            total_bytes: self.total_bytes,
        });
        // The dtype must be said again, or the data is converted to the device's default.
        Ok(Tensor::from_data(data, (device, self.dtype)))
    }
}
