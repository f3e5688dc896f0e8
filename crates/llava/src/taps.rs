//! What methods that reduce visual tokens may see of the vision tower.

use std::collections::BTreeMap;

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reducers::encoder::{Tap, Taps};
use reroute_family::{FamilyError, FamilyModel, MeanHidden, received_layers};
use vision_encoder::Inspected;

use crate::Llava;

impl<B: Backend> Llava<B> {
    /// Vision features, and whatever else is asked for, of all images side by side. The tower runs
    /// no further than the taps need.
    ///
    /// # Shapes
    /// - `pixels`: `[images, 3, image_size, image_size]`
    /// - returns as each [`Tap`] says, times `images` columns
    ///
    /// # Errors
    /// Visual tokens that are not the patches of the image have no grid for methods to work on.
    pub fn vision_taps(&self, pixels: Tensor<B, 4>, taps: &[Tap]) -> Result<Taps<B>, FamilyError> {
        self.config().check_grid()?;
        let of_class = |tap: &Tap| {
            matches!(
                tap,
                Tap::ClassToken
                    | Tap::ClassAttention { .. }
                    | Tap::ClassQuery { .. }
                    | Tap::ClassKey { .. }
            )
        };
        if !self.config().vision.class_token() && taps.iter().any(of_class) {
            return Err(FamilyError::Config(format!(
                "a {} has no class token for a method to look at",
                self.config().vision.kind.model_type()
            )));
        }
        let images = pixels.dims()[0];
        let layers = taps.iter().map(|tap| match *tap {
            Tap::ClassAttention { layer }
            | Tap::ReceivedAttention { layer }
            | Tap::ClassQuery { layer }
            | Tap::ClassKey { layer }
            | Tap::Keys { layer } => layer.saturating_add(1),
            Tap::MeanHidden { last, .. } | Tap::MeanHiddenInWindows { last, .. } => last,
            Tap::Features | Tap::Embeddings | Tap::ClassToken | Tap::Question => 0,
        });
        let depths = &self.config().vision_layers;
        let deepest = depths.iter().copied().max().unwrap_or(0);
        let layers = layers.max().unwrap_or(0).max(deepest);
        let received = received_layers(taps);
        let mut rows = Rows {
            images,
            tokens: self.config().vision.tokens(),
            prefix: self.config().vision.prefix_tokens(),
            heads: self.config().vision.num_heads,
            states: BTreeMap::new(),
            seen: Taps::new(),
        };
        let last =
            self.vision_tower()
                .forward_inspected(pixels, layers, &received, &mut |inspected| {
                    if depths.contains(&inspected.layer) {
                        rows.states.insert(inspected.layer, inspected.input.clone());
                    }
                    rows.tap(taps, inspected)
                })?;
        rows.states.insert(layers, last);
        rows.features(taps, depths);
        let mut seen = rows.seen;
        if taps.contains(&Tap::Embeddings) {
            let embeddings = seen.get(&Tap::Features).and_then(|x| self.project(x));
            seen.extend(embeddings.map(|embeddings| (Tap::Embeddings, embeddings)));
        }
        Ok(seen)
    }
}

/// How the rows of the tower divide into images, and what was seen of them.
struct Rows<B: Backend> {
    images: usize,
    /// Rows of an image, class token first.
    tokens: usize,
    /// Rows before its patches.
    prefix: usize,
    heads: usize,
    /// The hidden states after so many layers that features are made of.
    states: BTreeMap<usize, Tensor<B, 2>>,
    seen: Taps<B>,
}

impl<B: Backend> Rows<B> {
    fn tap(&mut self, taps: &[Tap], inspected: Inspected<B>) {
        let here = inspected.layer;
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
                Tap::MeanHidden { .. } => {
                    let shown = [&inspected.input, &inspected.output];
                    let (images, tokens, prefix) = (self.images, self.tokens, self.prefix);
                    let rows = |x: &Tensor<B, 2>| patches(x, images, tokens, prefix);
                    MeanHidden::add(&mut self.seen, tap, here, shown, rows);
                    continue;
                }
                _ => continue,
            };
            self.seen.insert(tap, seen);
        }
    }

    /// Features of the patches, and of the class token if it is asked for, after each of `layers`.
    fn features(&mut self, taps: &[Tap], layers: &[usize]) {
        let states: Vec<_> = layers.iter().filter_map(|at| self.states.get(at)).collect();
        let stacked = |rows: &dyn Fn(&Tensor<B, 2>) -> Tensor<B, 2>| {
            Tensor::cat(states.iter().map(|state| rows(state)).collect(), 0)
        };
        let features = stacked(&|state| self.patches(state));
        let class = (taps.contains(&Tap::ClassToken) && self.prefix > 0)
            .then(|| stacked(&|state| self.class(state)));
        self.seen.insert(Tap::Features, features);
        self.seen
            .extend(class.map(|class| (Tap::ClassToken, class)));
    }

    fn patches(&self, x: &Tensor<B, 2>) -> Tensor<B, 2> {
        patches(x, self.images, self.tokens, self.prefix)
    }

    /// `[features, images · tokens]` → `[features, images]`
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
            probabilities.narrow(1, self.prefix, self.tokens - self.prefix)
        };
        Tensor::cat((0..self.images).map(of_image).collect(), 1)
    }
}

/// `[features, images · tokens]` → `[features, images · patches]`
fn patches<B: Backend>(
    x: &Tensor<B, 2>,
    images: usize,
    tokens: usize,
    prefix: usize,
) -> Tensor<B, 2> {
    let features = x.dims()[0];
    x.clone()
        .reshape([features, images, tokens])
        .narrow(2, prefix, tokens - prefix)
        .reshape([features, images * (tokens - prefix)])
}
