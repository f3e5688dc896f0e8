use std::ops::Range;

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reroute_layers::{
    CausalMask, Linear, LinearConfig, RmsNorm, RmsNormConfig, Rotary, add, linears, silu_product,
};

use crate::cache::LayerCache;
use crate::{DecoderConfig, RerouteError, Routed, SelfAttention};

/// One pre-norm decoder layer.
#[derive(Module, Debug)]
pub struct DecoderLayer<B: Backend> {
    /// Normalises the input of attention.
    pub input_layernorm: RmsNorm<B>,
    /// Self-attention.
    pub self_attn: SelfAttention<B>,
    /// Normalises the input of the MLP.
    pub post_attention_layernorm: RmsNorm<B>,
    /// Feed-forward network.
    pub mlp: Mlp<B>,
}

linears!(DecoderLayer: self_attn, mlp);

impl<B: Backend> DecoderLayer<B> {
    pub(crate) fn new(config: &DecoderConfig, device: &B::Device) -> Self {
        let norm = RmsNormConfig {
            features: config.hidden_size,
            epsilon: config.rms_norm_eps,
        };
        Self {
            input_layernorm: norm.init(device),
            self_attn: SelfAttention::new(config, device),
            post_attention_layernorm: norm.init(device),
            mlp: Mlp::new(config, device),
        }
    }

    /// The layer's input where nothing is decided.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, rows]`
    pub(crate) fn enter(&self, hidden_states: Tensor<B, 2>, rope: &Rotary<B>) -> Routed<B> {
        let normed = self.input_layernorm.forward(hidden_states.clone());
        Routed {
            keys: self.self_attn.keys(normed.clone(), rope),
            hidden_states,
            normed,
            decisions: Vec::new(),
        }
    }

    /// The layer itself: every run attends to what the cache holds of its sample, itself included. Only
    /// the rows that are queries go past keys and values.
    ///
    /// # Shapes
    /// - `input`: hidden states of the queries, all else of all rows
    /// - `queries`: `[num_attention_heads · head_dim, queries]`, rotated
    /// - returns `[hidden_size, queries]`
    pub(crate) fn forward(
        &self,
        input: Routed<B>,
        queries: Tensor<B, 2>,
        runs: &[Run],
        cache: LayerCache<'_, B>,
        causal: Option<&CausalMask<B>>,
    ) -> Result<Tensor<B, 2>, RerouteError> {
        let attention = &self.self_attn;
        let values = attention.values(input.normed);
        let context = attention.attend(queries, [input.keys, values], runs, cache, causal)?;
        let hidden_states = add(input.hidden_states, attention.output(context));
        let normed = self.post_attention_layernorm.forward(hidden_states.clone());
        Ok(add(hidden_states, self.mlp.forward(normed)))
    }

    /// The first weight that is not of the sizes of `config`: its name, its shape and the right one.
    pub(crate) fn misfit(
        &self,
        config: &DecoderConfig,
    ) -> Option<(&'static str, [usize; 2], [usize; 2])> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let (attention, mlp) = (&self.self_attn, &self.mlp);
        let weights = [
            ("q_proj", &attention.q_proj, [queries, hidden]),
            ("k_proj", &attention.k_proj, [keys, hidden]),
            ("v_proj", &attention.v_proj, [keys, hidden]),
            ("o_proj", &attention.o_proj, [hidden, queries]),
            ("gate_proj", &mlp.gate_proj, [inner, hidden]),
            ("up_proj", &mlp.up_proj, [inner, hidden]),
            ("down_proj", &mlp.down_proj, [hidden, inner]),
        ];
        let given = |linear: &Linear<B>| linear.weight.dims();
        let misfit = |(name, linear, expected): (_, &Linear<B>, _)| {
            (given(linear) != expected).then(|| (name, given(linear), expected))
        };
        weights.into_iter().find_map(misfit)
    }
}

/// Rows of one sample that stand side by side among the rows that layers work on.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// The sample.
    pub(crate) sample: usize,
    /// Where they stand.
    pub(crate) packed: Range<usize>,
    /// Where those of them stand that are queries, among all queries: the last ones of the run.
    pub(crate) queries: Range<usize>,
    /// The same, numbered within the sample.
    pub(crate) rows: Vec<usize>,
}

/// SwiGLU feed-forward network (arXiv 2002.05202).
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    /// `[intermediate_size, hidden_size]`
    pub gate_proj: Linear<B>,
    /// `[intermediate_size, hidden_size]`
    pub up_proj: Linear<B>,
    /// `[hidden_size, intermediate_size]`
    pub down_proj: Linear<B>,
}

linears!(Mlp: gate_proj, up_proj, down_proj);

impl<B: Backend> Mlp<B> {
    fn new(config: &DecoderConfig, device: &B::Device) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Self {
            gate_proj: LinearConfig::new(hidden, inner).init(device),
            up_proj: LinearConfig::new(hidden, inner).init(device),
            down_proj: LinearConfig::new(inner, hidden).init(device),
        }
    }

    /// `down(silu(gate(x)) · up(x))`.
    ///
    /// # Shapes
    /// - `x`: `[hidden_size, rows]`
    /// - returns `[hidden_size, rows]`
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let gate = self.gate_proj.forward(x.clone());
        let inner = silu_product(gate, self.up_proj.forward(x));
        self.down_proj.forward(inner)
    }
}
