//! What will be written, to the byte, before anything is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use reroute_checkpoint::{
    CONFIG, CONFIG_MAX_BYTES, CONVERTED_FROM, Dtype, Folder, Format, INDEX, NewTensor, WeightsFile,
    coded_tensor, codes_note, dtype_of, forget_quantization, is_weight, json_bytes, set_codes,
    set_dtype, shard_index, shard_name, split,
};
use serde_json::Value;

use crate::assemble::{self, Assembled, Assembly};
use crate::companions::Companions;
use crate::journal::{self, Own};
use crate::original::{OriginalConfig, TOWER_PREFIX, is_original};
use crate::source::{Made, Recoded, SourceTensor, Stamp, Weights};
use crate::write::partial;
use crate::{Codes, ConvertError};

/// What a folder is opened by; one of them would hide another.
const WEIGHTS: [&str; 3] = ["model.bpk", "model.safetensors", INDEX];
/// What a vision tower brings along.
const PREPROCESSOR: &str = "preprocessor_config.json";

/// What a checkpoint is converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One Burnpack file, `model.bpk`.
    Burnpack,
    /// One safetensors file, `model.safetensors`.
    Safetensors,
    /// A folder that transformers loads: shards and their index.
    HuggingFace,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Job {
    /// Folder of the checkpoint, or its language model in GGUF.
    pub from: PathBuf,
    /// The tower that goes with a language model in GGUF, where it does not lie beside it.
    pub mmproj: Option<PathBuf>,
    /// Folder, or file of weights that ends in `.bpk` or `.safetensors`.
    pub to: PathBuf,
    /// Type of the weights, F32, F16 or BF16. As it is if `None`; of weights in fewer bits, what `config.json`
    /// says, or F32.
    pub dtype: Option<Dtype>,
    /// Weights that become codes of fewer bits. Without, those that `from` has in the form of
    /// [`coded_tensor`](reroute_checkpoint::coded_tensor) stay codes, if no `dtype` is asked for.
    pub codes: Option<Codes>,
    /// What to write; `None` means what the name of `to` says, or Burnpack.
    pub form: Option<Form>,
    /// What `from`, a decoder then, and `vision_tower` are assembled to.
    pub assembly: Option<Assembly>,
    /// Folder of the CLIP model, for LLaVA as its authors published it; of an assembly the tower, whose folder or
    /// ONNX file this is.
    pub vision_tower: Option<PathBuf>,
    /// Folder whose tokenizer and templates are used where `from` has none.
    pub tokenizer: Option<PathBuf>,
    /// Whether PyTorch's own files may be read.
    pub allow_pickle: bool,
    /// Whether finite values beyond the range of the new type become its largest value. Without it they
    /// are refused, as they are when weights are loaded: infinite, one would make every output NaN.
    pub clamp: bool,
    /// Largest shard of a Hugging Face folder, in bytes of data; one larger tensor is a shard, too.
    pub max_shard_bytes: u64,
}

impl Job {
    /// As it is, to Burnpack; shards are as large as transformers has long written them.
    pub fn new(from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        Self {
            from: from.into(),
            mmproj: None,
            to: to.into(),
            dtype: None,
            codes: None,
            form: None,
            assembly: None,
            vision_tower: None,
            tokenizer: None,
            allow_pickle: false,
            clamp: false,
            max_shard_bytes: 5_000_000_000,
        }
    }
}

/// A conversion that can be written.
pub struct Plan {
    pub(crate) weights: Vec<Weights>,
    pub(crate) files: Vec<PlannedFile>,
    pub(crate) companions: Companions,
    /// Folder that everything goes to.
    pub(crate) folder: PathBuf,
    /// Whether weights that are in it already would be put in the shade.
    shades: bool,
    /// Where a run that is interrupted leaves off.
    pub(crate) journal: PathBuf,
    /// What all this was read from.
    pub(crate) sources: Vec<Stamp>,
    pub(crate) clamp: bool,
}

/// One file of weights.
#[derive(Debug)]
pub struct PlannedFile {
    /// Where it will be.
    pub path: PathBuf,
    /// What it will hold, in order.
    pub tensors: Vec<NewTensor>,
    /// Where every byte of it will be.
    pub layout: WeightsFile,
    pub(crate) sources: Vec<SourceTensor>,
}

