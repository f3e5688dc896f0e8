//! What methods that reduce visual tokens may see of the vision tower.

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reducers::encoder::{EncoderShape, Tap, Taps, Tower};
use vision_encoder::Inspected;

use crate::{Llava, LlavaConfig, LlavaError};

impl LlavaConfig {
    /// The vision tower as such methods know it.
    pub fn encoder(&self) -> EncoderShape {
        EncoderShape {
            num_layers: self.vision.num_layers,
            feature_layer: self.vision_layers,
            num_heads: self.vision.num_heads,
            class_token: true,
            position_axes: 1,
            tower: Tower::Clip,
        }
    }
}

impl<B: Backend> Llava<B> {
    /// Vision features, and whatever else is asked for, of all images side by side. The tower runs
    /// no further than the taps need.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns as each [`Tap`] says, times `images` columns
    pub fn vision_taps(&self, pixels: Tensor<B, 4>, taps: &[Tap]) -> Result<Taps<B>, LlavaError> {
        let images = pixels.dims()[0];
        let layers = taps.iter().map(|tap| match *tap {
            Tap::ClassAttention { layer }
            | Tap::ReceivedAttention { layer }
            | Tap::ClassQuery { layer }
            | Tap::ClassKey { layer }
            | Tap::Keys { layer } => layer + 1,
            Tap::MeanHidden { last, .. } | Tap::MeanHiddenInWindows { last, .. } => last,
            Tap::Features | Tap::Embeddings | Tap::ClassToken | Tap::Question => 0,
        });
        let features_after = self.config().vision_layers;
        let layers = layers.max().unwrap_or(0).max(features_after);
        let received: Vec<usize> = taps
            .iter()
            .filter_map(|tap| match *tap {
                Tap::ReceivedAttention { layer } => Some(layer),
                _ => None,
            })
            .collect();
        let mut rows = Rows {
            images,
            tokens: 1 + self.tokens_per_image(),
            heads: self.config().vision.num_heads,
            seen: Taps::new(),
        };
        let last =
            self.vision_tower()
                .forward_inspected(pixels, layers, &received, &mut |inspected| {
                    rows.tap(taps, features_after, inspected)
                })?;
        if features_after == 0 {
            // A tower without layers: its input is its output.
            rows.features(taps, last);
        }
        let mut seen = rows.seen;
        if let (true, Some(features)) = (taps.contains(&Tap::Embeddings), seen.get(&Tap::Features))
        {
            seen.insert(Tap::Embeddings, self.project(features.clone()));
        }
        Ok(seen)
    }
}

/// How the rows of the tower divide into images, and what was seen of them.
struct Rows<B: Backend> {
    images: usize,
    /// Rows of an image, class token first.
    tokens: usize,
    heads: usize,
    seen: Taps<B>,
}

impl<B: Backend> Rows<B> {
    fn tap(&mut self, taps: &[Tap], features_after: usize, inspected: Inspected<B>) {
        let here = inspected.layer;
        let after = here + 1;
        if after == features_after {
            self.features(taps, inspected.output.clone());
        }
        for &tap in taps {
            let seen = match tap {
                Tap::ClassAttention { layer } if layer == here => {
                    self.class_attention(&inspected.queries, &inspected.keys)
                }
                Tap::ClassQuery { layer } if layer == here => self.class(&inspected.queries),
                Tap::ClassKey { layer } if layer == here => self.class(&inspected.keys),
                Tap::Keys { layer } if layer == here => self.patches(&inspected.keys),
                Tap::ReceivedAttention { layer } if layer == here => match &inspected.received {
                    Some(received) => self.patches(received),
                    None => continue,
                },
                Tap::MeanHidden { first, last } if first <= after && after <= last => {
                    let share = 1.0 / (last - first + 1) as f64;
                    let mut sum = self.patches(&inspected.output) * share;
                    if first == 0 && here == 0 {
                        sum = sum + self.patches(&inspected.input) * share;
                    }
                    match self.seen.get(&tap) {
                        Some(before) => before.clone() + sum,
                        None => sum,
                    }
                }
                _ => continue,
            };
            self.seen.insert(tap, seen);
        }
    }

    fn features(&mut self, taps: &[Tap], hidden_states: Tensor<B, 2>) {
        let features = self.patches(&hidden_states);
        self.seen.insert(Tap::Features, features);
        if taps.contains(&Tap::ClassToken) {
            let class = self.class(&hidden_states);
            self.seen.insert(Tap::ClassToken, class);
        }
    }

    /// `[features, images · (1 + patches)]` → `[features, images · patches]`
    fn patches(&self, x: &Tensor<B, 2>) -> Tensor<B, 2> {
        let features = x.dims()[0];
        x.clone()
            .reshape([features, self.images, self.tokens])
            .narrow(2, 1, self.tokens - 1)
            .reshape([features, self.images * (self.tokens - 1)])
    }

    /// `[features, images · (1 + patches)]` → `[features, images]`
    fn class(&self, x: &Tensor<B, 2>) -> Tensor<B, 2> {
        let features = x.dims()[0];
        x.clone()
            .reshape([features, self.images, self.tokens])
            .narrow(2, 0, 1)
            .reshape([features, self.images])
    }

    /// One row of attention per head and image, `[heads, images · patches]`.
    fn class_attention(&self, queries: &Tensor<B, 2>, keys: &Tensor<B, 2>) -> Tensor<B, 2> {
        let head_dim = queries.dims()[0] / self.heads;
        let scale = (head_dim as f64).powf(-0.5);
        let of_image = |image: usize| {
            let split = |x: &Tensor<B, 2>, start: usize, rows: usize| {
                let x = x.clone().narrow(1, start, rows).cast(DType::F32);
                x.reshape([self.heads, head_dim, rows])
            };
            let start = image * self.tokens;
            let query = split(queries, start, 1).swap_dims(1, 2) * scale;
            let logits = query.matmul(split(keys, start, self.tokens));
            let probabilities = softmax(logits, 2).reshape([self.heads, self.tokens]);
            probabilities.narrow(1, 1, self.tokens - 1)
        };
        Tensor::cat((0..self.images).map(of_image).collect(), 1)
    }
}
