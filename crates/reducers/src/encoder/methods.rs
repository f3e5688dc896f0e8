use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::{
    AveragePooling, CdPruner, DivPrune, EncoderReducer, EncoderShape, FasterVlm, HiPrune, Nuwa,
    PruMerge, RandomTokens, Reduced, Seen, Tap, UniformGrid, VScan, VisPruner, VisionZip,
};
use crate::ReducerError;

/// The built-in reductions before the decoder, each with its settings: the data of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "each is documented where it is defined")]
pub enum EncoderMethod {
    AveragePooling(AveragePooling),
    CdPruner(CdPruner),
    DivPrune(DivPrune),
    FasterVlm(FasterVlm),
    HiPrune(HiPrune),
    Nuwa(Nuwa),
    PruMerge(PruMerge),
    Random(RandomTokens),
    UniformGrid(UniformGrid),
    #[serde(rename = "vscan")]
    VScan(VScan),
    VisPruner(VisPruner),
    VisionZip(VisionZip),
}

impl EncoderMethod {
    /// The method itself.
    pub fn reducer<B: Backend>(&self) -> &dyn EncoderReducer<B> {
        match self {
            Self::AveragePooling(method) => method,
            Self::CdPruner(method) => method,
            Self::DivPrune(method) => method,
            Self::FasterVlm(method) => method,
            Self::HiPrune(method) => method,
            Self::Nuwa(method) => method,
            Self::PruMerge(method) => method,
            Self::Random(method) => method,
            Self::UniformGrid(method) => method,
            Self::VScan(method) => method,
            Self::VisPruner(method) => method,
            Self::VisionZip(method) => method,
        }
    }
}

impl<B: Backend> EncoderReducer<B> for EncoderMethod {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        self.reducer::<B>().needs(encoder)
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError> {
        self.reducer().reduce(seen, keep)
    }
}
