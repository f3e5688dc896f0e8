//! The model before it has learnt anything: its configuration, and the numbers that it begins with.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use reroute_zoo::{Folder, Model, ModelConfig, Tokenizer, embedded};
use serde_json::{Value, json};

use crate::scene::{COLOURS, SHAPES, SIZES};

/// Features of a row, in the tower and in the decoder.
pub const WIDTH: usize = 128;
/// Layers of the decoder.
pub const LAYERS: usize = 16;
/// Visual tokens along a side of a picture.
pub const GRID: usize = 8;
/// Steps between the coordinates 0 and 1.
pub const STEPS: usize = 100;
/// Waves of a coordinate's code, in cycles from 0 to 1.
const WAVES: [f64; 6] = [0.25, 0.5, 1.0, 2.0, 3.0, 5.0];
/// Numbers of a coordinate's code: a cosine and a sine for each wave.
pub const CODE: usize = 2 * WAVES.len();
/// Deviation of the numbers of a word's embedding.
const WORD: f64 = 0.3;
/// Layers whose outputs begin as large as their values; the others' begin at a quarter of that.
const RESEMBLING: usize = 4;
/// What a sine counts in an embedding.
const HEIGHT: f64 = 1.2;

/// The folder of the built-in model without its weights, with the sizes of a deeper one: tokenizer, template,
/// prompt and preprocessing are the same.
pub fn folder() -> Result<Folder> {
    let built_in = embedded::checkpoint();
    let read = |name: &str| built_in.read(name, 1 << 20);
    let mut files = BTreeMap::new();
    for name in [
        "chat_template.jinja",
        "generation_config.json",
        "grounding.json",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        files.insert(name.to_owned(), read(name)?);
    }
    let mut config: Value = serde_json::from_slice(&read("config.json")?)?;
    config["vision_feature_layer"] = json!(-1);
    for (part, settings) in [
        (
            "text_config",
            json!({
                "hidden_size": WIDTH, "intermediate_size": 320, "num_hidden_layers": LAYERS,
                "num_attention_heads": 4, "num_key_value_heads": 4
            }),
        ),
        (
            "vision_config",
            json!({
                "hidden_size": WIDTH, "intermediate_size": 384, "num_hidden_layers": 6,
                "num_attention_heads": 4, "projection_dim": WIDTH
            }),
        ),
    ] {
        for (name, value) in settings.as_object().into_iter().flatten() {
            config[part][name] = value.clone();
        }
    }
    files.insert("config.json".into(), serde_json::to_vec_pretty(&config)?);
    files.insert("model.safetensors".into(), last_norm()?);
    Ok(Folder::in_memory(files))
}

/// A file of weights that has the norm behind the tower's features: transformers looks for it, nothing reads it.
fn last_norm() -> Result<Vec<u8>> {
    let bytes = WIDTH * size_of::<f32>();
    let tensor = |start: usize| json!({"dtype": "F32", "shape": [WIDTH], "data_offsets": [start, start + bytes]});
    let name = |name: &str| format!("vision_tower.vision_model.post_layernorm.{name}");
    let head = json!({name("weight"): tensor(0), name("bias"): tensor(bytes)}).to_string();
    let mut file = (head.len() as u64).to_le_bytes().to_vec();
    file.extend(head.into_bytes());
    file.extend([1f32.to_le_bytes(); WIDTH].concat());
    file.extend(vec![0; bytes]);
    Ok(file)
}

/// A model of numbers drawn from a seed.
///
/// Maps begin so that they keep the size of what they are given; those of MLPs that add to the residual stream begin at
/// `1/√(layers / 2)` of it. Words begin at random, coordinates with their [`code`].
///
/// In the decoder's attention, keys begin as queries and outputs as values turned around: a row looks at rows that resemble it
/// and takes up what they are (arXiv 2305.09828, section 3). So a word looks at the patches of what it names
/// from the first step on.
pub fn random<B: Backend>(seed: u32, device: &B::Device) -> Result<Model<B>> {
    let folder = folder()?;
    let config = ModelConfig::open(&folder)?;
    let tokenizer = folder.read("tokenizer.json", 1 << 20)?;
    let tokenizer = Tokenizer::from_json(&tokenizer, &config.slots().all())?;
    let mut draw = Draw {
        rng: StdRng::seed_from_u64(seed.into()),
        path: Vec::new(),
        coordinates: coordinates(&tokenizer)?,
        basis: basis(),
        queries: Vec::new(),
        values: Vec::new(),
    };
    let model = Model::new(&config, device)?;
    Ok(model.map(&mut draw))
}

/// The tokens of a coordinate's value, by the places in a box that they are written at.
///
/// A box is `[x1, y1, x2, y2]`: the first place has tokens of its own, the two in the middle share theirs, the
/// last has its own.
pub fn coordinates(tokenizer: &Tokenizer) -> Result<BTreeMap<u32, (usize, usize)>> {
    let mut all = BTreeMap::new();
    for (form, (before, after)) in [("[", ","), ("", ","), ("", "]")].into_iter().enumerate() {
        for step in 0..=STEPS {
            let text = format!("{before}{:.2}{after}", step as f64 / STEPS as f64);
            let ids = tokenizer.encode(&text, false)?;
            let id = ids.first().filter(|_| ids.len() == 1);
            all.insert(
                *id.context("a coordinate is more than one token")?,
                (form, step),
            );
        }
    }
    Ok(all)
}

