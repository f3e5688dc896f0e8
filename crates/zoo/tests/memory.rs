//! The memory that [`ModelConfig::memory`] predicts is what an answer takes.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use burn_flex::Flex;
use llava::LlavaHfConfig;
use peak_alloc::PeakAlloc;
use qwen_vl::QwenVlHfConfig;
use reducers::Schedule;
use reroute_zoo::{
    Arithmetic, Memory, Model, ModelConfig, Picture, Pictures, PixelTensors, Sample,
};
use serde_json::json;
use vision_encoder::Grid;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Text tokens of the prompt.
const TEXT: usize = 20;

struct Cast(DType);

impl<B: Backend> ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

fn qwen(generation: &str, text: [usize; 2], tower: [usize; 2]) -> ModelConfig {
    let config = json!({
        "model_type": generation,
        "hidden_size": text[0],
        "intermediate_size": text[1],
        "num_hidden_layers": 2,
        "num_attention_heads": text[0] / 64,
        "num_key_value_heads": text[0] / 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 400,
        "image_token_id": 349,
        "video_token_id": 350,
        "vision_start_token_id": 346,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_config": {
            "depth": 2,
            "embed_dim": tower[0],
            "mlp_ratio": tower[1] / tower[0],
            "hidden_size": if generation == "qwen2_vl" { text[0] } else { tower[0] },
            "intermediate_size": tower[1],
            "num_heads": tower[0] / 64,
            "out_hidden_size": text[0],
            "fullatt_block_indexes": [1],
        },
    });
    let config: QwenVlHfConfig = serde_json::from_value(config).expect("parses");
    ModelConfig::QwenVl(config.resolve().expect("resolves"))
}

fn llava(text: [usize; 2], tower: [usize; 2]) -> ModelConfig {
    let config = json!({
        "image_token_index": 349,
        "text_config": {
            "hidden_size": text[0],
            "intermediate_size": text[1],
            "num_hidden_layers": 2,
            "num_attention_heads": text[0] / 64,
            "vocab_size": 400,
        },
        "vision_config": {
            "hidden_size": tower[0],
            "image_size": 30 * 14,
            "intermediate_size": tower[1],
            "num_attention_heads": tower[0] / 64,
            "num_hidden_layers": 3,
            "patch_size": 14,
        },
    });
    let config: LlavaHfConfig = serde_json::from_value(config).expect("parses");
    ModelConfig::Llava(config.resolve().expect("resolves"))
}

/// A picture of `side · side` patches, or as many as the model always takes.
fn picture(config: &ModelConfig, side: usize) -> Picture {
    let (side, merge) = match config {
        ModelConfig::Llava(config) => (config.vision.grid(), 1),
        config => (side, config.spatial_merge_size()),
    };
    Picture {
        resized: [14 * side; 2],
        patches: side * side,
        visual_tokens: (side / merge).pow(2),
    }
}

/// Bytes at the peak of a prefill of a picture and a text, weights not included.
fn peak(config: &ModelConfig, picture: &Picture, dtype: DType) -> usize {
    let device = Default::default();
    let model = Model::<Flex>::new(config, &device).expect("a good configuration");
    let model = model.map(&mut Cast(dtype));
    let side = picture.patches.isqrt();
    let (t, h, w) = (1, side, side);
    let grids = vec![Grid { t, h, w }];
    let mut ids = vec![1; TEXT];
    ids.splice(1..1, vec![config.slots().image; picture.visual_tokens]);
    HEAP.reset_peak_usage();
    let before = HEAP.current_usage();
    let pixels = match config {
        ModelConfig::Llava(config) => {
            let size = config.vision.image_size;
            Pictures::Fixed(Tensor::ones([1, 3, size, size], &device))
        }
        ModelConfig::QwenVl(config) => {
            let size = [config.vision.patch_features(), side * side];
            Pictures::Patches(Tensor::ones(size, &device), grids.clone())
        }
        _ => panic!("no other family is measured here"),
    };
    let pixels = PixelTensors::images(pixels);
    let tokens = model.see(pixels.cast(dtype)).expect("its pixels");
    let sample = Sample {
        ids,
        image_grids: grids,
        ..Default::default()
    };
    let prompt = model.prompt(&[sample], &tokens);
    let prompt = prompt.expect("its prompt");
    let prefill = model
        .decoder()
        .prefill(&prompt, &Schedule::dense(), Default::default());
    prefill.expect("a good prompt");
    HEAP.peak_usage() - before
}

/// An answer that is told to fit must fit; what allocations are rounded to, and buffers that happen to
/// be free, may be too much, but not the difference between two budgets.
const MOST_OVER: f64 = 1.15;

/// Threads have buffers of their own.
const THREADS: usize = 2;

#[test]
fn an_estimate_is_no_less_than_what_is_measured_and_close() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build();
    let pool = pool.expect("two threads");
    for (name, config, side) in [
        (
            "a tower with a gate",
            qwen("qwen2_5_vl", [256, 512], [640, 1728]),
            48,
        ),
        (
            "a tower without",
            qwen("qwen2_vl", [256, 512], [640, 2560]),
            48,
        ),
        ("a tower of squares", llava([128, 256], [1024, 4096]), 0),
        ("a decoder", qwen("qwen2_5_vl", [768, 4480], [64, 128]), 70),
        ("a decoder of many keys", llava([1536, 4096], [64, 128]), 0),
    ] {
        let picture = picture(&config, side);
        for dtype in [DType::F32, DType::F16] {
            let numbers = Arithmetic {
                bytes: dtype.size(),
                threads: Some(THREADS),
            };
            let memory = Memory::of(
                &*config,
                &picture,
                TEXT,
                &Schedule::dense(),
                numbers,
                dtype.into(),
            );
            let estimate = memory.activations + memory.kv;
            let measured = pool.install(|| peak(&config, &picture, dtype));
            let ratio = estimate as f64 / measured as f64;
            assert!(
                (1.0..MOST_OVER).contains(&ratio),
                "{name}, {dtype:?}: {estimate} bytes expected, {measured} measured"
            );
        }
    }
}
