//! What can be known of a checkpoint folder before a weight is read, and all that is wrong with it.

use std::fmt;
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reroute_checkpoint::{CONFIG_MAX_BYTES, Folder, Shards, TOKENIZER_MAX_BYTES};
use vision_encoder::Grid;

use crate::end_tokens::end_tokens;
use crate::grounding::GroundingFormat;
use crate::messages::{Content, Message, Role};
use crate::vlm::{GenerationConfig, check_vocabulary, encode_messages, optional};
use crate::{
    ChatTemplate, Model, ModelConfig, OpenOptions, Preprocessor, Tokenizer, View, Visual, ZooError,
};

/// What a question can be checked against before the weights are read.
#[derive(Debug, Clone)]
pub struct Outline {
    /// The resolved configuration.
    pub config: ModelConfig,
    /// Preprocessing of images and videos.
    pub preprocessor: Arc<dyn Preprocessor>,
}

impl Outline {
    /// Reads `config.json` and the settings of the preprocessor.
    pub fn open(folder: &Folder, options: &OpenOptions) -> Result<Self, ZooError> {
        let config = ModelConfig::open(folder)?;
        let preprocessor = config.preprocessor(folder, &options.images)?;
        Ok(Self {
            config,
            preprocessor,
        })
    }

    /// Whether the model can look at something of this kind, shape and pace.
    pub fn check(&self, visual: &Visual) -> Result<(), ZooError> {
        Ok(self.preprocessor.check(visual)?)
    }
}

/// What could be read of a folder, and what could not. [`Vlm::open`](crate::Vlm::open) succeeds on a
/// folder without problems, if its weights can be read and fit into memory.
#[derive(Debug, Default)]
pub struct Checkup {
    /// The resolved configuration.
    pub config: Option<ModelConfig>,
    /// Preprocessing of images and videos.
    pub preprocessor: Option<Arc<dyn Preprocessor>>,
    /// Parameters of the model that the configuration describes.
    pub parameters: Option<Parameters>,
    /// What kind of files the weights are in, and of which types, for people.
    pub form: Option<String>,
    /// Whether weights are of fewer bits there, and widened while they are read.
    pub is_widened: bool,
    /// Everything found, in the order in which files are opened.
    pub problems: Vec<Problem>,
    /// Whether nothing says which token ends an answer: it goes on until it is cut off.
    pub endless: bool,
}

/// The file or files of a folder that something is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// `config.json`
    Config,
    /// `tokenizer.json`
    Tokenizer,
    /// `generation_config.json`
    GenerationConfig,
    /// `grounding.json`
    Grounding,
    /// The weights, in whatever files they are.
    Weights,
    /// `preprocessor_config.json`, or `processor_config.json`
    Preprocessor,
    /// The chat template, wherever it is.
    ChatTemplate,
    /// Low-rank adapters.
    Adapter,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Config => "config.json",
            Self::Tokenizer => "tokenizer.json",
            Self::GenerationConfig => "generation_config.json",
            Self::Grounding => "grounding.json",
            Self::Weights => "weights",
            Self::Preprocessor => "preprocessor_config.json",
            Self::ChatTemplate => "chat template",
            Self::Adapter => "adapter",
        })
    }
}

/// Something that keeps a folder from being opened.
#[derive(Debug)]
pub struct Problem {
    /// What it is about.
    pub part: Part,
    /// What is wrong; its message says what to do.
    pub error: ZooError,
}

/// Numbers in the parameters of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parameters {
    /// In all of them.
    pub elements: u64,
    /// In the largest tensor that is kept in one piece.
    pub largest_elements: u64,
    /// In weights that stay in codes of fewer bits.
    pub coded_elements: u64,
    /// Bytes of those.
    pub coded_bytes: u64,
    /// In adapters, which are f32 whatever the type of the others.
    pub adapter_elements: u64,
}

impl Parameters {
    /// Bytes of all of them but adapters, if numbers that are not in codes have so many bytes.
    pub fn bytes(&self, float_bytes: usize) -> u64 {
        let floats = self.elements.saturating_sub(self.coded_elements);
        let floats = floats.saturating_mul(float_bytes as u64);
        floats.saturating_add(self.coded_bytes)
    }
}

