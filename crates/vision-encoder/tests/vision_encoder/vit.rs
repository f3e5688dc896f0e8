//! The towers against a plain restatement in loops, and what they refuse.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use burn_flex::Flex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use vision_encoder::VisionError;
use vision_encoder::vit::{VitActivation, VitConfig, VitHfConfig, VitKind, VitTower};

type Tower = VitTower<Flex>;

fn config(change: Value) -> Result<VitConfig, VisionError> {
    let mut config = json!({
        "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 11, "patch_size": 3,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 4,
    });
    let fields = config.as_object_mut().expect("an object");
    fields.extend(change.as_object().expect("an object").clone());
    let config: VitHfConfig = serde_json::from_value(config).expect("parses");
    config.resolve()
}

/// Gives every parameter random values and remembers them by name.
struct Randomise {
    rng: StdRng,
    path: Vec<String>,
    values: HashMap<String, Vec<f64>>,
}

impl<B: Backend> ModuleMapper<B> for Randomise {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|tensor| {
            let shape = tensor.dims();
            let count = shape.iter().product();
            let values: Vec<f32> = (0..count)
                .map(|_| self.rng.random_range(-0.6..0.6))
                .collect();
            let kept = values.iter().map(|&v| f64::from(v)).collect();
            self.values.insert(self.path.join("."), kept);
            Tensor::from_data(TensorData::new(values, shape), &tensor.device())
        })
    }
}

/// A tower with random parameters, and these by their names in a checkpoint.
fn random_tower(config: &VitConfig, seed: u64) -> (Tower, HashMap<String, Vec<f64>>) {
    let mut mapper = Randomise {
        rng: StdRng::seed_from_u64(seed),
        path: Vec::new(),
        values: HashMap::new(),
    };
    let tower: Tower = config.init(&Default::default());
    (tower.map(&mut mapper), mapper.values)
}

fn random_pixels(images: usize, side: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values = (0..images * 3 * side * side).map(|_| rng.random_range(-2.0..2.0));
    values.collect()
}

fn pixels(values: &[f32], side: usize) -> Tensor<Flex, 4> {
    let images = values.len() / (3 * side * side);
    let data = TensorData::new(values.to_vec(), [images, 3, side, side]);
    Tensor::from_data(data, &Default::default())
}

fn values(tensor: Tensor<Flex, 2>) -> Vec<f32> {
    tensor.into_data().to_vec().expect("f32")
}

// The restatement: `[tokens][features]`, f64 --------------------------------------------------------

type Rows = Vec<Vec<f64>>;

struct Naive<'a> {
    config: &'a VitConfig,
    weights: &'a HashMap<String, Vec<f64>>,
}

