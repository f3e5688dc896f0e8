//! Small random decoders, prompts and schedules, and how tests look at results.

mod schedules;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::Backend as AnyBackend;
use burn::tensor::{Int, Tensor, TensorData};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use reducers::{Action, Schedule, Stage, Waiting};
use reroute::{
    Decision, Decoder, DecoderConfig, Prefill, PrefillOptions, Prompt, RopeConfig, SampleLayout,
    Shortcut, Shortcuts,
};
pub use reroute_cli::backend::{Backend, Device};
pub use schedules::{schedule, unusual};

/// Vocabulary of every random decoder.
pub const VOCAB: usize = 40;

/// Property-test settings: so many cases, always the same ones. `PROPTEST_CASES` and
/// `PROPTEST_RNG_SEED` explore further.
pub fn cases(count: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: match std::env::var_os("PROPTEST_CASES") {
            Some(_) => default.cases,
            None => count,
        },
        rng_seed: match default.rng_seed {
            RngSeed::Random => RngSeed::Fixed(2606),
            fixed => fixed,
        },
        failure_persistence: None,
        ..default
    }
}

/// Random numbers that are the same on every backend and machine (SplitMix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Uniform in [-1, 1).
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }

    pub fn vector(&mut self, length: usize) -> Vec<f32> {
        (0..length).map(|_| self.next()).collect()
    }
}

/// One sample's prompt on the host.
#[derive(Debug, Clone)]
pub struct Sample {
    pub layout: SampleLayout,
    /// `[rows][hidden_size]`
    pub embeddings: Vec<Vec<f32>>,
    /// `[rows][axes]`
    pub positions: Vec<Vec<i64>>,
    /// `[layers][visual rows][hidden_size]`
    pub deepstack: Vec<Vec<Vec<f32>>>,
}

impl Sample {
    /// A random prompt of this layout. Visual rows of a decoder with several position axes stand on
    /// a grid; the next position is not simply the number of rows, as in the families with M-RoPE.
    pub fn random(layout: &[bool], config: &DecoderConfig, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let axes = config.rope.axes();
        let visual: Vec<usize> = (0..layout.len()).filter(|&row| layout[row]).collect();
        let position = |row: usize| -> Vec<i64> {
            let spread = |axis: usize| {
                if layout[row] {
                    (row % (axis + 2)) as i64
                } else {
                    0
                }
            };
            let at = |axis: usize| row as i64 + if axis == 0 { 0 } else { spread(axis) };
            (0..axes).map(at).collect()
        };
        let embeddings = layout.iter().map(|_| random.vector(config.hidden_size));
        let embeddings = embeddings.collect();
        let salience = random.vector(visual.len());
        let cells = (0..visual.len())
            .map(|token| [token / 3, token % 3])
            .collect();
        Self {
            embeddings,
            positions: (0..layout.len()).map(position).collect(),
            deepstack: Vec::new(),
            layout: SampleLayout {
                rows: layout.len(),
                visual,
                next_position: layout.len() as i64 + if axes > 1 { 3 } else { 0 },
                salience: Some(salience),
                cells,
            },
        }
    }

    /// The same sample with DeepStack features for its first layers.
    pub fn with_deepstack(mut self, layers: usize, seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0xdee9);
        let (visual, hidden) = (self.layout.visual.len(), self.embeddings[0].len());
        let mut features = || (0..visual).map(|_| random.vector(hidden)).collect();
        self.deepstack = (0..layers).map(|_| features()).collect();
        self
    }

    /// The first rows of the sample, as an earlier turn of a conversation.
    pub fn head(&self, rows: usize) -> Self {
        let visual = self.layout.visual.partition_point(|&row| row < rows);
        let positions = self.positions[..rows].to_vec();
        let next_position = positions.iter().flatten().max().map_or(0, |last| last + 1);
        Self {
            layout: SampleLayout {
                rows,
                visual: self.layout.visual[..visual].to_vec(),
                next_position,
                salience: self
                    .layout
                    .salience
                    .as_ref()
                    .map(|all| all[..visual].to_vec()),
                cells: self.layout.cells[..visual].to_vec(),
            },
            embeddings: self.embeddings[..rows].to_vec(),
            deepstack: self
                .deepstack
                .iter()
                .map(|layer| layer[..visual].to_vec())
                .collect(),
            positions,
        }
    }

    /// Rows that are not visual, ascending.
    pub fn text(&self) -> Vec<usize> {
        let is_text = |row: &usize| self.layout.visual.binary_search(row).is_err();
        (0..self.layout.rows).filter(is_text).collect()
    }
}

