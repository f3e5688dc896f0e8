//! A model of llama.cpp as the folder that it would be on Hugging Face.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Value, json};

use super::Gguf;
use super::header::MAGIC;
use super::language::Language;
use super::template::template_with_images;
use super::tower::Tower;
use super::vocabulary::Vocabulary;
use crate::shards::Shards;
use crate::{CONFIG, CheckpointError, Folder, TOKENIZER_MAX_BYTES, TensorInfo, json_bytes};

const EXTENSION: &str = ".gguf";
const TOKENIZER: &str = "tokenizer.json";
/// Files that count for more than what a GGUF file says, where they lie beside it.
const BESIDE: [&str; 10] = [
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "grounding.json",
];
/// What there may be several of.
const LANGUAGES: &str = "language models";
const TOWERS: &str = "towers (mmproj)";
/// Most GGUF files of a folder that are looked at.
const MAX_FILES: usize = 256;

/// Whether a path is that of a GGUF file, by its name or its first bytes.
pub(crate) fn is_gguf(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let is_called = name.is_some_and(|name| name.ends_with(EXTENSION));
    let begins = || {
        let mut magic = [0; MAGIC.len()];
        let file = path.is_file().then(|| File::open(path).ok())?;
        file?.read_exact(&mut magic).ok()?;
        Some(magic == *MAGIC)
    };
    !path.is_dir() && (is_called || begins() == Some(true))
}

/// A file of a folder.
struct Place<'a> {
    folder: &'a Folder,
    name: String,
    file: Gguf,
}

impl Place<'_> {
    /// Whether it is a tower and not a language model.
    fn is_tower(&self) -> bool {
        let named = |key| match self.file.metadata.get(key) {
            Some(super::GgufValue::Text(text)) => Some(text.as_str()),
            _ => None,
        };
        named("general.architecture") == Some("clip")
    }
}

impl Folder {
    /// A language model of llama.cpp, and its tower (the `mmproj` file), as the folder that the two would be on
    /// Hugging Face. Without `mmproj`, the tower is the one that lies beside the language model; if there is
    /// none, the folder is that of a language model.
    ///
    /// A `tokenizer.json`, a template or settings that lie beside the language model count for more than what it
    /// says. Of a split file, `model` is the first part.
    ///
    /// # Errors
    /// [`CheckpointError::Gguf`] if a file is broken, of a kind that is not read, or not of the other's model;
    /// [`CheckpointError::SeveralGguf`] if several towers lie beside the language model.
    pub fn open_gguf(
        model: impl AsRef<Path>,
        mmproj: Option<&Path>,
    ) -> Result<Self, CheckpointError> {
        let model = model.as_ref();
        if model.is_dir() {
            let folder = Self::on_disk(model)?;
            let (language, towers) = sorted(&folder)?;
            return match mmproj {
                Some(mmproj) => with_tower(&language, mmproj),
                None => present(&language, only(&folder, TOWERS, &towers)?),
            };
        }
        let (folder, name) = locate(model)?;
        let language = open(&folder, name)?;
        if language.is_tower() {
            let reason =
                "it is a vision tower: give the language model, and this as its mmproj file";
            return Err(language.file.refuse(reason.into()));
        }
        if let Some(mmproj) = mmproj {
            return with_tower(&language, mmproj);
        }
        // Other files beside it may be of kinds that are not read; nobody has asked for them.
        let mut towers: Vec<_> = all(&folder).filter_map(Result::ok).collect();
        towers.retain(Place::is_tower);
        present(&language, only(&folder, TOWERS, &towers)?)
    }

    /// A language model alone, whatever tower lies beside it, as the folder that it would be on Hugging Face; a
    /// folder of Hugging Face is what it is.
    ///
    /// # Errors
    /// As those of [`open_gguf`](Self::open_gguf).
    pub fn open_decoder(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        if !is_gguf(path) {
            return Self::open(path);
        }
        let (folder, name) = locate(path)?;
        let file = open(&folder, name)?;
        let is_qwen_vl = Language::new(&file.file).is_ok_and(|language| language.is_qwen_vl());
        match is_qwen_vl {
            true => Err(file.file.refuse(
                "it is of a Qwen-VL, which has a tower of its own; a decoder is llama or qwen2"
                    .into(),
            )),
            false => present(&file, None),
        }
    }

