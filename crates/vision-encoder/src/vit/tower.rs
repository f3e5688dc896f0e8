use std::collections::BTreeMap;

use burn::module::{Initializer, Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::gelu;
use burn::tensor::backend::Backend;
use reroute_layers::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, add, attention,
    gelu_tanh, linears, quick_gelu, received_attention, silu_product,
};

use super::position::resized;
use super::{VitActivation, VitConfig, VitKind};
use crate::{Inspected, VisionError};

/// A vision transformer: CLIP's, SigLIP's or DINOv2's.
///
/// Its parameters are named as CLIP's checkpoints name them; where DINOv2 keeps a tensor in another
/// shape, there is a field for each.
#[derive(Module, Debug)]
pub struct VitTower<B: Backend> {
    embeddings: Embeddings<B>,
    /// CLIP; spelt as checkpoints spell it.
    pre_layrnorm: Option<LayerNorm<B>>,
    encoder: Encoder<B>,
    #[module(skip)]
    config: VitConfig,
}

#[derive(Module, Debug)]
struct Embeddings<B: Backend> {
    /// CLIP: `[hidden_size]`
    class_embedding: Option<Param<Tensor<B, 1>>>,
    /// DINOv2: `[1, 1, hidden_size]`
    cls_token: Option<Param<Tensor<B, 3>>>,
    patch_embedding: PatchEmbedding<B>,
    /// CLIP, SigLIP: one vector per patch, preceded by that of the class token.
    position_embedding: Option<Embedding<B>>,
    /// DINOv2: the same, `[1, 1 + patches, hidden_size]`
    position_embeddings: Option<Param<Tensor<B, 3>>>,
}

#[derive(Module, Debug)]
struct PatchEmbedding<B: Backend> {
    /// `[hidden_size, channels, patch, patch]`
    weight: Param<Tensor<B, 4>>,
    /// `[hidden_size]`, except CLIP
    bias: Option<Param<Tensor<B, 1>>>,
}

#[derive(Module, Debug)]
struct Encoder<B: Backend> {
    layers: Vec<VitLayer<B>>,
}

/// One pre-norm transformer layer.
#[derive(Module, Debug)]
pub struct VitLayer<B: Backend> {
    layer_norm1: LayerNorm<B>,
    self_attn: Attention<B>,
    layer_scale1: Option<LayerScale<B>>,
    layer_norm2: LayerNorm<B>,
    mlp: Mlp<B>,
    layer_scale2: Option<LayerScale<B>>,
}

/// DINOv2: a factor for each feature of what is added to the residual stream (arXiv 2103.17239).
#[derive(Module, Debug)]
struct LayerScale<B: Backend> {
    /// `[hidden_size]`
    lambda1: Param<Tensor<B, 1>>,
}

#[derive(Module, Debug)]
struct Attention<B: Backend> {
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    out_proj: Linear<B>,
    num_heads: usize,
}

#[derive(Module, Debug)]
struct Mlp<B: Backend> {
    fc1: Linear<B>,
    fc2: Linear<B>,
    #[module(skip)]
    activation: VitActivation,
}

linears!(VitTower: encoder);
linears!(Encoder: layers);
linears!(VitLayer: self_attn, mlp);
linears!(Attention: q_proj, k_proj, v_proj, out_proj);
linears!(Mlp: fc1, fc2);

