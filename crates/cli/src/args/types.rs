//! Types of numbers in memory.

use clap::ValueEnum;
use reroute_zoo::burn::tensor::DType;
use reroute_zoo::{CodeFormat, Folder, KvType, Weights};

use crate::backend;

/// Types that keys and values can have in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kv {
    /// That of the activations.
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// The same, with the range of f32 and a third of the digits of f16.
    Bf16,
    /// Bytes, with a scale for each head and token.
    Int8,
}

impl Kv {
    /// The type, if it is not that of the activations.
    pub fn chosen(self) -> Option<KvType> {
        Some(match self {
            Self::Auto => return None,
            Self::F32 => KvType::F32,
            Self::F16 => KvType::F16,
            Self::Bf16 => KvType::BF16,
            Self::Int8 => KvType::Int8,
        })
    }
}

/// Types that the weights of a model can have in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightType {
    /// As the file has them: f32, f16, bf16; int8 and q4 of `convert`, and blocks of GGUF (Q8_0, Q4_0, Q4_1, Q4_K,
    /// Q6_K) as they are. What is quantised otherwise becomes what its file has beside.
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats: half the memory, faster decoding.
    F16,
    /// The same, with the range of f32 and a third of the digits of f16.
    Bf16,
    /// Bytes with a scale for each row in the decoder; what is left is bf16.
    Int8,
    /// 4 bits with a scale for each group of 64 in the decoder; what is left is bf16.
    Q4,
}

impl WeightType {
    /// The type of floats and activations, if it does not depend on the checkpoint.
    pub fn floats(self) -> Option<DType> {
        Some(match self {
            Self::Auto => return None,
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Int8 | Self::Q4 => backend::or_f32(DType::BF16),
        })
    }

    /// The type of floats and activations for a checkpoint, and which weights stay in fewer bits.
    pub fn types(self, coded: CodedMaps, folder: &Folder) -> (DType, Weights) {
        match (self, self.floats()) {
            (Self::Int8, Some(floats)) => (floats, coded.weights(CodeFormat::Int8)),
            (Self::Q4, Some(floats)) => (floats, coded.weights(CodeFormat::Int4)),
            (_, Some(floats)) => (floats, Weights::Floats),
            (_, None) => {
                // What is wrong with it is told when it is opened.
                let stored = Weights::stored(folder);
                let (floats, weights) = stored.unwrap_or((DType::F32, Weights::Floats));
                (backend::or_f32(floats), weights)
            }
        }
    }
}

/// Linear maps whose weights become codes of fewer bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CodedMaps {
    /// Those of the decoder: boxes suffer first from what the vision tower loses.
    Decoder,
    /// Those of the vision tower and of what projects its features, too.
    All,
}

impl CodedMaps {
    /// These in a format.
    pub fn weights(self, format: CodeFormat) -> Weights {
        match self {
            Self::Decoder => Weights::Decoder(format),
            Self::All => Weights::All(format),
        }
    }
}