impl Checkup {
    /// Looks at every file that opening the folder would need, whatever is wrong with the others.
    pub fn of<B: Backend>(folder: &Folder, options: &OpenOptions, device: &B::Device) -> Self {
        let mut found = Self::default();
        found.config = found.note(Part::Config, ModelConfig::open(folder));
        let tokenizer = tokenizer(folder, found.config.as_ref());
        let tokenizer = found.note(Part::Tokenizer, tokenizer);
        let generation = optional::<GenerationConfig>(folder, "generation_config.json");
        let generation = found.note(Part::GenerationConfig, generation);
        if folder.has("grounding.json") {
            let format = folder.read_json::<GroundingFormat>("grounding.json", CONFIG_MAX_BYTES);
            found.note(Part::Grounding, format.map_err(ZooError::from));
        }
        let shards = Shards::open(folder).map_err(ZooError::from);
        let shards = found.note(Part::Weights, shards);
        found.form = shards.as_ref().map(Shards::form);
        found.is_widened = shards.as_ref().is_some_and(Shards::is_widened);
        if let Some(config) = found.config.clone() {
            let preprocessor = config.preprocessor(folder, &options.images);
            let preprocessor = preprocessor.map_err(ZooError::from);
            found.preprocessor = found.note(Part::Preprocessor, preprocessor);
            let template = ChatTemplate::open(folder, config.dialect());
            let template = found.note(Part::ChatTemplate, template);
            if let (Some(tokenizer), Some(template)) = (tokenizer, template) {
                found.note(Part::ChatTemplate, ask(&config, &tokenizer, &template));
                let ends = generation.and_then(|generation| generation.eos_token_id);
                let (ends, vocab_size) = (ends.as_ref(), config.decoder().vocab_size);
                let ends = end_tokens(folder, ends, vocab_size, &tokenizer, &template);
                found.endless = ends.is_ok_and(|ends| ends.is_empty());
            }
            let model = Model::<B>::new(&config, device);
            if let Some(mut model) = found.note(Part::Config, model) {
                let mut parameters = Parameters::default();
                model.visit(&mut parameters);
                if let Some(shards) = shards {
                    found.note(Part::Weights, model.check_fit(&config, &shards));
                    let (weights, names) = (options.weights, config.names());
                    (parameters.coded_elements, parameters.coded_bytes) =
                        weights.sizes(&mut model, &shards, names);
                }
                let adapters = found.note(Part::Adapter, model.read_adapters(&options.adapters));
                let changes = adapters
                    .iter()
                    .flatten()
                    .flat_map(|adapter| &adapter.changes);
                let elements =
                    changes.map(|change| change.down.num_elements() + change.up.num_elements());
                parameters.adapter_elements = elements.sum::<usize>() as u64;
                found.parameters = Some(parameters);
            }
        }
        found
    }

    fn note<T>(&mut self, part: Part, result: Result<T, ZooError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.problems.push(Problem { part, error });
                None
            }
        }
    }
}

/// Whether a question about a picture becomes a prompt.
fn ask(
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> Result<(), ZooError> {
    let content = vec![Content::Image, Content::Text("What is this?".into())];
    let role = Role::User;
    let seen = View {
        original: [1; 2],
        resized: [1; 2],
        grid: Grid { t: 1, h: 1, w: 1 },
        tokens: [1; 3],
        time: None,
        allowed: [1; 2],
    };
    let messages = [Message { role, content }];
    encode_messages(config, tokenizer, template, &messages, &[seen])?;
    Ok(())
}

/// The tokenizer, if it can be read, and belongs to the model as far as that is known.
fn tokenizer(folder: &Folder, config: Option<&ModelConfig>) -> Result<Tokenizer, ZooError> {
    let json = folder.read("tokenizer.json", TOKENIZER_MAX_BYTES)?;
    let slots = config.map_or_else(Vec::new, |config| config.slots().all());
    let tokenizer = Tokenizer::from_json(&json, &slots)?;
    if let Some(config) = config {
        check_vocabulary(config, &tokenizer)?;
    }
    Ok(tokenizer)
}

impl<B: Backend> ModuleVisitor<B> for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let elements = param.lazy_shape().iter().map(|&size| size as u64).product();
        self.elements = self.elements.saturating_add(elements);
        self.largest_elements = self.largest_elements.max(elements);
    }
}
