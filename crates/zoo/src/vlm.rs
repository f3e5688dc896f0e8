use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use checkpoint::{Folder, LoadProgress};
use reducers::Schedule;
use reroute::{
    DecoderConfig, FinishReason, GenerationOptions, PrefillOptions, RoutingTrace, generate,
};
use serde::Deserialize;
use vision_encoder::{ClipPreprocessor, ClipPreprocessorConfig, RgbImage, to_tensor};

use crate::grounding::{BoundingBox, GroundingFormat, parse_box};
use crate::template::{SpecialTokens, TokenText};
use crate::{ChatTemplate, Model, ModelConfig, Tokenizer, ZooError};

/// A vision-language model with everything it needs to answer.
pub struct Vlm<B: Backend> {
    config: ModelConfig,
    model: Model<B>,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    preprocessor: ClipPreprocessor,
    grounding: GroundingFormat,
    generation: GenerationOptions,
    dtype: DType,
    device: B::Device,
}

/// How to open a checkpoint.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Type that weights are converted to: f32 or f16.
    pub dtype: DType,
    /// Pad images to a square instead of cropping, as the original LLaVA code does; `None` follows
    /// `preprocessor_config.json`.
    pub pad_to_square: Option<bool>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            pad_to_square: None,
        }
    }
}

/// A question about any number of images.
#[derive(Debug, Clone)]
pub struct Question {
    /// The images, in the order in which the text speaks of them.
    pub images: Vec<RgbImage>,
    /// The user's text. Special tokens in it are ordinary text.
    pub text: String,
}

/// The answer to a [`Question`].
#[derive(Debug, Clone)]
pub struct Answer {
    /// Generated text, without special tokens.
    pub text: String,
    /// Generated token ids, including the stop token.
    pub tokens: Vec<u32>,
    /// Why generation ended.
    pub finish: FinishReason,
    /// Rows of the prompt.
    pub prompt_rows: usize,
    /// Visual tokens of the prompt.
    pub visual_tokens: usize,
    /// What routing did; decisions of this sample only.
    pub trace: RoutingTrace,
    /// Bytes of keys and values per layer after prefill.
    pub kv_bytes: Vec<u64>,
    /// Wall-clock times of the whole batch.
    pub timings: Timings,
}

/// Where something is.
#[derive(Debug, Clone)]
pub struct Grounding {
    /// `x1, y1, x2, y2` in pixels of the image as given.
    pub pixels: BoundingBox,
    /// The same in shares of the image's width and height.
    pub normalized: BoundingBox,
    /// The answer that the box was read from.
    pub answer: Answer,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timings {
    /// Vision tower and projector.
    pub vision: Duration,
    /// All prompts through the decoder, routing included.
    pub prefill: Duration,
    /// All generated tokens.
    pub decode: Duration,
}

#[derive(Default, Deserialize)]
struct GenerationConfig {
    #[serde(default)]
    eos_token_id: Option<TokenIds>,
    #[serde(default)]
    max_new_tokens: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Several(Vec<u32>),
}

impl<B: Backend> Vlm<B> {
    /// Opens a checkpoint folder.
    pub fn open(
        folder: &Folder,
        options: &OpenOptions,
        device: &B::Device,
    ) -> Result<Self, ZooError> {
        Self::open_with_progress(folder, options, device, &mut |_| {})
    }

