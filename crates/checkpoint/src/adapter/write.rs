//! Writing an adapter: beside its place, then renamed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use safetensors::Dtype;

use super::{
    AdapterConfig, AdapterError, LinearMap, PREFIX, SETTINGS, SUFFIXES, TENSORS, Targets,
    UNFINISHED_SETTINGS, UNFINISHED_TENSORS, module_name, peft,
};
use crate::{Format, NameTable, NewTensor, WeightsFile};

/// The change of one linear map.
#[derive(Debug, Clone)]
pub struct NewAdapter<B: Backend> {
    /// Path of the map in the module.
    pub path: String,
    /// `[rank, in]` (`lora_A`)
    pub down: Tensor<B, 2>,
    /// `[out, rank]` (`lora_B`)
    pub up: Tensor<B, 2>,
    /// What is divided by the rank.
    pub alpha: f64,
    /// By the root of the rank instead.
    pub rank_stabilized: bool,
}

/// Writes an adapter into a folder, in f32; one that is there is replaced. `names` and `linears` are those
/// of the model, `others` what checkpoints call its weights that are no linear maps.
///
/// Whenever it is stopped, [`read_adapter`](crate::read_adapter) finds the old adapter or the new one.
///
/// # Errors
/// [`AdapterError::NotAdapted`] without adapters, [`AdapterError::Write`].
pub fn write_adapter<B: Backend>(
    folder: &Path,
    names: &NameTable,
    linears: &[LinearMap],
    others: &[String],
    adapters: &[NewAdapter<B>],
) -> Result<(), AdapterError> {
    let adapted: Vec<(&LinearMap, &NewAdapter<B>)> = linears
        .iter()
        .filter_map(|map| Some((map, adapters.iter().find(|new| new.path == map.path)?)))
        .collect();
    let Some((config, targets)) = settings(names, linears, others, &adapted) else {
        return Err(AdapterError::NotAdapted);
    };
    let [settings, new_settings, tensors, new_tensors] =
        [SETTINGS, UNFINISHED_SETTINGS, TENSORS, UNFINISHED_TENSORS].map(|name| folder.join(name));
    put(folder, |to| fs::create_dir_all(to))?;
    // One at a time, where the system has locks on folders: the names of what is unfinished are fixed.
    let alone = File::open(folder);
    if let Ok(folder) = &alone {
        let _ = folder.lock();
    }
    if new_settings.exists() && !new_tensors.exists() {
        // What was stopped here before its last step.
        put(&settings, |to| fs::rename(&new_settings, to))?;
    }
    put(&new_settings, remove)?;
    put(&new_tensors, remove)?;
    write_tensors(&new_tensors, &adapted)?;
    let text = peft::written(&config, &targets).map_err(io::Error::from);
    put(&new_settings, |to| {
        let mut file = File::create_new(to)?;
        file.write_all(&text?)?;
        file.sync_all()
    })?;
    // Who finds new settings beside no new tensors knows that these are in their place.
    put(&tensors, |to| fs::rename(&new_tensors, to))?;
    put(&settings, |to| fs::rename(&new_settings, to))?;
    // The names, too, must outlive a loss of power, where a system can be asked for that.
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}

