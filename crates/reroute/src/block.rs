use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reroute_layers::{Linear, LinearConfig, RmsNorm, RmsNormConfig, silu_product};

use crate::{DecoderConfig, SelfAttention};

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

    /// Everything after attention has gathered its context: output projection, residuals, MLP.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, rows]`, the layer's input
    /// - `context`: `[num_attention_heads · head_dim, rows]`
    /// - returns `[hidden_size, rows]`
    pub(crate) fn finish(
        &self,
        hidden_states: Tensor<B, 2>,
        context: Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let hidden_states = hidden_states + self.self_attn.output(context);
        let normed = self.post_attention_layernorm.forward(hidden_states.clone());
        hidden_states + self.mlp.forward(normed)
    }
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