impl<B: Backend> VitTower<B> {
    pub(super) fn new(config: &VitConfig, device: &B::Device) -> Self {
        let hidden = config.hidden_size;
        let random = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        let dinov2 = config.kind == VitKind::Dinov2;
        let clip = config.kind == VitKind::Clip;
        let patch = [hidden, 3, config.patch_size, config.patch_size];
        let entries = config.prefix_tokens() + config.position_grid.pow(2);
        let positions = EmbeddingConfig {
            entries,
            features: hidden,
        };
        Self {
            embeddings: Embeddings {
                class_embedding: clip.then(|| random.init([hidden], device)),
                cls_token: dinov2.then(|| random.init([1, 1, hidden], device)),
                patch_embedding: PatchEmbedding {
                    weight: random.init(patch, device),
                    bias: (!clip).then(|| random.init([hidden], device)),
                },
                position_embedding: (!dinov2).then(|| positions.init(device)),
                position_embeddings: dinov2.then(|| random.init([1, entries, hidden], device)),
            },
            pre_layrnorm: clip.then(|| norm(config, device)),
            encoder: Encoder {
                layers: (0..config.num_layers)
                    .map(|_| VitLayer::new(config, device))
                    .collect(),
            },
            config: config.clone(),
        }
    }

    /// The resolved configuration.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// The hidden states after `layers` layers (0: after the embedding and its norm, if it has one);
    /// no norm follows the last.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns `[hidden_size, images · tokens]`, each image's class token, if there is one, first
    pub fn forward(
        &self,
        pixels: Tensor<B, 4>,
        layers: usize,
    ) -> Result<Tensor<B, 2>, VisionError> {
        self.forward_inspected(pixels, layers, &[], &mut |_| {})
    }

    /// The same, showing every layer to `inspect`, those in `received` with the attention that their
    /// rows receive.
    pub fn forward_inspected(
        &self,
        pixels: Tensor<B, 4>,
        layers: usize,
        received: &[usize],
        inspect: &mut dyn FnMut(Inspected<B>),
    ) -> Result<Tensor<B, 2>, VisionError> {
        let size = self.config.image_size;
        let [images, channels, height, width] = pixels.dims();
        if images == 0 {
            return Err(VisionError::NoImages);
        }
        if [channels, height, width] != [3, size, size] {
            return Err(VisionError::PixelShape {
                expected: [3, size, size],
                found: [channels, height, width],
            });
        }
        if layers > self.encoder.layers.len() {
            return Err(VisionError::Config(format!(
                "vision_feature_layer asks for {layers} layers, the vision tower has {}",
                self.encoder.layers.len()
            )));
        }
        let embedded = self.embed(pixels);
        let mut hidden_states = match &self.pre_layrnorm {
            Some(norm) => norm.forward(embedded),
            None => embedded,
        };
        for (index, layer) in self.encoder.layers[..layers].iter().enumerate() {
            let input = hidden_states;
            let [output, queries, keys] = layer.forward(input.clone(), images);
            let asked = received.contains(&index);
            let received = || self.received(&queries, &keys, images);
            inspect(Inspected {
                layer: index,
                input,
                received: asked.then(received),
                queries,
                keys,
                output: output.clone(),
            });
            hidden_states = output;
        }
        Ok(hidden_states)
    }

    fn received(&self, queries: &Tensor<B, 2>, keys: &Tensor<B, 2>, images: usize) -> Tensor<B, 2> {
        let [hidden, rows] = queries.dims();
        let (heads, tokens) = (self.config.num_heads, rows / images);
        let of_image = |x: &Tensor<B, 2>, image: usize| {
            let x = x.clone().narrow(1, image * tokens, tokens);
            x.reshape([heads, hidden / heads, tokens])
        };
        let of_images = (0..images)
            .map(|image| received_attention(of_image(queries, image), of_image(keys, image)));
        Tensor::cat(of_images.collect(), 1)
    }

