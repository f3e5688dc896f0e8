use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::encoder::host::{read_mean, require_layer, require_share};
use crate::encoder::{BuiltIn, EncoderReducer, EncoderShape, Reduction, Seen, Tap, Tower};
use crate::{About, ReducerError, top_k};

/// HiPrune (arXiv 2508.00553): *anchors* that a middle layer attends to, their neighbours in the grid
/// as *buffers*, and as *registers* what the last layer attends to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HiPrune {
    /// Share of the budget for anchors and buffers, from 0 to 1.
    pub alpha: f64,
    /// The layer that finds anchors, from 0. As released if absent: 8 of 24 behind CLIP, 15 of 32
    /// behind Qwen-VL, in proportion for other depths; behind other towers as behind CLIP.
    pub object_layer: Option<usize>,
}

impl Default for HiPrune {
    fn default() -> Self {
        Self {
            alpha: 0.1,
            object_layer: None,
        }
    }
}

impl BuiltIn for HiPrune {
    const ABOUT: About = About {
        description: "attention received in a middle layer, its neighbourhood, and in the last",
        source: "arXiv 2508.00553; github.com/Danielement321/HiPrune (LLaVA and Qwen2.5-VL)",
        exact: "layers, the mean over heads and queries, the number of anchors, neighbours that wrap \
                at the ends of rows and stop at those of the picture",
        interpretation: "the object layer of other depths, in proportion; a token is chosen once, \
                         while the Qwen release only takes 1 off a score that averages 1 and so may \
                         choose it twice and keep fewer; Qwen pictures are reduced one by one",
        towers: &[Tower::Clip, Tower::QwenVl],
    };

    fn check(&self) -> Result<(), ReducerError> {
        require_share(Self::NAME, "alpha", self.alpha)
    }
}

impl HiPrune {
    fn taps(&self, encoder: &EncoderShape) -> [Tap; 2] {
        let (released, of) = encoder.settings((9, 24), (16, 32));
        let in_proportion = encoder.in_proportion(released, of).saturating_sub(1);
        let middle = self.object_layer.unwrap_or(in_proportion);
        [middle, encoder.last_layer()].map(|layer| Tap::ReceivedAttention { layer })
    }
}

impl<B: Backend> EncoderReducer<B> for HiPrune {
    fn needs(&self, encoder: &EncoderShape) -> Result<Vec<Tap>, ReducerError> {
        self.check()?;
        require_layer(Self::NAME, "object_layer", self.object_layer, encoder)?;
        Ok(self.taps(encoder).to_vec())
    }

    fn reduce(&self, seen: &Seen<B>, keep: usize) -> Result<Reduction<B>, ReducerError> {
        let [middle, last] = self.taps(&seen.encoder);
        let mut registers = read_mean(seen.get(last)?)?;
        // Python's round: halves to even.
        let anchors = (keep as f64 * self.alpha / 5.0).round_ties_even() as usize;
        let anchors = top_k(&read_mean(seen.get(middle)?)?, anchors)?;

        let columns = seen.grid[1] as isize;
        let steps = [0, -1, 1, -columns, columns];
        let near = steps.iter().flat_map(|step| {
            let end = seen.tokens() - 1;
            let neighbour = move |&anchor: &usize| anchor.saturating_add_signed(*step).min(end);
            anchors.iter().map(neighbour)
        });
        let mut chosen = Vec::with_capacity(keep);
        for token in near {
            if chosen.len() < keep && !chosen.contains(&token) {
                chosen.push(token);
                registers[token] = f32::NEG_INFINITY;
            }
        }
        chosen.extend(top_k(&registers, keep - chosen.len())?);
        Ok(Reduction::selection(chosen))
    }
}
