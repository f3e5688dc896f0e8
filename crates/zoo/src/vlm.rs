use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::module::AutodiffModule;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Tensor};
use reducers::encoder::Tap;
use reducers::{KvType, Plan, presets};
use reroute::{
    Drift, GenerationOptions, KvError, Prompt, RerouteError, Shortcuts, Waited, check_kv_type,
};
use reroute_checkpoint::{CONFIG_MAX_BYTES, Folder, LoadProgress, TOKENIZER_MAX_BYTES};
use reroute_family::kept_rows;
use serde::Deserialize;

use crate::end_tokens::{TokenIds, end_tokens};
use crate::grounding::GroundingFormat;
use crate::messages::{Message, Placeholders};
use crate::{
    ChatTemplate, EncoderStep, ImageOptions, Modality, Model, ModelConfig, PixelTensors, Prepared,
    Preprocessor, Question, Routing, Sample, Tokenizer, Tutor, View, Visual, VisualTokens, Weights,
    ZooError,
};

/// The file of a checkpoint that has its [`Shortcuts`].
pub const SHORTCUTS: &str = "shortcuts.json";
/// Rows of a prompt before a reduction that no model takes: 64 MiB of token ids.
const MAX_ROWS: usize = 1 << 24;

/// A vision-language model with everything it needs to answer.
///
/// Threads may share it. On GPU backends of Burn 0.21 that needs `max_streams = 1` in a `cubecl.toml`: see
/// `docs/backends.md`.
pub struct Vlm<B: Backend> {
    config: ModelConfig,
    model: Model<B>,
    tokenizer: Arc<Tokenizer>,
    template: Arc<ChatTemplate>,
    preprocessor: Arc<dyn Preprocessor>,
    grounding: GroundingFormat,
    generation: GenerationOptions,
    dtype: DType,
    device: B::Device,
    /// Tells its weights from all others of the program.
    identity: u64,
}

/// A number that nobody has had.
pub(crate) fn identity() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed)
}

/// How to open a checkpoint.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Type that weights are converted to, and activations have: f32, f16 or bf16.
    pub dtype: DType,
    /// Which weights stay in fewer bits.
    pub weights: Weights,
    /// Type that caches keep keys and values in, if not that of the activations.
    pub kv: Option<KvType>,
    /// What preprocessing does beyond what the checkpoint says.
    pub images: ImageOptions,
    /// Folders of low-rank adapters, as PEFT and [`Model::save_adapter`] write them; their changes add up.
    pub adapters: Vec<Folder>,
    /// Add the adapters to the weights instead of keeping them beside: answers cost what they cost without,
    /// and in half precision small changes are rounded.
    pub merge_adapters: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            weights: Weights::Floats,
            kv: None,
            images: ImageOptions::default(),
            adapters: Vec::new(),
            merge_adapters: false,
        }
    }
}

#[derive(Default, Deserialize)]
pub(crate) struct GenerationConfig {
    #[serde(default)]
    pub(crate) eos_token_id: Option<TokenIds>,
    #[serde(default)]
    max_new_tokens: Option<usize>,
}

impl<B: Backend> Vlm<B> {
    /// Opens a checkpoint folder.
    pub fn open(
        folder: &Folder,
        options: &OpenOptions,
        device: &B::Device,
    ) -> Result<Self, ZooError> {
        Self::open_with_progress(folder, options, device, &mut |_| ControlFlow::Continue(()))
    }