    /// The hidden states after each of `layers`, one below the other, without the first `skip` rows
    /// of every image.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns `[layers · hidden_size, images · (tokens − skip)]`
    pub fn features(
        &self,
        pixels: Tensor<B, 4>,
        layers: &[usize],
        skip: usize,
    ) -> Result<Tensor<B, 2>, VisionError> {
        let (images, tokens) = (pixels.dims()[0], self.config.tokens());
        let Some(&deepest) = layers.iter().max() else {
            return Err(VisionError::Config("vision_feature_layer is empty".into()));
        };
        if skip >= tokens {
            return Err(VisionError::Config(format!(
                "an image has {tokens} rows in the vision tower, without the first {skip} nothing is left"
            )));
        }
        let mut states = BTreeMap::new();
        let last = self.forward_inspected(pixels, deepest, &[], &mut |inspected| {
            if layers.contains(&inspected.layer) {
                states.insert(inspected.layer, inspected.input);
            }
        })?;
        states.insert(deepest, last);
        let chosen = layers.iter().filter_map(|layer| states.get(layer).cloned());
        let rows = |x: Tensor<B, 2>| {
            let hidden = x.dims()[0];
            x.reshape([hidden, images, tokens])
                .narrow(2, skip, tokens - skip)
                .reshape([hidden, images * (tokens - skip)])
        };
        Ok(Tensor::cat(chosen.map(rows).collect(), 0))
    }

    /// The features of all patches after `layers` layers, without the class tokens.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns `[hidden_size, images · patches]`, patches of an image row by row
    pub fn patch_features(
        &self,
        pixels: Tensor<B, 4>,
        layers: usize,
    ) -> Result<Tensor<B, 2>, VisionError> {
        self.features(pixels, &[layers], self.config.prefix_tokens())
    }

    /// Patch and class embeddings plus positions.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns `[hidden_size, images · tokens]`
    fn embed(&self, pixels: Tensor<B, 4>) -> Tensor<B, 2> {
        let images = pixels.dims()[0];
        let (hidden, patch, grid) = (
            self.config.hidden_size,
            self.config.patch_size,
            self.config.grid(),
        );
        let tokens = self.config.tokens();
        let weight = self.embeddings.patch_embedding.weight.val();
        // A convolution whose stride is its kernel is a product with every patch as a column.
        let side = grid * patch;
        let columns = pixels
            .cast(weight.dtype())
            .slice([0..images, 0..3, 0..side, 0..side])
            .reshape([images, 3, grid, patch, grid, patch])
            .permute([1, 3, 5, 0, 2, 4])
            .reshape([3 * patch * patch, images * grid * grid]);
        let mut patches = weight.reshape([hidden, 3 * patch * patch]).matmul(columns);
        if let Some(bias) = &self.embeddings.patch_embedding.bias {
            patches = patches + bias.val().unsqueeze_dim(1);
        }
        let patches = patches.reshape([hidden, images, grid * grid]);
        let rows = match self.class_token() {
            Some(class) => {
                let class = class.reshape([hidden, 1, 1]).repeat_dim(1, images);
                Tensor::cat(vec![class, patches], 2)
            }
            None => patches,
        };
        let rows = match self.positions() {
            Some(positions) => rows + positions.reshape([hidden, 1, tokens]),
            None => rows,
        };
        rows.reshape([hidden, images * tokens])
    }

    /// `[hidden_size]`
    fn class_token(&self) -> Option<Tensor<B, 1>> {
        let Embeddings {
            class_embedding,
            cls_token,
            ..
        } = &self.embeddings;
        let of_clip = class_embedding.as_ref().map(Param::val);
        let of_dinov2 = || Some(cls_token.as_ref()?.val().flatten(0, 2));
        of_clip.or_else(of_dinov2)
    }

    /// Positions for the grid of the images, `[hidden_size, tokens]`.
    fn positions(&self) -> Option<Tensor<B, 2>> {
        let Embeddings {
            position_embedding,
            position_embeddings,
            ..
        } = &self.embeddings;
        let table = match position_embedding {
            Some(table) => table.weight.val(),
            None => position_embeddings.as_ref()?.val().squeeze_dim(0),
        };
        let table = table.transpose();
        let (grid, from) = (self.config.grid(), self.config.position_grid);
        if grid == from {
            return Some(table);
        }
        let prefix = self.config.prefix_tokens();
        let patches = table.clone().narrow(1, prefix, from * from);
        let class = table.narrow(1, 0, prefix);
        Some(Tensor::cat(vec![class, resized(patches, from, grid)], 1))
    }
}

