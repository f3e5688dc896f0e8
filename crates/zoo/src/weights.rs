//! Which weights stay in fewer bits.

use std::collections::BTreeMap;

use burn::tensor::DType;
use burn::tensor::backend::Backend;
use reroute_checkpoint::{CheckpointError, Dtype, Folder, Loading, NameTable, Shards};
use reroute_layers::{CodeFormat, Coded, Linear, Linears, Weight};

/// How the weights of linear maps are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Weights {
    /// As floats of the type that everything else has.
    #[default]
    Floats,
    /// As the checkpoint has them, where that is a format that can be multiplied with: Q8_0, Q4_0, Q4_1,
    /// Q4_K and Q6_K of GGUF. Others are floats.
    Stored,
    /// Those of the decoder in a format of fewer bits, made while they are read: a whole byte
    /// ([`CodeFormat::Int8`]) or 4 bits ([`CodeFormat::Int4`]). The vision tower and what projects its
    /// features stay floats: boxes suffer first from what they lose.
    Decoder(CodeFormat),
    /// All of them likewise.
    All(CodeFormat),
}

/// What the paths of the decoder's maps begin with.
const DECODER: &str = "language_model.";

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

    /// The format of the linear map at a path, `None` for floats; a file is known by the names of its shards.
    fn format_at(
        self,
        path: &str,
        stored: &dyn Fn(&str) -> Option<CodeFormat>,
    ) -> Option<CodeFormat> {
        match self {
            Self::Floats => None,
            Self::Stored => stored(path),
            Self::Decoder(format) => path.starts_with(DECODER).then_some(format),
            Self::All(format) => Some(format),
        }
    }

    /// Numbers that stay in codes, and their bytes.
    pub(crate) fn sizes<B: Backend>(
        self,
        model: &mut impl Linears<B>,
        shards: &Shards,
        names: &NameTable,
    ) -> (u64, u64) {
        let of_path = |name: &str| Some((names.module_path(name)?, shards.code_format(name)?));
        let stored: BTreeMap<_, _> = shards.names().filter_map(of_path).collect();
        let stored = |path: &str| stored.get(&format!("{path}.weight")).copied();
        let mut linears: Vec<(String, &mut Linear<B>)> = Vec::new();
        model.linears("", &mut linears);
        let sizes = linears.iter().filter_map(|(path, linear)| {
            let [rows, columns] = linear.weight.dims();
            let bytes = self.format_at(path, &stored)?.row_bytes(columns)?;
            Some(((rows * columns) as u64, (rows * bytes) as u64))
        });
        sizes.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
    }

    /// Puts codes in the place of weights that are not loaded yet.
    pub(crate) fn put<B: Backend>(
        self,
        model: &mut impl Linears<B>,
        loading: &mut Loading<'_>,
        dtype: DType,
    ) -> Result<(), CheckpointError> {
        if self == Self::Floats {
            return Ok(());
        }
        let mut linears: Vec<(String, &mut Linear<B>)> = Vec::new();
        model.linears("", &mut linears);
        for (path, linear) in linears {
            let format = self.format_at(&path, &|_| None);
            if format.is_none() && self != Self::Stored {
                continue;
            }
            let ([output, _], device) = (linear.weight.dims(), linear.weight.device());
            let coded = loading.codes(&format!("{path}.weight"), output, format, |codes| {
                Coded::new(codes.format, codes.columns, codes.words, (&device, dtype))
            })?;
            if let Some(coded) = coded {
                linear.weight = Weight::Coded(coded);
            }
        }
        Ok(())
    }
}
