//! Weights that a file keeps in fewer bits: they become f32, row by row, while they are read.
//!
//! | `quant_method` | a weight `W [out, in]` is | source |
//! |---|---|---|
//! | `fp8`, `fbgemm_fp8` | E4M3 codes times a scale per block or row | transformers, `integrations/finegrained_fp8.py` |
//! | `compressed-tensors` | the same; int8, or int4 packed along the rows, times a scale per row or group | compressed-tensors, `compressors` |
//! | `awq` | 4 bits packed along the columns, less a zero, times a scale per group | AutoAWQ, `utils/packing_utils.py` |
//! | `gptq` | 4 or 8 bits packed along the columns, the same, groups in any order | GPTQModel, `nn_modules/qlinear` |
//! | – (GGUF) | blocks of a row with scales of their own | ggml, `ggml-quants.c` |
//! | `reroute` | rows as products take them from memory, see [`own`] | – |

mod blocks;
mod columns;
mod grid;
pub(crate) mod own;
mod rows;

use std::collections::BTreeMap;

use reroute_kernels::Format;
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

use crate::arranged::Arranged;
use crate::{CONFIG, CONFIG_MAX_BYTES, CheckpointError, Folder, TensorInfo};

pub(crate) use blocks::{BlockKind, Blocks};

/// How a weight comes about: f32 from parts or from blocks, or others whose rows stand in another order.
#[derive(Debug, Clone)]
pub(crate) enum Coded {
    Arranged(Arranged),
    Grid(grid::Grid),
    Columns(columns::Columns),
    Blocks(Blocks),
    Rows(own::Rows),
}

impl Coded {
    /// The format in which products take its rows as they are, if they do.
    pub(crate) fn format(&self) -> Option<Format> {
        match self {
            Self::Blocks(blocks) => blocks.format(),
            Self::Grid(grid) => grid.format(),
            Self::Rows(rows) => Some(rows.format),
            Self::Arranged(_) | Self::Columns(_) => None,
        }
    }

    /// What people call it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Arranged(_) => "several",
            Self::Grid(grid) => grid.name(),
            Self::Columns(columns) => columns.name(),
            Self::Blocks(blocks) => blocks.name(),
            Self::Rows(rows) => rows.format.name(),
        }
    }
}

/// The part of `config.json` that matters.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    quantization_config: Option<Quantization>,
}

/// What `config.json` says of it, whatever the method.
#[derive(Debug, Deserialize)]
struct Quantization {
    #[serde(default)]
    quant_method: String,
    /// `null`: one scale for all of a weight.
    #[serde(default = "blocks_of_128")]
    weight_block_size: Option<[usize; 2]>,
    #[serde(default)]
    bits: Option<u32>,
    #[serde(default)]
    group_size: Option<i64>,
    /// AWQ's order of bits.
    #[serde(default)]
    version: Option<String>,
    /// GPTQ's, whose first adds 1 to every zero.
    #[serde(default)]
    checkpoint_format: Option<String>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    config_groups: Option<BTreeMap<String, Group>>,
    /// GPTQ's groups in any order, which `g_idx` then says.
    #[serde(default)]
    desc_act: Option<bool>,
    /// What changes numbers in ways that are not known here.
    #[serde(default)]
    transform_config: Value,
    #[serde(default)]
    sparsity_config: Value,
    #[serde(default)]
    rotation: Value,
    #[serde(default)]
    dynamic: Value,
}

/// As transformers' `FineGrainedFP8Config` has it.
fn blocks_of_128() -> Option<[usize; 2]> {
    Some([128, 128])
}

impl Quantization {
    /// Refuses what would have to be done with numbers, and is not.
    fn check(&self) -> Result<(), String> {
        let is_off = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(entries) => {
                entries.is_empty()
                    || entries
                        .get("format")
                        .is_some_and(|format| format == "dense")
            }
            Value::Array(items) => items.is_empty(),
            _ => false,
        };
        let settings = [
            ("transform_config", &self.transform_config),
            ("sparsity_config", &self.sparsity_config),
            ("rotation", &self.rotation),
            ("dynamic", &self.dynamic),
        ];
        match settings.iter().find(|(_, value)| !is_off(value)) {
            None => Ok(()),
            Some((setting, _)) => Err(format!("its {setting} is not supported")),
        }
    }
}

