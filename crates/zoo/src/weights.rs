//! Which weights stay in fewer bits.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::DType;
use burn::tensor::backend::Backend;
use reroute_checkpoint::{CheckpointError, Dtype, Folder, Loading, NameTable, Shards};
use reroute_layers::{CodeFormat, Coded, Linears, Weight};

use crate::{Model, ModelConfig, ZooError};

/// How the weights of linear maps and vocabulary tables are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Weights {
    /// As floats of the type that everything else has.
    #[default]
    Floats,
    /// As the checkpoint has them, where that is a format that can be multiplied with: what was converted to
    /// int8 or int4 or saved in codes; Q8_0, Q4_0, Q4_1, Q4_K and Q6_K of GGUF; int8 with a scale for each row of
    /// compressed-tensors. Others are floats.
    Stored,
    /// Those of the decoder's linear maps in a format of fewer bits, made while they are read: a whole byte
    /// ([`CodeFormat::Int8`]) or 4 bits ([`CodeFormat::Int4`]). The vision tower and what projects its
    /// features stay floats: boxes suffer first from what they lose.
    Decoder(CodeFormat),
    /// All of them likewise.
    All(CodeFormat),
}

/// What the paths of the decoder's weights begin with, and of those its linear maps.
const DECODER: &str = "language_model.";
const LAYERS: &str = "language_model.layers.";

impl Weights {
    /// What a checkpoint has: the type of most of its floats, and whether blocks can stay as they are.
    pub fn stored(folder: &Folder) -> Result<(DType, Self), CheckpointError> {
        let shards = Shards::open(folder)?;
        let mut bytes = [(DType::F32, 0), (DType::F16, 0), (DType::BF16, 0)];
        let mut weights = Self::Floats;
        for name in shards.names() {
            let Some(info) = shards.info(name) else {
                continue;
            };
            if shards.code_format(name).is_some() {
                weights = Self::Stored;
                continue;
            }
            let index = match info.dtype {
                Dtype::F16 => 1,
                Dtype::BF16 => 2,
                _ => 0,
            };
            if !info.is_widened() {
                bytes[index].1 += info.bytes;
            }
        }
        // Norms and scales of a quantised model may be in f32: activations need not be.
        let halves = bytes[1..].iter().any(|(_, bytes)| *bytes > 0);
        let most = bytes.into_iter().max_by_key(|(_, bytes)| *bytes);
        let dtype = match most {
            Some((dtype, _)) if halves || !shards.is_widened() => dtype,
            _ => DType::BF16,
        };
        Ok((dtype, weights))
    }

    /// The format of the weight at a path, `None` for floats; what a file has, `stored` says.
    fn format_at(
        self,
        path: &str,
        stored: impl FnOnce() -> Option<CodeFormat>,
    ) -> Option<CodeFormat> {
        let is_linear = path.starts_with(LAYERS) || !path.starts_with(DECODER);
        match self {
            Self::Floats => None,
            Self::Stored => stored(),
            Self::Decoder(format) => path.starts_with(LAYERS).then_some(format),
            Self::All(format) => is_linear.then_some(format),
        }
    }

    /// Paths of the weights that are in codes, whatever a file has: what conversions want to know.
    pub fn coded_paths<B: Backend>(
        self,
        config: &ModelConfig,
        device: &B::Device,
    ) -> Result<BTreeSet<String>, ZooError> {
        let mut model = Model::<B>::new(config, device)?;
        let mut weights = Vec::new();
        model.weights("", &mut weights);
        let paths = weights.into_iter().map(|(path, _)| path);
        Ok(paths
            .filter(|path| self.format_at(path, || None).is_some())
            .collect())
    }

    /// Numbers that stay in codes, and their bytes.
    pub(crate) fn sizes<B: Backend>(
        self,
        model: &mut Model<B>,
        shards: &Shards,
        names: &NameTable,
    ) -> (u64, u64) {
        let of_path = |name: &str| Some((names.module_path(name)?, shards.code_format(name)?));
        let stored: BTreeMap<_, _> = shards.names().filter_map(of_path).collect();
        let mut weights = Vec::new();
        model.weights("", &mut weights);
        let sizes = weights.iter().filter_map(|(path, blocks)| {
            let format = self.format_at(path, || stored.get(path).copied())?;
            let rows: usize = blocks.iter().map(|block| block.dims()[0]).sum();
            let [_, columns] = blocks.first()?.dims();
            let bytes = format.row_bytes(columns)?;
            Some(((rows * columns) as u64, (rows * bytes) as u64))
        });
        sizes.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
    }

    /// Puts codes in the place of weights that are not loaded yet.
    pub(crate) fn put<B: Backend>(
        self,
        model: &mut Model<B>,
        loading: &mut Loading<'_>,
        dtype: DType,
    ) -> Result<(), CheckpointError> {
        if self == Self::Floats {
            return Ok(());
        }
        let mut weights = Vec::new();
        model.weights("", &mut weights);
        for (path, blocks) in weights {
            let format = self.format_at(&path, || None);
            let (Some(first), true) = (blocks.first(), format.is_some() || self == Self::Stored)
            else {
                continue;
            };
            let device = first.device();
            let heights: Vec<usize> = blocks.iter().map(|block| block.dims()[0]).collect();
            let coded = loading.codes(&path, &heights, format, |codes| {
                Coded::new(codes.format, codes.columns, codes.words, (&device, dtype))
            })?;
            for (block, coded) in blocks.iter_mut().zip(coded.into_iter().flatten()) {
                *block = Weight::Coded(coded);
            }
        }
        Ok(())
    }
}

impl<B: Backend> Model<B> {
    /// Format and columns of the weights that are in codes, by path.
    pub(crate) fn codes(&self) -> BTreeMap<String, (CodeFormat, usize)> {
        // Clones share their numbers.
        let (mut model, mut weights) = (self.clone(), Vec::new());
        model.weights("", &mut weights);
        let coded = weights.into_iter().filter_map(|(path, blocks)| {
            let first = blocks.first()?;
            Some((path, (first.format()?, first.dims()[1])))
        });
        coded.collect()
    }
}
