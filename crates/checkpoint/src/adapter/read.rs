//! Reading an adapter: what its tensors change is decided before any is read.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, TensorData};
use safetensors::Dtype;

use super::peft::Stored;
use super::{
    AdapterError, AdapterMismatch, LinearMap, MAGNITUDES, PREFIX, SUFFIXES, TENSORS, check_alpha,
    kind, kinds, peft,
};
use crate::load::{self, Parts};
use crate::mismatch::{Duplicate, Misshapen, ModuleMismatch, Unreadable};
use crate::{Folder, Layout, NameTable, Shards};

/// What PEFT has put in the name of a module that is there as a whole.
const WHOLE: &str = ".modules_to_save.";

/// All that an adapter changes.
#[derive(Debug)]
pub struct StoredAdapter {
    /// Changes of linear maps.
    pub changes: Vec<StoredChange>,
    /// Parameters that are there as a whole: path and tensor.
    whole: Vec<(String, String)>,
    /// Ends of the names of such modules.
    modules: Vec<String>,
    tensors: Shards,
    /// Where it is, and what it is for.
    name: String,
}

/// The change of one linear map.
#[derive(Debug, Clone)]
pub struct StoredChange {
    /// Path of the map in the module.
    pub path: String,
    /// `[rank, in]`, f32 (`lora_A`)
    pub down: TensorData,
    /// `[out, rank]`, f32 (`lora_B`)
    pub up: TensorData,
    /// `[out]`, f32: how long the rows of the changed weight are (`lora_magnitude_vector`; DoRA, arXiv
    /// 2402.09353).
    pub magnitudes: Option<TensorData>,
    /// What is divided by the rank.
    pub alpha: f64,
    /// By the root of the rank instead.
    pub rank_stabilized: bool,
}

impl StoredAdapter {
    /// Paths of parameters that are there as a whole.
    pub fn whole(&self) -> impl Iterator<Item = &str> {
        self.whole.iter().map(|(path, _)| path.as_str())
    }

    /// Whether the module has all that is there as a whole, in its shape.
    ///
    /// # Errors
    /// [`AdapterError::Mismatch`] with all that does not fit.
    pub fn check_whole<B: Backend, M: Module<B>>(&self, module: &M) -> Result<(), AdapterError> {
        self.parts(module).map(drop)
    }

    /// The module with what is there as a whole in the place of its own.
    ///
    /// # Errors
    /// Those of [`check_whole`](Self::check_whole); [`AdapterError::Checkpoint`] if a tensor cannot be read.
    pub fn put_whole<B: Backend, M: Module<B>>(
        &self,
        module: M,
        dtype: DType,
    ) -> Result<M, AdapterError> {
        if self.whole.is_empty() {
            return Ok(module);
        }
        let parts = self.parts(&module)?;
        let proceed = &mut |_| ControlFlow::Continue(());
        Ok(load::put(module, &self.tensors, parts, dtype, proceed)?)
    }

    fn parts<B: Backend, M: Module<B>>(&self, module: &M) -> Result<Parts, AdapterError> {
        let parts = load::assign_parts(module, &self.tensors, &self.whole, &self.modules);
        parts.map_err(|mismatch| refused(&self.name, mismatch))
    }
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
) -> Result<StoredAdapter, AdapterError> {
    let stored = peft::read(folder)?;
    let tensors = Shards::open_file(folder, TENSORS)?;
    let mut plan = Plan {
        stored: &stored,
        tensors: &tensors,
        names,
        mismatch: ModuleMismatch::default(),
    };
    let (found, whole) = plan.find(linears);
    let found = plan.check(linears, &found, &whole)?;
    if !plan.mismatch.is_empty() {
        return Err(refused(&stored.name, plan.mismatch));
    }
    let read = |name: &str| {
        let data = tensors.read(name, DType::F32, Layout::AsStored)?;
        let is_finite = data.iter::<f32>().all(f32::is_finite);
        match is_finite {
            true => Ok(data),
            false => Err(AdapterError::NotFinite { name: name.into() }),
        }
    };
    let changes = found.into_iter().map(|(linear, sides, alpha)| {
        check_alpha(alpha)?;
        Ok(StoredChange {
            path: linear.path.clone(),
            down: read(sides.down)?,
            up: read(sides.up)?,
            magnitudes: sides.magnitudes.map(read).transpose()?,
            alpha,
            rank_stabilized: stored.rank_stabilized,
        })
    });
    Ok(StoredAdapter {
        changes: changes.collect::<Result<_, AdapterError>>()?,
        whole,
        modules: stored.whole,
        tensors,
        name: stored.name,
    })
}

fn refused(adapter: &str, mismatch: ModuleMismatch) -> AdapterError {
    let adapter = adapter.to_owned();
    AdapterError::Mismatch(Box::new(AdapterMismatch { adapter, mismatch }))
}

/// What a tensor is to the map that it changes.
#[derive(Debug, Clone, Copy)]
enum Side {
    Down,
    Up,
    Magnitudes,
}

/// Tensors of each map that has some, by [`Side`]; keys are paths.
type Found<'t> = BTreeMap<String, [Vec<&'t str>; 3]>;

/// The tensors of one map.
struct Sides<'t> {
    down: &'t str,
    up: &'t str,
    magnitudes: Option<&'t str>,
}

struct Plan<'a> {
    stored: &'a Stored,
    tensors: &'a Shards,
    names: &'a NameTable,
    mismatch: ModuleMismatch,
}

