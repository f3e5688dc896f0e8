//! Tiny random decoders and prompts.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_flex::{Flex, FlexDevice};
use reducers::{Action, Schedule, Stage};
use reroute::{
    Decoder, DecoderConfig, Prefill, PrefillOptions, Prompt, RerouteError, RopeConfig, SampleLayout,
};

pub type B = Flex;

pub const DEVICE: FlexDevice = FlexDevice;
pub const VOCAB: usize = 24;
pub const LAYERS: usize = 4;
pub const HIDDEN: usize = 16;
pub const CONTEXT: usize = 64;

pub fn config() -> DecoderConfig {
    DecoderConfig {
        vocab_size: VOCAB,
        hidden_size: HIDDEN,
        intermediate_size: 40,
        num_layers: LAYERS,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        qkv_bias: true,
        qk_norm: false,
        tie_word_embeddings: false,
        max_position_embeddings: CONTEXT,
        sliding_window: None,
        rope: RopeConfig::one_axis(1e4, 8),
    }
}

/// Uniform in [-1, 1), the same everywhere (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }

    pub fn tensor<const D: usize>(&mut self, shape: [usize; D], spread: f32) -> Tensor<B, D> {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| spread * self.next()).collect();
        Tensor::from_data(TensorData::new(values, shape), &DEVICE)
    }
}

/// Weights large enough that attention is far from uniform; norms around 1.
pub fn decoder_of(config: &DecoderConfig, seed: u64) -> Decoder<B> {
    struct Fill(Random);
    impl ModuleMapper<B> for Fill {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let shape = param.lazy_shape().dims::<D>();
            let spread = (6.0 / shape[D - 1] as f32).sqrt();
            let values = match D {
                1 => self.0.tensor(shape, 0.3) + 1.0,
                _ => self.0.tensor(shape, spread),
            };
            param.map(|_| values)
        }
    }
    let decoder = config.init(&DEVICE).unwrap();
    decoder.map(&mut Fill(Random(seed)))
}

pub fn decoder(seed: u64) -> Decoder<B> {
    decoder_of(&config(), seed)
}

/// All weights in another type.
pub fn cast(decoder: Decoder<B>, dtype: DType) -> Decoder<B> {
    struct Cast(DType);
    impl ModuleMapper<B> for Cast {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            param.map(|values| values.cast(self.0))
        }
    }
    decoder.map(&mut Cast(dtype))
}

/// A prompt of samples with so many visual rows each, between two text rows and three.
pub fn prompt(visual: &[usize], seed: u64) -> Prompt<B> {
    let layout = |&visual: &usize| SampleLayout {
        rows: 2 + visual + 3,
        visual: (2..2 + visual).collect(),
        next_position: (2 + visual + 3) as i64,
        salience: None,
        cells: (0..visual).map(|token| [token / 3, token % 3]).collect(),
    };
    let samples: Vec<SampleLayout> = visual.iter().map(layout).collect();
    let positions: Vec<i64> = samples.iter().flat_map(|s| 0..s.rows as i64).collect();
    // Each sample's numbers depend on its place alone.
    let embeddings = samples.iter().enumerate().map(|(at, sample)| {
        let mut random = Random(seed + 100 * at as u64);
        random.tensor([HIDDEN, sample.rows], 1.0)
    });
    Prompt {
        embeddings: Tensor::cat(embeddings.collect(), 1),
        positions: Tensor::<B, 1, Int>::from_data(positions.as_slice(), &DEVICE).unsqueeze(),
        deepstack: Vec::new(),
        samples,
    }
}

/// One sample of a batch by itself.
pub fn alone(batch: &Prompt<B>, sample: usize) -> Prompt<B> {
    let range = batch.ranges()[sample].clone();
    Prompt {
        embeddings: batch.embeddings.clone().narrow(1, range.start, range.len()),
        positions: batch.positions.clone().narrow(1, range.start, range.len()),
        deepstack: Vec::new(),
        samples: vec![batch.samples[sample].clone()],
    }
}

pub fn schedule(action: Action, stages: &[(usize, usize)]) -> Schedule {
    let stages = stages
        .iter()
        .map(|&(layer, keep)| Stage::count(layer, keep));
    Schedule::new(action, false, stages.collect()).unwrap()
}

pub fn observed(
    decoder: &Decoder<B>,
    prompt: &Prompt<B>,
    schedule: &Schedule,
) -> Result<Prefill<B>, RerouteError> {
    let options = PrefillOptions {
        hidden_states: true,
        keep_pool: true,
    };
    decoder.prefill(prompt, schedule, options)
}

pub fn values<const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().into_vec().unwrap()
}

/// The columns of `[features, rows]`.
pub fn columns(tensor: &Tensor<B, 2>) -> Vec<Vec<f32>> {
    let features = tensor.dims()[0];
    let flat = values(tensor.clone().transpose());
    flat.chunks(features).map(<[f32]>::to_vec).collect()
}
