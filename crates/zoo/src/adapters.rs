//! Low-rank adapters of a model (LoRA, arXiv 2106.09685): added, trained, saved, loaded, merged.

use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use reroute_checkpoint::{
    AdapterConfig, AdapterError, Folder, LinearMap, NewAdapter, StoredAdapter, StoredChange,
    read_adapter, write_adapter,
};
use reroute_layers::{Linear, Linears, LowRank, Scaling};

use crate::{Model, ZooError};

impl<B: Backend> Model<B> {
    /// The same model with a low-rank adapter beside the weight of every target, and everything else
    /// frozen: on `Autodiff<B>` only the adapter gets gradients. The model answers as before until the
    /// adapter is trained: what maps down is random (Kaiming uniform, as in PEFT), what maps up is zero.
    ///
    /// Adapters are f32 whatever the type of the weights, as in PEFT: in half precision the steps of an
    /// optimizer would be lost. Only their own small products are computed in f32.
    ///
    /// ```
    /// use burn::tensor::backend::AutodiffBackend;
    /// use reroute_zoo::{AdapterConfig, Folder, Vlm, ZooError};
    ///
    /// fn adapted<B: AutodiffBackend>(vlm: Vlm<B>) -> Result<Vlm<B>, ZooError> {
    ///     let model = vlm.model().adapt(&AdapterConfig::new(["q_proj", "v_proj"], 8))?;
    ///     println!("{} parameters are trained", model.adapter_parameters());
    ///     Ok(vlm.map_model(|_| model))
    /// }
    ///
    /// fn saved_and_merged<B: AutodiffBackend>(vlm: Vlm<B>) -> Result<Vlm<B>, ZooError> {
    ///     vlm.model().save_adapter("my-adapter")?;
    ///     let model = vlm.model().clone().without_adapters();
    ///     let model = model.load_adapter(&Folder::open("my-adapter")?)?;
    ///     Ok(vlm.map_model(|_| model.merge_adapters()))
    /// }
    /// ```
    ///
    /// # Errors
    /// [`AdapterError::Adapted`], and those of [`AdapterConfig::choose`].
    pub fn adapt(&self, config: &AdapterConfig) -> Result<Self, ZooError> {
        let vocabularies = self.names_of(&Kept::of(self).vocabularies);
        let chosen = config.choose(&self.linear_maps(), &vocabularies)?;
        let mut random = StdRng::seed_from_u64(config.seed);
        self.with_adapters(|path, linear| {
            let &(rank, alpha) = chosen.get(path)?;
            let ([output, input], device) = (shape(linear), linear.weight.device());
            let bound = 1.0 / (input as f32).sqrt();
            let down = (0..rank * input).map(|_| random.random_range(-bound..=bound));
            let down = TensorData::new(down.collect::<Vec<f32>>(), [rank, input]);
            let options = (&device, DType::F32);
            let scaling = Scaling {
                alpha,
                rank_stabilized: config.rank_stabilized,
            };
            let (down, up) = (
                Tensor::from_data(down, options),
                Tensor::zeros([output, rank], options),
            );
            Some(LowRank::new(down, up, scaling).with_dropout(config.dropout))
        })
    }

    /// The same model with the adapter of a folder, as PEFT and [`save_adapter`](Self::save_adapter) write
    /// it, and everything else frozen. What is adapted is what the folder has tensors of, in any spelling of
    /// the family. Modules that it has as a whole (`modules_to_save`) take the place of the model's own; a
    /// weight whose rows it gives lengths (DoRA) can be used and merged, not trained further.
    ///
    /// # Errors
    /// [`AdapterError::Adapted`], and those of [`read_adapter`].
    pub fn load_adapter(&self, folder: &Folder) -> Result<Self, ZooError> {
        self.load_adapters(std::slice::from_ref(folder))
    }

    /// The same with several adapters at once, whose changes add up.
    ///
    /// # Errors
    /// Those of [`load_adapter`](Self::load_adapter); [`AdapterError::Several`].
    pub fn load_adapters(&self, folders: &[Folder]) -> Result<Self, ZooError> {
        self.with_read(&self.read_adapters(folders)?)
    }

