//! Low-rank adapters (LoRA, arXiv 2106.09685) as PEFT keeps them: a folder with settings and tensors.

mod error;
mod peft;
mod read;
mod write;

use std::collections::BTreeMap;

pub use error::{AdapterError, AdapterMismatch};
pub use read::{StoredAdapter, StoredChange, read_adapter};
pub use write::{NewAdapter, write_adapter};

use crate::NameTable;
use crate::names::matches;

/// File of the settings.
const SETTINGS: &str = "adapter_config.json";
/// The same while it is written.
const UNFINISHED_SETTINGS: &str = "adapter_config.json.partial";
/// File of the tensors.
const TENSORS: &str = "adapter_model.safetensors";
/// The same while it is written.
const UNFINISHED_TENSORS: &str = "adapter_model.safetensors.partial";
/// What PEFT puts before the name of a module.
const PREFIX: &str = "base_model.model.";
/// What PEFT puts behind it: first comes the factor that maps down to the rank.
const SUFFIXES: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
/// What it puts behind it for the lengths of rows, and what some versions do.
const MAGNITUDES: [&str; 2] = [".lora_magnitude_vector", ".lora_magnitude_vector.weight"];

/// An adapter that is going to be trained.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The linear maps that it changes.
    pub targets: Targets,
    /// Rank of the change (`r`).
    pub rank: usize,
    /// The change counts `alpha / rank` times (`lora_alpha`).
    pub alpha: f64,
    /// Or `alpha / √rank` times (`use_rslora`; arXiv 2312.03732).
    pub rank_stabilized: bool,
    /// Ranks of single maps, named as targets are; the first that fits counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Their alphas.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Share of the inputs that are left out while it is trained (`lora_dropout`), below 1. It is not saved.
    pub dropout: f64,
    /// Seed of the numbers that training starts from. It is not saved.
    pub seed: u64,
}

impl AdapterConfig {
    /// An adapter that counts once (`alpha` is the rank).
    pub fn new(targets: impl Into<Targets>, rank: usize) -> Self {
        Self {
            targets: targets.into(),
            rank,
            alpha: rank as f64,
            rank_stabilized: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            dropout: 0.0,
            seed: 0,
        }
    }

    /// Rank and alpha of every map that is changed, by path.
    ///
    /// # Errors
    /// [`AdapterError::NoTargets`], [`AdapterError::Vocabulary`], [`AdapterError::UnknownTarget`],
    /// [`AdapterError::Rank`], [`AdapterError::Alpha`], [`AdapterError::Dropout`].
    pub fn choose(
        &self,
        linears: &[LinearMap],
        vocabularies: &[String],
    ) -> Result<BTreeMap<String, (usize, f64)>, AdapterError> {
        self.check_names(linears, vocabularies)?;
        if !(0.0..1.0).contains(&self.dropout) {
            let dropout = self.dropout;
            return Err(AdapterError::Dropout { dropout });
        }
        let chosen = linears.iter().filter(|map| self.targets.mean(map));
        chosen
            .map(|map| {
                let (rank, alpha) = self.strength(map);
                let most = map.shape[0].min(map.shape[1]);
                if !(1..=most).contains(&rank) {
                    let name = map.name.clone();
                    return Err(AdapterError::Rank { rank, name, most });
                }
                check_alpha(alpha)?;
                Ok((map.path.clone(), (rank, alpha)))
            })
            .collect()
    }

    /// Whether all names say something.
    fn check_names(
        &self,
        linears: &[LinearMap],
        vocabularies: &[String],
    ) -> Result<(), AdapterError> {
        let targets = match &self.targets {
            Targets::AllLinear => &[][..],
            Targets::Named(targets) if targets.is_empty() => return Err(AdapterError::NoTargets),
            Targets::Named(targets) => targets,
        };
        let ranks = self.rank_pattern.iter().map(|(name, _)| name);
        let alphas = self.alpha_pattern.iter().map(|(name, _)| name);
        let names: Vec<&String> = targets.iter().chain(ranks).chain(alphas).collect();
        let those = |wanted: &dyn Fn(&str) -> bool| -> Vec<String> {
            let found = names.iter().filter(|name| wanted(name));
            found.map(|name| (*name).clone()).collect()
        };
        let tables = those(&|name| vocabularies.iter().any(|table| fits(name, table)));
        if !tables.is_empty() {
            return Err(AdapterError::Vocabulary { targets: tables });
        }
        let unknown = those(&|name| !linears.iter().any(|map| map.is_meant_by(name)));
        match unknown.is_empty() {
            true => Ok(()),
            false => Err(AdapterError::UnknownTarget {
                targets: unknown,
                linears: kinds(linears),
            }),
        }
    }

