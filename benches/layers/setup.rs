//! Models and prompts of the measured shapes.

use std::time::Duration;

use anyhow::{Context, ensure};
use burn::tensor::backend::Backend as _;
use burn::tensor::{Distribution, Int, Tensor, TensorData};
use reducers::{ReducerError, Schedule, presets};
use reroute::{Decoder, DecoderConfig, Prefill, Prompt, RopeConfig, SampleLayout};
use reroute_cli::backend::{self, Backend, Device};
use vision_encoder::clip::{ClipVisionConfig, ClipVisionTower};

use crate::options::{Options, Shapes};
use crate::timing::{seconds, wait, wait_for_one};

/// Layers of the tower that are timed.
pub const VISION_LAYERS: usize = 2;

/// Layers with weights of their own; deeper decoders repeat them. Two, so that a layer never finds
/// its own weights in a processor cache.
const DISTINCT_LAYERS: usize = 2;

/// Rows of the head. It runs once however many layers there are, so that a full one (32064) would
/// weigh four times too much in a decoder of 8 layers; FLOP ceilings count layers only.
const SMALL_HEAD: usize = 1024;

/// Everything that is measured.
pub struct Setup {
    /// The decoder: all weights made, one prefill done.
    pub decoder: Decoder<Backend>,
    /// One image and a question.
    pub prompt: Prompt<Backend>,
    /// The first layers of the vision tower.
    pub tower: ClipVisionTower<Backend>,
    /// `[1, 3, side, side]`
    pub pixels: Tensor<Backend, 4>,
    /// Visual tokens of the prompt.
    pub visual: usize,
    /// Text tokens of the prompt.
    pub text: usize,
    /// What making the weights and the first run took.
    pub warm_up: Duration,
    device: Device,
}

impl Setup {
    /// Builds the models with random weights of a fixed seed and runs each once.
    pub fn new(options: &Options) -> anyhow::Result<Self> {
        let device = backend::device()?;
        Backend::seed(&device, 0);
        let (config, visual, text, before_image) = match (options.smoke, options.shapes) {
            (true, _) => (toy_decoder(), 36, 8, 2),
            (false, Shapes::Llava) => (llava_decoder(), 576, 64, 5),
            (false, Shapes::Qwen) => (qwen_decoder(), 576, 64, 15),
        };
        let vision = if options.smoke {
            toy_vision()
        } else {
            llava_vision()
        };
        let side = vision.image_size;
        let (hidden, rows) = (config.hidden_size, visual + text);

        let mut decoder = config.init::<Backend>(&device)?;
        let prompt = Prompt {
            embeddings: Tensor::random([hidden, rows], Distribution::Normal(0.0, 0.1), &device),
            positions: positions(config.rope.axes(), before_image, visual, rows, &device),
            deepstack: Vec::new(),
            samples: vec![SampleLayout {
                rows,
                visual: (before_image..before_image + visual).collect(),
                next_position: rows as i64,
                salience: None,
                cells: Vec::new(),
            }],
        };
        let tower = vision.resolve()?.init(&device);
        let pixels = Tensor::random([1, 3, side, side], Distribution::Default, &device);

        // Parameters are made on first use; clones share them only from then on.
        let warm_up = seconds(|| {
            wait(
                decoder
                    .prefill(&prompt, &Schedule::dense(), Default::default())?
                    .logits,
            )?;
            wait_for_one(tower.patch_features(pixels.clone(), VISION_LAYERS)?)
        })?;
        let layers = decoder.layers();
        let layers = (0..options.depth)
            .map(|at| layers[at % layers.len()].clone())
            .collect();
        decoder = decoder.with_layers(layers);
        Ok(Self {
            decoder,
            prompt,
            tower,
            pixels,
            visual,
            text,
            warm_up: Duration::from_secs_f64(warm_up),
            device,
        })
    }

