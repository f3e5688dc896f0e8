//! Small checkpoints, honest and lying, and a module to load them into.

use std::fs;
use std::ops::ControlFlow;

use burn::module::{Module, Param, ParamId};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reroute_checkpoint::{
    CheckpointError, Folder, Layout, LoadOptions, LoadProgress, NameTable, Rule, Shards, load_into,
};
use tempfile::TempDir;

pub type TestBackend = burn_flex::Flex;

/// A folder with these files; it is deleted when the first part is dropped.
pub fn folder(files: &[(&str, &[u8])]) -> (TempDir, Folder) {
    let dir = TempDir::new().unwrap();
    for (name, content) in files {
        fs::write(dir.path().join(name), content).unwrap();
    }
    let folder = Folder::open(dir.path()).unwrap();
    (dir, folder)
}

/// Opens an embedded folder with one weights file of this content.
pub fn open(content: &[u8]) -> Result<Shards, CheckpointError> {
    let content: &'static [u8] = content.to_vec().leak();
    Shards::open(&Folder::embedded(
        vec![("model.safetensors", content)].leak(),
    ))
}

/// A safetensors file with any header and any data.
pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A tensor to be written: name, dtype, shape, little-endian elements.
pub type Stored<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

/// An honest safetensors file.
pub fn safetensors(tensors: &[Stored]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        entries.push(entry(name, dtype, shape, start, data.len()));
    }
    file(&format!("{{{}}}", entries.join(",")), &data)
}

/// One entry of a header.
pub fn entry(name: &str, dtype: &str, shape: &[usize], start: usize, end: usize) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
}

pub fn f32_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// An f32 tensor that counts upwards.
pub fn counting<'a>(name: &'a str, shape: &'a [usize]) -> Stored<'a> {
    let elements: usize = shape.iter().product();
    (
        name,
        "F32",
        shape,
        f32_bytes((0..elements).map(|i| i as f32)),
    )
}

/// `class [2]`, and two layers of `proj [2 → 3]` and `norm [3]`; no parameter may be initialised.
#[derive(Module, Debug)]
pub struct Tiny<B: Backend> {
    pub class: Param<Tensor<B, 1>>,
    pub layers: Vec<Layer<B>>,
}

#[derive(Module, Debug)]
pub struct Layer<B: Backend> {
    pub proj: Linear<B>,
    pub norm: LayerNorm<B>,
}

impl<B: Backend> Tiny<B> {
    pub fn new(device: &B::Device) -> Self {
        let layer = |_| Layer {
            proj: LinearConfig::new(2, 3).init(device),
            norm: LayerNormConfig::new(3).init(device),
        };
        Self {
            class: Param::uninitialized(
                ParamId::new(),
                |_, _| panic!("a parameter was initialised while loading"),
                device.clone(),
                false,
                [2].into(),
            ),
            layers: (0..2).map(layer).collect(),
        }
    }
}

pub const TABLE: NameTable = NameTable {
    rules: &[
        Rule {
            module: "layers.{}.norm.gamma",
            file: &[
                "old.layers.{}.norm.weight",
                "model.new.layers.{}.norm.weight",
            ],
        },
        Rule {
            module: "layers.{}.norm.beta",
            file: &["old.layers.{}.norm.bias", "model.new.layers.{}.norm.bias"],
        },
        Rule {
            module: "*",
            file: &["old.*", "model.new.*"],
        },
    ],
    ignore: &["*.inv_freq"],
};

/// The tensors of a [`Tiny`], under names with this prefix.
pub fn tiny_names(prefix: &str) -> Vec<(String, Vec<usize>)> {
    let mut names = vec![(format!("{prefix}.class"), vec![2])];
    for layer in 0..2 {
        for (name, shape) in [
            ("proj.weight", vec![3, 2]),
            ("proj.bias", vec![3]),
            ("norm.weight", vec![3]),
            ("norm.bias", vec![3]),
        ] {
            names.push((format!("{prefix}.layers.{layer}.{name}"), shape));
        }
    }
    names
}

/// An honest file of counting tensors.
pub fn counting_file(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let tensors: Vec<_> = tensors.iter().map(|(n, s)| counting(n, s)).collect();
    safetensors(&tensors)
}

/// Options for [`Tiny`], whose linear layers are Burn's.
pub fn options() -> LoadOptions {
    LoadOptions {
        linear: Layout::Transposed,
        ..LoadOptions::new(DType::F32)
    }
}

pub fn load(
    shards: &Shards,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Tiny<TestBackend>, CheckpointError> {
    let module = Tiny::new(&Default::default());
    let mut go_on = |report| {
        progress(report);
        ControlFlow::Continue(())
    };
    load_into(module, shards, &TABLE, options, &mut go_on)
}
