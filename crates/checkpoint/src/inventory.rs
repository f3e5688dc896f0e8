//! The parameters of a module and where they stand in it.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use reroute_kernels::Format;

use crate::Layout;
use crate::plan::Expected;

/// Paths of the parameters in the order in which they are visited, and the tensors that they are in a
/// file; no parameter is touched. A list of parameters is one tensor.
pub(crate) fn inventory<B: Backend, M: Module<B>>(
    module: &M,
    linear: Layout,
) -> Vec<(String, Expected)> {
    inventory_with(module, linear, &InCodes::new())
}

/// Formats and columns of weights in codes, by path.
pub(crate) type InCodes = BTreeMap<String, (Format, usize)>;

/// The same with weights in codes as the numbers that they stand for.
pub(crate) fn inventory_with<B: Backend, M: Module<B>>(
    module: &M,
    linear: Layout,
    codes: &InCodes,
) -> Vec<(String, Expected)> {
    let mut inventory = Inventory {
        linear,
        codes,
        path: Path::default(),
        found: Vec::new(),
    };
    module.visit(&mut inventory);
    inventory.found
}

struct Inventory<'a> {
    linear: Layout,
    codes: &'a InCodes,
    path: Path,
    found: Vec<(String, Expected)>,
}

/// Field names from the root, with the kind of container that each lies in.
#[derive(Default)]
pub(crate) struct Path(Vec<(String, Container)>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Container {
    Linear,
    List,
    Other,
}

impl Path {
    pub(crate) fn enter(&mut self, name: &str, container_type: &str) {
        let container = match container_type {
            "Struct:Linear" => Container::Linear,
            "Vec" => Container::List,
            _ => Container::Other,
        };
        self.0.push((name.to_owned(), container));
    }

    pub(crate) fn leave(&mut self) {
        self.0.pop();
    }

    /// The path of the current parameter, and whether it is a block of the tensor of that path.
    pub(crate) fn parameter(&self) -> (String, bool) {
        let is_block = matches!(self.0.last(), Some((_, Container::List)));
        let names = self.0.iter().map(|(name, _)| name.as_str());
        let names: Vec<&str> = names.take(self.0.len() - usize::from(is_block)).collect();
        (names.join("."), is_block)
    }

    /// How the current parameter is laid out in a module whose linear weights are laid out like this.
    pub(crate) fn layout(&self, linear: Layout) -> Layout {
        match self.0.last() {
            Some((name, Container::Linear)) if name == "weight" => linear,
            _ => Layout::AsStored,
        }
    }
}

impl<B: Backend> ModuleVisitor<B> for Inventory<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.leave();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let layout = self.path.layout(self.linear);
        let mut shape = param.lazy_shape().to_vec();
        if layout == Layout::Transposed {
            shape.reverse();
        }
        self.add(shape, layout);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<B, D, Int>>) {
        if let Some(&(_, columns)) = self.codes.get(&self.path.parameter().0) {
            self.add(vec![param.lazy_shape()[0], columns], Layout::AsStored);
        }
    }
}

impl Inventory<'_> {
    /// The current parameter, or a further block of it.
    fn add(&mut self, shape: Vec<usize>, layout: Layout) {
        let (path, is_block) = self.path.parameter();
        match self.found.last_mut() {
            Some((last, tensor)) if is_block && *last == path => tensor.shape[0] += shape[0],
            _ => self.found.push((path, Expected { shape, layout })),
        }
    }
}