/// A smooth code of a coordinate between 0 and 1: near ones have like codes.
pub fn code(at: f64) -> [f64; CODE] {
    let mut code = [0.0; CODE];
    for (pair, wave) in code.as_chunks_mut().0.iter_mut().zip(WAVES) {
        let (sine, cosine) = (std::f64::consts::TAU * wave * at).sin_cos();
        *pair = [HEIGHT * cosine, HEIGHT * sine];
    }
    code
}

/// Directions at right angles, `CODE` for each of the four coordinates of a box and for what is shared by the two
/// in the middle.
pub fn basis() -> Vec<Vec<f64>> {
    let mut rng = StdRng::seed_from_u64(0xc0de);
    let mut found: Vec<Vec<f64>> = Vec::new();
    while found.len() < 5 * CODE {
        let mut new: Vec<f64> = (0..WIDTH).map(|_| normal(&mut rng)).collect();
        for old in &found {
            let along: f64 = old.iter().zip(&new).map(|(a, b)| a * b).sum();
            new.iter_mut().zip(old).for_each(|(x, y)| *x -= along * y);
        }
        let length = new.iter().map(|x| x * x).sum::<f64>().sqrt();
        found.push(new.into_iter().map(|x| x / length).collect());
    }
    found
}

/// The code of a coordinate along its directions.
pub fn spread(basis: &[Vec<f64>], slot: usize, at: f64) -> Vec<f64> {
    let mut vector = vec![0.0; WIDTH];
    for (number, direction) in code(at).iter().zip(&basis[slot * CODE..]) {
        vector
            .iter_mut()
            .zip(direction)
            .for_each(|(x, y)| *x += number * y);
    }
    vector
}

/// The words of colours, shapes and sizes as tokens, in the order of the lists.
pub fn words(tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let colours = COLOURS.iter().map(|(name, _)| *name);
    let all = colours.chain(SHAPES).chain(SIZES);
    let ids = all.map(|word| {
        let ids = tokenizer.encode(word, false)?;
        let id = ids.first().filter(|_| ids.len() == 1);
        id.copied().context("a word is more than one token")
    });
    ids.collect()
}

/// A normal number (Box and Muller's).
fn normal(rng: &mut StdRng) -> f64 {
    let (a, b): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

struct Draw {
    rng: StdRng,
    path: Vec<String>,
    coordinates: BTreeMap<u32, (usize, usize)>,
    basis: Vec<Vec<f64>>,
    /// The last maps to queries and to values.
    queries: Vec<f32>,
    values: Vec<f32>,
}

impl Draw {
    /// The numbers of a parameter.
    fn numbers(&mut self, shape: &[usize]) -> Vec<f32> {
        let count: usize = shape.iter().product();
        let path = self.path.join(".");
        let ends = |ends: &[&str]| ends.iter().any(|end| path.contains(end));
        if shape.len() == 1 && !path.ends_with("class_embedding") {
            let value = if path.ends_with("bias") { 0.0 } else { 1.0 };
            return vec![value; count];
        }
        let inputs: usize = shape.iter().skip(1).product();
        let keeping = (inputs as f64).powf(-0.5);
        let is_decoder = path.contains("language_model");
        let deviation = match () {
            () if ends(&["class_embedding", "position_embedding"]) => 0.1,
            () if ends(&["embed_tokens"]) => WORD,
            () if ends(&["lm_head"]) => 0.02,
            () if ends(&["multi_modal_projector"]) => keeping,
            () if is_decoder && ends(&["q_proj"]) => keeping,
            () if ends(&["down_proj"]) => 0.7 * keeping / (LAYERS as f64 / 2.0).sqrt(),
            () if ends(&["out_proj", "fc2"]) => 0.7 * keeping / 3f64.sqrt(),
            () => 0.7 * keeping,
        };
        let drawn = (0..count).map(|_| (deviation * normal(&mut self.rng)) as f32);
        let mut drawn: Vec<f32> = drawn.collect();
        let by = match () {
            () if ends(&["embed_tokens"]) => 1.0,
            () if ends(&["lm_head"]) => 0.1,
            () if is_decoder => return self.resembling(drawn),
            () => return drawn,
        };
        for (&id, &(form, step)) in &self.coordinates {
            // The places in the middle share their tokens, and with them a code.
            let slot = [0, 4, 3][form];
            let code = spread(&self.basis, slot, step as f64 / STEPS as f64);
            let row = &mut drawn[id as usize * WIDTH..][..WIDTH];
            row.iter_mut()
                .zip(code)
                .for_each(|(x, y)| *x = 0.1 * *x + (by * y) as f32);
        }
        drawn
    }
}

impl Draw {
    /// The numbers of a map of the decoder, which may be those of an earlier one.
    fn resembling(&mut self, drawn: Vec<f32>) -> Vec<f32> {
        let is = |name: &str| self.path.iter().any(|part| part == name);
        match () {
            () if is("q_proj") => self.queries.clone_from(&drawn),
            () if is("v_proj") => self.values.clone_from(&drawn),
            () if is("k_proj") => return self.queries.clone(),
            () if is("o_proj") => {
                let mut numbers = self
                    .path
                    .iter()
                    .filter_map(|part| part.parse::<usize>().ok());
                let share = match numbers.next() < Some(RESEMBLING) {
                    true => 1.0,
                    false => 0.25,
                };
                let turned = (0..WIDTH * WIDTH).map(|at| (at / WIDTH, at % WIDTH));
                let turned = turned.map(|(row, column)| share * self.values[column * WIDTH + row]);
                return turned.collect();
            }
            () => {}
        }
        drawn
    }
}

impl<B: Backend> ModuleMapper<B> for Draw {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let value = param.val();
        let data = TensorData::new(self.numbers(&value.dims()), value.dims());
        let value = Tensor::from_data(data, (&value.device(), DType::F32));
        Param::initialized(param.id, value.require_grad())
    }
}

