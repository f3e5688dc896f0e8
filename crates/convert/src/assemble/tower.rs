//! Vision towers: which tensor is which, whoever named them, and what `config.json` says of that.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use reroute_checkpoint::{
    CONFIG, CONFIG_MAX_BYTES, Dtype, Folder, NewTensor, Onnx, OnnxInput, OnnxNode,
};
use serde_json::{Value, json};

use super::names::{Naming, SUPPORTED, Sizes, default_of, part_of, recognise};
use super::nodes::{self, is_normalisation};
use super::{PREPROCESSOR, refuse};
use crate::ConvertError;
use crate::source::{Made, SourceTensor, Weights};

/// A tower that has been understood.
pub(super) struct Tower {
    pub(super) weights: Weights,
    pub(super) tensors: Vec<SourceTensor>,
    pub(super) naming: &'static Naming,
    pub(super) sizes: Sizes,
    /// Side of the square of positions, in patches.
    pub(super) grid: usize,
    /// `vision_config`.
    pub(super) config: Value,
    /// `preprocessor_config.json`, where there is one.
    pub(super) preprocessor: Value,
}

impl Tower {
    /// Opens the tower in a folder or an ONNX file; its weights are the first of all.
    pub(super) fn open(path: &Path, allow_pickle: bool) -> Result<Self, ConvertError> {
        let mut source = Source::open(path, allow_pickle)?;
        let sizes = source.sizes()?;
        let tensors = source.found.values().map(|stored| stored.name.as_str());
        nodes::check(&source.nodes, &tensors.collect(), sizes.patch)
            .or_else(|problem| source.refuse(problem))?;
        let class = usize::from(source.naming.class_token);
        let grid = sizes.positions.saturating_sub(class).isqrt();
        if grid == 0 || grid * grid + class != sizes.positions {
            let positions = sizes.positions;
            return source.refuse(format!(
                "its {positions} positions are those of no square of patches"
            ));
        }
        Ok(Self {
            tensors: source.tensors(&sizes)?,
            naming: source.naming,
            config: source.config(&sizes, grid)?,
            sizes,
            grid,
            preprocessor: source.preprocessor,
            weights: source.weights,
        })
    }
}

/// A tensor of the source.
#[derive(Debug, Clone, PartialEq)]
struct Stored {
    name: String,
    is_transposed: bool,
}

/// The source, and what its tensors are.
struct Source<'a> {
    path: &'a Path,
    weights: Weights,
    shapes: BTreeMap<String, (Dtype, Vec<usize>)>,
    naming: &'static Naming,
    /// The module of a tensor → the tensor.
    found: BTreeMap<String, Stored>,
    /// Nodes of the tower.
    nodes: Vec<OnnxNode>,
    /// What a folder says of its tower.
    said: Value,
    preprocessor: Value,
}

/// How many layers are looked for.
const MAX_LAYERS: usize = 1 << 10;