impl Plan {
    /// Opens the source and lays out the target. Reads headers only, but for pickles.
    pub fn new(job: &Job) -> Result<Self, ConvertError> {
        let named = named_form(&job.to).or(folder_form(&job.to));
        let usual = match job.assembly {
            Some(_) => Form::HuggingFace,
            None => Form::Burnpack,
        };
        let form = job.form.or(named).unwrap_or(usual);
        let target = Target::new(job, form)?;
        let folder = match (&job.assembly, &job.mmproj) {
            (Some(_), _) => Folder::open_decoder(&job.from)?,
            (None, Some(mmproj)) => Folder::open_gguf(&job.from, Some(mmproj))?,
            (None, None) => Folder::open(&job.from)?,
        };
        if !target.is_folder && (job.assembly.is_some() || folder.root().is_none()) {
            return Err(ConvertError::Target {
                path: job.to.clone(),
                problem: "a file holds weights alone, and there is no folder that holds the configuration and the \
                          tokenizer: give a folder"
                    .into(),
            });
        }
        let Assembled {
            weights,
            mut tensors,
            mut config,
            dtype,
            files: made,
        } = match &job.assembly {
            Some(assembly) => assemble::open(job, assembly, &folder)?,
            None => open(job, &folder)?,
        };
        let dtype = job.dtype.or(dtype);
        if let Some(how) = config["quantization_config"]["quant_method"].as_str()
            && !tensors.iter().any(|source| source.is_widened)
        {
            return Err(ConvertError::Quantised {
                path: job.from.clone(),
                how: how.to_owned(),
            });
        }
        for source in &mut tensors {
            source.find_codes(job, &weights);
        }
        // What a weight of fewer bits is, where nobody asks for another type.
        let said = dtype_of(&config);
        let mut companions = Companions::default();
        if target.is_folder {
            let is_old = |name: &str| job.assembly.is_some() && Assembled::is_old(name);
            companions.add(&folder, |name| !is_old(name))?;
            if let Some(path) = &job.tokenizer {
                companions.add(&Folder::open(path)?, |name| !is_old(name))?;
            }
            if let (Some(path), None) = (&job.vision_tower, &job.assembly) {
                // Its tokenizer is that of CLIP's own text model.
                companions.add(&Folder::open(path)?, |name| name == PREPROCESSOR)?;
            }
            for (name, content) in made {
                companions.make(name, content);
            }
            if let Some(dtype) = dtype {
                set_dtype(&mut config, dtype);
            }
            forget_quantization(&mut config);
            let formats = tensors.iter().filter_map(|source| source.codes);
            set_codes(&mut config, formats.map(Recoded::format).collect());
            let config = json_bytes(&config);
            companions.make(CONFIG, config);
        }
        let target_tensor = |source: &SourceTensor| {
            let widened = said.filter(|_| source.is_widened);
            target_tensor(source, dtype.or(widened))
        };
        // Wide elements first, so that all are aligned; then by name.
        tensors.sort_by_cached_key(|source| {
            let tensor = target_tensor(source);
            (Reverse(tensor.dtype.bitsize()), tensor.name)
        });
        let format = match form {
            Form::Burnpack => Format::Burnpack,
            Form::Safetensors | Form::HuggingFace => Format::Safetensors,
        };
        let shards = match form {
            Form::HuggingFace => split(tensors, job.max_shard_bytes, |source| {
                target_tensor(source).bytes()
            })?,
            Form::Burnpack | Form::Safetensors => vec![tensors],
        };
        let origin = weights.first().filter(|_| job.assembly.is_none());
        let origin = origin.map(Weights::origin).transpose()?.flatten();
        let notes = match format {
            Format::Burnpack => origin.map(|origin| (CONVERTED_FROM.to_owned(), origin)),
            Format::Safetensors => None,
        };
        let notes: BTreeMap<String, String> = notes.into_iter().collect();
        let mut files = Vec::with_capacity(shards.len());
        let count = shards.len();
        for (at, sources) in shards.into_iter().enumerate() {
            let tensors: Vec<_> = sources.iter().map(target_tensor).collect();
            let codes = sources.iter().filter_map(|source| {
                let (codes, columns) = (source.codes?, source.tensor.shape.last()?);
                Some(codes_note(&source.tensor.name, codes.format(), *columns))
            });
            let notes = notes.clone().into_iter().chain(codes).collect();
            files.push(PlannedFile {
                path: target.file(at, count),
                layout: WeightsFile::with_notes(format, &tensors, &notes)?,
                tensors,
                sources,
            });
        }
        if count > 1 {
            let shards = files.iter().map(|file| (file.name(), &file.tensors[..]));
            companions.make(INDEX, shard_index(shards));
        }
        let configs = [Some(&job.from), job.vision_tower.as_ref()];
        let configs = configs.into_iter().flatten().map(|path| path.join(CONFIG));
        let configs = configs.filter(|path| path.is_file());
        let mut sources = Vec::new();
        for weights in &weights {
            sources.extend(weights.stamps()?);
        }
        for path in configs.chain(companions.sources()) {
            sources.push(Stamp::of(path)?);
        }
        let plan = Self {
            sources,
            weights,
            files,
            companions,
            folder: target.folder,
            shades: target.shades,
            journal: target.journal,
            clamp: job.clamp,
        };
        plan.check_free(&journal::files(&plan.journal))?;
        // What cannot be read is noticed now, and not after the weights.
        plan.companions
            .contents()
            .try_for_each(|file| file.map(drop))?;
        Ok(plan)
    }