    /// Opens a checkpoint folder and reports how far loading is. Breaking stops, with
    /// [`CheckpointError::Stopped`](reroute_checkpoint::CheckpointError::Stopped).
    pub fn open_with_progress(
        folder: &Folder,
        options: &OpenOptions,
        device: &B::Device,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self, ZooError> {
        let config = ModelConfig::open(folder)?;
        let tokenizer = folder.read("tokenizer.json", TOKENIZER_MAX_BYTES)?;
        let tokenizer = Tokenizer::from_json(&tokenizer, &config.slots().all())?;
        check_vocabulary(&config, &tokenizer)?;
        let generation: GenerationConfig = optional(folder, "generation_config.json")?;
        let preprocessor = config.preprocessor(folder, &options.images)?;
        let grounding = match folder.has("grounding.json") {
            true => folder.read_json("grounding.json", CONFIG_MAX_BYTES)?,
            false => config.grounding(),
        };
        let template = ChatTemplate::open(folder, config.dialect())?;
        let shortcuts = match folder.has(SHORTCUTS) {
            true => folder.read_json(SHORTCUTS, TOKENIZER_MAX_BYTES)?,
            false => Shortcuts::default(),
        };
        let mut model = Self::open_model(&config, folder, options, device, progress)?;
        model.decoder_mut().set_shortcuts(shortcuts)?;
        let (ends, vocab_size) = (&generation.eos_token_id, config.decoder().vocab_size);
        let stop_tokens = end_tokens(folder, ends.as_ref(), vocab_size, &tokenizer, &template)?;
        Ok(Self {
            template: template.into(),
            generation: GenerationOptions {
                max_new_tokens: generation.max_new_tokens.unwrap_or(256),
                stop_tokens,
                ..GenerationOptions::default()
            },
            dtype: options.dtype,
            device: device.clone(),
            config,
            model,
            tokenizer: tokenizer.into(),
            preprocessor,
            grounding,
            identity: identity(),
        })
    }

    /// The model with its adapters.
    fn open_model(
        config: &ModelConfig,
        folder: &Folder,
        options: &OpenOptions,
        device: &B::Device,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Model<B>, ZooError> {
        let types = (options.dtype, options.weights);
        if let Some(kv) = options.kv {
            check_kv_type::<B>(kv, device)?;
        }
        let open = |progress| {
            let mut model = Model::open_with(config, folder, types, device, progress)?;
            model.decoder_mut().set_kv_type(options.kv)?;
            Ok::<_, ZooError>(model)
        };
        if options.adapters.is_empty() {
            return open(progress);
        }
        // What does not fit is known before the weights are read.
        let adapters = Model::<B>::new(config, device)?.read_adapters(&options.adapters)?;
        let mut model = open(progress)?;
        model = model.with_read(&adapters)?;
        Ok(match options.merge_adapters {
            true => model.merge_adapters(),
            false => model,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// The same around another model: after a step of training, or on another backend of the same
    /// device (`|model| model.valid()` leaves [`Autodiff`](burn::tensor::backend::AutodiffBackend)).
    pub fn map_model<C: Backend<Device = B::Device>>(
        self,
        change: impl FnOnce(Model<B>) -> Model<C>,
    ) -> Vlm<C> {
        let model = change(self.model);
        Vlm {
            dtype: model.decoder().dtype(),
            model,
            config: self.config,
            tokenizer: self.tokenizer,
            template: self.template,
            preprocessor: self.preprocessor,
            grounding: self.grounding,
            generation: self.generation,
            device: self.device,
            identity: identity(),
        }
    }

    /// The same beside another model, such as its own with an adapter; what both have in common is shared.
    ///
    /// ```
    /// # use reroute_zoo::{Folder, Vlm, ZooError};
    /// # fn adapted<B: burn::tensor::backend::Backend>(vlm: &Vlm<B>) -> Result<Vlm<B>, ZooError> {
    /// let adapter = Folder::open("my-adapter")?;
    /// Ok(vlm.with_model(vlm.model().load_adapter(&adapter)?))
    /// # }
    /// ```
    pub fn with_model(&self, model: Model<B>) -> Self {
        self.beside(model, self.device.clone())
    }

    /// The same without gradients, for answers and for measuring; the weights are shared.
    pub fn valid(&self) -> Vlm<B::InnerBackend>
    where
        B: AutodiffBackend,
    {
        self.beside(self.model.valid(), self.device.clone())
    }

    /// The same with a model of any backend, which has an identity of its own.
    fn beside<C: Backend>(&self, model: Model<C>, device: C::Device) -> Vlm<C> {
        Vlm {
            dtype: model.decoder().dtype(),
            model,
            config: self.config.clone(),
            tokenizer: self.tokenizer.clone(),
            template: self.template.clone(),
            preprocessor: self.preprocessor.clone(),
            grounding: self.grounding.clone(),
            generation: self.generation.clone(),
            device,
            identity: identity(),
        }
    }

    /// What tells its weights from all others.
    pub(crate) fn identity(&self) -> u64 {
        self.identity
    }

    /// The plan of a preset for this model: `reroute-pdrop@192`, `dense`.
    ///
    /// # Errors
    /// [`ReducerError`](reducers::ReducerError): there is no such preset, or it does not work with this
    /// model.
    pub fn plan(&self, preset: &str) -> Result<Plan, ZooError> {
        let (layers, encoder) = (self.config.decoder().num_layers, self.config.encoder());
        Ok(presets::find(preset)?.plan(layers, &encoder)?)
    }

    /// The resolved configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device that the model lives on.
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// The type of the weights.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The type that keys and values are kept in.
    pub fn kv_type(&self) -> KvType {
        self.model.decoder().kv_type()
    }

    /// Length limit and stop tokens of the checkpoint, greedy.
    pub fn generation_defaults(&self) -> GenerationOptions {
        self.generation.clone()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How this model is asked for boxes.
    pub fn grounding(&self) -> &GroundingFormat {
        &self.grounding
    }

    /// Preprocessing of images and videos.
    pub fn preprocessor(&self) -> &dyn Preprocessor {
        self.preprocessor.as_ref()
    }

    /// What makes lessons for this model, in any thread.
    pub fn tutor(&self) -> Tutor {
        Tutor {
            config: self.config.clone(),
            tokenizer: self.tokenizer.clone(),
            template: self.template.clone(),
            preprocessor: self.preprocessor.clone(),
            grounding: self.grounding.clone(),
            end: self.generation.stop_tokens.first().copied(),
        }
    }

    /// Token ids of a question, slots repeated once per visual token.
    pub fn encode(&self, question: &Question) -> Result<Vec<u32>, ZooError> {
        let prepared = self.prepare(&question.visuals)?;
        let views: Vec<View> = prepared.into_iter().map(|(view, _)| view).collect();
        self.encode_messages(&[question.message(&views)], &views)
    }

    /// Token ids of a conversation about visuals that are seen like this, and the cue for an answer.
    pub fn encode_messages(
        &self,
        messages: &[Message],
        views: &[View],
    ) -> Result<Vec<u32>, ZooError> {
        encode_messages(
            &self.config,
            &self.tokenizer,
            &self.template,
            messages,
            views,
        )
    }

    /// Preprocesses images and videos.
    pub(crate) fn prepare(&self, visuals: &[Visual]) -> Result<Vec<(View, Prepared)>, ZooError> {
        let prepare = |visual| Ok(self.preprocessor.prepare(visual)?);
        visuals.iter().map(prepare).collect()
    }

    /// Visual tokens of preprocessed images and videos; `texts` is what is asked about each.
    pub(crate) fn see(
        &self,
        views: &[View],
        prepared: Vec<Prepared>,
        texts: &[&str],
        step: Option<&EncoderStep<'_, B>>,
    ) -> Result<VisualTokens<B>, ZooError> {
        let pixels = PixelTensors::of(prepared, &self.device)?.cast(self.dtype);
        let Some(step) = step else {
            return self.model.see(pixels);
        };
        let needs = step.reducer.needs(&self.config.encoder())?;
        let mut questions = [Vec::new(), Vec::new()];
        if needs.contains(&Tap::Question) {
            for (view, text) in views.iter().zip(texts) {
                let kind = usize::from(view.time.is_some());
                questions[kind].push(self.embed_text(text)?);
            }
        }
        self.model.see_reduced(pixels, Some(step), questions)
    }

    /// The words of a text as the decoder embeds them, `[hidden_size, tokens]`.
    fn embed_text(&self, text: &str) -> Result<Tensor<B, 2>, ZooError> {
        let decoder = self.model.decoder();
        let mut ids = self.tokenizer.encode(text, false)?;
        ids.retain(|&id| (id as usize) < decoder.config().vocab_size);
        match ids.is_empty() {
            true => {
                let size = [decoder.config().hidden_size, 1];
                Ok(Tensor::zeros(size, (&self.device, self.dtype)))
            }
            false => Ok(decoder.embed(&ids)?),
        }
    }

    /// Packs the prompts of samples; also their token ids, without the slots that a reduction took.
    pub(crate) fn prompt(
        &self,
        ids: &[Vec<u32>],
        views: &[Vec<View>],
        tokens: &VisualTokens<B>,
    ) -> Result<(Prompt<B>, Vec<Vec<u32>>), ZooError> {
        let samples = ids.iter().zip(views);
        let samples: Vec<Sample> = samples.map(|(ids, views)| sample(ids, views)).collect();
        let kept = kept_rows(self.model.config(), &samples, tokens.kept.as_ref());
        let prompt = self.model.prompt_of(&samples, &kept, tokens)?;
        let kept = ids.iter().zip(kept).map(|(ids, kept)| kept.of(ids));
        Ok((prompt, kept.collect::<Result<_, _>>()?))
    }

    /// The prompt of one question.
    pub(crate) fn prompt_of(
        &self,
        question: &Question,
        step: Option<&EncoderStep<'_, B>>,
    ) -> Result<Prompt<B>, ZooError> {
        let prepared = self.prepare(&question.visuals)?;
        let (views, pixels): (Vec<View>, Vec<_>) = prepared.into_iter().unzip();
        let ids = self.encode_messages(&[question.message(&views)], &views)?;
        let texts = vec![question.text.as_str(); views.len()];
        let tokens = self.see(&views, pixels, &texts, step)?;
        Ok(self.prompt(&[ids], &[views], &tokens)?.0)
    }

    /// How far visual tokens that wait drift from what they would have become, see
    /// [`Decoder::drift`](reroute::Decoder::drift). Runs the question twice.
    pub fn drift<'a>(
        &self,
        question: &Question,
        routing: impl Into<Routing<'a, B>>,
    ) -> Result<Vec<Drift>, ZooError> {
        let routing = routing.into();
        let prompt = self.prompt_of(question, routing.encoder.as_ref())?;
        let decoder = self.model.decoder();
        Ok(decoder.drift(routing.scorer.as_deref(), &prompt, &routing.schedule)?)
    }

    /// How visual tokens would wait for the decisions of a routing, and what the layers would have made of them, see
    /// [`Decoder::waits`](reroute::Decoder::waits): what [`Shortcuts`] are fitted to.
    pub fn waits<'a>(
        &self,
        question: &Question,
        routing: impl Into<Routing<'a, B>>,
    ) -> Result<Vec<Waited<B>>, ZooError> {
        let routing = routing.into();
        let prompt = self.prompt_of(question, routing.encoder.as_ref())?;
        Ok(self.model.decoder().waits(&prompt, &routing.schedule)?)
    }

    /// The same with other shortcuts for tokens that wait; the weights are shared.
    ///
    /// # Errors
    /// [`RerouteError::Shortcut`] for one that does not fit.
    pub fn with_shortcuts(&self, shortcuts: Shortcuts) -> Result<Self, ZooError> {
        let mut model = self.model.clone();
        model.decoder_mut().set_shortcuts(shortcuts)?;
        Ok(self.with_model(model))
    }

    /// What the type of keys and values changes of the logits behind a question and behind each token of an
    /// answer, see [`Decoder::kv_error`](reroute::Decoder::kv_error). Runs both twice.
    pub fn kv_error<'a>(
        &self,
        question: &Question,
        answer: &[u32],
        routing: impl Into<Routing<'a, B>>,
    ) -> Result<KvError, ZooError> {
        let routing = routing.into();
        let prompt = self.prompt_of(question, routing.encoder.as_ref())?;
        let (scorer, schedule) = (routing.scorer.as_deref(), &routing.schedule);
        let decoder = self.model.decoder();
        Ok(decoder.kv_error(scorer, &prompt, schedule, answer)?)
    }
}

impl<B: Backend> fmt::Debug for Vlm<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut vlm = f.debug_struct("Vlm");
        vlm.field("config", &self.config)
            .field("dtype", &self.dtype);
        vlm.finish_non_exhaustive()
    }
}

/// A prompt whose visuals are seen like this.
pub(crate) fn sample(ids: &[u32], views: &[View]) -> Sample {
    let (videos, images): (Vec<&View>, Vec<&View>) = views.iter().partition(|v| v.time.is_some());
    let times = videos.iter().filter_map(|view| view.time.as_ref());
    Sample {
        ids: ids.to_vec(),
        second_per_grid_ts: times.map(|time| time.seconds_per_step as f32).collect(),
        image_grids: images.iter().map(|view| view.grid).collect(),
        video_grids: videos.iter().map(|view| view.grid).collect(),
    }
}

/// Token ids of a conversation about visuals that are seen like this, and the cue for an answer.
pub(crate) fn encode_messages(
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    views: &[View],
) -> Result<Vec<u32>, ZooError> {
    let ids = template.encode(tokenizer, messages, true)?;
    let (mut images, mut videos) = (Vec::new(), Vec::new());
    // Before anything is as long as they say.
    let needed = views.iter().fold(ids.len(), |rows, view| {
        let tokens = view.tokens.iter().copied().reduce(usize::saturating_mul);
        rows.saturating_add(tokens.unwrap_or(0))
    });
    if needed > MAX_ROWS {
        let (available, limit) = config.decoder().context();
        return Err(ZooError::Reroute(RerouteError::ContextLength {
            needed,
            available,
            limit,
        }));
    }
    for view in views {
        let [steps, rows, columns] = view.tokens;
        let tokens = rows.saturating_mul(columns);
        match view.time {
            None => images.push(tokens),
            Some(_) => videos.extend(template.dialect().video_placeholders(steps, tokens)),
        }
    }
    let slots = config.slots();
    let lengths = [&images[..], &videos[..]];
    let of_kind = |(modality, lengths)| {
        Some(Placeholders {
            modality,
            token: slots.of(modality)?,
            lengths,
        })
    };
    let kinds = Modality::ALL.into_iter().zip(lengths);
    let placeholders: Vec<Placeholders> = kinds.filter_map(of_kind).collect();
    template.expand(&ids, &placeholders)
}

/// Reads a JSON file, or takes the default if there is none.
pub(crate) fn optional<T: Default + serde::de::DeserializeOwned>(
    folder: &Folder,
    name: &str,
) -> Result<T, ZooError> {
    match folder.has(name) {
        true => Ok(folder.read_json(name, CONFIG_MAX_BYTES)?),
        false => Ok(T::default()),
    }
}

/// Tokenizer and model must belong together.
pub(crate) fn check_vocabulary(
    config: &ModelConfig,
    tokenizer: &Tokenizer,
) -> Result<(), ZooError> {
    let vocab_size = config.decoder().vocab_size;
    let slots = config.slots().all().into_iter().max();
    let slots = slots.map_or(0, |last| last as usize + 1);
    if tokenizer.vocab_size() > vocab_size.max(slots) {
        return Err(ZooError::Tokenizer {
            reason: format!(
                "it has ids up to {}, the model's vocabulary has {vocab_size}",
                tokenizer.vocab_size() - 1
            ),
            source: None,
        });
    }
    Ok(())
}