impl<'a> Source<'a> {
    fn open(path: &'a Path, allow_pickle: bool) -> Result<Self, ConvertError> {
        let (mut said, mut preprocessor) = (Value::Null, Value::Null);
        let (weights, nodes) = if path.is_dir() {
            let folder = Folder::open(path)?;
            said = folder.read_json(CONFIG, CONFIG_MAX_BYTES)?;
            said = said.get("vision_config").cloned().unwrap_or(said);
            if folder.has(PREPROCESSOR) {
                preprocessor = folder.read_json(PREPROCESSOR, CONFIG_MAX_BYTES)?;
            }
            (Weights::open(&folder, path, allow_pickle)?, Vec::new())
        } else if path.extension().is_some_and(|end| end == "gguf") {
            let problem = "a tower is taken from ONNX or from a folder of the hub, not from GGUF";
            return Err(refuse(path, problem.into()));
        } else {
            let onnx = Onnx::open_path(path)?;
            (Weights::Shards(onnx.tensors), onnx.nodes)
        };
        let shapes: BTreeMap<_, _> = (weights.tensors().into_iter())
            .map(|tensor| (tensor.name, (tensor.dtype, tensor.shape)))
            .collect();
        let own = own_names(&shapes, &nodes);
        let lost = lost_names(&shapes, &nodes);
        let names = own.iter().chain(&lost).map(|(name, _)| name.as_str());
        let towers = recognise(names);
        let (naming, prefix) = match towers.as_slice() {
            [(naming, prefix)] => (*naming, prefix.as_str()),
            [] => return Err(refuse(path, unknown(&own, &nodes))),
            several => {
                let prefixes: Vec<&str> = several.iter().map(|(_, it)| it.as_str()).collect();
                return Err(refuse(path, format!("it has several towers: {prefixes:?}")));
            }
        };
        let mut found = BTreeMap::new();
        for (is_own, (name, stored)) in own
            .into_iter()
            .map(|name| (true, name))
            .chain(lost.into_iter().map(|name| (false, name)))
        {
            let Some(name) = name.strip_prefix(prefix) else {
                continue;
            };
            if let Some(module) = naming.table.module_path(name) {
                found.entry(module).or_insert(stored);
            } else if is_own && naming.is_part(name) && !naming.table.ignores(name) {
                let problem = format!("{} has no {name:?}; {SUPPORTED}", naming.title);
                return Err(refuse(path, problem));
            }
        }
        if let Some(node) = nodes.iter().find(|node| is_normalisation(node)) {
            let problem = format!(
                "it normalises pixels in the graph ({} of three numbers in {:?}), which would be done twice",
                node.op, node.scope
            );
            return Err(refuse(path, problem));
        }
        let is_of_it = |node: &OnnxNode| format!("{}.", node.scope).starts_with(prefix);
        Ok(Self {
            path,
            nodes: nodes.into_iter().filter(is_of_it).collect(),
            weights,
            shapes,
            naming,
            found,
            said,
            preprocessor,
        })
    }

    fn refuse<T>(&self, problem: String) -> Result<T, ConvertError> {
        Err(refuse(self.path, problem))
    }

    /// The shape of a tensor as the tower has it, `[out, in]`.
    fn shape(&self, stored: &Stored) -> Vec<usize> {
        let shape = self.shapes.get(&stored.name);
        let shape = shape.map(|(_, shape)| shape.as_slice());
        match (stored.is_transposed, shape.unwrap_or_default()) {
            (true, &[1, depth, height, width]) => vec![height.saturating_mul(width), depth],
            (true, shape) => shape.iter().rev().copied().collect(),
            (false, shape) => shape.to_vec(),
        }
    }

    fn sizes(&mut self) -> Result<Sizes, ConvertError> {
        let patch = "embeddings.patch_embeddings.projection.weight";
        let patch = self.found.get(patch).map(|stored| self.shape(stored));
        let (hidden, patch) = match patch.as_deref() {
            Some(&[hidden, 3, patch, width]) if hidden > 0 && patch > 0 && patch == width => {
                (hidden, patch)
            }
            shape => return self.refuse(format!("its patches are {shape:?}, no squares of RGB")),
        };
        // A row that is joined to others is the class token, or what is added to it.
        if let Some(row) = self.found.remove("embeddings.class") {
            let token = "embeddings.cls_token";
            let is_known = self.found.contains_key(token);
            let name = if is_known { CLASS_POSITION } else { token };
            self.found.insert(name.to_owned(), row);
        }
        let rows = |name: &str| {
            let shape = self.shape(self.found.get(name)?);
            // None of them may be empty, and all others be of any length.
            let elements = shape
                .iter()
                .fold(1_usize, |all, &side| all.saturating_mul(side));
            (shape.last() == Some(&hidden)).then(|| elements / hidden)
        };
        let joined = rows(CLASS_POSITION).zip(rows(PATCH_POSITIONS));
        let joined = joined.map(|(class, patches)| class.saturating_add(patches));
        let Some(positions) = rows(POSITIONS).or(joined) else {
            return self.refuse(format!("its positions are not found; {SUPPORTED}"));
        };
        let rows = |name: &str| {
            let stored = self.found.get(&format!("encoder.layer.0.{name}"))?;
            self.shape(stored).first().copied()
        };
        let gated = rows("mlp.weights_in.weight");
        let is_there = |layer: &usize| {
            let prefix = format!("encoder.layer.{layer}.");
            let next = self.found.range(prefix.clone()..).next();
            next.is_some_and(|(name, _)| name.starts_with(&prefix))
        };
        let layers = (0..MAX_LAYERS).take_while(is_there).count();
        if let Some(lost) = (layers..MAX_LAYERS).find(is_there) {
            return self.refuse(format!("it has layer {lost} and not layer {layers}"));
        }
        if layers == 0 {
            return self.refuse("it has no layers".into());
        }
        Ok(Sizes {
            hidden,
            inner: gated.or(rows("mlp.fc1.weight")).unwrap_or(0),
            patch,
            positions,
            layers,
            is_swiglu: gated.is_some(),
            has_bias: rows("attention.attention.query.bias")
                .or(rows("attention.qkv.bias"))
                .is_some(),
        })
    }