    /// Files of weights.
    pub fn files(&self) -> &[PlannedFile] {
        &self.files
    }

    /// How everything begins that will be in the folder.
    pub(crate) fn own_files(&self) -> impl Iterator<Item = Result<Own, ConvertError>> {
        let weights = self.files.iter();
        let weights = weights.map(|file| Ok(Own::weights(file.name(), &file.layout.header)));
        let companions = self.companions.contents();
        weights.chain(companions.map(|file| file.map(|(name, content)| Own::whole(name, &content))))
    }

    /// Nothing that is there is overwritten or put in the shade, but what the journal of an
    /// interrupted run knows.
    pub(crate) fn check_free(&self, own: &[Own]) -> Result<(), ConvertError> {
        if self.shades {
            check_free(&self.folder, own, WEIGHTS.into_iter())?;
        }
        let names = self.files.iter().map(PlannedFile::name);
        check_free(&self.folder, own, names.chain(self.companions()))
    }

    /// Whether files of the source lie in the folder that everything goes to.
    pub(crate) fn is_in_place(&self) -> bool {
        let target = self.folder.canonicalize().ok();
        let folders = self.sources.iter().map(|source| source.path.parent());
        let mut folders = folders.map(|folder| folder.and_then(|it| it.canonicalize().ok()));
        folders.any(|folder| folder == target)
    }

    /// What has been read is of one piece: no file of the source has changed.
    pub(crate) fn check_sources(&self) -> Result<(), ConvertError> {
        self.sources.iter().try_for_each(Stamp::check)
    }

    /// Names of the small files that go beside them.
    pub fn companions(&self) -> impl Iterator<Item = &str> {
        self.companions.names()
    }

    /// Small files that turned out too large to be any, and are not copied.
    pub fn left_out(&self) -> &[PathBuf] {
        &self.companions.left_out
    }

    /// Length of all files of weights, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.layout.bytes).sum()
    }
}

impl PlannedFile {
    pub(crate) fn name(&self) -> &str {
        let name = self.path.file_name().and_then(|name| name.to_str());
        name.unwrap_or_default() // `Target` has made sure that it is one.
    }

    /// Where the tensor `at` ends, in bytes from the start of the file.
    pub(crate) fn end(&self, at: usize) -> u64 {
        self.layout.offsets[at] + self.tensors[at].bytes().unwrap_or(0)
    }
}

/// Opens everything that tensors come from; they have their new names then.
fn open(job: &Job, folder: &Folder) -> Result<Assembled, ConvertError> {
    let mut config = read_config(folder)?;
    let path = job.from.join(CONFIG);
    let mut weights = vec![Weights::open(folder, &job.from, job.allow_pickle)?];
    let mut original = None;
    if is_original(&config) {
        let parsed = OriginalConfig::parse(&config, &path)?;
        let tower = job
            .vision_tower
            .as_ref()
            .ok_or_else(|| ConvertError::Original {
                path: path.clone(),
                problem: "it names a CLIP tower; download that, too, and add --vision-tower DIR"
                    .into(),
            })?;
        let tower_folder = Folder::open(tower)?;
        let tower_config = read_config(&tower_folder)?;
        config = parsed.to_hub(&tower_config, &tower.join(CONFIG))?;
        weights.push(Weights::open(&tower_folder, tower, job.allow_pickle)?);
        original = Some(parsed);
    } else if job.vision_tower.is_some() {
        return Err(ConvertError::Original {
            path,
            problem: "it is not of LLaVA as its authors published it; leave out --vision-tower"
                .into(),
        });
    }
    let mut tensors = Vec::new();
    for (at, part) in weights.iter().enumerate() {
        let is_tower = |source: &SourceTensor| source.tensor.name.starts_with(TOWER_PREFIX);
        if at > 0 && tensors.iter().any(is_tower) {
            break; // A tower that was trained on; only the config of the other is needed.
        }
        for mut tensor in part.tensors() {
            let stored_name = tensor.name.clone();
            let added_rows = match &original {
                Some(original) => original.rename(&mut tensor, at > 0, &path)?,
                None => Some(0),
            };
            if let Some(added_rows) = added_rows {
                tensors.push(SourceTensor {
                    tensor,
                    is_widened: part.is_widened(&stored_name),
                    weights: at,
                    stored_name,
                    made: Made::Stored(added_rows),
                    codes: None,
                });
            }
        }
    }
    check_names(&tensors)?;
    Ok(Assembled {
        weights,
        tensors,
        config,
        dtype: None,
        files: BTreeMap::new(),
    })
}

