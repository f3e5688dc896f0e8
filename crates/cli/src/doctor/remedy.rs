//! What to do about a folder that cannot be opened: what its user has decides, not the words of the
//! error.

use std::path::Path;

use reroute_checkpoint::CheckpointError;
use reroute_zoo::{AdapterError, FamilyError, ModelType, Part, Problem, ZooError, model_types};
use serde_json::Value;

/// The remedy where there is no checkpoint.
pub(super) const HOLDS_CONFIG: &str = "give the folder that holds config.json to --model";

/// Largest settings file that is looked into, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What a folder holds, as far as it says what its user has.
#[derive(Default)]
pub(super) struct Contents {
    folder: String,
    /// Names of all entries.
    names: Vec<String>,
    config: Value,
    adapter: Value,
}

impl Contents {
    /// Looks into a folder; what cannot be read is not there.
    pub(super) fn of(folder: &Path) -> Self {
        let entries = folder.read_dir().into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let json = |name: &str| {
            let path = folder.join(name);
            let small = path.metadata().is_ok_and(|file| file.len() <= MAX_BYTES);
            let text = small.then(|| std::fs::read(&path).ok()).flatten();
            text.and_then(|text| serde_json::from_slice(&text).ok())
        };
        Self {
            folder: folder.display().to_string(),
            names: names.collect(),
            config: json("config.json").unwrap_or_default(),
            adapter: json("adapter_config.json").unwrap_or_default(),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    fn has_end(&self, end: &str) -> bool {
        self.names.iter().any(|name| name.ends_with(end))
    }

    /// What to do about a part that cannot be used.
    pub(super) fn remedy(&self, problem: &Problem) -> String {
        match (problem.part, &problem.error) {
            (_, ZooError::Family(FamilyError::Option { .. } | FamilyError::NoPixels)) => {
                "leave the flag out".into()
            }
            (_, ZooError::UnknownFamily { found, .. }) => self.instead_of(found),
            (_, ZooError::LanguageModel { found }) => format!(
                "add its tower if it is GGUF (--mmproj FILE), make a model of it and a tower (reroute convert \
                 --assemble llava), or take one that has both: {}",
                nearest(found)
            ),
            (Part::Adapter, ZooError::Adapter(AdapterError::Unsupported { .. })) => {
                "merge it in Python: \
                 PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(NEW), and give NEW \
                 to --model"
                    .into()
            }
            (Part::Config, ZooError::Family(_)) => {
                let family = self.config["model_type"].as_str();
                variant(&nearest(family.unwrap_or_default()))
            }
            (_, ZooError::TemplateOutput { .. }) => {
                "take the chat template, tokenizer.json and config.json of one revision".into()
            }
            (_, ZooError::Family(FamilyError::ImageSize { .. })) => {
                "take preprocessor_config.json and config.json of one revision".into()
            }
            (part, ZooError::Checkpoint(error)) => self.of_checkpoint(part, error),
            (part, _) => again(part),
        }
    }

    fn of_checkpoint(&self, part: Part, error: &CheckpointError) -> String {
        use CheckpointError as Error;
        match error {
            Error::Pickle { .. } => {
                let folder = &self.folder;
                format!(
                    "reroute convert --from {folder} --to NEW --allow-pickle, if you trust its author; \
                     LLaVA as its authors published it also takes --vision-tower and --tokenizer"
                )
            }
            Error::MissingFile { .. } | Error::NoWeights { .. } | Error::IsAdapter { .. } => {
                self.of_missing(part)
            }
            Error::MissingShards { .. } => "finish the download".into(),
            Error::LinkOutside { .. } => {
                "put the file itself into the folder, or give the folder that holds it to --model"
                    .into()
            }
            Error::Read { .. } => "check the permissions of the file, and the disk".into(),
            Error::Module(_) | Error::Tensor { .. } | Error::Quantised { .. } => {
                self.quantised().unwrap_or_else(|| {
                    "give config.json and weights of the same model and revision".into()
                })
            }
            _ => again(part),
        }
    }

    /// What to do where a file is missing: often the folder holds something else in its place.
    fn of_missing(&self, part: Part) -> String {
        let folder = &self.folder;
        if !self.adapter.is_null() {
            let base = self.adapter["base_model_name_or_path"].as_str();
            let base = base.unwrap_or("its base model");
            return format!(
                "this is an adapter for {base}, not a model: give that to --model, and {folder} to --adapter"
            );
        }
        if self.has("snapshots") {
            return format!("give a folder in {folder}/snapshots to --model");
        }
        if self.has_end("onnx") {
            return "models in ONNX are not supported; nearest is the checkpoint in safetensors that they were made \
                    from (its repository usually has the same name without ONNX); a vision tower becomes part of a \
                    model by reroute convert --assemble llava"
                .into();
        }
        let is_slow = self.has("tokenizer.model");
        let is_split = self.has("vocab.json") && self.has("merges.txt");
        match part {
            Part::Tokenizer if is_slow || is_split => format!(
                "make tokenizer.json of {} in Python: \
                 AutoTokenizer.from_pretrained(\"{folder}\").save_pretrained(\"{folder}\")",
                if is_slow {
                    "tokenizer.model"
                } else {
                    "vocab.json and merges.txt"
                }
            ),
            Part::Config => format!("finish the download, or {HOLDS_CONFIG}"),
            _ => "finish the download: take the file from where the others came from".into(),
        }
    }

    /// What to do about weights that are quantised, if they are.
    fn quantised(&self) -> Option<String> {
        let how = self.config["quantization_config"]["quant_method"].as_str()?;
        if QUANTISED.contains(&how) {
            return None;
        }
        let name = self.config["_name_or_path"].as_str();
        let name = name.map_or(String::new(), |name| format!(" ({name})"));
        Some(match how {
            "bitsandbytes" => format!(
                "weights of bitsandbytes are not supported: take the checkpoint that they were made from{name}, or \
                 make one in Python: AutoModelForImageTextToText.from_pretrained(\"{}\").dequantize()\
                 .save_pretrained(NEW)",
                self.folder
            ),
            _ => format!(
                "weights quantised by {how} are not supported ({} are); nearest is the checkpoint that they \
                 were made from{name}, with --dtype f16 or bf16 for half the memory",
                QUANTISED.join(", ")
            ),
        })
    }

    /// What to use instead of a model of another family.
    fn instead_of(&self, family: &str) -> String {
        let is_tower =
            family.contains("clip") || family.contains("siglip") || family.contains("dino");
        let is_vision = !self.config["vision_config"].is_null() || family.contains("vl");
        let nearest = nearest(family);
        match family {
            "" => HOLDS_CONFIG.into(),
            "llava_llama" => format!(
                "this is LLaVA as its authors published it: reroute convert --from {} --to NEW \
                 --vision-tower CLIP --tokenizer {nearest}",
                self.folder
            ),
            _ if is_tower => {
                format!("this is a vision tower alone; nearest is a model with one: {nearest}")
            }
            _ if is_vision => format!("{family} is not supported; nearest is {nearest}"),
            _ => format!("{family} is no vision-language model; nearest is one: {nearest}"),
        }
    }
}

/// Ways to quantise weights that are read.
const QUANTISED: [&str; 5] = ["fp8", "fbgemm_fp8", "compressed-tensors", "awq", "gptq"];

/// What to do about a folder that cannot be opened; `otherwise` if that is nothing else.
pub(super) fn of_folder(error: &anyhow::Error, otherwise: &str) -> String {
    match error.downcast_ref() {
        Some(CheckpointError::NotCached { repository, .. }) => format!("hf download {repository}"),
        Some(CheckpointError::Gguf { .. }) => {
            "do what it says there, or take another file of the model, of a kind that \
             is read (docs/checkpoints.md)"
                .into()
        }
        Some(CheckpointError::MissingFile { .. }) => "finish the download".into(),
        Some(CheckpointError::NoSuchFile { .. }) => "check the path".into(),
        Some(CheckpointError::NoGguf { .. }) => "leave --mmproj out".into(),
        Some(CheckpointError::SeveralGguf { .. }) => "--model FILE --mmproj FILE".into(),
        Some(CheckpointError::NoLanguageModel { .. }) => "download the language model, too".into(),
        _ => otherwise.into(),
    }
}

/// Letters that two types begin with in common, at least, if they have anything to do with each other.
const ALIKE: usize = 3;

/// The checkpoint that is nearest to a model of this type: of what can be opened, the last whose type begins
/// with most of the same letters, or the first if none begins alike.
fn nearest(model_type: &str) -> String {
    let alike = |known: &ModelType| {
        let pairs = known.name.bytes().zip(model_type.bytes());
        pairs.take_while(|(a, b)| a == b).count()
    };
    let known = model_types();
    let nearest = known.iter().filter(|known| alike(known) >= ALIKE);
    let nearest = nearest.max_by_key(|known| alike(known)).or(known.first());
    nearest.map_or(String::new(), |known| {
        format!("{} ({})", known.checkpoint, known.title)
    })
}

/// A variant of a known family.
fn variant(nearest: &str) -> String {
    format!(
        "this variant is not supported, nearest is {nearest}; if config.json was changed, take the one of the \
         weights' own revision"
    )
}

/// What to do about a file that is damaged.
fn again(part: Part) -> String {
    match part {
        Part::Config => "download it again, from the same revision as the weights".into(),
        Part::Weights => {
            "download all weight files again, from the same revision as config.json".into()
        }
        Part::ChatTemplate => {
            "remove the template to use the family's own, or download it again".into()
        }
        Part::Adapter => "give the model that the adapter was trained for to --model".into(),
        Part::Grounding => "correct the file, or remove it to use the family's own prompt".into(),
        _ => "download this file again, from the same revision as the weights".into(),
    }
}