/// Does something to a file.
fn put<T>(path: &Path, work: impl FnOnce(&Path) -> io::Result<T>) -> Result<T, AdapterError> {
    work(path).map_err(|source| AdapterError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Removes a file, or a link to one, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn write_tensors<B: Backend>(
    path: &Path,
    adapted: &[(&LinearMap, &NewAdapter<B>)],
) -> Result<(), AdapterError> {
    let tensors = adapted.iter().flat_map(|(map, new)| {
        let both = SUFFIXES.into_iter().zip([&new.down, &new.up]);
        both.map(|(suffix, tensor)| (format!("{PREFIX}{}{suffix}", map.module), tensor))
    });
    let tensors: Vec<(String, &Tensor<B, 2>)> = tensors.collect();
    let new = tensors.iter().map(|(name, tensor)| NewTensor {
        name: name.clone(),
        dtype: Dtype::F32,
        shape: tensor.dims().into(),
    });
    let layout = WeightsFile::new(Format::Safetensors, &new.collect::<Vec<_>>())?;
    put(path, |path| {
        let mut file = File::create_new(path)?;
        file.write_all(&layout.header)?;
        for (_, tensor) in &tensors {
            let numbers = tensor.to_data().convert::<f32>().into_vec::<f32>();
            let numbers = numbers.map_err(|error| io::Error::other(format!("{error:?}")))?;
            let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            file.write_all(&bytes)?;
        }
        file.sync_all()
    })
}

/// What the adapters say of themselves, and their targets; `None` without adapters.
fn settings<B: Backend>(
    names: &NameTable,
    linears: &[LinearMap],
    others: &[String],
    adapted: &[(&LinearMap, &NewAdapter<B>)],
) -> Option<(AdapterConfig, Vec<String>)> {
    let changed: Vec<&str> = adapted.iter().map(|(map, _)| map.module.as_str()).collect();
    let others: Vec<String> = { others.iter() }
        .map(|name| module_name(names, name))
        .collect();
    let spared = linears.iter().map(|map| &map.module).chain(&others);
    let spared = spared
        .map(String::as_str)
        .filter(|module| !changed.contains(module));
    let targets = ends(&changed, spared).into_iter().collect();

    let rank_stabilized = adapted.iter().all(|(_, new)| new.rank_stabilized);
    let strength = |(_, new): &(&LinearMap, &NewAdapter<B>)| {
        let rank = new.down.dims()[0];
        let alpha = match new.rank_stabilized == rank_stabilized {
            true => new.alpha,
            // They disagree: the same factor without the root.
            false => new.alpha * (rank as f64).sqrt(),
        };
        (rank, alpha)
    };
    let strengths: Vec<(usize, f64)> = adapted.iter().map(strength).collect();
    let &(rank, alpha) = strengths.first()?;
    let ranks = strengths.iter().map(|(rank, _)| *rank);
    let alphas = strengths.iter().map(|(_, alpha)| alpha.to_bits());
    let alphas = exceptions(&changed, &alphas.collect::<Vec<_>>()).into_iter();
    Some((
        AdapterConfig {
            alpha,
            rank_stabilized,
            rank_pattern: exceptions(&changed, &ranks.collect::<Vec<_>>()),
            alpha_pattern: alphas
                .map(|(name, bits)| (name, f64::from_bits(bits)))
                .collect(),
            ..AdapterConfig::new(Targets::AllLinear, rank)
        },
        targets,
    ))
}

/// Ends of the names of modules whose value is not the first one's.
fn exceptions<T: Copy + Ord>(modules: &[&str], values: &[T]) -> Vec<(String, T)> {
    let mut groups: BTreeMap<T, Vec<&str>> = BTreeMap::new();
    for (module, value) in modules.iter().zip(values) {
        groups.entry(*value).or_default().push(module);
    }
    if let Some(usual) = values.first() {
        groups.remove(usual);
    }
    let named = groups.into_iter().flat_map(|(value, group)| {
        let others = modules
            .iter()
            .copied()
            .filter(|module| !group.contains(module));
        let ends = ends(&group, others);
        ends.into_iter().map(move |end| (end, value))
    });
    named.collect()
}

/// The shortest ends of names that mean these modules and none of the others.
fn ends<'m>(modules: &[&'m str], others: impl Iterator<Item = &'m str>) -> BTreeSet<String> {
    let taken: HashSet<&str> = others.flat_map(ends_of).collect();
    let shortest = |&module: &&'m str| {
        let end = ends_of(module).find(|end| !taken.contains(end));
        end.unwrap_or(module).to_owned()
    };
    modules.iter().map(shortest).collect()
}

/// Ends of a name at dots, shortest first. None begins with an index: lists have those, too.
fn ends_of(name: &str) -> impl Iterator<Item = &str> {
    let dots = name.rmatch_indices('.').map(|(at, _)| at + 1);
    let ends = dots.chain([0]).filter_map(|at| name.get(at..));
    ends.filter(|end| !end.starts_with(|first: char| first.is_ascii_digit()))
}
