//! The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: against the library, and what rows may see.

use std::collections::BTreeMap;

use burn::module::{AutodiffModule, Module, ModuleMapper, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use vision_encoder::VisionError;
use vision_encoder::qwen::{QwenGeneration, QwenTowerConfig, QwenVisionConfig, QwenVisionTower};
use vision_encoder::{Grid, VisionOutput};

const GENERATIONS: [(QwenGeneration, &str); 3] = [
    (QwenGeneration::Qwen2, "qwen2"),
    (QwenGeneration::Qwen2_5, "qwen2_5"),
    (QwenGeneration::Qwen3, "qwen3"),
];

/// A tower of the library, and what it makes of some calls (`fixtures/make_qwen.py`).
struct Reference {
    config: QwenTowerConfig,
    /// Grids of a call, by its name.
    cases: BTreeMap<String, Vec<Grid>>,
    file: Vec<u8>,
}

impl Reference {
    fn open(generation: QwenGeneration, name: &str) -> Self {
        let path = format!("{}/tests/fixtures/qwen/{name}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(format!("{path}.json")).expect("the description");
        let described: Value = serde_json::from_str(&text).expect("JSON");
        let cases = described["cases"].as_object().expect("cases").iter();
        let grid = |grid: &Value| {
            let [t, h, w] = serde_json::from_value(grid.clone()).expect("three numbers");
            Grid { t, h, w }
        };
        Self {
            config: resolve(generation, &described["config"]).expect("resolves"),
            cases: cases
                .map(|(name, grids)| {
                    let grids = grids.as_array().expect("grids").iter().map(grid);
                    (name.clone(), grids.collect())
                })
                .collect(),
            file: std::fs::read(format!("{path}.safetensors")).expect("the tensors"),
        }
    }

    fn all() -> impl Iterator<Item = Self> {
        GENERATIONS
            .map(|(generation, name)| Self::open(generation, name))
            .into_iter()
    }

    fn tower<B: Backend>(&self) -> QwenVisionTower<B> {
        let mut loader = Loader {
            file: SafeTensors::deserialize(&self.file).expect("tensors"),
            path: Vec::new(),
        };
        self.config.init(&Default::default()).map(&mut loader)
    }

    /// A stored tensor, `[rows, features]`, feature-major.
    fn tensor<B: Backend>(&self, name: &str) -> Tensor<B, 2> {
        let file = SafeTensors::deserialize(&self.file).expect("tensors");
        let view = file.tensor(name).unwrap_or_else(|_| panic!("no {name}"));
        let data = TensorData::new(floats(view.data()), view.shape().to_vec());
        Tensor::from_data(data, &Default::default()).transpose()
    }
}

/// Loads parameters by the names that the library gives them.
struct Loader<'a> {
    file: SafeTensors<'a>,
    path: Vec<String>,
}

impl<B: Backend> ModuleMapper<B> for Loader<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let path = format!("weights.{}", self.path.join("."));
        let spellings = [
            path.replace("patch_embed.", "patch_embed.proj."),
            path.replace(".fc1.", ".linear_fc1.")
                .replace(".fc2.", ".linear_fc2."),
            path.replace(".gate.", ".gate_proj.")
                .replace(".fc1.", ".up_proj.")
                .replace(".fc2.", ".down_proj."),
            path.replace("merger.norm.", "merger.ln_q.")
                .replace("merger.fc1.", "merger.mlp.0.")
                .replace("merger.fc2.", "merger.mlp.2."),
            path.clone(),
        ];
        let stored = spellings
            .iter()
            .find_map(|name| self.file.tensor(name).ok());
        let stored = stored.unwrap_or_else(|| panic!("no {path}"));
        param.map(|tensor| {
            assert_eq!(stored.shape(), tensor.dims(), "{path}");
            let data = TensorData::new(floats(stored.data()), tensor.dims());
            Tensor::from_data(data, &tensor.device())
        })
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (values, _) = bytes.as_chunks();
    values
        .iter()
        .map(|&value| f32::from_le_bytes(value))
        .collect()
}

fn resolve(generation: QwenGeneration, config: &Value) -> Result<QwenTowerConfig, VisionError> {
    let config: QwenVisionConfig = serde_json::from_value(config.clone()).expect("parses");
    config.resolve(generation)
}

