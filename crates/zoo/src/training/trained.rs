//! Which parameters of a model are trained.

use std::collections::BTreeSet;
use std::fmt;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reroute_checkpoint::fits;
use reroute_layers::{Linears, Weight};

use crate::{Model, ZooError};

/// What of a model is trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trained {
    /// The factors of its adapters.
    Adapter,
    /// What makes visual tokens of the tower's features: projector or merger.
    Projector,
    /// The vision tower without it.
    Tower,
    /// The decoder with its vocabulary tables.
    Decoder,
    /// Everything.
    All,
    /// Parameters whose name, in checkpoints of the model or in the module, is this, ends like this behind a
    /// dot, or fits this pattern with `*`.
    Named(String),
}

impl Trained {
    /// What people write: `adapter`, `projector`, `tower`, `decoder`, `all`, or a name.
    pub fn named(name: &str) -> Self {
        match name {
            "adapter" => Self::Adapter,
            "projector" | "merger" => Self::Projector,
            "tower" => Self::Tower,
            "decoder" => Self::Decoder,
            "all" => Self::All,
            name => Self::Named(name.to_owned()),
        }
    }

    /// Whether it means the parameter at a path, which checkpoints call `name`.
    fn means(&self, path: &str, name: &str) -> bool {
        if path.contains(".adapter.") {
            // Lengths of rows are made of the weight.
            return *self == Self::Adapter && !path.ends_with(".gain");
        }
        let is_decoder = path.starts_with("language_model.");
        let is_projector = path.starts_with("multi_modal_projector.") || path.contains("merger");
        match self {
            Self::Adapter => false,
            Self::Projector => is_projector,
            Self::Tower => !is_decoder && !is_projector,
            Self::Decoder => is_decoder,
            Self::All => true,
            Self::Named(wanted) => [path, name].iter().any(|name| {
                // Of a module all parameters.
                fits(wanted, name)
                    || (name.rsplit_once('.')).is_some_and(|(of, _)| fits(wanted, of))
            }),
        }
    }
}

impl fmt::Display for Trained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Adapter => "adapter",
            Self::Projector => "projector",
            Self::Tower => "tower",
            Self::Decoder => "decoder",
            Self::All => "all",
            Self::Named(name) => name,
        })
    }
}

impl<B: Backend> Model<B> {
    /// The same model where these parameters are trained and all others frozen: they get no gradient.
    ///
    /// # Errors
    /// [`ZooError::NotTrained`] for one that means no parameter, or one that is not in floats of f32.
    pub fn train(self, trained: &[Trained]) -> Result<Self, ZooError> {
        let (mut chosen, coded) = (BTreeSet::new(), self.coded());
        for one in trained {
            let found = Parameters::of(&self).found.into_iter();
            let meant: Vec<Found> = found
                .filter(|found| one.means(&found.path, &self.parameter_name(&found.path)))
                .collect();
            let refused = |what: String, reason: String| Err(ZooError::NotTrained { what, reason });
            let means = |path: &&String| one.means(path, &self.parameter_name(path));
            if let Some(path) = coded.iter().find(means) {
                let reason = "is in codes of fewer bits, beside which only an adapter is trained: open the model in \
                              f32 (--dtype f32)";
                return refused(path.clone(), reason.into());
            }
            if meant.is_empty() {
                let reason = "means no parameter of this model: names are those of the checkpoint, their ends, or \
                              patterns in which a * stands for whole parts between dots";
                return refused(one.to_string(), reason.into());
            }
            if let Some(half) = meant.iter().find(|found| found.dtype.size() < 4) {
                let (path, dtype) = (half.path.clone(), half.dtype.name());
                let reason = format!(
                    "is {dtype}, in which the steps of an optimizer are lost: open the model in f32 (--dtype f32)"
                );
                return refused(path, reason);
            }
            chosen.extend(meant.into_iter().map(|found| found.path));
        }
        let mut walk = Choose {
            chosen,
            path: Path::default(),
        };
        Ok(self.map(&mut walk))
    }

    /// Paths of the weights that are in codes of fewer bits.
    pub fn coded(&self) -> Vec<String> {
        let (mut model, mut weights) = (self.clone(), Vec::new());
        model.weights("", &mut weights);
        let is_coded = |blocks: &[Weight<B>]| blocks.iter().any(|block| block.format().is_some());
        let coded = weights.into_iter().filter(|(_, blocks)| is_coded(blocks));
        coded.map(|(path, _)| path).collect()
    }

    /// Paths and numbers of the parameters that are trained, in their order.
    pub fn trained_parameters(&self) -> Vec<(String, usize)> {
        let found = Parameters::of(self).found.into_iter();
        let trained = found.filter(|found| found.is_trained);
        trained.map(|found| (found.path, found.numbers)).collect()
    }

    /// What checkpoints call a parameter. A table is kept in blocks, which have numbers.
    fn parameter_name(&self, path: &str) -> String {
        let of_table = path.trim_end_matches(|c: char| c.is_ascii_digit());
        let path = of_table.strip_suffix('.').unwrap_or(path);
        let name = self.config().file_name(path);
        name.unwrap_or_else(|| path.to_owned())
    }
}

/// Names from the root; that of the family is none.
#[derive(Default)]
struct Path(Vec<Option<String>>);

impl Path {
    fn enter(&mut self, name: &str, kind: &str) {
        let is_family = kind.starts_with("Enum:");
        self.0.push((!is_family).then(|| name.to_owned()));
    }

    fn joined(&self) -> String {
        let names = self.0.iter().flatten().map(String::as_str);
        names.collect::<Vec<_>>().join(".")
    }
}

/// A parameter in floats.
struct Found {
    path: String,
    numbers: usize,
    dtype: DType,
    is_trained: bool,
}

#[derive(Default)]
struct Parameters {
    path: Path,
    found: Vec<Found>,
}

impl Parameters {
    fn of<B: Backend>(model: &Model<B>) -> Self {
        let mut parameters = Self::default();
        model.visit(&mut parameters);
        parameters
    }
}

impl<B: Backend> ModuleVisitor<B> for Parameters {
    fn enter_module(&mut self, name: &str, kind: &str) {
        self.path.enter(name, kind);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.0.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let value = param.val();
        self.found.push(Found {
            path: self.path.joined(),
            numbers: value.shape().num_elements(),
            dtype: value.dtype(),
            is_trained: param.is_require_grad(),
        });
    }
}

/// Freezes all parameters but those of these paths.
struct Choose {
    chosen: BTreeSet<String>,
    path: Path,
}

impl<B: Backend> ModuleMapper<B> for Choose {
    fn enter_module(&mut self, name: &str, kind: &str) {
        self.path.enter(name, kind);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.0.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.set_require_grad(self.chosen.contains(&self.path.joined()))
    }
}