impl<'a> Plan<'a> {
    /// Finds the map that each tensor belongs to; also path and tensor of what is there as a whole.
    fn find(&mut self, linears: &[LinearMap]) -> (Found<'a>, Vec<(String, String)>) {
        let (mut found, mut whole) = (Found::new(), Vec::new());
        for name in self.tensors.names() {
            let place = self.place(name);
            match place.filter(|(path, _)| linears.iter().any(|map| map.path == *path)) {
                Some((path, side)) => found.entry(path).or_default()[side as usize].push(name),
                None => match self.whole(name) {
                    Some(path) => whole.push((path, name.to_owned())),
                    None => self.mismatch.unknown.push(name.to_owned()),
                },
            }
        }
        (found, whole)
    }

    /// The path of the map that a tensor changes, and how.
    fn place(&self, tensor: &str) -> Option<(String, Side)> {
        let name = tensor.strip_prefix(PREFIX)?;
        let [down, up] = SUFFIXES;
        let magnitudes = MAGNITUDES.map(|suffix| (suffix, Side::Magnitudes));
        let known = [(down, Side::Down), (up, Side::Up)].into_iter();
        let mut known = known.chain(
            self.stored
                .has_magnitudes
                .then_some(magnitudes)
                .into_iter()
                .flatten(),
        );
        let (module, side) =
            known.find_map(|(suffix, side)| Some((name.strip_suffix(suffix)?, side)))?;
        let path = self.names.module_path(&format!("{module}.weight"))?;
        Some((path.strip_suffix(".weight")?.to_owned(), side))
    }

    /// The path of the parameter that a tensor takes the place of.
    fn whole(&self, tensor: &str) -> Option<String> {
        let name = tensor.strip_prefix(PREFIX)?.replacen(WHOLE, ".", 1);
        let (module, _) = name.rsplit_once('.')?;
        // Of a module that is named, or below one.
        let ends = module.match_indices('.').map(|(at, _)| at);
        let mut modules = ends.chain([module.len()]).filter_map(|at| module.get(..at));
        let is_named = |above: &str| {
            let mut named = self.stored.whole.iter();
            named.any(|end| super::fits(end, above))
        };
        modules
            .any(is_named)
            .then(|| self.names.module_path(&name))?
    }

    /// The tensors and the alpha of each map that is changed.
    fn check<'l>(
        &mut self,
        linears: &'l [LinearMap],
        found: &Found<'a>,
        whole: &[(String, String)],
    ) -> Result<Vec<(&'l LinearMap, Sides<'a>, f64)>, AdapterError> {
        self.check_targets(linears, found);
        self.check_whole(whole);
        let mut changes = Vec::new();
        for map in linears {
            let Some(sides) = found.get(&map.path) else {
                continue;
            };
            let [down, up, magnitudes] = sides.each_ref().map(Vec::as_slice);
            let (&[down], &[up]) = (down, up) else {
                self.check_sides(map, sides);
                continue;
            };
            let magnitudes = match (self.stored.has_magnitudes, magnitudes) {
                (false, _) => None,
                (true, &[magnitudes]) => Some(magnitudes),
                (true, _) => {
                    self.check_sides(map, sides);
                    continue;
                }
            };
            let (rank, alpha) = self.stored.strength(map)?;
            self.check_tensor(down, &[rank, map.shape[1]]);
            self.check_tensor(up, &[map.shape[0], rank]);
            if let Some(magnitudes) = magnitudes {
                self.check_tensor(magnitudes, &[map.shape[0]]);
            }
            let sides = Sides {
                down,
                up,
                magnitudes,
            };
            changes.push((map, sides, alpha));
        }
        if found.is_empty() && whole.is_empty() && self.mismatch.is_empty() {
            self.mismatch.missing.push("all".to_owned());
        }
        Ok(changes)
    }

    /// Notes what a map has not, or more than once.
    fn check_sides(&mut self, map: &LinearMap, sides: &[Vec<&str>; 3]) {
        let suffixes = [SUFFIXES[0], SUFFIXES[1], MAGNITUDES[0]];
        let wanted = 2 + usize::from(self.stored.has_magnitudes);
        for (names, suffix) in sides.iter().zip(suffixes).take(wanted) {
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

    /// Notes modules that should be there as a whole and are not, or more than once.
    fn check_whole(&mut self, whole: &[(String, String)]) {
        for end in &self.stored.whole {
            let is_there = |tensor: &String| {
                let name = tensor.replacen(WHOLE, ".", 1);
                name.split('.')
                    .any(|part| end.rsplit('.').next() == Some(part))
            };
            if !whole.iter().any(|(_, tensor)| is_there(tensor)) {
                self.mismatch.missing.push(end.clone());
            }
        }
        let mut tensors: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (path, tensor) in whole {
            tensors.entry(path).or_default().push(tensor.clone());
        }
        let twice = tensors.into_iter().filter(|(_, names)| names.len() > 1);
        let twice = twice.map(|(path, names)| Duplicate {
            path: path.to_owned(),
            names,
        });
        self.mismatch.duplicate.extend(twice);
    }

    /// Notes maps that a target means and that have no tensors, though others of their kind have: an
    /// adapter may be of a part of the model.
    fn check_targets(&mut self, linears: &[LinearMap], found: &Found<'_>) {
        for target in &self.stored.targets {
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

    fn check_tensor(&mut self, name: &str, expected: &[usize]) {
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