/// Packs samples side by side.
pub fn pack<B: AnyBackend>(samples: &[Sample]) -> Prompt<B> {
    let device = B::Device::default();
    let embeddings: Vec<&Vec<f32>> = samples.iter().flat_map(|s| &s.embeddings).collect();
    let positions: Vec<&Vec<i64>> = samples.iter().flat_map(|s| &s.positions).collect();
    let (rows, hidden, axes) = (embeddings.len(), embeddings[0].len(), positions[0].len());
    let embeddings: Vec<f32> = embeddings.into_iter().flatten().copied().collect();
    let positions: Vec<i64> = positions.into_iter().flatten().copied().collect();
    let embeddings =
        Tensor::<B, 2>::from_data(TensorData::new(embeddings, [rows, hidden]), &device);
    let positions =
        Tensor::<B, 2, Int>::from_data(TensorData::new(positions, [rows, axes]), &device);
    Prompt {
        embeddings: embeddings.transpose(),
        positions: positions.transpose(),
        deepstack: (0..samples[0].deepstack.len())
            .map(|layer| {
                let features = samples.iter().flat_map(|s| &s.deepstack[layer]).flatten();
                let features: Vec<f32> = features.copied().collect();
                let visual = features.len() / hidden;
                let data = TensorData::new(features, [visual, hidden]);
                Tensor::<B, 2>::from_data(data, &device).transpose()
            })
            .collect(),
        samples: samples.iter().map(|s| s.layout.clone()).collect(),
    }
}

/// For tests that go back through graphs: by turns, since these are all in one place of the process.
pub fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A decoder with random weights that are the same on every backend: normalisation weights around
/// 1, everything else large enough that attention is far from uniform.
pub fn decoder<B: AnyBackend>(config: &DecoderConfig, seed: u64) -> Decoder<B> {
    struct Fill(Random, Vec<String>);
    impl<B: AnyBackend> ModuleMapper<B> for Fill {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.1.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.1.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let shape = param.lazy_shape();
            let path = self.1.join(".");
            let (middle, spread) = match D {
                1 if path.contains("norm") => (1.0, 0.3),
                1 => (0.0, 0.5),
                _ if path.contains("embed_tokens") => (0.0, 1.0),
                _ => (0.0, (6.0 / shape.dims::<D>()[D - 1] as f32).sqrt()),
            };
            let length = shape.num_elements();
            let values: Vec<f32> = (0..length)
                .map(|_| middle + spread * self.0.next())
                .collect();
            let device = param.lazy_device();
            param.map(|_| Tensor::from_data(TensorData::new(values, shape), &device).require_grad())
        }
    }
    let decoder = config.init::<B>(&B::Device::default()).unwrap();
    decoder.map(&mut Fill(Random::new(seed), Vec::new()))
}

/// The weights of a module, by path, as `[out][in]` or `[1][features]`.
pub fn weights<B: AnyBackend>(module: &impl Module<B>) -> HashMap<String, Vec<Vec<f64>>> {
    #[derive(Default)]
    struct Collect {
        path: Vec<String>,
        weights: HashMap<String, Vec<Vec<f64>>>,
    }
    impl<B: AnyBackend> ModuleVisitor<B> for Collect {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let columns = param.val().dims()[D - 1];
            let flat: Vec<f64> = param.val().into_data().iter().collect();
            let rows = flat.chunks(columns).map(<[f64]>::to_vec);
            // Blocks of a table are rows of one.
            let is_block = self
                .path
                .last()
                .is_some_and(|name| name.parse::<usize>().is_ok());
            let names = &self.path[..self.path.len() - usize::from(is_block)];
            let weight = self.weights.entry(names.join(".")).or_default();
            assert!(is_block || weight.is_empty());
            weight.extend(rows);
        }
    }
    let mut collect = Collect::default();
    module.visit(&mut collect);
    collect.weights
}

/// A module with all its parameters zero.
pub fn zeroed<B: AnyBackend, M: Module<B>>(module: M) -> M {
    struct Zero;
    impl<B: AnyBackend> ModuleMapper<B> for Zero {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            param.map(|value| value.zeros_like())
        }
    }
    module.map(&mut Zero)
}