fn assert_close(found: Tensor<Flex, 2>, expected: Tensor<Flex, 2>, case: &str) {
    assert_eq!(found.dims(), expected.dims(), "{case}");
    let difference = (found - expected).abs().max().into_scalar();
    assert!(difference < 2e-5, "{case}: {difference}");
}

// Against the library -----------------------------------------------------------------------------

/// The output, and the hidden states: what enters the first block, then what leaves each.
fn inspected(
    tower: &QwenVisionTower<Flex>,
    patches: Tensor<Flex, 2>,
    grids: &[Grid],
) -> (VisionOutput<Flex>, Vec<Tensor<Flex, 2>>) {
    let mut states = Vec::new();
    let output = tower.forward_inspected(patches, grids, &[], &mut |seen| {
        if seen.layer == 0 {
            states.push(seen.input);
        }
        states.push(seen.output);
    });
    (output.expect("forward"), states)
}

#[test]
fn hidden_states_tokens_and_deepstack_equal_the_library() {
    for reference in Reference::all() {
        let tower = reference.tower::<Flex>();
        for (case, grids) in &reference.cases {
            let name = |part: String| format!("{case}.{part}");
            let patches = reference.tensor(&name("patches".into()));
            let (output, states) = inspected(&tower, patches, grids);
            assert_eq!(states.len(), 1 + reference.config.num_layers);
            assert_eq!(
                output.deepstack.len(),
                reference.config.deepstack_layers.len()
            );
            let states = states.into_iter().enumerate();
            let states = states.map(|(index, state)| (format!("hidden.{index}"), state));
            let taps = output.deepstack.into_iter().enumerate();
            let taps = taps.map(|(index, features)| (format!("deepstack.{index}"), features));
            for (part, found) in states.chain(taps).chain([("tokens".into(), output.tokens)]) {
                let name = name(part);
                let case = format!("{:?}, {name}", reference.config.generation);
                assert_close(found, reference.tensor(&name), &case);
            }
        }
    }
}

// Who sees whom -----------------------------------------------------------------------------------

#[test]
fn an_image_in_a_call_is_the_image_alone() {
    for reference in Reference::all() {
        let tower = reference.tower::<Flex>();
        let grids = &reference.cases["images and videos"];
        let patches = reference.tensor::<Flex>("images and videos.patches");
        let together = tower.forward(patches.clone(), grids).expect("forward");
        let (mut patch, mut token) = (0, 0);
        for &grid in grids {
            let (rows, tokens) = (grid.patches(), grid.tokens(2));
            let alone = patches.clone().narrow(1, patch, rows);
            let alone = tower.forward(alone, &[grid]).expect("forward");
            let case = format!("{:?}, {grid:?}", reference.config.generation);
            let part = |x: &Tensor<Flex, 2>| x.clone().narrow(1, token, tokens);
            assert_close(alone.tokens, part(&together.tokens), &case);
            for (alone, together) in alone.deepstack.into_iter().zip(&together.deepstack) {
                assert_close(alone, part(together), &case);
            }
            (patch, token) = (patch + rows, token + tokens);
        }
    }
}

#[test]
fn a_video_is_its_frames_one_by_one() {
    for reference in Reference::all() {
        let tower = reference.tower::<Flex>();
        let patches = reference.tensor::<Flex>("video.patches");
        let video = Grid { t: 2, h: 6, w: 10 };
        let frame = Grid { t: 1, ..video };
        let whole = tower.forward(patches.clone(), &[video]).expect("forward");
        let frames = patches.chunk(2, 1).into_iter();
        let frames = frames.map(|f| tower.forward(f, &[frame]).expect("forward").tokens);
        let case = format!("{:?}", reference.config.generation);
        assert_close(Tensor::cat(frames.collect(), 1), whole.tokens, &case);
    }
}