    /// The same with adapters that were read.
    pub(crate) fn with_read(&self, stored: &[StoredAdapter]) -> Result<Self, ZooError> {
        let mut model = self.clone();
        for stored in stored {
            model = model.with_floats(stored).put_whole(stored)?;
        }
        let mut several = None;
        let changes = |path: &str, linear: &Linear<B>| {
            let changes = stored.iter().flat_map(|stored| &stored.changes);
            let changes = changes.filter(|change| change.path == path);
            let changes: Vec<_> = changes.map(|change| low_rank(change, linear)).collect();
            let count = changes.len();
            let sum = LowRank::sum(changes);
            if count > 1 && sum.is_none() {
                several.get_or_insert_with(|| path.to_owned());
            }
            sum
        };
        let model = model.with_adapters(changes)?;
        match several {
            Some(name) => Err(AdapterError::Several { name }.into()),
            None => Ok(model),
        }
    }

    /// Reads adapters and compares them with the model, whose weights need not be there.
    ///
    /// # Errors
    /// Those of [`load_adapter`](Self::load_adapter).
    pub(crate) fn read_adapters(&self, folders: &[Folder]) -> Result<Vec<StoredAdapter>, ZooError> {
        let maps = self.linear_maps();
        let read = |folder| {
            let stored = read_adapter(folder, self.config().names(), &maps)?;
            self.with_floats(&stored).check_whole(&stored)?;
            // The head would need a table of its own.
            let has_table = stored.whole().any(|path| path.contains("embed_tokens"));
            if self.decoder().config().tie_word_embeddings && has_table {
                return Err(AdapterError::Unsupported {
                    setting: "modules_to_save".into(),
                    value: "embed_tokens of a model with tied embeddings".into(),
                });
            }
            Ok(stored)
        };
        let stored = folders.iter().map(read);
        let stored: Vec<StoredAdapter> = stored.collect::<Result<_, AdapterError>>()?;
        let mut whole: Vec<&str> = stored.iter().flat_map(StoredAdapter::whole).collect();
        whole.sort_unstable();
        match whole.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => {
                let name = pair[0].to_owned();
                Err(AdapterError::Several { name }.into())
            }
            None => Ok(stored),
        }
    }

    /// Writes the adapter into a folder as PEFT does (`adapter_config.json`, `adapter_model.safetensors`,
    /// f32), in the place of one that is there; see [`write_adapter`].
    ///
    /// # Errors
    /// [`AdapterError::NotAdapted`], [`AdapterError::PutIn`], [`AdapterError::Write`].
    pub fn save_adapter(&self, folder: impl AsRef<Path>) -> Result<(), ZooError> {
        let (mut model, mut has_gains) = (self.clone(), false);
        let adapters = linears(&mut model)
            .into_iter()
            .filter_map(|(path, linear)| {
                let LowRank {
                    down,
                    up,
                    scaling,
                    gain,
                    dropout: _,
                } = linear.adapter.take()?;
                has_gains |= gain.is_some();
                Some(NewAdapter {
                    path,
                    down: down.val(),
                    up: up.val(),
                    alpha: scaling.alpha,
                    rank_stabilized: scaling.rank_stabilized,
                })
            });
        let adapters: Vec<NewAdapter<B>> = adapters.collect();
        if has_gains {
            let what = "magnitudes (DoRA)";
            return Err(AdapterError::PutIn { what }.into());
        }
        let (names, others) = (self.config().names(), self.names_of(&Kept::of(self).all));
        let folder = folder.as_ref();
        Ok(write_adapter(
            folder,
            names,
            &self.linear_maps(),
            &others,
            &adapters,
        )?)
    }

    /// The model with its adapters added to the weights, in f32 and rounded once to the weights' type. What
    /// was frozen stays frozen.
    pub fn merge_adapters(mut self) -> Self {
        let linears = linears(&mut self).into_iter();
        linears.for_each(|(_, linear)| linear.merge());
        self
    }

    /// The model without its adapters. What was frozen stays frozen.
    pub fn without_adapters(mut self) -> Self {
        let linears = linears(&mut self).into_iter();
        linears.for_each(|(_, linear)| linear.adapter = None);
        self
    }

    /// Numbers in the adapters: what is trained.
    pub fn adapter_parameters(&self) -> usize {
        let mut model = self.clone();
        let adapters = { linears(&mut model).into_iter() }
            .filter_map(|(_, linear)| linear.adapter.as_ref().map(Module::num_params));
        adapters.sum()
    }

    /// Puts an adapter beside every weight for which there is one.
    fn with_adapters(
        &self,
        mut adapter: impl FnMut(&str, &Linear<B>) -> Option<LowRank<B>>,
    ) -> Result<Self, ZooError> {
        let mut model = self.clone().no_grad();
        for (path, linear) in linears(&mut model) {
            if linear.adapter.is_some() {
                return Err(AdapterError::Adapted.into());
            }
            linear.adapter = adapter(&path, linear);
        }
        Ok(model)
    }

    /// The same with floats in the place of codes where the adapter has a whole weight.
    fn with_floats(&self, stored: &StoredAdapter) -> Self {
        let mut model = self.clone();
        let mut weights = Vec::new();
        model.weights("", &mut weights);
        weights.retain(|(path, _)| stored.whole().any(|whole| whole == path));
        let blocks = weights.into_iter().flat_map(|(_, blocks)| blocks);
        for block in blocks.filter(|block| block.format().is_some()) {
            *block = block.val().into();
        }
        model
    }

    /// All linear maps, and what checkpoints call them.
    fn linear_maps(&self) -> Vec<LinearMap> {
        let (mut model, names) = (self.clone(), self.config().names());
        let maps = linears(&mut model).into_iter().map(|(path, linear)| {
            let name = self.name_of(&path);
            LinearMap::new(names, path, name, shape(linear))
        });
        maps.collect()
    }

    fn names_of(&self, paths: &[String]) -> Vec<String> {
        paths.iter().map(|path| self.name_of(path)).collect()
    }

    /// What a checkpoint calls the module at a path.
    fn name_of(&self, path: &str) -> String {
        let name = self.config().file_name(&format!("{path}.weight"));
        let name = name.and_then(|name| Some(name.strip_suffix(".weight")?.to_owned()));
        name.unwrap_or_else(|| path.to_owned())
    }
}

