//! ONNX files: the tensors of an exported model where they lie, and which node uses which.
//!
//! Exporters fold constants: a linear weight becomes `onnx::MatMul_123`, transposed, and nothing but the node that
//! uses it says what it was. So nodes are read, too, but no graph is built of them.
//!
//! The reader is our own: those of other crates take the whole file into memory, weights and all.

mod wire;

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use crate::shards::Shards;
use crate::{CheckpointError, Folder, TensorInfo};
use wire::{Fault, Node, Part, Tensor, fault};

/// An ONNX file.
#[derive(Debug)]
pub struct Onnx {
    /// Its initialisers and constants, under its names, which may be `onnx::MatMul_123`.
    pub tensors: Shards,
    /// The nodes that use any of them, or are an activation, in the order of the file.
    pub nodes: Vec<OnnxNode>,
}

/// A node of the graph.
#[derive(Debug, Clone, PartialEq)]
pub struct OnnxNode {
    /// The module that it is of, as that names its parameters: `backbone.blocks.0.attn.qkv`.
    pub scope: String,
    /// What it does: `MatMul`, `Add`, …; a `Gelu` that is approximated by it is `Tanh`.
    pub op: String,
    /// Which of its inputs are tensors of the file.
    pub inputs: Vec<OnnxInput>,
    /// What its attributes say of numbers: `alpha`, `beta`, `dilations`, `epsilon`, `pads`, `strides`, `transA`,
    /// `transB`.
    pub attributes: BTreeMap<String, Vec<f64>>,
}

/// A tensor that a node uses.
#[derive(Debug, Clone, PartialEq)]
pub struct OnnxInput {
    /// Position in the list of inputs.
    pub at: usize,
    /// Name of the tensor.
    pub tensor: String,
    /// Whether it is a matrix whose rows belong to the inputs of the node.
    pub is_transposed: bool,
    /// Its numbers, if they are few.
    pub numbers: Vec<f64>,
}

/// Nodes that say which activation a model has.
const ACTIVATIONS: [&str; 4] = ["Erf", "Gelu", "Sigmoid", "Tanh"];
/// Nodes whose output is their input, in another type at most.
const SAME: [&str; 2] = ["Cast", "Identity"];

impl Onnx {
    /// Opens a file of a folder. What it keeps in other files must lie beside it.
    ///
    /// # Errors
    /// [`CheckpointError::Onnx`] if it is broken or of a kind that is not read,
    /// [`CheckpointError::MissingFile`] for a file beside it that is not there.
    pub fn open(folder: &Folder, name: &str) -> Result<Self, CheckpointError> {
        let (file, source) = (folder.path_of(name), folder.locate(name)?);
        let mut found = Found {
            folder,
            shards: BTreeMap::new(),
            tensors: Shards::empty(),
            numbers: BTreeMap::new(),
        };
        // Tensors stand behind the nodes that use them.
        wire::each_part(&source, &file, &mut |part| match part {
            Part::Tensor(tensor) => found.add(name, tensor),
            Part::Node(Node {
                value: Some(mut tensor),
                outputs,
                ..
            }) => {
                tensor.name = outputs.into_iter().next().unwrap_or_default();
                found.add(name, tensor)
            }
            Part::Node(_) => Ok(()),
        })?;
        let mut nodes = Vec::new();
        let mut others = BTreeMap::new();
        wire::each_part(&source, &file, &mut |part| {
            if let Part::Node(node) = part {
                nodes.extend(found.node(node, &mut others));
            }
            Ok(())
        })?;
        if found.tensors.names().next().is_none() {
            return Err(CheckpointError::Onnx {
                file,
                reason: "it has no weights".into(),
            });
        }
        Ok(Self {
            tensors: found.tensors,
            nodes,
        })
    }

    /// Opens a file by its path.
    ///
    /// # Errors
    /// As [`open`](Self::open), and those of [`Folder::on_disk`] for the folder that it lies in.
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        if path.is_dir() || !path.exists() {
            return Err(CheckpointError::NoSuchFile { path: path.into() });
        }
        let missing = || CheckpointError::NotAFile {
            file: path.display().to_string(),
        };
        let name = path.file_name().and_then(|name| name.to_str());
        let parent = path.parent().filter(|parent| *parent != Path::new(""));
        let folder = Folder::on_disk(parent.unwrap_or(Path::new(".")))?;
        Self::open(&folder, name.ok_or_else(missing)?)
    }
}

/// What has been found so far.
struct Found<'a> {
    folder: &'a Folder,
    /// Name of a file → its position among the shards, and its length.
    shards: BTreeMap<String, (usize, u64)>,
    tensors: Shards,
    numbers: BTreeMap<String, Vec<f64>>,
}