    /// The same of a folder that has both and no other weights; any other folder stays what it is.
    ///
    /// # Errors
    /// As those of [`open_gguf`](Self::open_gguf); [`CheckpointError::SeveralGguf`] if there are several
    /// language models or towers, so that a file has to be named.
    pub fn with_gguf(self) -> Result<Self, CheckpointError> {
        if self.has_weights() || self.find(|name| name.ends_with(EXTENSION)).is_none() {
            return Ok(self);
        }
        let (language, towers) = sorted(&self)?;
        present(&language, only(&self, TOWERS, &towers)?)
    }
}

/// The only language model of a folder, and its towers.
fn sorted(folder: &Folder) -> Result<(Place<'_>, Vec<Place<'_>>), CheckpointError> {
    let found = all(folder).collect::<Result<Vec<_>, _>>()?;
    if found.is_empty() {
        return Err(CheckpointError::NoGguf {
            folder: folder.describe(),
        });
    }
    let (towers, mut languages): (Vec<_>, Vec<_>) = found.into_iter().partition(Place::is_tower);
    only(folder, LANGUAGES, &languages)?;
    let language = languages
        .pop()
        .ok_or_else(|| CheckpointError::NoLanguageModel {
            folder: folder.describe(),
        })?;
    Ok((language, towers))
}

/// A language model with the tower in a file.
fn with_tower(language: &Place<'_>, mmproj: &Path) -> Result<Folder, CheckpointError> {
    let (folder, name) = locate(mmproj)?;
    present(language, Some(&open(&folder, name)?))
}

/// The folder that a file lies in, and its name there.
fn locate(path: &Path) -> Result<(Folder, String), CheckpointError> {
    if path.is_dir() || !path.exists() {
        return Err(CheckpointError::NoSuchFile { path: path.into() });
    }
    let name = path.file_name().and_then(|name| name.to_str());
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    let folder = Folder::on_disk(parent.unwrap_or(Path::new(".")))?;
    let name = name.map(str::to_owned);
    let name = name.ok_or_else(|| CheckpointError::FileName {
        folder: folder.describe(),
        name: path.display().to_string(),
    })?;
    Ok((folder, name))
}

fn open(folder: &Folder, name: String) -> Result<Place<'_>, CheckpointError> {
    let file = Gguf::open(folder, &name)?;
    Ok(Place { folder, name, file })
}

/// Every GGUF file of a folder; split ones by their first part.
fn all(folder: &Folder) -> impl Iterator<Item = Result<Place<'_>, CheckpointError>> {
    let is_later_part = |name: &str| {
        let stem = name.trim_end_matches(EXTENSION);
        let part = stem
            .rsplit_once("-of-")
            .and_then(|(stem, _)| stem.rsplit_once('-'));
        part.is_some_and(|(_, number)| number.parse().is_ok_and(|number: u32| number > 1))
    };
    let mut names = folder.names();
    names.retain(|name| name.ends_with(EXTENSION) && !is_later_part(name));
    names.sort();
    names.truncate(MAX_FILES);
    names.into_iter().map(|name| open(folder, name))
}

/// The one that there is, if any.
fn only<'a, 'f>(
    folder: &Folder,
    what: &'static str,
    found: &'a [Place<'f>],
) -> Result<Option<&'a Place<'f>>, CheckpointError> {
    match found {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        several => Err(CheckpointError::SeveralGguf {
            folder: folder.describe(),
            what,
            files: several.iter().map(|place| place.name.clone()).collect(),
        }),
    }
}