impl<B: Backend> VitLayer<B> {
    fn new(config: &VitConfig, device: &B::Device) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let linear = |input, output, bias| {
            LinearConfig::new(input, output)
                .with_bias(bias)
                .init(device)
        };
        let project = || linear(hidden, hidden, config.qkv_bias);
        let first = match config.activation {
            VitActivation::SwiGlu => 2 * inner,
            _ => inner,
        };
        let scale = || {
            (config.kind == VitKind::Dinov2).then(|| LayerScale {
                lambda1: Initializer::Ones.init([hidden], device),
            })
        };
        Self {
            layer_norm1: norm(config, device),
            self_attn: Attention {
                q_proj: project(),
                k_proj: project(),
                v_proj: project(),
                out_proj: linear(hidden, hidden, true),
                num_heads: config.num_heads,
            },
            layer_scale1: scale(),
            layer_norm2: norm(config, device),
            mlp: Mlp {
                fc1: linear(hidden, first, true),
                fc2: linear(inner, hidden, true),
                activation: config.activation,
            },
            layer_scale2: scale(),
        }
    }

    /// The output, and the queries and keys that led to it.
    fn forward(&self, hidden_states: Tensor<B, 2>, images: usize) -> [Tensor<B, 2>; 3] {
        let normed = self.layer_norm1.forward(hidden_states.clone());
        let [attended, queries, keys] = self.self_attn.forward(normed, images);
        let hidden_states = add(hidden_states, scaled(&self.layer_scale1, attended));
        let normed = self.layer_norm2.forward(hidden_states.clone());
        let inner = scaled(&self.layer_scale2, self.mlp.forward(normed));
        [add(hidden_states, inner), queries, keys]
    }
}

fn scaled<B: Backend>(scale: &Option<LayerScale<B>>, x: Tensor<B, 2>) -> Tensor<B, 2> {
    match scale {
        Some(scale) => x * scale.lambda1.val().unsqueeze_dim(1),
        None => x,
    }
}

impl<B: Backend> Attention<B> {
    /// Every image attends to itself. The output, queries and keys.
    fn forward(&self, normed: Tensor<B, 2>, images: usize) -> [Tensor<B, 2>; 3] {
        let [hidden, rows] = normed.dims();
        let (heads, tokens) = (self.num_heads, rows / images);
        let split = |x: Tensor<B, 2>| x.reshape([heads, hidden / heads, rows]);
        let queries = self.q_proj.forward(normed.clone());
        let keys = self.k_proj.forward(normed.clone());
        let query = split(queries.clone()).unsqueeze_dim::<4>(1);
        let key = split(keys.clone());
        let value = split(self.v_proj.forward(normed));
        let context = (0..images).map(|image| {
            let start = image * tokens;
            attention(
                query.clone().narrow(3, start, tokens),
                key.clone().narrow(2, start, tokens),
                value.clone().narrow(2, start, tokens),
                None,
            )
        });
        let output = self.out_proj.forward(Tensor::cat(context.collect(), 1));
        [output, queries, keys]
    }
}

impl<B: Backend> Mlp<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let inner = self.fc1.forward(x);
        self.fc2.forward(match self.activation {
            VitActivation::QuickGelu => quick_gelu(inner),
            VitActivation::Gelu => gelu(inner),
            VitActivation::GeluTanh => gelu_tanh(inner),
            VitActivation::SwiGlu => {
                let half = inner.dims()[0] / 2;
                let up = inner.clone().narrow(0, half, half);
                silu_product(inner.narrow(0, 0, half), up)
            }
        })
    }
}

fn norm<B: Backend>(config: &VitConfig, device: &B::Device) -> LayerNorm<B> {
    LayerNormConfig {
        features: config.hidden_size,
        epsilon: config.layer_norm_eps,
    }
    .init(device)
}
