use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::host::{attention, feature_layer, read_mean, require_class_token};
use super::{EncoderReducer, EncoderShape, Reduced, Seen, Tap};
use crate::{About, ReducerError, Support, top_k};

/// FasterVLM (arXiv 2412.01818v1): the tokens that the class token attends to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FasterVlm {}

impl FasterVlm {
    /// What to know before comparing.
    pub const ABOUT: About = About {
        description: "top class attention",
        source: "arXiv 2412.01818v1; github.com/Theia-4869/FasterVLM",
        exact: "class attention of the layer that makes the features, mean over heads, order kept",
        interpretation: "",
        llava: Support::Yes,
        qwen: Support::No("it ranks by the class token's attention, and there is no class token"),
    };
}

impl<B: Backend> EncoderReducer<B> for FasterVlm {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        require_class_token("faster-vlm", encoder)?;
        Ok(vec![attention(encoder, feature_layer(encoder))])
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError> {
        let attention = attention(&seen.encoder, feature_layer(&seen.encoder));
        let scores = read_mean(seen.get(attention)?)?;
        Ok(Reduced::selection(top_k(&scores, keep)?))
    }
}