    /// One line about the models.
    pub fn describe(&self) -> String {
        let config = self.decoder.config();
        format!(
            "backend {}; {} decoder layers ({DISTINCT_LAYERS} distinct) of hidden {}, {} heads, MLP {}; \
             head of {} rows instead of 32064; {} visual + {} text tokens; \
             weights and first run {:.1} s",
            backend::NAME,
            config.num_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.vocab_size,
            self.visual,
            self.text,
            self.warm_up.as_secs_f64(),
        )
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Rows of the prompt.
    pub fn rows(&self) -> usize {
        self.visual + self.text
    }

    /// Prefills the prompt and waits for its logits.
    pub fn prefill(&self, schedule: &Schedule) -> anyhow::Result<Prefill<Backend>> {
        let prefill = self
            .decoder
            .prefill(&self.prompt, schedule, Default::default())?;
        wait(prefill.logits.clone())?;
        Ok(prefill)
    }

    /// The schedule of `METHOD@BUDGET-exact` at the decoder's depth.
    ///
    /// In a shallow decoder the layers before the first decision can exceed the whole budget. The
    /// first decision then moves to layer 0.
    pub fn schedule(&self, method: &str, budget: usize) -> anyhow::Result<Schedule> {
        let depth = self.decoder.layers().len();
        let preset = presets::find(&format!("{method}@{budget}-exact"))?;
        let layers = match preset.schedule(depth) {
            Ok(schedule) => return Ok(schedule),
            Err(ReducerError::Infeasible { mut layers, .. }) => {
                *layers.first_mut().context("a schedule without decisions")? = 0;
                layers
            }
            Err(error) => return Err(error.into()),
        };
        let schedule = preset.schedule_at(layers, depth)?;
        ensure!(!schedule.is_dense(), "{method:?} does not decide");
        Ok(schedule)
    }
}

/// LLaVA-1.5-7B's decoder, but for depth and head.
fn llava_decoder() -> DecoderConfig {
    DecoderConfig {
        vocab_size: SMALL_HEAD,
        hidden_size: 4096,
        intermediate_size: 11008,
        num_layers: DISTINCT_LAYERS,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        rms_norm_eps: 1e-5,
        qkv_bias: false,
        qk_norm: false,
        tie_word_embeddings: false,
        max_position_embeddings: 4096,
        rope: RopeConfig::one_axis(10_000.0, 128),
    }
}

/// Qwen2.5-VL-7B's decoder, but for depth and head.
fn qwen_decoder() -> DecoderConfig {
    let axis = |frequency: usize| match frequency {
        0..16 => 0,
        16..40 => 1,
        _ => 2,
    };
    DecoderConfig {
        hidden_size: 3584,
        intermediate_size: 18944,
        num_attention_heads: 28,
        num_key_value_heads: 4,
        rms_norm_eps: 1e-6,
        qkv_bias: true,
        rope: RopeConfig {
            theta: 1e6,
            axis_of_frequency: (0..64).map(axis).collect(),
        },
        ..llava_decoder()
    }
}

/// Positions of one image in text: consecutive on one axis; on three, a square grid in place.
///
/// # Shapes
/// - returns `[axes, rows]`
fn positions(
    axes: usize,
    before_image: usize,
    visual: usize,
    rows: usize,
    device: &Device,
) -> Tensor<Backend, 2, Int> {
    let side = visual.isqrt();
    let position = |axis: usize, row: usize| match row.checked_sub(before_image) {
        Some(token) if axes > 1 && token < visual => {
            before_image + [0, token / side, token % side][axis]
        }
        Some(_) if axes > 1 => row - visual + side,
        _ => row,
    };
    let all = (0..axes).flat_map(|axis| (0..rows).map(move |row| position(axis, row) as i64));
    let all: Vec<i64> = all.collect();
    Tensor::from_data(TensorData::new(all, [axes, rows]), device)
}

fn toy_decoder() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 64,
        hidden_size: 64,
        intermediate_size: 128,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 16,
        rope: RopeConfig::one_axis(10_000.0, 16),
        ..llava_decoder()
    }
}

/// The first layers of CLIP ViT-L/14 at 336 px.
fn llava_vision() -> ClipVisionConfig {
    ClipVisionConfig {
        num_hidden_layers: VISION_LAYERS,
        ..ClipVisionConfig::large_patch14_336()
    }
}

fn toy_vision() -> ClipVisionConfig {
    ClipVisionConfig {
        hidden_size: 32,
        intermediate_size: 64,
        num_attention_heads: 2,
        image_size: 28,
        ..llava_vision()
    }
}
