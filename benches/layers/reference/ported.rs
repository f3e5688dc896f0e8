//! The reference design as one would port it: the operations of the release one by one, on Burn's own
//! modules and its own attention, on `[rows, features]`.

use std::ops::Range;

use burn::module::Param;
use burn::nn::{Linear, RmsNorm, SwiGlu};
use burn::tensor::activation::softmax;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Tensor};
use reroute::DecoderLayer;
use reroute_cli::backend::Backend;
use reroute_layers::Rotary;

use super::{Layers, indices};
use crate::model::DISTINCT_LAYERS;
use crate::setup::Setup;

/// The decoder's weights in Burn's modules.
pub struct PortedLayers<'a> {
    setup: &'a Setup,
    /// Those with weights of their own.
    layers: Vec<Layer>,
    /// `[rows, head_dim]`
    cos: Tensor<Backend, 2>,
    /// `[rows, head_dim]`
    sin: Tensor<Backend, 2>,
}

struct Layer {
    input_norm: RmsNorm<Backend>,
    queries: Linear<Backend>,
    keys: Linear<Backend>,
    values: Linear<Backend>,
    output: Linear<Backend>,
    query_norm: Option<RmsNorm<Backend>>,
    key_norm: Option<RmsNorm<Backend>>,
    mlp_norm: RmsNorm<Backend>,
    gated: SwiGlu<Backend>,
    down: Linear<Backend>,
}

impl<'a> PortedLayers<'a> {
    /// Takes the weights of the measured decoder, transposed as Burn's modules store them.
    pub fn new(setup: &'a Setup) -> Self {
        let prompt = &setup.prompt;
        let config = setup.decoder.config();
        let rope = config.rope.table(prompt.positions.clone(), DType::F32);
        let (cos, sin) = table(&rope, config.head_dim, setup);
        let distinct = setup.decoder.layers().iter().take(DISTINCT_LAYERS);
        Self {
            layers: distinct.map(Layer::of).collect(),
            setup,
            cos: cos.cast(setup.dtype()),
            sin: sin.cast(setup.dtype()),
        }
    }

    fn layer(&self, index: usize) -> &Layer {
        &self.layers[index % self.layers.len()]
    }

    /// Splits heads and rotates: `x · cos + rotate_half(x) · sin`.
    ///
    /// # Shapes
    /// - `x`: `[rows, heads · head_dim]`
    /// - `cos`, `sin`: `[rows, head_dim]`
    /// - returns `[heads, rows, head_dim]`
    fn heads(
        &self,
        x: Tensor<Backend, 2>,
        norm: Option<&RmsNorm<Backend>>,
        cos: &Tensor<Backend, 2>,
        sin: &Tensor<Backend, 2>,
    ) -> Tensor<Backend, 3> {
        let x = self.split(x);
        let x = match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let half = x.dims()[2] / 2;
        let (first, second) = (
            x.clone().narrow(2, 0, half),
            x.clone().narrow(2, half, half),
        );
        let turned = Tensor::cat(vec![second.neg(), first], 2);
        x * cos.clone().unsqueeze() + turned * sin.clone().unsqueeze()
    }

    /// `[rows, heads · head_dim]` → `[heads, rows, head_dim]`
    fn split(&self, x: Tensor<Backend, 2>) -> Tensor<Backend, 3> {
        let head_dim = self.setup.decoder.config().head_dim;
        let [rows, features] = x.dims();
        x.reshape([rows, features / head_dim, head_dim])
            .swap_dims(0, 1)
    }

    /// Repeats key or value heads for the query heads that share them.
    ///
    /// # Shapes
    /// - `x`: `[kv_heads, rows, head_dim]`
    /// - returns `[heads, rows, head_dim]`
    fn repeat(&self, x: Tensor<Backend, 3>) -> Tensor<Backend, 3> {
        let config = self.setup.decoder.config();
        let group = config.num_attention_heads / config.num_key_value_heads;
        let [kv_heads, rows, head_dim] = x.dims();
        match group {
            1 => x,
            _ => x.unsqueeze_dim::<4>(1).repeat_dim(1, group).reshape([
                kv_heads * group,
                rows,
                head_dim,
            ]),
        }
    }
}

