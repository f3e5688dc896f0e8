//! What methods that reduce visual tokens may see of the vision tower.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::encoder::{EncoderShape, Tap, Taps, Tower};
use vision_encoder::Inspected;
use vision_encoder::qwen::{Grid, QwenVisionOutput};

use crate::{QwenVl, QwenVlConfig, QwenVlError};

impl QwenVlConfig {
    /// The vision tower as such methods know it.
    pub fn encoder(&self) -> EncoderShape {
        EncoderShape {
            num_layers: self.vision.num_layers,
            feature_layer: self.vision.num_layers,
            num_heads: self.vision.num_heads,
            class_token: false,
            position_axes: 3,
            tower: Tower::QwenVl,
        }
    }
}

impl<B: Backend> QwenVl<B> {
    /// The tower's output, and whatever else is asked for, one column per visual token.
    ///
    /// # Shapes
    /// - `patches`: `[patch_features, patches]`, see
    ///   [`QwenVisionTower::forward`](vision_encoder::qwen::QwenVisionTower::forward)
    pub fn vision_taps(
        &self,
        patches: Tensor<B, 2>,
        grids: &[Grid],
        taps: &[Tap],
    ) -> Result<(QwenVisionOutput<B>, Taps<B>), QwenVlError> {
        let received: Vec<usize> = taps
            .iter()
            .filter_map(|tap| match *tap {
                Tap::ReceivedAttention { layer } => Some(layer),
                _ => None,
            })
            .collect();
        let merge = self.config().vision.spatial_merge_size;
        let mut seen = Taps::new();
        let output =
            self.visual()
                .forward_inspected(patches, grids, &received, &mut |inspected| {
                    taps.iter()
                        .for_each(|&tap| see(&mut seen, tap, &inspected, merge * merge));
                })?;
        for (tap, seen) in &mut seen {
            match tap {
                Tap::MeanHidden { .. } => *seen = self.visual().merge(seen.clone()),
                Tap::MeanHiddenInWindows { .. } => {
                    let merged = self.visual().merge(seen.clone());
                    *seen = self.visual().in_windows(merged, grids);
                }
                _ => {}
            }
        }
        for tap in [Tap::Features, Tap::Embeddings] {
            if tap == Tap::Features || taps.contains(&tap) {
                seen.insert(tap, output.tokens.clone());
            }
        }
        Ok((output, seen))
    }
}

/// Adds what a block shows of a tap.
fn see<B: Backend>(
    seen: &mut Taps<B>,
    tap: Tap,
    inspected: &Inspected<B>,
    patches_per_token: usize,
) {
    let after = inspected.layer + 1;
    let shown = match tap {
        Tap::Keys { layer } if layer == inspected.layer => {
            token_means(&inspected.keys, patches_per_token)
        }
        Tap::ReceivedAttention { layer } if layer == inspected.layer => match &inspected.received {
            Some(received) => token_means(received, patches_per_token),
            None => return,
        },
        // Per patch; merged when all are there.
        Tap::MeanHidden { first, last } | Tap::MeanHiddenInWindows { first, last }
            if first <= after && after <= last =>
        {
            let share = 1.0 / (last - first + 1) as f64;
            let mut sum = inspected.output.clone() * share;
            if first == 0 && inspected.layer == 0 {
                sum = sum + inspected.input.clone() * share;
            }
            match seen.get(&tap) {
                Some(before) => before.clone() + sum,
                None => sum,
            }
        }
        _ => return,
    };
    seen.insert(tap, shown);
}

/// `[features, patches]` → `[features, tokens]`, the mean over the patches of each token.
fn token_means<B: Backend>(x: &Tensor<B, 2>, patches_per_token: usize) -> Tensor<B, 2> {
    let [features, patches] = x.dims();
    let tokens = patches / patches_per_token;
    x.clone()
        .reshape([features, tokens, patches_per_token])
        .mean_dim(2)
        .reshape([features, tokens])
}