/// The files of Hugging Face that say what the two say.
fn present(place: &Place<'_>, tower: Option<&Place<'_>>) -> Result<Folder, CheckpointError> {
    let refuse = |reason| place.file.refuse(reason);
    let language = Language::new(&place.file).map_err(refuse)?;
    let tower = match tower {
        Some(found) => {
            let refuse = |reason| found.file.refuse(reason);
            let tower = Tower::new(&found.file).map_err(refuse)?;
            tower.check(&language).map_err(refuse)?;
            Some((found, tower))
        }
        None if language.is_qwen_vl() => {
            return Err(refuse(
                "it is the language model alone: give the mmproj file that was published with it"
                    .into(),
            ));
        }
        None => None,
    };
    let mut files = beside(place.folder)?;
    let mut made: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut add = |name: &str, value: &Value| made.insert(name.to_owned(), json_bytes(value));
    let is_llava = tower.as_ref().is_some_and(|(_, tower)| tower.is_llava());
    let mut config = language.config().map_err(refuse)?;
    // A tokenizer beside the file has numbers of its own for what it adds.
    let image = files.get(TOKENIZER).map(|tokenizer| image_of(tokenizer));
    let mut image = image.transpose().map_err(|source| CheckpointError::Json {
        file: place.folder.path_of(TOKENIZER),
        source,
    })?;
    if image.is_none() {
        let mut vocabulary = Vocabulary::new(language.keys).map_err(refuse)?;
        image = Some(match is_llava {
            true => Some(vocabulary.image().map_err(refuse)?),
            false => None,
        });
        add(TOKENIZER, &vocabulary.tokenizer().map_err(refuse)?);
        add("tokenizer_config.json", &vocabulary.settings());
        config.insert("eos_token_id".into(), json!(vocabulary.ends()));
        add(
            "generation_config.json",
            &json!({ "eos_token_id": vocabulary.ends() }),
        );
    }
    if is_llava && image == Some(None) {
        return Err(refuse(format!(
            "the {TOKENIZER} beside it has no token <image>: remove it, or add the token"
        )));
    }
    if let Some(template) = language.keys.text("tokenizer.chat_template") {
        // One that mentions them knows what to write.
        let template = match is_llava && !template.contains("image") {
            true => template_with_images(template),
            false => template.to_owned(),
        };
        made.insert("chat_template.jinja".into(), template.into_bytes());
    }
    let mut weights = Shards::empty();
    let names = match &tower {
        Some((_, tower)) => tower.language_names(),
        None => ("model", "lm_head"),
    };
    let tensors = weights.join(place.file.tensors.clone());
    let tensors = language.rename(tensors, names).map_err(refuse)?;
    insert(&mut weights, place, tensors)?;
    if let Some((found, tower)) = &tower {
        let refuse = |reason| found.file.refuse(reason);
        let special = |text: &str| language.token(text);
        let config = tower.config(config, &special, image.flatten());
        made.insert(CONFIG.into(), json_bytes(&config.map_err(refuse)?));
        for (name, settings) in tower.processors().map_err(refuse)? {
            made.insert(name, json_bytes(&settings));
        }
        let tensors = weights.join(found.file.tensors.clone());
        let tensors = tower.rename(tensors).map_err(refuse)?;
        insert(&mut weights, found, tensors)?;
    } else {
        made.insert(CONFIG.into(), json_bytes(&Value::Object(config)));
    }
    let of = place.file.file.clone();
    for (name, content) in made {
        files.entry(name).or_insert(content);
    }
    Ok(Folder::made(of, files.into_iter().collect(), weights))
}

fn insert(
    weights: &mut Shards,
    place: &Place<'_>,
    tensors: BTreeMap<String, TensorInfo>,
) -> Result<(), CheckpointError> {
    for (name, info) in tensors {
        if weights.insert(name.clone(), info).is_some() {
            return Err(CheckpointError::DuplicateKey {
                file: place.file.file.clone(),
                key: name,
            });
        }
    }
    Ok(())
}

/// Files that lie beside a GGUF file and count for more than it.
fn beside(folder: &Folder) -> Result<BTreeMap<String, Vec<u8>>, CheckpointError> {
    let there = BESIDE.into_iter().filter(|name| folder.has(name));
    let read = |name: &str| Ok((name.to_owned(), folder.read(name, TOKENIZER_MAX_BYTES)?));
    there.map(read).collect()
}

/// The number of `<image>` in a `tokenizer.json`.
fn image_of(tokenizer: &[u8]) -> Result<Option<usize>, serde_json::Error> {
    let tokenizer: Value = serde_json::from_slice(tokenizer)?;
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let mut images = added.filter(|token| token["content"] == "<image>");
    let id = images.next().and_then(|image| image["id"].as_u64());
    Ok(id.and_then(|id| usize::try_from(id).ok()))
}