impl Layers for PortedLayers<'_> {
    const ROWS: usize = 0;

    fn run(
        &self,
        layers: Range<usize>,
        mut hidden_states: Tensor<Backend, 2>,
        active: &[usize],
    ) -> anyhow::Result<Tensor<Backend, 2>> {
        let rows = indices(active, self.setup);
        let cos = self.cos.clone().select(0, rows.clone());
        let sin = self.sin.clone().select(0, rows);
        let mut kv_cache = Vec::new();
        for index in layers {
            let layer = self.layer(index);
            let normed = layer.input_norm.forward(hidden_states.clone());
            let queries = layer.queries.forward(normed.clone());
            let queries = self.heads(queries, layer.query_norm.as_ref(), &cos, &sin);
            let keys = layer.keys.forward(normed.clone());
            let keys = self.heads(keys, layer.key_norm.as_ref(), &cos, &sin);
            let values = self.split(layer.values.forward(normed));
            kv_cache.push((keys.clone(), values.clone()));
            let options = AttentionModuleOptions {
                is_causal: true,
                ..Default::default()
            };
            let [heads, count, head_dim] = queries.dims();
            let context: Tensor<Backend, 4> = attention(
                queries.unsqueeze(),
                self.repeat(keys).unsqueeze(),
                self.repeat(values).unsqueeze(),
                None,
                None,
                options,
            );
            let context = context.swap_dims(1, 2).reshape([count, heads * head_dim]);
            hidden_states = hidden_states + layer.output.forward(context);
            let normed = layer.mlp_norm.forward(hidden_states.clone());
            hidden_states = hidden_states + layer.down.forward(layer.gated.forward(normed));
        }
        Ok(hidden_states)
    }

    fn attention_matrix(
        &self,
        layer: usize,
        hidden_states: Tensor<Backend, 2>,
    ) -> Tensor<Backend, 3> {
        let layer = self.layer(layer);
        let normed = layer.input_norm.forward(hidden_states);
        let queries = layer.queries.forward(normed.clone());
        let queries = self.heads(queries, layer.query_norm.as_ref(), &self.cos, &self.sin);
        let keys = layer.keys.forward(normed);
        let keys = self.heads(keys, layer.key_norm.as_ref(), &self.cos, &self.sin);
        let scale = (queries.dims()[2] as f64).powf(-0.5);
        let (queries, keys) = (queries.cast(DType::F32), self.repeat(keys).cast(DType::F32));
        softmax(queries.matmul(keys.swap_dims(1, 2)).mul_scalar(scale), 2)
    }
}

impl Layer {
    fn of(layer: &DecoderLayer<Backend>) -> Self {
        let (attention, mlp) = (&layer.self_attn, &layer.mlp);
        Self {
            input_norm: norm(&layer.input_layernorm),
            queries: linear(&attention.q_proj),
            keys: linear(&attention.k_proj),
            values: linear(&attention.v_proj),
            output: linear(&attention.o_proj),
            query_norm: attention.q_norm.as_ref().map(norm),
            key_norm: attention.k_norm.as_ref().map(norm),
            mlp_norm: norm(&layer.post_attention_layernorm),
            gated: SwiGlu {
                linear_inner: linear(&mlp.gate_proj),
                linear_outer: linear(&mlp.up_proj),
            },
            down: linear(&mlp.down_proj),
        }
    }
}

fn linear(linear: &reroute_layers::Linear<Backend>) -> Linear<Backend> {
    let [output, input] = linear.weight.dims();
    // Through one axis, or the transposed view would stay a view.
    let weight = linear.weight.val().transpose().reshape([output * input]);
    Linear {
        weight: Param::from_tensor(weight.reshape([input, output])),
        bias: linear.bias.clone(),
    }
}

fn norm(norm: &reroute_layers::RmsNorm<Backend>) -> RmsNorm<Backend> {
    RmsNorm {
        gamma: norm.weight.clone(),
        epsilon: norm.epsilon,
    }
}

/// Cosines and sines of a rotary table: what it makes of a head that is 1 in its first half and 0 in
/// its second.
///
/// # Shapes
/// - returns `[rows, head_dim]`, twice
fn table(
    rope: &Rotary<Backend>,
    head_dim: usize,
    setup: &Setup,
) -> (Tensor<Backend, 2>, Tensor<Backend, 2>) {
    let half = [head_dim / 2, setup.rows()];
    let (ones, zeros) = (
        Tensor::ones(half, &setup.device()),
        Tensor::zeros(half, &setup.device()),
    );
    let turned = rope.apply(Tensor::cat(vec![ones, zeros], 0)).transpose();
    let twice = |part: usize| {
        let part = turned.clone().narrow(1, part * half[0], half[0]);
        Tensor::cat(vec![part.clone(), part], 1)
    };
    (twice(0), twice(1))
}