/// A decoder, prompts and a schedule that fit each other, from a few small numbers.
#[derive(Debug, Clone)]
pub struct Case {
    pub config: DecoderConfig,
    /// For each sample and row, whether the row is visual.
    pub layouts: Vec<Vec<bool>>,
    pub schedule: Schedule,
    /// Layers that receive DeepStack features.
    pub deepstack: usize,
    pub seed: u64,
}

impl Case {
    /// The decoder, with shortcuts if the schedule has tokens take them.
    pub fn decoder<B: AnyBackend>(&self) -> Decoder<B> {
        let mut decoder = decoder(&self.config, self.seed);
        if self.schedule.waiting() == Waiting::Shortcut {
            let shortcuts = shortcuts(&self.schedule, self.config.hidden_size, self.seed);
            decoder.set_shortcuts(shortcuts).unwrap();
        }
        decoder
    }

    pub fn samples(&self) -> Vec<Sample> {
        let seed = |index: usize| self.seed.wrapping_mul(31).wrapping_add(index as u64);
        let sample = |(index, layout): (usize, &Vec<bool>)| {
            let sample = Sample::random(layout, &self.config, seed(index));
            sample.with_deepstack(self.deepstack, seed(index))
        };
        self.layouts.iter().enumerate().map(sample).collect()
    }

    /// The first sample.
    pub fn sample(&self) -> Sample {
        self.samples().swap_remove(0)
    }
}

/// Random maps for every stage that ends in a decision, which change states by about a half.
pub fn shortcuts(schedule: &Schedule, hidden_size: usize, seed: u64) -> Shortcuts {
    let mut random = Random::new(seed ^ 0x5ca1e);
    let mut numbers = |count: usize, size: f32| -> Vec<f32> {
        (0..count).map(|_| size * random.next()).collect()
    };
    let shortcut = |pair: &[Stage]| {
        let layers = pair[0].layer..pair[1].layer;
        let rank = 1 + layers.len() % 3;
        let size = (3.0 / hidden_size as f32).sqrt();
        Shortcut {
            layers,
            down: numbers(rank * hidden_size, size),
            up: numbers(rank * hidden_size, 1.0),
            shift: numbers(hidden_size, 0.2),
        }
    };
    Shortcuts::new(schedule.stages().windows(2).map(shortcut))
}

/// Random cases of one sample with visual tokens.
pub fn case(action: impl Strategy<Value = Action> + Clone + 'static) -> BoxedStrategy<Case> {
    batch(action, layout().prop_map(|layout| vec![layout]).boxed())
}

/// Random cases with these samples.
pub fn batch(
    action: impl Strategy<Value = Action> + Clone + 'static,
    layouts: BoxedStrategy<Vec<Vec<bool>>>,
) -> BoxedStrategy<Case> {
    model()
        .prop_flat_map(move |config| {
            let schedule = schedule(config.num_layers, action.clone());
            let deepstack = prop_oneof![Just(0), 1..=3usize];
            (
                Just(config),
                layouts.clone(),
                schedule,
                deepstack,
                any::<u64>(),
            )
        })
        .prop_map(|(config, layouts, schedule, deepstack, seed)| Case {
            config,
            layouts,
            schedule,
            deepstack,
            seed,
        })
        .boxed()
}

/// Either action.
pub fn any_action() -> impl Strategy<Value = Action> + Clone {
    prop_oneof![Just(Action::Remove), Just(Action::Reroute)]
}

/// Small decoders of every kind that the families need.
pub fn model() -> impl Strategy<Value = DecoderConfig> {
    let sizes = (
        prop_oneof![Just(32), Just(48), Just(64)],
        3..=8usize,
        prop_oneof![Just(1), Just(2), Just(4)],
        prop_oneof![Just(8), Just(16)],
    );
    (sizes, any::<[bool; 4]>()).prop_map(
        |((hidden, layers, kv_heads, head_dim), [qkv_bias, qk_norm, tied, m_rope])| {
            let axis = |frequency: usize| if m_rope { frequency % 3 } else { 0 };
            DecoderConfig {
                vocab_size: VOCAB,
                hidden_size: hidden,
                intermediate_size: 72,
                num_layers: layers,
                num_attention_heads: 4,
                num_key_value_heads: kv_heads,
                head_dim,
                rms_norm_eps: 1e-5,
                qkv_bias,
                qk_norm,
                tie_word_embeddings: tied,
                max_position_embeddings: 512,
                sliding_window: None,
                rope: RopeConfig {
                    theta: 1e4,
                    scaling: Default::default(),
                    axis_of_frequency: (0..head_dim / 2).map(axis).collect(),
                },
            }
        },
    )
}

