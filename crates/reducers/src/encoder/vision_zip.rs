use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::cosines::nearest;
use super::host::{attention, feature_layer, others, read_mean};
use super::mixture::Mixture;
use super::{EncoderReducer, EncoderShape, Reduced, Seen, Tap};
use crate::{About, ReducerError, Support, top_k};

/// VisionZip (arXiv 2412.04467): the tokens that get most attention, and the rest merged into a few.
///
/// The first are *dominant* (behind CLIP the class token is one of them). Of the others every n-th is
/// a *contextual* token, to which the mean of those is added whose keys are most like its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VisionZip {
    /// Contextual tokens among those kept, at most all but one. As released if absent: 10 of 64
    /// behind CLIP, one for 20 tokens of the picture behind Qwen.
    pub contextual: Option<usize>,
}

impl VisionZip {
    /// What to know before comparing.
    pub const ABOUT: About = About {
        description: "top attention, and the rest merged by key similarity",
        source: "arXiv 2412.04467; github.com/dvlab-research/VisionZip (LLaVA and Qwen2.5-VL)",
        exact: "attention and mean key of the layer that makes the features; class token kept; \
                contextual targets at even steps, assignment by cosine, mean of the assigned added; \
                splits 54+10, 108+20, 162+30 (LLaVA) and 5 % of the picture (Qwen)",
        interpretation: "other budgets divide as 54+10 does; tokens stand in the order of the grid, \
                         where the LLaVA release puts contextual tokens last; keeping all changes \
                         nothing; Qwen pictures are reduced one by one",
        llava: Support::Yes,
        qwen: Support::Yes,
    };

    fn contextual(&self, encoder: &EncoderShape, tokens: usize, keep: usize) -> usize {
        let released = match encoder.class_token {
            true => keep * 10 / 64,
            false => (tokens / 20).max(1),
        };
        self.contextual.unwrap_or(released).min(keep - 1)
    }
}

impl<B: Backend> EncoderReducer<B> for VisionZip {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        let layer = feature_layer(encoder);
        let mut taps = vec![attention(encoder, layer), Tap::Keys { layer }];
        if encoder.class_token {
            taps.push(Tap::ClassToken);
        }
        Ok(taps)
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduced<B>, ReducerError> {
        let (tokens, encoder) = (seen.tokens(), &seen.encoder);
        if keep == tokens {
            return Ok(Reduced::selection((0..tokens).collect()));
        }
        let layer = feature_layer(encoder);
        let class_token = encoder.class_token.then_some(tokens);
        let contextual = self.contextual(encoder, tokens, keep);
        let dominant = keep - contextual - class_token.iter().len();

        let scores = read_mean(seen.get(attention(encoder, layer))?)?;
        let dominant = top_k(&scores, dominant)?;
        let rest = others(&dominant, tokens);
        let step = rest.len().checked_div(contextual).unwrap_or(1).max(1);
        let targets: Vec<usize> = rest
            .iter()
            .copied()
            .step_by(step)
            .take(contextual)
            .collect();
        let merged = others(&[&dominant[..], &targets].concat(), tokens);

        let keys = seen.get(Tap::Keys { layer })?;
        let [hidden_size, _] = keys.dims();
        let heads = encoder.num_heads;
        let mean_keys = keys
            .reshape([heads, hidden_size / heads * tokens])
            .mean_dim(0);
        let mean_keys = mean_keys.reshape([hidden_size / heads, tokens]);
        let device = mean_keys.device();
        let assigned = nearest(mean_keys, &merged, &targets)?;
        let mut sizes = vec![0; targets.len()];
        assigned.iter().for_each(|&target| sizes[target] += 1);

        let cells = dominant.iter().chain(&targets);
        let sources: Vec<usize> = class_token.iter().chain(cells).copied().collect();
        let place = |&source: &usize| (source < tokens).then_some(source);
        let mut mixture = Mixture::new(
            sources.iter().map(place).collect(),
            tokens + class_token.iter().len(),
        );
        for (token, &source) in sources.iter().enumerate() {
            mixture.add(token, source, 1.0);
        }
        for (&source, target) in merged.iter().zip(assigned) {
            let token = sources.len() - targets.len() + target;
            mixture.add(token, source, 1.0 / sizes[target] as f32);
        }
        Ok(mixture.on(&device))
    }
}
