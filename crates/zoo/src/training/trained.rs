//! Which parameters of a model are trained.

use std::collections::BTreeSet;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reroute_checkpoint::fits;

use crate::{Model, ZooError};

/// What of a model is trained beside its adapters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trained {
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
    /// What people write: `projector`, `tower`, `decoder`, `all`, or a name.
    pub fn named(name: &str) -> Self {
        match name {
            "projector" | "merger" => Self::Projector,
            "tower" => Self::Tower,
            "decoder" => Self::Decoder,
            "all" => Self::All,
            name => Self::Named(name.to_owned()),
        }
    }

    /// Whether it means the parameter at a path, which checkpoints call `name`.
    fn means(&self, path: &str, name: &str) -> bool {
        let is_decoder = path.starts_with("language_model.");
        let is_projector = path.starts_with("multi_modal_projector.") || path.contains("merger");
        match self {
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

impl<B: Backend> Model<B> {
    /// The same model where these parameters are trained, and of the others only the adapters; what is frozen
    /// gets no gradient.
    ///
    /// # Errors
    /// [`ZooError::NotTrained`] for one that means no parameter in floats of f32.
    pub fn train(self, trained: &[Trained]) -> Result<Self, ZooError> {
        let mut chosen = BTreeSet::new();
        for one in trained {
            let found = Parameters::of(&self).found.into_iter();
            let meant: Vec<Found> = found
                .filter(|found| one.means(&found.path, &self.parameter_name(&found.path)))
                .collect();
            let refused = |what: String, reason: String| Err(ZooError::NotTrained { what, reason });
            if meant.is_empty() {
                let reason = "means no parameter of this model in floats".into();
                return refused(format!("{one:?}"), reason);
            }
            if let Some(half) = meant.iter().find(|found| found.dtype.size() < 4) {
                let (path, dtype) = (half.path.clone(), half.dtype.name());
                let reason = format!("is {dtype}, in which the steps of an optimizer are lost");
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

/// Freezes all parameters but those of these paths and of adapters.
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
        let path = self.path.joined();
        // Lengths of rows are made of the weight.
        let is_adapter = path.contains(".adapter.") && !path.ends_with(".gain");
        let is_trained = is_adapter || self.chosen.contains(&path);
        param.set_require_grad(is_trained)
    }
}