/// Which numbers of a weight share a scale.
#[derive(Debug, Clone, Copy)]
enum Cells {
    All,
    Row,
    /// So many of a row.
    Group(usize),
    /// Rows and columns.
    Block([usize; 2]),
}

impl Cells {
    /// Rows and columns of a cell of a weight of this shape.
    fn of(self, [rows, columns]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::All => [rows, columns],
            Self::Row => [1, columns],
            Self::Group(group) => [1, group.max(1)],
            Self::Block(block) => block.map(|side| side.max(1)),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Group {
    #[serde(default)]
    weights: Option<GroupWeights>,
    #[serde(default)]
    format: Option<String>,
}

#[derive(Debug, Deserialize)]
struct GroupWeights {
    num_bits: u32,
    #[serde(default)]
    strategy: Option<String>,
    #[serde(default)]
    group_size: Option<i64>,
    #[serde(default)]
    block_structure: Option<[usize; 2]>,
    #[serde(default)]
    symmetric: Option<bool>,
    #[serde(default)]
    actorder: Option<Value>,
}

/// All tensors of a checkpoint, by name.
type Tensors = BTreeMap<String, TensorInfo>;

/// Puts the weights in the place of the tensors that they are made of, if the checkpoint is quantised.
pub(crate) fn assemble(folder: &Folder, tensors: &mut Tensors) -> Result<(), CheckpointError> {
    if !folder.has(CONFIG) {
        return Ok(());
    }
    let config: Config = folder.read_json(CONFIG, CONFIG_MAX_BYTES)?;
    let assembled = match &config.quantization_config {
        Some(config) => config.check().and_then(|()| put_together(config, tensors)),
        None => Ok(()),
    };
    let assembled = assembled.and_then(|()| check_left(tensors));
    assembled.map_err(|reason| CheckpointError::Quantised {
        folder: folder.describe(),
        reason,
    })
}

fn put_together(config: &Quantization, tensors: &mut Tensors) -> Result<(), String> {
    // What was widened before, by whatever means, has nothing to be put together.
    match config.quant_method.as_str() {
        "fp8" => {
            let block = config.weight_block_size.map(Cells::Block);
            grid::fp8(tensors, block.unwrap_or(Cells::All))
        }
        "fbgemm_fp8" => grid::fp8(tensors, Cells::Row),
        "compressed-tensors" => compressed(config, tensors),
        "awq" => columns::awq(config, tensors),
        "gptq" => columns::gptq(config, tensors),
        own::METHOD => match tensors.iter().find(|(_, info)| info.dtype == Dtype::U8) {
            None => Ok(()),
            Some((name, _)) => Err(format!(
                "its file does not say what the codes of {name} are"
            )),
        },
        _ if tensors.values().all(|info| is_plain(info.dtype)) => Ok(()),
        "" => Err("quantization_config has no quant_method".to_owned()),
        other => Err(format!("weights quantised by {other} are not supported")),
    }
}

/// Refuses parts of weights that nothing was made of.
fn check_left(tensors: &Tensors) -> Result<(), String> {
    let ends = [
        ".qweight",
        ".qzeros",
        ".g_idx",
        ".weight_packed",
        ".weight_scale",
        ".weight_scale_inv",
    ];
    let is_part = |(name, info): &(&String, &TensorInfo)| {
        let is_code = info.dtype == Dtype::F8_E4M3 || info.dtype == Dtype::I8;
        ends.iter().any(|end| name.ends_with(end)) || name.ends_with(".weight") && is_code
    };
    match tensors.iter().find(is_part) {
        None => Ok(()),
        Some((name, _)) => Err(format!(
            "its {name:?} is a part of no weight that its quantization_config speaks of"
        )),
    }
}

fn is_plain(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Folders of compressed-tensors hold the same under other names.
fn compressed(config: &Quantization, tensors: &mut Tensors) -> Result<(), String> {
    let groups = config.config_groups.iter().flatten();
    let mut weights = groups.filter_map(|(_, group)| {
        let format = group.format.as_ref().or(config.format.as_ref());
        Some((format.map_or("", String::as_str), group.weights.as_ref()?))
    });
    let Some((format, group)) = weights.next() else {
        return Err("config_groups of quantization_config say nothing of weights".into());
    };
    if weights.next().is_some() {
        return Err("weights in several groups (config_groups) are not supported".into());
    }
    if group.symmetric == Some(false) {
        return Err("asymmetric weights of compressed-tensors are not supported".into());
    }
    if !matches!(
        &group.actorder,
        None | Some(Value::Null | Value::Bool(false))
    ) {
        return Err("weights of compressed-tensors with actorder are not supported".into());
    }
    let size = group.group_size.and_then(|size| usize::try_from(size).ok());
    let cells = match (group.strategy.as_deref(), size.filter(|&size| size > 0)) {
        (Some("tensor"), _) | (None, None) => Cells::All,
        (Some("channel"), _) => Cells::Row,
        (Some("group") | None, Some(size)) => Cells::Group(size),
        (Some("block"), _) => Cells::Block(group.block_structure.unwrap_or([128, 128])),
        (Some(other), _) => return Err(format!("its strategy \"{other}\" is not supported")),
    };
    match (format, group.num_bits) {
        ("float-quantized" | "naive-quantized", 8) => grid::fp8(tensors, cells),
        ("int-quantized", 8) => grid::int8(tensors, cells),
        ("pack-quantized", 4) => grid::packed(tensors, cells),
        (format, bits) => Err(format!(
            "weights of compressed-tensors in {bits} bits as \"{format}\" are not supported: float-quantized \
             and int-quantized in 8 bits and pack-quantized in 4 are"
        )),
    }
}

/// Takes `suffix` off the names that end with it: what they are of.
fn stems(tensors: &Tensors, suffix: &str) -> Vec<String> {
    let stems = tensors.keys().filter_map(|name| name.strip_suffix(suffix));
    stems.map(str::to_owned).collect()
}

/// Takes a part of a weight out of the tensors.
fn take(tensors: &mut Tensors, stem: &str, suffix: &str) -> Result<TensorInfo, String> {
    let name = format!("{stem}{suffix}");
    let found = tensors.remove(&name);
    found.ok_or_else(|| format!("{name} is missing; is the download complete?"))
}

/// Puts a weight in the place of its parts.
fn put(tensors: &mut Tensors, stem: &str, info: TensorInfo) -> Result<(), String> {
    let name = format!("{stem}.weight");
    match tensors.insert(name, info) {
        None => Ok(()),
        Some(_) => Err(format!("{stem}.weight is there both as it is and in parts")),
    }
}

/// A weight of f32.
fn weight(shape: [usize; 2], shard: usize, coded: Coded) -> Result<TensorInfo, String> {
    let elements = shape[0].checked_mul(shape[1]);
    let bytes = elements.and_then(|elements| (elements as u64).checked_mul(4));
    Ok(TensorInfo {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        bytes: bytes.ok_or("a weight is larger than any memory")?,
        shard,
        offset: 0,
        coded: Some(Box::new(coded)),
    })
}

/// Rows and columns of a matrix of this type.
fn matrix(name: &str, info: &TensorInfo, dtypes: &[Dtype]) -> Result<[usize; 2], String> {
    match info.shape.as_slice() {
        &[rows, columns] if dtypes.contains(&info.dtype) && rows > 0 && columns > 0 => {
            Ok([rows, columns])
        }
        shape => Err(format!(
            "{name} is {:?} {shape:?}, a matrix of {dtypes:?} is needed",
            info.dtype
        )),
    }
}
