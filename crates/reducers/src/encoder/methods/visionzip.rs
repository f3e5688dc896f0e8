use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::encoder::cosines::nearest;
use crate::encoder::host::{others, read_mean};
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Part, Reduction, Seen, Tap, Tower};
use crate::{About, ReducerError, top_k};

/// VisionZip (arXiv 2412.04467): the tokens that get most attention, and the rest merged into a few.
///
/// The first are *dominant* (the class token, where there is one, is one of them). Of the others every n-th is
/// a *contextual* token, to which the mean of those is added whose keys are most like its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VisionZip {
    /// Contextual tokens among those kept, at most all but one. As released if absent: 10 of 64
    /// behind CLIP, one for 20 tokens of the picture behind Qwen-VL; behind other towers as behind CLIP.
    pub contextual: Option<usize>,
}

impl BuiltIn for VisionZip {
    const ABOUT: About = About {
        description: "top attention, and the rest merged by key similarity",
        source: "arXiv 2412.04467; github.com/dvlab-research/VisionZip (LLaVA and Qwen2.5-VL)",
        exact: "attention and mean key of the layer that makes the features; class token kept; \
                contextual targets at even steps, assignment by cosine, mean of the assigned added; \
                splits 54+10, 108+20, 162+30 (LLaVA) and 5 % of the picture (Qwen)",
        interpretation: "other budgets divide as 54+10 does; tokens stand in the order of the grid, \
                         where the LLaVA release puts contextual tokens last; keeping all changes \
                         nothing; Qwen pictures are reduced one by one",
        towers: &[Tower::Clip, Tower::QwenVl],
    };
}

impl VisionZip {
    fn contextual(&self, encoder: &EncoderShape, tokens: usize, keep: usize) -> usize {
        let released = encoder.settings(keep * 10 / 64, (tokens / 20).max(1));
        self.contextual.unwrap_or(released).min(keep - 1)
    }
}

impl<B: Backend> EncoderReducer<B> for VisionZip {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        let layer = encoder.last_layer();
        let mut taps = vec![encoder.attention(layer), Tap::Keys { layer }];
        if encoder.class_token {
            taps.push(Tap::ClassToken);
        }
        Ok(taps)
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let (tokens, encoder) = (seen.tokens(), &seen.encoder);
        if keep == tokens {
            return Ok(Reduction::selection((0..tokens).collect()));
        }
        let layer = encoder.last_layer();
        let class_token = encoder.class_token.then_some(tokens);
        let contextual = self.contextual(encoder, tokens, keep);
        let dominant = keep - contextual - class_token.iter().len();

        let scores = read_mean(seen.get(encoder.attention(layer))?)?;
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
        if hidden_size.checked_rem(heads) != Some(0) {
            return Err(ReducerError::Picture {
                reason: format!("{hidden_size} rows of keys are not those of {heads} heads"),
            });
        }
        let mean_keys = keys
            .reshape([heads, hidden_size / heads * tokens])
            .mean_dim(0);
        let mean_keys = mean_keys.reshape([hidden_size / heads, tokens]);
        let assigned = nearest(mean_keys, &merged, &targets)?;
        let mut sizes = vec![0; targets.len()];
        assigned.iter().for_each(|&target| sizes[target] += 1);

        let cells = dominant.iter().chain(&targets);
        let sources: Vec<usize> = class_token.iter().chain(cells).copied().collect();
        let place = |&source: &usize| (source < tokens).then_some(source);
        let itself = sources.iter().enumerate().map(|(token, &source)| Part {
            token,
            source,
            weight: 1.0,
        });
        let merged = merged.iter().zip(assigned).map(|(&source, target)| Part {
            token: sources.len() - targets.len() + target,
            source,
            weight: 1.0 / sizes[target] as f32,
        });
        let places = sources.iter().map(place).collect();
        Ok(Reduction::of_parts(places, itself.chain(merged).collect()))
    }
}