impl Naive<'_> {
    fn weight(&self, name: &str) -> &[f64] {
        self.optional(name).unwrap_or_else(|| panic!("no {name}"))
    }

    fn optional(&self, name: &str) -> Option<&[f64]> {
        self.weights.get(name).map(Vec::as_slice)
    }

    /// The one of two spellings that is there.
    fn either(&self, names: [&str; 2]) -> Option<&[f64]> {
        names.into_iter().find_map(|name| self.optional(name))
    }

    /// A convolution with the patch as stride, the class token before it, positions added.
    fn embeddings(&self, image: &[f32]) -> Rows {
        let (hidden, patch) = (self.config.hidden_size, self.config.patch_size);
        let (side, grid) = (self.config.image_size, self.config.grid());
        let kernel = self.weight("embeddings.patch_embedding.weight");
        let bias = self.optional("embeddings.patch_embedding.bias");
        assert_eq!(bias.is_none(), self.config.kind == VitKind::Clip);
        let class = self.either(["embeddings.class_embedding", "embeddings.cls_token"]);
        let mut rows: Rows = class.map(<[f64]>::to_vec).into_iter().collect();
        for (top, left) in (0..grid * grid).map(|i| (i / grid * patch, i % grid * patch)) {
            let mut row = bias.map_or(vec![0.0; hidden], <[f64]>::to_vec);
            for (out, value) in row.iter_mut().enumerate() {
                for channel in 0..3 {
                    for y in 0..patch {
                        for x in 0..patch {
                            let at = ((out * 3 + channel) * patch + y) * patch + x;
                            let pixel = image[(channel * side + top + y) * side + left + x];
                            *value += kernel[at] * f64::from(pixel);
                        }
                    }
                }
            }
            rows.push(row);
        }
        let positions = self.either([
            "embeddings.position_embedding.weight",
            "embeddings.position_embeddings",
        ]);
        let positions = positions.expect("positions");
        assert_eq!(positions.len(), rows.len() * hidden);
        for (row, position) in rows.iter_mut().zip(positions.chunks_exact(hidden)) {
            row.iter_mut().zip(position).for_each(|(v, p)| *v += p);
        }
        rows
    }

    fn norm(&self, name: &str, rows: &Rows) -> Rows {
        let weight = self.weight(&format!("{name}.weight"));
        let bias = self.weight(&format!("{name}.bias"));
        let normed = rows.iter().map(|row| {
            let count = row.len() as f64;
            let mean = row.iter().sum::<f64>() / count;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
            let scale = (variance + self.config.layer_norm_eps).sqrt();
            let affine = row.iter().zip(weight).zip(bias);
            affine
                .map(|((v, w), b)| (v - mean) / scale * w + b)
                .collect()
        });
        normed.collect()
    }

    /// Weights are `[out, in]`, as checkpoints have them.
    fn linear(&self, name: &str, rows: &Rows) -> Rows {
        let weight = self.weight(&format!("{name}.weight"));
        let bias = self.optional(&format!("{name}.bias"));
        let product = |row: &Vec<f64>| {
            let mut outputs: Vec<f64> = weight
                .chunks_exact(row.len())
                .map(|w| dot(w, row))
                .collect();
            let bias = bias.unwrap_or_default();
            outputs.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            outputs
        };
        rows.iter().map(product).collect()
    }

    fn attention(&self, name: &str, rows: &Rows) -> Rows {
        let project = |which: &str| self.linear(&format!("{name}.{which}_proj"), rows);
        let (query, key, value) = (project("q"), project("k"), project("v"));
        let heads = self.config.num_heads;
        let size = self.config.hidden_size / heads;
        let mut context = vec![vec![0.0; self.config.hidden_size]; rows.len()];
        for head in (0..heads).map(|head| head * size..(head + 1) * size) {
            for (query, context) in query.iter().zip(&mut context) {
                let scores = key.iter().map(|key| {
                    (dot(&query[head.clone()], &key[head.clone()]) / (size as f64).sqrt()).exp()
                });
                let scores: Vec<f64> = scores.collect();
                let total: f64 = scores.iter().sum();
                for (score, value) in scores.iter().zip(&value) {
                    for at in head.clone() {
                        context[at] += score / total * value[at];
                    }
                }
            }
        }
        self.linear(&format!("{name}.out_proj"), &context)
    }

    fn mlp(&self, name: &str, rows: &Rows) -> Rows {
        let mut inner = self.linear(&format!("{name}.fc1"), rows);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let activation = self.config.activation;
        for row in &mut inner {
            if activation == VitActivation::SwiGlu {
                let up = row.split_off(row.len() / 2);
                let gated = row.iter().zip(up).map(|(&g, up)| g * sigmoid(g) * up);
                *row = gated.collect();
                continue;
            }
            for v in row {
                *v *= match activation {
                    VitActivation::QuickGelu => sigmoid(1.702 * *v),
                    VitActivation::Gelu => (1.0 + erf(*v / 2f64.sqrt())) / 2.0,
                    VitActivation::GeluTanh => {
                        let inner = *v + 0.044715 * v.powi(3);
                        (1.0 + (inner * (2.0 / std::f64::consts::PI).sqrt()).tanh()) / 2.0
                    }
                    other => panic!("{other:?}"),
                };
            }
        }
        self.linear(&format!("{name}.fc2"), &inner)
    }

    fn scaled(&self, name: &str, mut rows: Rows) -> Rows {
        if let Some(scale) = self.optional(&format!("{name}.lambda1")) {
            let values = rows.iter_mut().flat_map(|row| row.iter_mut().zip(scale));
            values.for_each(|(v, scale)| *v *= scale);
        }
        rows
    }

    fn forward(&self, image: &[f32], layers: usize) -> Rows {
        let mut rows = self.embeddings(image);
        if self.config.kind == VitKind::Clip {
            rows = self.norm("pre_layrnorm", &rows);
        }
        for layer in (0..layers).map(|layer| format!("encoder.layers.{layer}")) {
            let normed = self.norm(&format!("{layer}.layer_norm1"), &rows);
            let attended = self.attention(&format!("{layer}.self_attn"), &normed);
            add(
                &mut rows,
                self.scaled(&format!("{layer}.layer_scale1"), attended),
            );
            let normed = self.norm(&format!("{layer}.layer_norm2"), &rows);
            let inner = self.mlp(&format!("{layer}.mlp"), &normed);
            add(
                &mut rows,
                self.scaled(&format!("{layer}.layer_scale2"), inner),
            );
        }
        rows
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(rows: &mut Rows, more: Rows) {
    let values = rows.iter_mut().flatten();
    values
        .zip(more.into_iter().flatten())
        .for_each(|(v, m)| *v += m);
}

/// The error function by its Maclaurin series; good for the small arguments here.
fn erf(x: f64) -> f64 {
    assert!(x.abs() < 5.0);
    let mut power = x;
    let mut sum = x;
    for n in 1..120 {
        power *= -x * x / f64::from(n);
        sum += power / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// Feature-major values against rows of several images.
fn assert_close(found: &[f32], expected: &[Rows], case: &str) {
    let rows: Vec<&Vec<f64>> = expected.iter().flatten().collect();
    assert_eq!(found.len(), rows.len() * rows[0].len(), "{case}");
    for (at, value) in found.iter().enumerate() {
        let (feature, row) = (at / rows.len(), at % rows.len());
        let difference = (f64::from(*value) - rows[row][feature]).abs();
        assert!(
            difference < 1e-5,
            "{case}, feature {feature} of row {row}: {difference}"
        );
    }
}

/// Eleven pixels hold three patches of three; the last two rows and columns are not looked at.
#[test]
fn hidden_states_equal_plain_loops_after_every_layer() {
    for (seed, change) in [
        json!({}),
        json!({"hidden_act": "gelu", "num_attention_heads": 4, "patch_size": 2}),
        json!({"image_size": 4, "patch_size": 4, "num_attention_heads": 8, "num_hidden_layers": 3}),
        json!({"image_size": 5, "patch_size": 1, "num_attention_heads": 1, "layer_norm_eps": 0.1}),
        json!({"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}),
        json!({"model_type": "siglip_vision_model", "hidden_act": "gelu", "patch_size": 11}),
        json!({"model_type": "dinov2", "mlp_ratio": 2, "hidden_act": "gelu"}),
        json!({"model_type": "dinov2", "mlp_ratio": 3, "use_swiglu_ffn": true, "qkv_bias": false}),
    ]
    .into_iter()
    .enumerate()
    {
        let case = change.to_string();
        let config = config(change).expect("resolves");
        let (tower, weights) = random_tower(&config, seed as u64);
        let naive = Naive {
            config: &config,
            weights: &weights,
        };
        let side = config.image_size;
        let input = random_pixels(2, side, seed as u64 + 50);
        for layers in 0..=config.num_layers {
            let images = input.chunks_exact(3 * side * side);
            let mut expected: Vec<Rows> = images.map(|i| naive.forward(i, layers)).collect();
            let found = tower
                .forward(pixels(&input, side), layers)
                .expect("forward");
            assert_eq!(found.dims(), [8, 2 * config.tokens()]);
            assert_close(&values(found), &expected, &case);

            // The features of the patches are the same less the class tokens.
            let prefix = usize::from(config.kind != VitKind::Siglip);
            expected
                .iter_mut()
                .for_each(|rows| drop(rows.drain(..prefix)));
            let found = tower.patch_features(pixels(&input, side), layers);
            let found = found.expect("features");
            assert_eq!(found.dims(), [8, 2 * config.patches()]);
            assert_close(&values(found), &expected, &case);
        }
    }
}

/// Features of several layers stand below each other in the order asked for; rows are skipped whatever
/// they are.
#[test]
fn features_are_the_states_that_were_asked_for() {
    for change in [
        json!({}),
        json!({"model_type": "siglip_vision_model", "hidden_act": "gelu"}),
        json!({"model_type": "dinov2", "mlp_ratio": 2, "hidden_act": "gelu"}),
    ] {
        let config = config(change).expect("resolves");
        let (tower, _) = random_tower(&config, 3);
        let input = random_pixels(2, 11, 4);
        let state = |layers: usize, skip: usize| {
            let all = tower.forward(pixels(&input, 11), layers).expect("forward");
            let of_image = |image| {
                let start = image * config.tokens() + skip;
                all.clone().narrow(1, start, config.tokens() - skip)
            };
            Tensor::cat(vec![of_image(0), of_image(1)], 1)
        };
        for skip in [0, 1, 2] {
            for layers in [&[2, 0, 1][..], &[1], &[0], &[2, 2]] {
                let found = tower.features(pixels(&input, 11), layers, skip);
                let expected = layers.iter().map(|&layer| state(layer, skip));
                let expected = Tensor::cat(expected.collect(), 0);
                assert_eq!(values(found.expect("features")), values(expected));
            }
        }
        for (layers, skip) in [(&[][..], 0), (&[3], 0), (&[1], config.tokens())] {
            let found = tower.features(pixels(&input, 11), layers, skip);
            assert!(matches!(found, Err(VisionError::Config(_))), "{layers:?}");
        }
    }
}

#[test]
fn an_image_in_a_batch_is_the_image_alone() {
    let config = config(json!({})).expect("resolves");
    let (tower, _) = random_tower(&config, 7);
    let input = random_pixels(3, 11, 8);
    let together = tower
        .patch_features(pixels(&input, 11), 2)
        .expect("features");
    for (index, image) in input.chunks_exact(3 * 11 * 11).enumerate() {
        let alone = tower
            .patch_features(pixels(image, 11), 2)
            .expect("features");
        let patches = config.patches();
        let part = together.clone().narrow(1, index * patches, patches);
        let difference = (part - alone).abs().max().into_scalar();
        // Products of other widths may add up in another order.
        assert!(difference < 1e-6, "{difference}");
    }
}

/// One image does not see another: changing one leaves the other's features as they are.
#[test]
fn images_of_a_batch_do_not_mix() {
    let config = config(json!({})).expect("resolves");
    let (tower, _) = random_tower(&config, 9);
    let mut input = random_pixels(2, 11, 10);
    let features = |input: &[f32]| {
        let both = tower
            .patch_features(pixels(input, 11), 2)
            .expect("features");
        let patches = config.patches();
        [0, patches].map(|start| values(both.clone().narrow(1, start, patches)))
    };
    let before = features(&input);
    input[3 * 11 * 11..].iter_mut().for_each(|v| *v = -*v);
    let after = features(&input);
    assert_eq!(before[0], after[0]);
    assert_ne!(before[1], after[1]);
}

// What is refused -------------------------------------------------------------------------------

#[test]
fn more_layers_than_the_tower_has_are_an_error() {
    let config = config(json!({})).expect("resolves");
    let (tower, _) = random_tower(&config, 1);
    for layers in [3, usize::MAX] {
        let input = pixels(&random_pixels(1, 11, 1), 11);
        match tower.patch_features(input, layers) {
            Err(VisionError::Config(text)) => {
                assert!(
                    text.contains("vision_feature_layer") && text.contains("has 2"),
                    "{text}"
                );
            }
            other => panic!("{layers}: {other:?}"),
        }
    }
}

#[test]
fn pixels_of_another_shape_are_an_error() {
    let config = config(json!({})).expect("resolves");
    let (tower, _) = random_tower(&config, 1);
    for shape in [
        [1, 3, 11, 12],
        [1, 3, 10, 11],
        [2, 1, 11, 11],
        [1, 4, 11, 11],
        [1, 3, 22, 22],
    ] {
        let input: Tensor<Flex, 4> = Tensor::zeros(shape, &Default::default());
        for found in [
            tower.forward(input.clone(), 1),
            tower.patch_features(input, 1),
        ] {
            match found {
                Err(VisionError::PixelShape { expected, found }) => {
                    assert_eq!(
                        (expected, found[..].to_vec()),
                        ([3, 11, 11], shape[1..].to_vec())
                    );
                }
                other => panic!("{shape:?}: {other:?}"),
            }
        }
    }
}

#[test]
fn contradicting_configurations_are_errors_that_name_the_field() {
    for (change, field) in [
        (json!({"model_type": "pixtral"}), "pixtral"),
        (
            json!({"model_type": "dinov2_with_registers"}),
            "dinov2_with_registers",
        ),
        (json!({"image_size": [11, 12]}), "image_size"),
        (json!({"patch_size": [3, 4]}), "patch_size"),
        (json!({"model_type": "dinov2", "mlp_ratio": 0}), "mlp_ratio"),
        (
            json!({"model_type": "dinov2", "mlp_ratio": u64::MAX}),
            "mlp_ratio",
        ),
        (json!({"hidden_size": 0}), "hidden_size"),
        (json!({"hidden_size": 9}), "hidden_size"),
        (json!({"hidden_size": 1u64 << 40}), "hidden_size"),
        (json!({"intermediate_size": 0}), "intermediate_size"),
        (json!({"num_hidden_layers": 0}), "num_hidden_layers"),
        (json!({"num_hidden_layers": u64::MAX}), "num_hidden_layers"),
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"num_attention_heads": 3}), "num_attention_heads"),
        (json!({"num_attention_heads": 16}), "num_attention_heads"),
        (json!({"num_channels": 1}), "num_channels"),
        (json!({"num_channels": 0}), "num_channels"),
        (json!({"image_size": 0}), "image_size"),
        (json!({"patch_size": 0}), "patch_size"),
        (json!({"patch_size": 12}), "patch_size"),
        (json!({"layer_norm_eps": -1e-5}), "layer_norm_eps"),
        (json!({"hidden_act": "relu"}), "hidden_act"),
        (json!({"hidden_act": ""}), "hidden_act"),
    ] {
        match config(change.clone()) {
            Err(error @ VisionError::Config(_)) => {
                let text = error.to_string();
                assert!(
                    text.contains(field) && text.contains("config.json"),
                    "{text}"
                );
            }
            other => panic!("{change}: {other:?}"),
        }
    }
}

#[test]
fn what_is_left_out_of_a_configuration_has_the_library_s_defaults() {
    let empty: VitHfConfig = serde_json::from_str("{}").expect("parses");
    let found = empty.resolve().expect("CLIP ViT-B/32");
    assert_eq!(
        (found.hidden_size, found.num_layers, found.patches()),
        (768, 12, 49)
    );
    assert_eq!(found.activation, VitActivation::QuickGelu);

    // As `SiglipVisionConfig()` and `Dinov2Config()` of transformers 5.24.
    for (name, patch, activation, inner) in [
        ("siglip_vision_model", 16, VitActivation::GeluTanh, 3072),
        ("dinov2", 14, VitActivation::Gelu, 3072),
    ] {
        let config: VitHfConfig =
            serde_json::from_value(json!({"model_type": name})).expect("parses");
        let found = config.resolve().expect("resolves");
        assert_eq!(
            (found.patch_size, found.activation, found.intermediate_size),
            (patch, activation, inner)
        );
        assert_eq!((found.num_layers, found.layer_norm_eps), (12, 1e-6));
        assert!(found.qkv_bias);
    }

    let large = VitHfConfig::clip_large_patch14_336()
        .resolve()
        .expect("resolves");
    assert_eq!(
        (large.grid(), large.patches(), large.num_layers),
        (24, 576, 24)
    );
}

/// Learned positions are for one size; DINOv2's are interpolated.
#[test]
fn only_dinov2_takes_another_size_of_image() {
    let dinov2 = config(json!({"model_type": "dinov2", "mlp_ratio": 2, "hidden_act": "gelu"}));
    let larger = dinov2
        .expect("resolves")
        .with_image_size(16)
        .expect("five patches");
    assert_eq!((larger.grid(), larger.position_grid), (5, 3));
    let (tower, weights) = random_tower(&larger, 5);
    assert_eq!(weights["embeddings.position_embeddings"].len(), 10 * 8);
    let input = pixels(&random_pixels(2, 16, 6), 16);
    let found = tower.forward(input, 2).expect("forward");
    assert_eq!(found.dims(), [8, 2 * 26]);
    assert!(values(found).iter().all(|v| v.is_finite()));
    assert!(larger.with_image_size(2).is_err(), "no whole patch");

    for kind in ["clip_vision_model", "siglip_vision_model"] {
        let tower = config(json!({"model_type": kind})).expect("resolves");
        assert_eq!(tower.clone().with_image_size(11).expect("the same"), tower);
        let text = tower.with_image_size(12).expect_err("refused").to_string();
        assert!(
            text.contains("image_size is 11") && text.contains(kind),
            "{text}"
        );
    }
}

#[test]
fn a_tower_keeps_its_configuration() {
    let config = config(json!({})).expect("resolves");
    assert_eq!(random_tower(&config, 1).0.config(), &config);
}