/// Frame, row and column of every patch, group by group, for groups of `merge · merge`.
fn places(grids: &[Grid], merge: usize) -> Vec<[usize; 3]> {
    let mut places = Vec::new();
    let mut frame = 0;
    for grid in grids {
        for _ in 0..grid.t {
            for top in (0..grid.h).step_by(merge) {
                for left in (0..grid.w).step_by(merge) {
                    for y in top..top + merge {
                        places.extend((left..left + merge).map(|x| [frame, y, x]));
                    }
                }
            }
            frame += 1;
        }
    }
    places
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A patch reaches exactly its window in a layer with windows, its frame in one without,
    /// whatever the sizes of images, windows and merge groups.
    #[test]
    fn a_patch_reaches_its_window_and_no_further(
        sizes in prop::collection::vec((1..3usize, 1..8usize, 1..8usize), 1..4),
        merge in 1..4usize,
        side in 1..5usize,
        full in any::<bool>(),
        changed in any::<prop::sample::Index>(),
    ) {
        let grids: Vec<Grid> = sizes
            .iter()
            .map(|&(t, h, w)| Grid { t, h: h * merge, w: w * merge })
            .collect();
        let layers: &[usize] = if full { &[0] } else { &[] };
        let config = json!({
            "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 1,
            "temporal_patch_size": 1, "spatial_merge_size": merge, "window_size": merge * side,
            "fullatt_block_indexes": layers,
        });
        let config = resolve(QwenGeneration::Qwen2_5, &config).expect("resolves");
        let tower: QwenVisionTower<Flex> = config.init(&Default::default());
        let places = places(&grids, merge);
        let changed = changed.index(places.len());
        let input = |shift: f32| {
            let value = |at: usize| {
                let (feature, patch) = (at / places.len(), at % places.len());
                let value = ((at * 7919) % 97) as f32 / 48.0 - 1.0;
                value + if patch == changed { shift * (1 + feature) as f32 } else { 0.0 }
            };
            let values = (0..3 * places.len()).map(value).collect();
            let data = TensorData::new(values, [3, places.len()]);
            Tensor::from_data(data, &Default::default())
        };
        let state = |shift| {
            let (_, states) = inspected(&tower, input(shift), &grids);
            states[1].clone()
        };
        let difference = (state(0.0) - state(30.0)).abs().max_dim(0);
        let difference: Vec<f32> = difference.into_data().to_vec().expect("f32");
        let window = |[frame, y, x]: [usize; 3]| match full {
            true => [frame, 0, 0],
            false => [frame, y / merge / side, x / merge / side],
        };
        for (place, difference) in places.iter().zip(difference) {
            let reached = window(*place) == window(places[changed]);
            prop_assert_eq!(difference > 0.0, reached, "{:?} from {:?}", place, places[changed]);
        }
    }
}

#[test]
fn gradients_reach_every_patch_and_are_those_of_finite_differences() {
    for reference in Reference::all() {
        let tower = reference.tower::<Autodiff<Flex>>();
        let plain = tower.valid();
        let grids = &reference.cases["images and videos"];
        let patches = reference.tensor::<Flex>("images and videos.patches");
        let leaf = Tensor::from_inner(patches.clone()).require_grad();
        let output = tower.forward(leaf.clone(), grids).expect("forward");
        let taps = output.deepstack.into_iter();
        let sum = taps
            .fold(output.tokens, |sum, tap| sum + tap)
            .powi_scalar(2)
            .mean();
        let gradient = leaf.grad(&sum.backward()).expect("a gradient");
        let smallest = gradient.clone().abs().max_dim(0).min().into_scalar();
        assert!(smallest > 0.0, "{:?}", reference.config.generation);

        let value = |step: f64| -> f32 {
            let patches = patches.clone() + gradient.clone().mul_scalar(step);
            let output = plain.forward(patches, grids).expect("forward");
            let taps = output.deepstack.into_iter();
            let sum = taps
                .fold(output.tokens, |sum, tap| sum + tap)
                .powi_scalar(2)
                .mean();
            sum.into_scalar()
        };
        // Along the gradient the value climbs by its square.
        let square = gradient.clone().powi_scalar(2).sum().into_scalar();
        let step = 0.02 / square.sqrt();
        let climb = (value(f64::from(step)) - value(f64::from(-step))) / (2.0 * step);
        let difference = (climb / square - 1.0).abs();
        assert!(
            difference < 0.02,
            "{:?}: {difference}",
            reference.config.generation
        );
    }
}
