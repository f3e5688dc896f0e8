//! What methods that reduce visual tokens may see of the vision tower.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::encoder::{Tap, Taps};
use reroute_family::{FamilyError, FamilyModel, MeanHidden, received_layers};
use vision_encoder::Inspected;
use vision_encoder::{Grid, VisionOutput};

use crate::QwenVl;

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
    ) -> Result<(VisionOutput<B>, Taps<B>), FamilyError> {
        let received = received_layers(taps);
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
    let shown = match tap {
        Tap::Keys { layer } if layer == inspected.layer => {
            token_means(&inspected.keys, patches_per_token)
        }
        Tap::ReceivedAttention { layer } if layer == inspected.layer => match &inspected.received {
            Some(received) => token_means(received, patches_per_token),
            None => return,
        },
        // Per patch; merged when all are there.
        Tap::MeanHidden { .. } | Tap::MeanHiddenInWindows { .. } => {
            let shown = [&inspected.input, &inspected.output];
            MeanHidden::add(seen, tap, inspected.layer, shown, Tensor::clone);
            return;
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
