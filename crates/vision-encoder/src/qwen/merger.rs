use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::gelu;
use burn::tensor::backend::Backend;
use reroute_layers::{Linear, LinearConfig, linears};

use super::norm::Norm;
use super::{QwenGeneration, QwenTowerConfig};

/// Makes one visual token of every merge group.
#[derive(Module, Debug)]
pub(super) struct PatchMerger<B: Backend> {
    norm: Norm<B>,
    fc1: Linear<B>,
    fc2: Linear<B>,
    /// Patches of a merge group.
    group: usize,
    /// Whether a group is normalised as a whole instead of patch by patch.
    norm_groups: bool,
}

linears!(PatchMerger: fc1, fc2);

impl<B: Backend> PatchMerger<B> {
    pub(super) fn new(config: &QwenTowerConfig, norm_groups: bool, device: &B::Device) -> Self {
        let group = config.spatial_merge_size * config.spatial_merge_size;
        let joined = config.hidden_size * group;
        let normed = if norm_groups {
            joined
        } else {
            config.hidden_size
        };
        let linear = |output| {
            LinearConfig::new(joined, output)
                .with_bias(true)
                .init(device)
        };
        Self {
            norm: Norm::new(normed, config.generation != QwenGeneration::Qwen2_5, device),
            fc1: linear(joined),
            fc2: linear(config.output_size),
            group,
            norm_groups,
        }
    }

    /// # Shapes
    /// - `hidden_states`: `[hidden_size, patches]`, merge groups side by side
    /// - returns `[output_size, tokens]`
    pub(super) fn forward(&self, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        let joined = if self.norm_groups {
            self.norm.forward(self.join(hidden_states))
        } else {
            self.join(self.norm.forward(hidden_states))
        };
        self.fc2.forward(gelu(self.fc1.forward(joined)))
    }

    /// Puts the patches of a group one below the other.
    fn join(&self, patches: Tensor<B, 2>) -> Tensor<B, 2> {
        let [features, rows] = patches.dims();
        let tokens = rows / self.group;
        patches
            .reshape([features, tokens, self.group])
            .permute([2, 0, 1])
            .reshape([self.group * features, tokens])
    }
}