    /// Every tensor that the tower has, under the hub's name.
    fn tensors(&self, sizes: &Sizes) -> Result<Vec<SourceTensor>, ConvertError> {
        let mut tensors = Vec::new();
        let mut missing = Vec::new();
        for (module, shape) in self.naming.wanted(sizes) {
            match self.tensor(&module, &shape)? {
                Some((stored, dtype, made)) => tensors.push(SourceTensor {
                    tensor: NewTensor {
                        name: self.naming.hub_name(&module),
                        dtype,
                        shape,
                    },
                    weights: 0,
                    is_widened: self.weights.is_widened(stored),
                    stored_name: stored.to_owned(),
                    made,
                    codes: None,
                }),
                None => missing.push(module),
            }
        }
        match missing.as_slice() {
            [] => Ok(tensors),
            [first, ..] => self.refuse(format!(
                "of {} {} tensors are not found, first {first:?}; {SUPPORTED}",
                self.naming.title,
                missing.len(),
            )),
        }
    }

    /// Of what, and how, a tensor of this shape is made.
    fn tensor(
        &self,
        module: &str,
        shape: &[usize],
    ) -> Result<Option<(&str, Dtype, Made)>, ConvertError> {
        let found = |module: &str| self.found.get(module);
        let rows = shape.first().copied().unwrap_or(1);
        if let Some(stored) = found(module) {
            let dtype = self.check(module, stored, shape)?;
            let made = match stored.is_transposed {
                true => Made::Columns(0..rows),
                false => Made::Stored(0),
            };
            return Ok(Some((&stored.name, dtype, made)));
        }
        if let Some((at, all)) = part_of(module)
            && let Some(stored) = found(&all)
        {
            let mut whole = shape.to_vec();
            whole[0] *= 3;
            let dtype = self.check(&all, stored, &whole)?;
            let range = at * rows..(at + 1) * rows;
            let made = match stored.is_transposed {
                true => Made::Columns(range),
                false => Made::Rows(range),
            };
            return Ok(Some((&stored.name, dtype, made)));
        }
        if module == POSITIONS
            && let (Some(class), Some(patches)) = (found(CLASS_POSITION), found(PATCH_POSITIONS))
            && let [.., positions, hidden] = *shape
        {
            let dtype = self.check(CLASS_POSITION, class, &[1, hidden])?;
            let others = self.check(PATCH_POSITIONS, patches, &[positions - 1, hidden])?;
            if dtype != others {
                return self.refuse(format!("its positions are of types {dtype} and {others}"));
            }
            let made = Made::Joined(patches.name.clone(), patches.is_transposed);
            return Ok(Some((&class.name, dtype, made)));
        }
        Ok(default_of(module).map(|number| ("", Dtype::F32, Made::Filled(number))))
    }

    /// A tensor must have the shape that it needs, up to axes of one, and be of numbers.
    fn check(
        &self,
        module: &str,
        stored: &Stored,
        wanted: &[usize],
    ) -> Result<Dtype, ConvertError> {
        let shape = self.shape(stored);
        let axes = |shape: &[usize]| {
            shape
                .iter()
                .copied()
                .filter(|&n| n != 1)
                .collect::<Vec<_>>()
        };
        let dtype = self.shapes.get(&stored.name).map(|(dtype, _)| *dtype);
        match dtype {
            Some(dtype @ (Dtype::F32 | Dtype::F16 | Dtype::BF16))
                if axes(&shape) == axes(wanted) =>
            {
                Ok(dtype)
            }
            _ => self.refuse(format!(
                "its {module} ({:?}) is {dtype:?} of {shape:?}, not of {wanted:?}",
                stored.name
            )),
        }
    }

