use burn::module::{Initializer, Module, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reroute_layers::{Embedding, EmbeddingConfig, Rotary, linears};

use super::arrangement::{Arrangement, windows_in_rows};
use super::block::Block;
use super::merger::PatchMerger;
use super::position::{interpolate, rotary_angles};
use super::{QwenGeneration, QwenTowerConfig};
use crate::{Grid, Inspected, VisionError, VisionOutput, grid};

/// A vision transformer of the Qwen family.
#[derive(Module, Debug)]
pub struct QwenVisionTower<B: Backend> {
    patch_embed: PatchEmbed<B>,
    /// Qwen3-VL: one vector per patch of a square.
    pos_embed: Option<Embedding<B>>,
    blocks: Vec<Block<B>>,
    merger: PatchMerger<B>,
    /// One per layer of DeepStack.
    deepstack_merger_list: Vec<PatchMerger<B>>,
    #[module(skip)]
    config: QwenTowerConfig,
}

/// A convolution whose stride is its kernel: one matrix product.
#[derive(Module, Debug)]
struct PatchEmbed<B: Backend> {
    /// `[hidden_size, channels, temporal_patch_size, patch_size, patch_size]`
    weight: Param<Tensor<B, 5>>,
    /// `[hidden_size]`
    bias: Option<Param<Tensor<B, 1>>>,
}

linears!(QwenVisionTower: blocks, merger, deepstack_merger_list);

impl<B: Backend> QwenVisionTower<B> {
    pub(super) fn new(config: &QwenTowerConfig, device: &B::Device) -> Self {
        let deepstack = config.deepstack_layers.iter();
        Self {
            patch_embed: PatchEmbed::new(config, device),
            pos_embed: config.position_embeddings.map(|entries| {
                let table = EmbeddingConfig {
                    entries,
                    features: config.hidden_size,
                };
                table.init(device)
            }),
            blocks: (0..config.num_layers)
                .map(|_| Block::new(config, device))
                .collect(),
            merger: PatchMerger::new(config, false, device),
            deepstack_merger_list: deepstack
                .map(|_| PatchMerger::new(config, true, device))
                .collect(),
            config: config.clone(),
        }
    }

    /// The resolved configuration.
    pub fn config(&self) -> &QwenTowerConfig {
        &self.config
    }

    /// The visual tokens of images and videos of any size.
    ///
    /// Every frame attends to itself only, so images of one call do not see each other, nor do the
    /// frames of a video. Memory grows linearly with the number of patches.
    ///
    /// # Shapes
    /// - `patches`: `[patch_features, patches]`, a column holding channels, pictures, rows and
    ///   columns; the patches of all grids side by side, each frame in merge order (see [`Grid`])
    pub fn forward(
        &self,
        patches: Tensor<B, 2>,
        grids: &[Grid],
    ) -> Result<VisionOutput<B>, VisionError> {
        self.run(patches, grids, &[], |_, _| {})
    }

    /// The same, showing every block to `inspect`, its rows in the order of `patches`; the blocks in
    /// `received` with the attention that their rows receive.
    ///
    /// Queries and keys are rotated to their positions.
    pub fn forward_inspected(
        &self,
        patches: Tensor<B, 2>,
        grids: &[Grid],
        received: &[usize],
        inspect: &mut dyn FnMut(Inspected<B>),
    ) -> Result<VisionOutput<B>, VisionError> {
        self.run(patches, grids, received, |arrangement, seen| {
            inspect(Inspected {
                layer: seen.layer,
                input: arrangement.restore(seen.input),
                queries: arrangement.restore(seen.queries),
                keys: arrangement.restore(seen.keys),
                output: arrangement.restore(seen.output),
                received: seen.received.map(|x| arrangement.restore(x)),
            });
        })
    }

    /// Visual tokens of hidden states, as the tower makes them of its last.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, patches]`
    /// - returns `[output_size, tokens]`
    pub fn merge(&self, hidden_states: Tensor<B, 2>) -> Tensor<B, 2> {
        self.merger.forward(hidden_states)
    }

    /// Visual tokens in the order in which the windows of a frame lie in it, row by row; unchanged
    /// where the tower has no windows.
    ///
    /// # Shapes
    /// - `tokens`: `[features, tokens]`, in the order of `grids`
    /// - returns `[features, tokens]`
    pub fn in_windows(&self, tokens: Tensor<B, 2>, grids: &[Grid]) -> Tensor<B, 2> {
        match &self.config.windows {
            Some(windows) => {
                let order = windows_in_rows(grids, self.config.spatial_merge_size, windows.side);
                let order = Tensor::from_data(order.as_slice(), &tokens.device());
                tokens.select(1, order)
            }
            None => tokens,
        }
    }

    fn run(
        &self,
        patches: Tensor<B, 2>,
        grids: &[Grid],
        received: &[usize],
        mut inspect: impl FnMut(&Arrangement<B>, Inspected<B>),
    ) -> Result<VisionOutput<B>, VisionError> {
        let (config, device) = (&self.config, patches.device());
        let [features, count] = patches.dims();
        if features != config.patch_features() {
            return Err(VisionError::Patches(format!(
                "a patch has {features} numbers, the vision tower takes {}: preprocess with the \
                 checkpoint's own preprocessor_config.json",
                config.patch_features()
            )));
        }
        grid::check(grids, count, config.spatial_merge_size)?;

        let mut hidden_states = self.patch_embed.forward(patches);
        let dtype = hidden_states.dtype();
        if let Some(table) = &self.pos_embed {
            let positions = interpolate(table, grids, config.spatial_merge_size);
            hidden_states = hidden_states + positions.cast(dtype);
        }
        let arrangement = Arrangement::new(config, grids, &device);
        let angles = arrangement.arrange(rotary_angles(config, grids, &device));
        let rotary = Rotary::from_angles(angles, dtype);

        hidden_states = arrangement.arrange(hidden_states);
        let mut deepstack = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let input = hidden_states;
            let runs = arrangement.runs(layer);
            let [output, queries, keys] = block.forward(input.clone(), &rotary, runs);
            hidden_states = output.clone();
            let asked = received.contains(&layer);
            let received = || block.received(&queries, &keys, runs);
            let seen = Inspected {
                layer,
                input,
                received: asked.then(received),
                queries,
                keys,
                output,
            };
            inspect(&arrangement, seen);
            if let Ok(tap) = config.deepstack_layers.binary_search(&layer) {
                let merged = self.deepstack_merger_list[tap].forward(hidden_states.clone());
                deepstack.push(arrangement.restore(merged));
            }
        }
        Ok(VisionOutput {
            tokens: arrangement.restore(self.merger.forward(hidden_states)),
            deepstack,
        })
    }
}

impl<B: Backend> PatchEmbed<B> {
    fn new(config: &QwenTowerConfig, device: &B::Device) -> Self {
        let hidden = config.hidden_size;
        let [channels, pictures, height, width] = config.patch_shape();
        let random = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        let bias = config.generation == QwenGeneration::Qwen3;
        Self {
            weight: random.init([hidden, channels, pictures, height, width], device),
            bias: bias.then(|| Initializer::Zeros.init([hidden], device)),
        }
    }

    /// # Shapes
    /// - `patches`: `[patch_features, patches]`
    /// - returns `[hidden_size, patches]`, of the dtype of the weights
    fn forward(&self, patches: Tensor<B, 2>) -> Tensor<B, 2> {
        let (weight, features) = (self.weight.val(), patches.dims()[0]);
        let patches = patches.cast(weight.dtype());
        let hidden = weight.dims()[0];
        let embedded = weight.reshape([hidden, features]).matmul(patches);
        match &self.bias {
            Some(bias) => embedded + bias.val().unsqueeze_dim(1),
            None => embedded,
        }
    }
}