/// Rows of a prompt with one or two runs of visual rows, ending in text.
pub fn layout() -> impl Strategy<Value = Vec<bool>> {
    let runs = (0..4usize, 1..14usize, 0..3usize, 0..6usize, 1..5usize);
    runs.prop_map(|(before, first, between, second, after)| {
        let run = |visual: bool, rows: usize| std::iter::repeat_n(visual, rows);
        run(false, before)
            .chain(run(true, first))
            .chain(run(false, between))
            .chain(run(true, second))
            .chain(run(false, after))
            .collect()
    })
}

/// Prefill with every layer's output captured.
pub fn prefill<B: AnyBackend>(
    decoder: &Decoder<B>,
    samples: &[Sample],
    schedule: &Schedule,
) -> Prefill<B> {
    let options = PrefillOptions {
        hidden_states: true,
        keep_pool: false,
    };
    decoder.prefill(&pack(samples), schedule, options).unwrap()
}

/// [`prefill`] of one sample.
pub fn prefill_one<B: AnyBackend>(
    decoder: &Decoder<B>,
    sample: &Sample,
    schedule: &Schedule,
) -> Prefill<B> {
    prefill(decoder, std::slice::from_ref(sample), schedule)
}

/// Feeds each token to every sample in turn and returns `[tokens][samples · vocab_size]` logits.
pub fn decode<B: AnyBackend>(
    decoder: &Decoder<B>,
    prefill: &mut Prefill<B>,
    tokens: &[u32],
) -> Vec<Vec<f32>> {
    let samples = prefill.cache.samples();
    let step = |&token: &u32| {
        let fed: Vec<(usize, u32)> = (0..samples).map(|sample| (sample, token)).collect();
        values(decoder.decode(&fed, &mut prefill.cache).unwrap())
    };
    tokens.iter().map(step).collect()
}

/// A tensor's numbers, row-major.
pub fn values<B: AnyBackend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().into_vec().unwrap()
}

/// The columns of `[features, rows]`.
pub fn columns<B: AnyBackend>(tensor: &Tensor<B, 2>) -> Vec<Vec<f32>> {
    let features = tensor.dims()[0];
    let flat = values(tensor.clone().transpose());
    flat.chunks(features).map(<[f32]>::to_vec).collect()
}

/// The largest difference, as a share of the largest expected magnitude (at least 1).
pub fn distance(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(1f64, |scale, x| scale.max(x.abs()));
    let difference = |(&a, &e): (&f32, &f64)| (f64::from(a) - e).abs();
    let pairs = actual.iter().zip(expected).map(difference);
    assert!(
        actual.iter().all(|x| x.is_finite()),
        "not finite: {actual:?}"
    );
    pairs.fold(0.0, f64::max) / scale
}

/// [`distance`] between two results of the library.
pub fn gap(actual: &[f32], expected: &[f32]) -> f64 {
    let expected: Vec<f64> = expected.iter().map(|&x| f64::from(x)).collect();
    distance(actual, &expected)
}

/// Whether one sample's decisions would be the same after rounding: at each, the last score that is
/// in and the first that is out are well apart.
pub fn are_clear(decisions: &[Decision], monotonic: bool) -> bool {
    let mut previous: Option<&[usize]> = None;
    decisions.iter().all(|decision| {
        let (mut within, mut without) = (f32::INFINITY, f32::NEG_INFINITY);
        let ranked = decision.remembered.as_ref().unwrap_or(&decision.scores);
        for (token, &score) in decision.candidates.iter().zip(ranked) {
            if decision.selected.binary_search(token).is_ok() {
                within = within.min(score);
            } else if !monotonic || previous.is_none_or(|p| p.binary_search(token).is_ok()) {
                without = without.max(score);
            }
        }
        previous = Some(&decision.selected);
        within - without > 1e-6
    })
}

/// What was selected, in order.
pub fn selections(decisions: &[Decision]) -> Vec<Vec<usize>> {
    decisions.iter().map(|d| d.selected.clone()).collect()
}