    /// Opens a checkpoint folder and reports how far loading is.
    pub fn open_with_progress(
        folder: &Folder,
        options: &OpenOptions,
        device: &B::Device,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ZooError> {
        let config = ModelConfig::open(folder)?;
        let tokenizer = folder.read("tokenizer.json", checkpoint::TOKENIZER_MAX_BYTES)?;
        let tokenizer = Tokenizer::from_json(&tokenizer, config.image_token())?;
        let special_tokens: SpecialTokens = optional(folder, "tokenizer_config.json")?;
        let generation: GenerationConfig = optional(folder, "generation_config.json")?;
        let preprocessor: ClipPreprocessorConfig =
            folder.read_json("preprocessor_config.json", checkpoint::CONFIG_MAX_BYTES)?;
        let mut preprocessor = preprocessor.resolve()?;
        if let Some(pad) = options.pad_to_square {
            preprocessor = preprocessor.with_pad_to_square(pad);
        }
        let grounding = match folder.has("grounding.json") {
            true => folder.read_json("grounding.json", checkpoint::CONFIG_MAX_BYTES)?,
            false => GroundingFormat::llava(),
        };
        check_sizes(&config, &tokenizer, &preprocessor)?;
        let model = Model::open(&config, folder, options.dtype, device, progress)?;
        let eos = special_tokens.eos_token.as_ref().map(TokenText::text);
        let stop_tokens = match generation.eos_token_id {
            Some(TokenIds::One(id)) => vec![id],
            Some(TokenIds::Several(ids)) => ids,
            None => eos
                .and_then(|token| tokenizer.id(token))
                .into_iter()
                .collect(),
        };
        Ok(Self {
            template: ChatTemplate::open(folder, special_tokens)?,
            generation: GenerationOptions {
                max_new_tokens: generation.max_new_tokens.unwrap_or(256),
                stop_tokens,
                ..GenerationOptions::default()
            },
            dtype: options.dtype,
            device: device.clone(),
            config,
            model,
            tokenizer,
            preprocessor,
            grounding,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// The resolved configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The decoder's resolved configuration.
    pub fn decoder_config(&self) -> &DecoderConfig {
        self.config.decoder()
    }

    /// The device that the model lives on.
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// The type of the weights.
    pub fn dtype(&self) -> DType {
        self.dtype
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

    /// Image preprocessing.
    pub fn preprocessor(&self) -> &ClipPreprocessor {
        &self.preprocessor
    }

    /// Token ids of a question, image slots repeated once per visual token.
    pub fn encode(&self, question: &Question) -> Result<Vec<u32>, ZooError> {
        let images = question.images.len();
        let text = self.tokenizer.disarm(&question.text);
        let rendered = self.template.render(images, &text)?;
        let has_bos = self
            .template
            .bos_token()
            .is_some_and(|bos| rendered.starts_with(bos));
        let ids = self.tokenizer.encode(&rendered, !has_bos)?;
        let image = self.config.image_token();
        let slots = ids.iter().filter(|&&id| id == image).count();
        if slots != images {
            return Err(self.template.unusable(format!(
                "makes {slots} image slots for {images} images (the image token of config.json is \
                 {image})"
            )));
        }
        let [rows, columns] = self.config.visual_grid();
        let repeat = |id: u32| match id == image {
            true => rows * columns,
            false => 1,
        };
        Ok(ids
            .into_iter()
            .flat_map(|id| std::iter::repeat_n(id, repeat(id)))
            .collect())
    }

    /// Answers one question. `on_text` receives the answer piece by piece as it is generated.
    pub fn ask(
        &self,
        question: &Question,
        schedule: &Schedule,
        options: &GenerationOptions,
        on_text: impl FnMut(&str),
    ) -> Result<Answer, ZooError> {
        let mut stream = self.tokenizer.stream(on_text);
        let mut on_token = |_, id| {
            if !options.stop_tokens.contains(&id) {
                stream(id);
            }
            ControlFlow::Continue(())
        };
        let mut answers = self.ask_batch(
            std::slice::from_ref(question),
            schedule,
            options,
            &mut on_token,
        )?;
        Ok(answers.remove(0))
    }

    /// Asks where something is and reads the box out of the answer.
    pub fn ground(
        &self,
        image: &RgbImage,
        expression: &str,
        schedule: &Schedule,
        options: &GenerationOptions,
    ) -> Result<Grounding, ZooError> {
        let question = Question {
            images: vec![image.clone()],
            text: self.grounding.question(expression),
        };
        let answer = self.ask(&question, schedule, options, |_| {})?;
        let Some(answered) = parse_box(&answer.text) else {
            return Err(ZooError::NoBox {
                answer: answer.text,
            });
        };
        let resized = self.preprocessor.output_size().map(|side| side as f64);
        let seen = self
            .grounding
            .units
            .normalized(answered, [resized[1], resized[0]]);
        let pixels = self.preprocessor.box_to_pixels(image, seen);
        let (width, height) = (image.width() as f64, image.height() as f64);
        let [x1, y1, x2, y2] = pixels;
        Ok(Grounding {
            pixels,
            normalized: [x1 / width, y1 / height, x2 / width, y2 / height],
            answer,
        })
    }

    /// Answers several questions in one batch, each routed by its own scores. `on_token` receives
    /// (question, token id) as soon as a token is chosen; breaking ends all answers.
    pub fn ask_batch(
        &self,
        questions: &[Question],
        schedule: &Schedule,
        options: &GenerationOptions,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Answer>, ZooError> {
        let ids = questions.iter().map(|question| self.encode(question));
        let ids = ids.collect::<Result<Vec<_>, _>>()?;
        let pixels = questions.iter().flat_map(|question| &question.images);
        let pixels = pixels.map(|image| self.preprocessor.preprocess(image));
        let pixels = pixels.collect::<Result<Vec<_>, _>>()?;
        let mut timings = Timings::default();

        let started = Instant::now();
        let visual = match pixels.is_empty() {
            true => None,
            false => {
                let pixels: Tensor<B, 4> = to_tensor(&pixels, &self.device)?;
                let features = self.model.vision_features(pixels.cast(self.dtype))?;
                Some(self.model.project(features))
            }
        };
        self.finish(started, &mut timings.vision);

        let started = Instant::now();
        let prompt = self.model.prompt(&ids, visual, &self.device)?;
        let decoder = self.model.decoder();
        let prefill = decoder.prefill(&prompt, schedule, PrefillOptions::default())?;
        self.finish(started, &mut timings.prefill);

        let started = Instant::now();
        let mut cache = prefill.cache;
        let kv_bytes: Vec<Vec<u64>> = (0..ids.len()).map(|sample| cache.bytes(sample)).collect();
        let generations = generate(decoder, prefill.logits, &mut cache, &ids, options, on_token)?;
        self.finish(started, &mut timings.decode);

        let answers = generations.into_iter().zip(kv_bytes).enumerate();
        let answer =
            |(sample, (generation, kv_bytes)): (usize, (reroute::Generation, Vec<u64>))| {
                let layout = &prompt.samples[sample];
                Ok(Answer {
                    text: self
                        .tokenizer
                        .decode(&generation.tokens)?
                        .trim()
                        .to_string(),
                    tokens: generation.tokens,
                    finish: generation.finish,
                    prompt_rows: layout.rows,
                    visual_tokens: layout.visual.len(),
                    trace: RoutingTrace {
                        decisions: prefill.trace.of_sample(sample).cloned().collect(),
                        rows: prefill
                            .trace
                            .rows
                            .iter()
                            .map(|rows| vec![rows[sample]])
                            .collect(),
                    },
                    kv_bytes,
                    timings,
                })
            };
        answers.map(answer).collect()
    }

    /// Waits for the device, so that the time belongs to what was asked of it.
    fn finish(&self, started: Instant, elapsed: &mut Duration) {
        // A failed synchronisation shows again, with its reason, when results are read.
        let _ = B::sync(&self.device);
        *elapsed = started.elapsed();
    }
}

/// Reads a JSON file, or takes the default if there is none.
fn optional<T: Default + serde::de::DeserializeOwned>(
    folder: &Folder,
    name: &str,
) -> Result<T, ZooError> {
    match folder.has(name) {
        true => Ok(folder.read_json(name, checkpoint::CONFIG_MAX_BYTES)?),
        false => Ok(T::default()),
    }
}

/// Tokenizer, preprocessor and model must belong together.
fn check_sizes(
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    preprocessor: &ClipPreprocessor,
) -> Result<(), ZooError> {
    let vocab_size = config.decoder().vocab_size;
    if tokenizer.vocab_size() > vocab_size.max(config.image_token() as usize + 1) {
        return Err(ZooError::Tokenizer {
            reason: format!(
                "it has ids up to {}, the model's vocabulary has {vocab_size}",
                tokenizer.vocab_size() - 1
            ),
            source: None,
        });
    }
    let (size, [height, width]) = (config.image_size(), preprocessor.output_size());
    if [height, width] != [size, size] {
        return Err(ZooError::ImageSize {
            made: format!("{width}×{height}"),
            wanted: format!("{size}×{size}"),
        });
    }
    Ok(())
}
