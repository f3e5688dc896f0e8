use serde::Serialize;

use super::Tap;

/// The vision tower that a method works behind: facts, and whose published settings fit it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderShape {
    /// Transformer layers.
    pub num_layers: usize,
    /// Number of the hidden states that become visual tokens, as `transformers` counts (CLIP in
    /// LLaVA-1.5: 23 of 24; Qwen-VL: `num_layers`).
    pub feature_layer: usize,
    /// Attention heads of a layer.
    pub num_heads: usize,
    /// Whether there is a class token (CLIP, DINOv2; not SigLIP, Qwen-VL).
    pub class_token: bool,
    /// Axes of the positions that the decoder gives the tokens: 1, or 3 for time, height and width.
    pub position_axes: usize,
    /// Which published settings are its own.
    pub tower: Tower,
}

/// The towers that settings of methods were published for.
///
/// It says nothing of what a tower *has*: that are the other fields of [`EncoderShape`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[non_exhaustive]
pub enum Tower {
    /// CLIP as in LLaVA-1.5: one grid for every picture.
    Clip,
    /// The towers of Qwen-VL (published for Qwen2.5-VL's): any grid, attention within windows in
    /// most layers.
    QwenVl,
    /// Any other, such as SigLIP and DINOv2. Nothing was published for it: methods take CLIP's
    /// settings, layers in proportion to the depth, and where there is no class token, the attention
    /// that tokens receive in place of the class token's.
    Other,
}

impl EncoderShape {
    /// What was published for this tower: `qwen_vl` for Qwen-VL, `clip` for all others.
    pub(crate) fn settings<T>(&self, clip: T, qwen_vl: T) -> T {
        match self.tower {
            Tower::QwenVl => qwen_vl,
            Tower::Clip | Tower::Other => clip,
        }
    }

    /// The layer, from 0, whose output becomes visual tokens.
    pub(crate) fn last_layer(&self) -> usize {
        self.feature_layer.saturating_sub(1)
    }

    /// The attention of a layer that says which tokens matter: the class token's, and where there is
    /// none, what a token receives (as VisionZip, VScan, HiPrune and Nüwa do behind Qwen-VL; behind
    /// other towers that is ours).
    pub(crate) fn attention(&self, layer: usize) -> Tap {
        match self.class_token {
            true => Tap::ClassAttention { layer },
            false => Tap::ReceivedAttention { layer },
        }
    }

    /// Of so many layers of `of`, as many in proportion of this tower's.
    pub(crate) fn in_proportion(&self, layers: usize, of: usize) -> usize {
        self.num_layers.saturating_mul(layers) / of
    }
}
