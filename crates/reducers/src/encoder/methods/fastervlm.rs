use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::encoder::host::{read_mean, require_class_token};
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Reduction, Seen, Tap, Tower};
use crate::{About, ReducerError, top_k};

/// FasterVLM (arXiv 2412.01818v1): the tokens that the class token attends to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FasterVlm {}

impl BuiltIn for FasterVlm {
    const ABOUT: About = About {
        description: "top class attention",
        source: "arXiv 2412.01818v1; github.com/Theia-4869/FasterVLM",
        exact: "class attention of the layer that makes the features, mean over heads, order kept",
        interpretation: "",
        towers: &[Tower::Clip],
    };

    fn works_behind(&self, encoder: &EncoderShape) -> Result<(), ReducerError> {
        require_class_token(Self::NAME, encoder)
    }
}

impl<B: Backend> EncoderReducer<B> for FasterVlm {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        self.works_behind(encoder)?;
        Ok(vec![encoder.attention(encoder.last_layer())])
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let attention = seen.encoder.attention(seen.encoder.last_layer());
        let scores = read_mean(seen.get(attention)?)?;
        Ok(Reduction::selection(top_k(&scores, keep)?))
    }
}