fn check_names(tensors: &[SourceTensor]) -> Result<(), ConvertError> {
    let mut names = BTreeSet::new();
    for source in tensors {
        if !names.insert(&source.tensor.name) {
            return Err(ConvertError::Duplicate {
                name: source.tensor.name.clone(),
            });
        }
    }
    Ok(())
}

/// Reads `config.json`.
fn read_config(folder: &Folder) -> Result<Value, ConvertError> {
    Ok(folder.read_json(CONFIG, CONFIG_MAX_BYTES)?)
}

/// A tensor as it will be written.
fn target_tensor(source: &SourceTensor, dtype: Option<Dtype>) -> NewTensor {
    let mut tensor = source.tensor.clone();
    if let (Some(codes), &[rows, columns]) = (source.codes, &tensor.shape[..])
        && let Some(coded) = coded_tensor(&tensor.name, codes.format(), [rows, columns])
    {
        return coded;
    }
    if let Some(dtype) = dtype.filter(|_| is_weight(tensor.dtype)) {
        tensor.dtype = dtype;
    }
    tensor
}

/// What the name of a target says: a file of weights, or (`None`) a folder.
fn named_form(to: &Path) -> Option<Form> {
    match to.extension()?.to_str()? {
        "bpk" => Some(Form::Burnpack),
        "safetensors" => Some(Form::Safetensors),
        _ => None,
    }
}

/// What the name of a folder says that is called like a format.
fn folder_form(to: &Path) -> Option<Form> {
    match to.file_name()?.to_str()? {
        "burnpack" => Some(Form::Burnpack),
        "safetensors" => Some(Form::Safetensors),
        "hf" => Some(Form::HuggingFace),
        _ => None,
    }
}

/// Where files go.
struct Target {
    folder: PathBuf,
    is_folder: bool,
    /// Whether a checkpoint that is not the source would be opened by the new file.
    shades: bool,
    /// Name of the only file of weights.
    single: PathBuf,
    journal: PathBuf,
}

fn check_free<'a>(
    folder: &Path,
    own: &[Own],
    mut names: impl Iterator<Item = &'a str>,
) -> Result<(), ConvertError> {
    let is_there = |path: &Path| path.symlink_metadata().is_ok();
    let taken = names.find_map(|name| {
        let path = folder.join(name);
        let unfinished = partial(&path);
        if is_there(&path) && !own.iter().any(|own| own.is(folder, name)) {
            Some(path)
        } else if is_there(&unfinished) && !own.iter().any(|own| own.is_named(name)) {
            Some(unfinished)
        } else {
            None
        }
    });
    taken.map_or(Ok(()), |path| Err(ConvertError::Occupied { path }))
}

impl Target {
    fn new(job: &Job, form: Form) -> Result<Self, ConvertError> {
        let named = named_form(&job.to);
        let refuse = |problem: String| {
            let path = job.to.clone();
            Err(ConvertError::Target { path, problem })
        };
        if named.is_some_and(|named| named != form) {
            return refuse("its name and --format disagree; change one of them".to_owned());
        }
        if job.to.extension().is_some_and(|end| end == "gguf") {
            return refuse("GGUF is not written; give a folder".to_owned());
        }
        let name = job.to.file_name().map(|name| name.to_str());
        let is_text = |name: &str| !name.contains(char::is_control);
        if named.is_some() && !name.flatten().is_some_and(is_text) {
            return refuse("its name is no text; choose another".to_owned());
        }
        let is_folder = named.is_none();
        let single = match (is_folder, form) {
            (false, _) => job.to.clone(),
            (true, Form::Burnpack) => job.to.join("model.bpk"),
            (true, Form::Safetensors | Form::HuggingFace) => job.to.join("model.safetensors"),
        };
        let folder = match job.to.parent() {
            _ if is_folder => job.to.clone(),
            Some(parent) if parent != Path::new("") => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        if is_folder && job.to.is_file() {
            let problem =
                "it is a file; give a folder, or a name that ends in .bpk or .safetensors";
            return refuse(problem.to_owned());
        }
        let journal = single.with_extension("journal");
        let is_opened = WEIGHTS.iter().any(|name| single.ends_with(name));
        let is_source = || folder.canonicalize().ok() == job.from.canonicalize().ok();
        let shades = is_folder || is_opened && !is_source();
        if shades {
            check_free(&folder, &journal::files(&journal), WEIGHTS.into_iter())?;
        }
        Ok(Self {
            folder,
            is_folder,
            shades,
            single,
            journal,
        })
    }

    /// One of `count` files.
    fn file(&self, at: usize, count: usize) -> PathBuf {
        match count {
            1 => self.single.clone(),
            _ => self.folder.join(shard_name(at, count)),
        }
    }
}