/// A change that was read, beside the weight.
fn low_rank<B: Backend>(stored: &StoredChange, linear: &Linear<B>) -> LowRank<B> {
    let device = linear.weight.device();
    let tensor = |data: &TensorData| Tensor::from_data(data.clone(), (&device, DType::F32));
    let scaling = Scaling {
        alpha: stored.alpha,
        rank_stabilized: stored.rank_stabilized,
    };
    let change = LowRank::new(tensor(&stored.down), tensor(&stored.up), scaling);
    match &stored.magnitudes {
        Some(magnitudes) => {
            let magnitudes = Tensor::from_data(magnitudes.clone(), (&device, DType::F32));
            change.with_magnitudes(magnitudes, linear.weight.val())
        }
        None => change,
    }
}

fn linears<B: Backend>(model: &mut Model<B>) -> Vec<(String, &mut Linear<B>)> {
    let mut found = Vec::new();
    model.linears("", &mut found);
    found
}

/// `[out, in]`
fn shape<B: Backend>(linear: &Linear<B>) -> [usize; 2] {
    linear.weight.dims()
}

/// Paths of modules whose weight takes no adapter.
#[derive(Default)]
struct Kept {
    /// Names from the root, with the kind of module that each lies in.
    path: Vec<(String, String)>,
    vocabularies: Vec<String>,
    /// The vocabularies, too.
    all: Vec<String>,
}

impl Kept {
    fn of<B: Backend>(model: &Model<B>) -> Self {
        let mut kept = Self::default();
        model.visit(&mut kept);
        kept
    }
}

impl<B: Backend> ModuleVisitor<B> for Kept {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push((name.to_owned(), container_type.to_owned()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<B, D>>) {
        let weight = self.path.iter().rposition(|(name, _)| name == "weight");
        let Some((at, (_, kind))) = weight.and_then(|at| Some((at, self.path.get(at)?))) else {
            return;
        };
        // The name of the family is not part of a path.
        let names = self.path[..at].iter();
        let names = names.filter(|(_, kind)| !kind.starts_with("Enum:"));
        let names: Vec<&str> = names.map(|(name, _)| name.as_str()).collect();
        let path = names.join(".");
        if kind == "Struct:Linear" || self.all.contains(&path) {
            return;
        }
        if kind == "Struct:Vocabulary" {
            self.vocabularies.push(path.clone());
        }
        self.all.push(path);
    }
}