impl Found<'_> {
    /// Takes up a tensor of the file `name`, if its elements have a type of fixed length.
    fn add(&mut self, name: &str, tensor: Tensor) -> Result<(), Fault> {
        let Some(dtype) = tensor.dtype() else {
            return Ok(()); // Texts and the like.
        };
        let refuse = |what: String| fault(format!("its tensor {:?} {what}", tensor.name));
        let sides = tensor.shape.iter();
        let bytes = sides.copied().try_fold(1_u64, |all, side| {
            all.checked_mul(u64::try_from(side).ok()?)
        });
        let bytes = bytes.and_then(|elements| elements.checked_mul(dtype.bitsize() as u64 / 8));
        let Some(bytes) = bytes else {
            return refuse("is larger than any file".into());
        };
        let (place, offset, stored) = match (tensor.is_external, tensor.data) {
            (true, _) => (
                tensor.location.as_str(),
                tensor.offset,
                tensor.length.unwrap_or(bytes),
            ),
            (false, Some((offset, stored))) => (name, offset, stored),
            (false, None) if bytes == 0 => (name, 0, 0),
            // Integers of variable length: shapes, no weights.
            (false, None) if !matches!(dtype, Dtype::F16 | Dtype::BF16) => return Ok(()),
            (false, None) => {
                return refuse("has its numbers as integers; save it with raw_data".into());
            }
        };
        if stored != bytes {
            return refuse(format!(
                "has {stored} bytes, but its shape and type need {bytes}"
            ));
        }
        let (shard, file_bytes) = self.shard(place)?;
        if offset.checked_add(bytes).is_none_or(|end| end > file_bytes) {
            return refuse(format!("ends behind {place:?}: is the download complete?"));
        }
        let numbers = numbers(dtype, &tensor.small);
        if !numbers.is_empty() {
            self.numbers.insert(tensor.name.clone(), numbers);
        }
        let info = TensorInfo {
            dtype,
            shape: tensor.shape,
            bytes,
            shard,
            offset,
            coded: None,
        };
        match self.tensors.insert(tensor.name.clone(), info) {
            None => Ok(()),
            Some(_) => fault(format!("it has the tensor {:?} twice", tensor.name)),
        }
    }

    /// The position of a file among the shards, and its length.
    fn shard(&mut self, name: &str) -> Result<(usize, u64), Fault> {
        if let Some(known) = self.shards.get(name) {
            return Ok(*known);
        }
        let source = self.folder.locate(name)?;
        let (_, bytes) = source.open()?;
        let at = self.tensors.push("ONNX", self.folder.path_of(name), source);
        self.shards.insert(name.to_owned(), (at, bytes));
        Ok((at, bytes))
    }

    /// A node, if it matters; `others` are further names of tensors.
    fn node(&self, node: Node, others: &mut BTreeMap<String, String>) -> Option<OnnxNode> {
        let tensor = |name: &String| match others.get(name) {
            Some(other) => Some(other.clone()),
            None => self.tensors.info(name).map(|_| name.clone()),
        };
        let scope = scope(&node);
        let turned = node.attributes.get("transB");
        let turned = turned.is_some_and(|turned| turned.first() == Some(&1.0));
        let mut op = node.op;
        let inputs = node.inputs.iter().enumerate().filter_map(|(at, name)| {
            let tensor = tensor(name)?;
            let axes = self.tensors.info(&tensor)?.shape.len();
            let is_right = at == 1 && axes == 2;
            Some(OnnxInput {
                at,
                is_transposed: is_right && (op == "MatMul" || op == "Gemm" && !turned),
                numbers: self.numbers.get(&tensor).cloned().unwrap_or_default(),
                tensor,
            })
        });
        let inputs: Vec<OnnxInput> = inputs.collect();
        if let ([input], true) = (inputs.as_slice(), SAME.contains(&op.as_str())) {
            let names = node.outputs.into_iter().take(1);
            others.extend(names.map(|name| (name, input.tensor.clone())));
            return None;
        }
        if node.approximate == "tanh" {
            op = "Tanh".into();
        }
        let is_known = ACTIVATIONS.contains(&op.as_str()) || op.contains("Attention");
        let matters = !inputs.is_empty() || is_known;
        matters.then_some(OnnxNode {
            scope,
            op,
            inputs,
            attributes: node.attributes,
        })
    }
}

/// The module that a node is of: `/backbone/blocks.0/attn/qkv/MatMul` is of `backbone.blocks.0.attn.qkv`, as is
/// what lies in `['', 'backbone', …, 'backbone.blocks.0.attn.qkv', 'linear']`.
fn scope(node: &Node) -> String {
    if let Some(scopes) = &node.scopes {
        let mut scopes = scopes.trim_matches(['[', ']']).rsplit(", ");
        let scope = scopes.nth(1).unwrap_or_default();
        return scope.trim_matches(['\'', '"']).to_owned();
    }
    let path = node.name.trim_start_matches('/');
    match path.rsplit_once('/') {
        Some((scope, _)) => scope.replace('/', "."),
        None => String::new(),
    }
}

/// A few numbers.
fn numbers(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::I64 => {
            let numbers = bytes.as_chunks().0.iter();
            numbers.map(|raw| i64::from_le_bytes(*raw) as f64).collect()
        }
        Dtype::F32 => {
            let numbers = bytes.as_chunks().0.iter();
            numbers.map(|raw| f32::from_le_bytes(*raw).into()).collect()
        }
        Dtype::F16 => {
            let numbers = bytes.as_chunks().0.iter();
            numbers
                .map(|raw| half::f16::from_le_bytes(*raw).into())
                .collect()
        }
        _ => Vec::new(),
    }
}
