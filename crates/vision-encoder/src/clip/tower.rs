use burn::module::{Initializer, Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::gelu;
use burn::tensor::backend::Backend;
use reroute_layers::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, attention,
    quick_gelu, received_attention,
};

use super::ClipConfig;
use crate::{Inspected, VisionError};

/// A CLIP vision transformer.
#[derive(Module, Debug)]
pub struct ClipVisionTower<B: Backend> {
    embeddings: ClipEmbeddings<B>,
    /// Spelt as checkpoints spell it.
    pre_layrnorm: LayerNorm<B>,
    encoder: ClipEncoder<B>,
    #[module(skip)]
    config: ClipConfig,
}

#[derive(Module, Debug)]
struct ClipEmbeddings<B: Backend> {
    /// `[hidden_size]`
    class_embedding: Param<Tensor<B, 1>>,
    patch_embedding: PatchEmbedding<B>,
    /// One vector per patch, preceded by that of the class token.
    position_embedding: Embedding<B>,
}

#[derive(Module, Debug)]
struct PatchEmbedding<B: Backend> {
    /// `[hidden_size, channels, patch, patch]`
    weight: Param<Tensor<B, 4>>,
}

#[derive(Module, Debug)]
struct ClipEncoder<B: Backend> {
    layers: Vec<ClipLayer<B>>,
}

/// One pre-norm transformer layer.
#[derive(Module, Debug)]
pub struct ClipLayer<B: Backend> {
    layer_norm1: LayerNorm<B>,
    self_attn: ClipAttention<B>,
    layer_norm2: LayerNorm<B>,
    mlp: ClipMlp<B>,
}

#[derive(Module, Debug)]
struct ClipAttention<B: Backend> {
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    out_proj: Linear<B>,
    num_heads: usize,
}

#[derive(Module, Debug)]
struct ClipMlp<B: Backend> {
    fc1: Linear<B>,
    fc2: Linear<B>,
    quick_gelu: bool,
}

impl<B: Backend> ClipVisionTower<B> {
    pub(super) fn new(config: &ClipConfig, device: &B::Device) -> Self {
        let hidden = config.hidden_size;
        let random = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        let patch = [hidden, 3, config.patch_size, config.patch_size];
        let positions = EmbeddingConfig {
            entries: config.patches() + 1,
            features: hidden,
        };
        Self {
            embeddings: ClipEmbeddings {
                class_embedding: random.init([hidden], device),
                patch_embedding: PatchEmbedding {
                    weight: random.init(patch, device),
                },
                position_embedding: positions.init(device),
            },
            pre_layrnorm: norm(config, device),
            encoder: ClipEncoder {
                layers: (0..config.num_layers)
                    .map(|_| ClipLayer::new(config, device))
                    .collect(),
            },
            config: config.clone(),
        }
    }

    /// The resolved configuration.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// The hidden states after `layers` layers (0: after the embedding and its norm).
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns `[hidden_size, images · (1 + patches)]`, each image's class token first
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
        let mut hidden_states = self.pre_layrnorm.forward(embedded);
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
        let images = pixels.dims()[0];
        let (hidden, patches) = (self.config.hidden_size, self.config.patches());
        let all = self.forward(pixels, layers)?;
        let all = all.reshape([hidden, images, 1 + patches]);
        Ok(all
            .narrow(2, 1, patches)
            .reshape([hidden, images * patches]))
    }

    /// Patch and class embeddings plus positions.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns `[hidden_size, images · (1 + patches)]`
    fn embed(&self, pixels: Tensor<B, 4>) -> Tensor<B, 2> {
        let images = pixels.dims()[0];
        let (hidden, patch, grid) = (
            self.config.hidden_size,
            self.config.patch_size,
            self.config.grid(),
        );
        let tokens = 1 + grid * grid;
        // A convolution whose stride is its kernel is a product with every patch as a column.
        let side = grid * patch;
        let weight = self.embeddings.patch_embedding.weight.val();
        let columns = pixels
            .cast(weight.dtype())
            .slice([0..images, 0..3, 0..side, 0..side])
            .reshape([images, 3, grid, patch, grid, patch])
            .permute([1, 3, 5, 0, 2, 4])
            .reshape([3 * patch * patch, images * grid * grid]);
        let patches = weight
            .reshape([hidden, 3 * patch * patch])
            .matmul(columns)
            .reshape([hidden, images, grid * grid]);
        let class = self.embeddings.class_embedding.val();
        let class = class.reshape([hidden, 1, 1]).repeat_dim(1, images);
        let positions = self.embeddings.position_embedding.weight.val();
        let positions = positions.transpose().reshape([hidden, 1, tokens]);
        (Tensor::cat(vec![class, patches], 2) + positions).reshape([hidden, images * tokens])
    }
}

impl<B: Backend> ClipLayer<B> {
    fn new(config: &ClipConfig, device: &B::Device) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let linear = |input, output| {
            LinearConfig::new(input, output)
                .with_bias(true)
                .init(device)
        };
        Self {
            layer_norm1: norm(config, device),
            self_attn: ClipAttention {
                q_proj: linear(hidden, hidden),
                k_proj: linear(hidden, hidden),
                v_proj: linear(hidden, hidden),
                out_proj: linear(hidden, hidden),
                num_heads: config.num_heads,
            },
            layer_norm2: norm(config, device),
            mlp: ClipMlp {
                fc1: linear(hidden, inner),
                fc2: linear(inner, hidden),
                quick_gelu: config.quick_gelu,
            },
        }
    }

    /// The output, and the queries and keys that led to it.
    fn forward(&self, hidden_states: Tensor<B, 2>, images: usize) -> [Tensor<B, 2>; 3] {
        let normed = self.layer_norm1.forward(hidden_states.clone());
        let [attended, queries, keys] = self.self_attn.forward(normed, images);
        let hidden_states = hidden_states + attended;
        let normed = self.layer_norm2.forward(hidden_states.clone());
        [hidden_states + self.mlp.forward(normed), queries, keys]
    }
}

impl<B: Backend> ClipAttention<B> {
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

impl<B: Backend> ClipMlp<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let inner = self.fc1.forward(x);
        self.fc2.forward(match self.quick_gelu {
            true => quick_gelu(inner),
            false => gelu(inner),
        })
    }
}

fn norm<B: Backend>(config: &ClipConfig, device: &B::Device) -> LayerNorm<B> {
    LayerNormConfig {
        features: config.hidden_size,
        epsilon: config.layer_norm_eps,
    }
    .init(device)
}
