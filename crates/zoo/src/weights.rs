//! Which weights stay in fewer bits.

use burn::tensor::DType;
use burn::tensor::backend::Backend;
use reroute_checkpoint::{CheckpointError, Dtype, Folder, Loading, Shards};
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
            if shards.has_codes(name) {
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
        let [single, ..] = bytes;
        // Norms and scales of a quantised model may be in f32: activations need not be.
        let all_small = shards.is_widened() && bytes[1..].iter().all(|(_, bytes)| *bytes == 0);
        let most = bytes.into_iter().max_by_key(|(_, bytes)| *bytes);
        let dtype = match all_small {
            true => DType::BF16,
            false => most.unwrap_or(single).0,
        };
        Ok((dtype, weights))
    }

    /// Puts codes in the place of weights that are not loaded yet.
    pub(crate) fn put<B: Backend>(
        self,
        model: &mut impl Linears<B>,
        loading: &mut Loading<'_>,
        dtype: DType,
    ) -> Result<(), CheckpointError> {
        let (format, is_decoder_only) = match self {
            Self::Floats => return Ok(()),
            Self::Stored => (None, false),
            Self::Decoder(format) => (Some(format), true),
            Self::All(format) => (Some(format), false),
        };
        let mut linears: Vec<(String, &mut Linear<B>)> = Vec::new();
        model.linears("", &mut linears);
        for (path, linear) in linears {
            if is_decoder_only && !path.starts_with(DECODER) {
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