    /// `vision_config`: what the folder says, else what shapes and nodes do.
    fn config(&self, sizes: &Sizes, grid: usize) -> Result<Value, ConvertError> {
        let said = |key: &str| self.said.get(key).filter(|value| !value.is_null()).cloned();
        let heads = match said("num_attention_heads") {
            Some(heads) => heads,
            None => self.heads(sizes.hidden)?.into(),
        };
        let mut config = json!({
            "model_type": self.naming.model_type,
            "hidden_size": sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": heads,
            "num_channels": 3,
            "image_size": grid * sizes.patch,
            "patch_size": sizes.patch,
            "layer_norm_eps": match said("layer_norm_eps") {
                Some(said) => said,
                None => nodes::epsilon(&self.nodes)
                    .or_else(|problem| self.refuse(problem))?
                    .unwrap_or(self.naming.layer_norm_eps)
                    .into(),
            },
            "hidden_act": match said("hidden_act") {
                Some(said) => said,
                None => self.activation()?.into(),
            },
        });
        if self.naming.model_type != "dinov2" {
            config["intermediate_size"] = sizes.inner.into();
            if !self.naming.class_token {
                config["vision_use_head"] = false.into();
            }
            return Ok(config);
        }
        // Gates and values of a gated MLP are two thirds of four widths, a multiple of 8.
        let ratio = if sizes.is_swiglu {
            4
        } else {
            sizes.inner / sizes.hidden
        };
        let inner = match sizes.is_swiglu {
            true => 2 * (sizes.hidden * 8 / 3).next_multiple_of(8),
            false => ratio * sizes.hidden,
        };
        if inner != sizes.inner || ratio == 0 {
            let (inner, hidden) = (sizes.inner, sizes.hidden);
            return self.refuse(format!(
                "its MLPs have {inner} rows, which DINOv2 of width {hidden} has not"
            ));
        }
        config["mlp_ratio"] = ratio.into();
        config["qkv_bias"] = sizes.has_bias.into();
        config["use_swiglu_ffn"] = sizes.is_swiglu.into();
        Ok(config)
    }

    /// The activation of the MLPs: what nodes there do. A folder that does not say it means the usual one.
    fn activation(&self) -> Result<&'static str, ConvertError> {
        let does = |op: &str| {
            let mut nodes = self.nodes.iter();
            nodes.any(|node| node.op == op && node.scope.contains("mlp"))
        };
        let is_gated = self
            .found
            .keys()
            .any(|name| name.ends_with("mlp.weights_in.weight"));
        Ok(match () {
            () if does("Tanh") => "gelu_pytorch_tanh",
            () if does("Erf") || does("Gelu") => "gelu",
            () if does("Sigmoid") && self.naming.model_type != "dinov2" => "quick_gelu",
            () if self.nodes.is_empty() || does("Sigmoid") && is_gated => self.naming.hidden_act,
            () => {
                return self.refuse(
                    "the activation of its MLPs is none of GELU, its approximation by tanh or by a sigmoid".into(),
                );
            }
        })
    }

    /// How many heads attention has. Nodes there have the number or the width of heads to reshape by, and one of
    /// the width to scale by; where these say nothing, a head is 64 wide, as in most towers.
    fn heads(&self, hidden: usize) -> Result<usize, ConvertError> {
        let is_attention = |node: &&OnnxNode| {
            let mut modules = node.scope.split('.');
            modules.any(|module| module.contains("attn") || module.contains("attention"))
        };
        let nodes = self.nodes.iter().filter(is_attention);
        let (mut counts, mut scales) = (Vec::new(), Vec::new());
        for input in nodes.flat_map(|node| &node.inputs) {
            match self.shapes.get(&input.tensor) {
                Some((Dtype::I64, _)) => counts.extend(&input.numbers),
                _ => scales.extend(&input.numbers),
            }
        }
        let is_there = |number: usize| counts.contains(&(number as f64));
        // 1/√width at once, or half of it for queries and half for keys; √width to divide by.
        let scales = |width: usize| {
            let powers = |n: &f64| [n.powi(-2), n.powi(-4), n.powi(2)];
            let mut powers = scales.iter().flat_map(powers);
            powers.any(|power| (power / width as f64 - 1.0).abs() < 0.01)
        };
        let widths: Vec<usize> = (2..=hidden)
            .filter(|width| hidden.is_multiple_of(*width) && scales(*width))
            .filter(|width| is_there(*width) || is_there(hidden / width))
            .collect();
        match widths.as_slice() {
            [width] => Ok(hidden / width),
            _ if self.nodes.iter().any(|node| node.op.contains("Attention")) => self.refuse(
                "its attention is one node, whose heads are not read; give the folder of the checkpoint that it was \
                 exported from"
                    .into(),
            ),
            _ if hidden.is_multiple_of(64) => Ok(hidden / 64),
            _ => self.refuse(format!(
                "nothing says how many heads its attention of width {hidden} has; give the folder of the \
                 checkpoint that it was exported from"
            )),
        }
    }
}