    /// Rank and alpha of a map.
    fn strength(&self, map: &LinearMap) -> (usize, f64) {
        let rank = { self.rank_pattern.iter() }.find(|(name, _)| map.is_meant_by(name));
        let alpha = { self.alpha_pattern.iter() }.find(|(name, _)| map.is_meant_by(name));
        (
            rank.map_or(self.rank, |&(_, rank)| rank),
            alpha.map_or(self.alpha, |&(_, alpha)| alpha),
        )
    }
}

/// Whether the change counts at all, and finitely, in f32.
fn check_alpha(alpha: f64) -> Result<(), AdapterError> {
    match (alpha as f32).is_normal() {
        true => Ok(()),
        false => Err(AdapterError::Alpha { alpha }),
    }
}

/// Which linear maps an adapter changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// All of the decoder, the projector or merger, and the tower; never the vocabulary tables.
    AllLinear,
    /// Those whose name, in checkpoints of the model or in PEFT, ends like this behind a dot (`q_proj`,
    /// `mlp.gate_proj`), or fits a pattern with `*` (`language_model.*.q_proj`, see [`crate::Rule`]).
    Named(Vec<String>),
}

impl Targets {
    fn mean(&self, map: &LinearMap) -> bool {
        match self {
            Self::AllLinear => true,
            Self::Named(targets) => targets.iter().any(|target| map.is_meant_by(target)),
        }
    }
}

/// `all-linear`, as PEFT calls it, or one name.
impl From<&str> for Targets {
    fn from(target: &str) -> Self {
        match target {
            "all-linear" => Self::AllLinear,
            name => Self::Named(vec![name.into()]),
        }
    }
}

impl<const N: usize> From<[&str; N]> for Targets {
    fn from(targets: [&str; N]) -> Self {
        Self::Named(targets.map(String::from).into())
    }
}

impl From<Vec<String>> for Targets {
    fn from(targets: Vec<String>) -> Self {
        Self::Named(targets)
    }
}

/// A linear map of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearMap {
    /// Path in the module.
    path: String,
    /// What a checkpoint of this model calls it.
    name: String,
    /// What PEFT calls it.
    module: String,
    /// `[out, in]`
    shape: [usize; 2],
}

impl LinearMap {
    /// The map at a path of a module, which a checkpoint calls `name`.
    ///
    /// # Shapes
    /// - `shape`: `[out, in]`
    pub fn new(names: &NameTable, path: String, name: String, shape: [usize; 2]) -> Self {
        Self {
            path,
            module: module_name(names, &name),
            name,
            shape,
        }
    }

    fn is_meant_by(&self, target: &str) -> bool {
        fits(target, &self.name) || fits(target, &self.module)
    }
}

/// What PEFT calls the module of a weight. It goes by the modules of the library, which since
/// transformers 4.52 has all of them below `model`, whatever checkpoints say.
fn module_name(names: &NameTable, name: &str) -> String {
    let path = names.module_path(&format!("{name}.weight"));
    let module = path.and_then(|path| {
        let below = format!("model.{}.", path.split('.').next()?);
        let names = names.file_names(&path);
        let names = names.filter(|other| other.starts_with(&below));
        let modules = names.filter_map(|other| Some(other.strip_suffix(".weight")?.to_owned()));
        // Other generations of a family call other things so.
        let same = |other: &String| other.rsplit('.').next() == name.rsplit('.').next();
        { modules }.filter(same).min_by_key(String::len)
    });
    module.unwrap_or_else(|| name.to_owned())
}

/// Whether a target means what has this name: the name, its end behind a dot, or a pattern with `*`
/// ([`Targets::Named`]).
pub fn fits(target: &str, name: &str) -> bool {
    let head = name.strip_suffix(target);
    head.is_some_and(|head| head.is_empty() || head.ends_with('.'))
        || target.contains('*') && matches(target, name)
}

/// Names of maps without their indices, each once.
fn kinds<'m>(maps: impl IntoIterator<Item = &'m LinearMap>) -> Vec<String> {
    let mut kinds = Vec::new();
    for kind in maps.into_iter().map(kind) {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds
}

fn kind(map: &LinearMap) -> String {
    let is_index = |segment: &str| segment.bytes().all(|byte| byte.is_ascii_digit());
    let segments = map.name.split('.');
    let segments = segments.map(|segment| if is_index(segment) { "{}" } else { segment });
    segments.collect::<Vec<_>>().join(".")
}
