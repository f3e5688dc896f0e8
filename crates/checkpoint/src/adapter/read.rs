//! Reading an adapter: what its tensors change is decided before any is read.

use std::collections::BTreeMap;

use burn::tensor::{DType, TensorData};
use safetensors::Dtype;

use super::{
    AdapterConfig, AdapterError, AdapterMismatch, LinearMap, PREFIX, SUFFIXES, TENSORS, Targets,
    check_alpha, kind, kinds, peft,
};
use crate::mismatch::{Duplicate, Misshapen, ModuleMismatch, Unreadable};
use crate::{Folder, Layout, NameTable, Shards};

/// The change of one linear map.
#[derive(Debug, Clone)]
pub struct StoredAdapter {
    /// Path of the map in the module.
    pub path: String,
    /// `[rank, in]`, f32 (`lora_A`)
    pub down: TensorData,
    /// `[out, rank]`, f32 (`lora_B`)
    pub up: TensorData,
    /// What is divided by the rank.
    pub alpha: f64,
    /// By the root of the rank instead.
    pub rank_stabilized: bool,
}

/// Reads the adapter in a folder. `names` and `linears` are those of the model.
///
/// # Errors
/// [`AdapterError::Checkpoint`] for files that are not there or broken, [`AdapterError::Unsupported`], and
/// [`AdapterError::Mismatch`] with all that does not fit; no tensor has been read then.
pub fn read_adapter(
    folder: &Folder,
    names: &NameTable,
    linears: &[LinearMap],
) -> Result<Vec<StoredAdapter>, AdapterError> {
    let config = peft::read(folder)?;
    let tensors = Shards::open_file(folder, TENSORS)?;
    let mut plan = Plan {
        config: &config,
        tensors: &tensors,
        names,
        mismatch: ModuleMismatch::default(),
    };
    let found = plan.find(linears);
    let found = plan.check(linears, &found);
    if !plan.mismatch.is_empty() {
        let mismatch = AdapterMismatch(plan.mismatch);
        return Err(AdapterError::Mismatch(Box::new(mismatch)));
    }
    let read = |name: &str| {
        let data = tensors.read(name, DType::F32, Layout::AsStored)?;
        let is_finite = data.iter::<f32>().all(f32::is_finite);
        match is_finite {
            true => Ok(data),
            false => Err(AdapterError::NotFinite { name: name.into() }),
        }
    };
    let adapters = found.into_iter().map(|(linear, [down, up], alpha)| {
        check_alpha(alpha)?;
        Ok(StoredAdapter {
            path: linear.path.clone(),
            down: read(down)?,
            up: read(up)?,
            alpha,
            rank_stabilized: config.rank_stabilized,
        })
    });
    adapters.collect()
}

/// Tensors of each map that has some, down and up; keys are paths.
type Found<'t> = BTreeMap<String, [Vec<&'t str>; 2]>;

struct Plan<'a> {
    config: &'a AdapterConfig,
    tensors: &'a Shards,
    names: &'a NameTable,
    mismatch: ModuleMismatch,
}

impl<'a> Plan<'a> {
    /// Finds the map that each tensor belongs to.
    fn find(&mut self, linears: &[LinearMap]) -> Found<'a> {
        let mut found = Found::new();
        for name in self.tensors.names() {
            let place = self.place(name);
            match place.filter(|(path, _)| linears.iter().any(|map| map.path == *path)) {
                Some((path, side)) => found.entry(path).or_default()[side].push(name),
                None => self.mismatch.unknown.push(name.to_owned()),
            }
        }
        found
    }

    /// The path of the map that a tensor changes, and which factor it is.
    fn place(&self, tensor: &str) -> Option<(String, usize)> {
        let name = tensor.strip_prefix(PREFIX)?;
        let mut sides = (0..).zip(SUFFIXES);
        let (module, side) =
            sides.find_map(|(side, suffix)| Some((name.strip_suffix(suffix)?, side)))?;
        let path = self.names.module_path(&format!("{module}.weight"))?;
        Some((path.strip_suffix(".weight")?.to_owned(), side))
    }

    /// Both tensors and the alpha of each map that is changed.
    fn check<'l>(
        &mut self,
        linears: &'l [LinearMap],
        found: &Found<'a>,
    ) -> Vec<(&'l LinearMap, [&'a str; 2], f64)> {
        self.check_targets(linears, found);
        let mut pairs = Vec::new();
        for map in linears {
            let Some(sides) = found.get(&map.path) else {
                continue;
            };
            match (sides[0].as_slice(), sides[1].as_slice()) {
                (&[down], &[up]) => {
                    let (rank, alpha) = self.config.strength(map);
                    self.check_tensor(down, [rank, map.shape[1]]);
                    self.check_tensor(up, [map.shape[0], rank]);
                    pairs.push((map, [down, up], alpha));
                }
                _ => self.check_pair(map, sides),
            }
        }
        if found.is_empty() && self.mismatch.is_empty() {
            self.mismatch.missing.push("all".to_owned());
        }
        pairs
    }

    /// Notes what a map has not, or more than once.
    fn check_pair(&mut self, map: &LinearMap, sides: &[Vec<&str>; 2]) {
        for (names, suffix) in sides.iter().zip(SUFFIXES) {
            let tensor = format!("{PREFIX}{}{suffix}", map.module);
            match names.len() {
                0 => self.mismatch.missing.push(tensor),
                1 => {}
                _ => self.mismatch.duplicate.push(Duplicate {
                    path: tensor,
                    names: names.iter().map(|name| (*name).to_owned()).collect(),
                }),
            }
        }
    }

    /// Notes maps that a target means and that have no tensors, though others of their kind have: an
    /// adapter may be of a part of the model.
    fn check_targets(&mut self, linears: &[LinearMap], found: &Found<'_>) {
        let Targets::Named(targets) = &self.config.targets else {
            return;
        };
        for target in targets {
            let meant = linears.iter().filter(|map| map.is_meant_by(target));
            let (with, without): (Vec<&LinearMap>, Vec<_>) =
                meant.partition(|map| found.contains_key(&map.path));
            let (with, without) = (kinds(with), without.into_iter());
            match with.is_empty() {
                true => self.mismatch.missing.extend(kinds(without)),
                false => {
                    let missing = without.filter(|map| with.contains(&kind(map)));
                    self.mismatch
                        .missing
                        .extend(missing.map(|map| map.name.clone()));
                }
            }
        }
    }

    fn check_tensor(&mut self, name: &str, expected: [usize; 2]) {
        let Some(info) = self.tensors.info(name) else {
            return;
        };
        let name = name.to_owned();
        if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let dtype = info.dtype;
            self.mismatch.unreadable.push(Unreadable { name, dtype });
        } else if info.shape != expected || expected.contains(&0) {
            self.mismatch.misshapen.push(Misshapen {
                name,
                found: info.shape.clone(),
                expected: expected.into(),
            });
        }
    }
}