const POSITIONS: &str = "embeddings.position_embeddings";
const CLASS_POSITION: &str = "embeddings.class_position";
const PATCH_POSITIONS: &str = "embeddings.patch_positions";

type Shapes = BTreeMap<String, (Dtype, Vec<usize>)>;

/// Tensors under their own names.
fn own_names(shapes: &Shapes, nodes: &[OnnxNode]) -> Vec<(String, Stored)> {
    let inputs = nodes.iter().flat_map(|node| &node.inputs);
    let transposed: BTreeSet<&str> = inputs
        .filter(|input| input.is_transposed)
        .map(|input| input.tensor.as_str())
        .collect();
    let stored = |name: &String| Stored {
        name: name.clone(),
        is_transposed: transposed.contains(name.as_str()),
    };
    shapes
        .keys()
        .map(|name| (name.clone(), stored(name)))
        .collect()
}

/// Tensors under the names of the modules that use them; a name that two have means neither.
fn lost_names(shapes: &Shapes, nodes: &[OnnxNode]) -> Vec<(String, Stored)> {
    let mut names: BTreeMap<String, Option<Stored>> = BTreeMap::new();
    for node in nodes {
        for input in &node.inputs {
            let axes = shapes
                .get(&input.tensor)
                .map_or(0, |(_, shape)| shape.len());
            let Some(part) = part(node, input, axes) else {
                continue;
            };
            let name = match node.scope.as_str() {
                "" => part,
                scope => format!("{scope}.{part}"),
            };
            let stored = Some(Stored {
                name: input.tensor.clone(),
                // Positions that are about to be interpolated lie plane by plane.
                is_transposed: input.is_transposed || node.op == "Resize",
            });
            let known = names.entry(name).or_insert_with(|| stored.clone());
            if *known != stored {
                *known = None;
            }
        }
    }
    let names = names.into_iter();
    names
        .filter_map(|(name, stored)| Some((name, stored?)))
        .collect()
}

/// What a module calls a tensor that is used so.
fn part(node: &OnnxNode, input: &OnnxInput, axes: usize) -> Option<String> {
    let part = match (node.op.as_str(), input.at, axes) {
        ("MatMul" | "Gemm", 1, 2) | ("Conv", 1, 4) | ("LayerNormalization", 1, 1) => "weight",
        ("Gemm" | "Conv" | "LayerNormalization", 2, 1) | ("Add", _, 1) => "bias",
        ("Mul", _, 1) => "weight",
        ("Add" | "Concat" | "Reshape", _, 3) | ("Resize", 0, 4) => {
            return Some(node.op.to_lowercase());
        }
        _ => return None,
    };
    Some(part.to_owned())
}

/// What is said where no tower is found.
fn unknown(own: &[(String, Stored)], nodes: &[OnnxNode]) -> String {
    let first = |name: &str| name.split('.').take(2).collect::<Vec<_>>().join(".");
    let scopes = nodes.iter().map(|node| first(&node.scope));
    let names = own.iter().map(|(name, _)| first(name));
    let scopes: BTreeSet<String> = scopes
        .chain(names)
        .filter(|name| !name.is_empty())
        .collect();
    let scopes: Vec<String> = scopes.into_iter().take(8).collect();
    format!(
        "no tower is found among {}, …; {SUPPORTED}",
        scopes.join(", ")
    )
}
