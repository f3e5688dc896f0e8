//! Models and prompts of the measured shapes.

use std::sync::LazyLock;

use burn::tensor::backend::Backend as _;
use burn::tensor::{Distribution, Int, Tensor};
use reducers::{Schedule, presets};
use reroute::{Decoder, DecoderConfig, Prompt, RopeConfig, SampleLayout};
use reroute_cli::backend::{Backend, Device};
use vision_encoder::clip::{ClipVisionConfig, ClipVisionTower};

/// Visual tokens of LLaVA-1.5.
pub const VISUAL: usize = 576;

/// Text tokens, five of them before the image.
pub const TEXT: usize = 64;
const BEFORE_IMAGE: usize = 5;

/// Layers of a prefill. Two distinct layers take turns: deep enough for the published schedules at
/// half their depth, small enough for memory.
pub const DEPTH: usize = 16;
const DISTINCT: usize = 2;

/// Layers of the tower that are timed.
pub const VISION_LAYERS: usize = 2;

static DECODER: LazyLock<Decoder<Backend>> = LazyLock::new(|| {
    let device = device();
    let decoder = config(DISTINCT).init::<Backend>(&device).expect("the sizes agree");
    // Parameters are made on first use; make them all now.
    decoder.prefill(&prompt(), &Schedule::dense(), Default::default()).expect("a good prompt");
    decoder
});

/// LLaVA-1.5-7B's decoder, with the embedding table as head to save memory.
pub fn config(num_layers: usize) -> DecoderConfig {
    DecoderConfig {
        vocab_size: 32064,
        hidden_size: 4096,
        intermediate_size: 11008,
        num_layers,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        rms_norm_eps: 1e-5,
        qkv_bias: false,
        qk_norm: false,
        tie_word_embeddings: true,
        max_position_embeddings: 4096,
        rope: RopeConfig::one_axis(10_000.0, 128),
    }
}

/// The device, seeded.
pub fn device() -> Device {
    let device = reroute_cli::backend::device().expect("the backend has a device");
    Backend::seed(&device, 0);
    device
}

/// A decoder of any depth; layers share their weights in turn.
pub fn decoder(depth: usize) -> Decoder<Backend> {
    let layers = DECODER.layers();
    let layers = (0..depth).map(|at| layers[at % layers.len()].clone()).collect();
    DECODER.clone().with_layers(layers)
}

/// One image and a question.
pub fn prompt() -> Prompt<Backend> {
    let (device, rows) = (device(), VISUAL + TEXT);
    Prompt {
        embeddings: Tensor::random([4096, rows], Distribution::Normal(0.0, 0.1), &device),
        positions: Tensor::<Backend, 1, Int>::arange(0..rows as i64, &device).unsqueeze(),
        samples: vec![SampleLayout {
            rows,
            visual: (BEFORE_IMAGE..BEFORE_IMAGE + VISUAL).collect(),
            next_position: rows as i64,
        }],
    }
}

/// A preset's schedule at the measured depth.
pub fn schedule(preset: &str) -> Schedule {
    let preset = presets::find(preset).expect("a known preset");
    preset.schedule(DEPTH).expect("feasible at this depth")
}

/// The first layers of CLIP ViT-L/14 at 336 px.
pub fn tower() -> ClipVisionTower<Backend> {
    let config = ClipVisionConfig {
        num_hidden_layers: VISION_LAYERS,
        ..ClipVisionConfig::large_patch14_336()
    };
    config.resolve().expect("the sizes agree").init(&device())
}

/// Waits for a result by reading a value of it.
pub fn wait<const D: usize>(tensor: Tensor<Backend, D>) {
    let one = tensor.dims().map(|_| 0..1);
    tensor.slice(one).try_into_data().expect("the device computes");
}