/// The model whose projector takes features less their means, times factors.
pub fn with_inputs<B: Backend>(model: Model<B>, factors: &[f64], means: &[f64]) -> Model<B> {
    let mut weight = Scaled {
        factors,
        means,
        path: Vec::new(),
        bias: Vec::new(),
    };
    let model = model.map(&mut weight);
    // The bias is known when the weight is.
    model.map(&mut Biased(weight.bias, Vec::new()))
}

const FIRST: &str = "multi_modal_projector.linear_1";

struct Scaled<'a> {
    factors: &'a [f64],
    means: &'a [f64],
    path: Vec<String>,
    bias: Vec<f32>,
}

impl<B: Backend> ModuleMapper<B> for Scaled<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if D != 2 || !self.path.join(".").contains(FIRST) {
            return param;
        }
        let (value, trained) = (param.val(), param.is_require_grad());
        let (shape, device) = (value.dims(), value.device());
        let mut weight: Vec<f32> = value.detach().into_data().iter::<f32>().collect();
        self.bias.clear();
        for row in weight.chunks_mut(self.factors.len()) {
            row.iter_mut()
                .zip(self.factors)
                .for_each(|(x, factor)| *x *= *factor as f32);
            let products = row.iter().zip(self.means);
            let sum: f64 = products.map(|(x, mean)| f64::from(*x) * mean).sum();
            self.bias.push(-sum as f32);
        }
        let value = Tensor::from_data(TensorData::new(weight, shape), (&device, DType::F32));
        Param::initialized(param.id, value.set_require_grad(trained))
    }
}

struct Biased(Vec<f32>, Vec<String>);

impl<B: Backend> ModuleMapper<B> for Biased {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.1.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.1.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if D != 1 || !self.1.join(".").contains(FIRST) {
            return param;
        }
        let (device, trained) = (param.val().device(), param.is_require_grad());
        let data = TensorData::new(self.0.clone(), param.val().dims());
        let value = Tensor::from_data(data, (&device, DType::F32));
        Param::initialized(param.id, value.set_require_grad(trained))
    }
}

#[cfg(test)]
mod tests {
    use burn::module::ModuleVisitor;
    use reroute_zoo::backend::Flex;

    use super::*;

    /// Square weights by the ends of their paths.
    #[derive(Default)]
    struct Read(Vec<String>, BTreeMap<String, Vec<f32>>);

    impl ModuleVisitor<Flex> for Read {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Flex, D>>) {
            let path = self.0.join(".");
            if param.val().shape().num_elements() == WIDTH * WIDTH
                && path.contains("language_model")
            {
                let numbers = param.val().into_data().iter::<f32>().collect();
                self.1.insert(path, numbers);
            }
        }
    }

    #[test]
    fn rows_begin_by_looking_at_what_resembles_them() {
        let mut read = Read::default();
        let model = random::<Flex>(1, &Default::default()).expect("a model");
        model.visit(&mut read);
        for layer in 0..LAYERS {
            let of = |name: &str| {
                let part = format!("layers.{layer}.self_attn.{name}.");
                let found = read.1.iter().find(|(path, _)| path.contains(&part));
                found
                    .unwrap_or_else(|| panic!("no {part} in {:?}", read.1.keys()))
                    .1
            };
            assert_eq!(of("q_proj"), of("k_proj"));
            assert!(of("q_proj") != of("v_proj"));
            let share = if layer < 4 { 1.0 } else { 0.25 };
            for at in 0..WIDTH * WIDTH {
                let turned = of("v_proj")[at % WIDTH * WIDTH + at / WIDTH];
                assert_eq!(of("o_proj")[at], share * turned, "layer {layer}");
            }
        }
    }
}
