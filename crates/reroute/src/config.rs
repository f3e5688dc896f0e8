use burn::tensor::backend::Backend;
use reducers::DecoderShape;

use crate::{Decoder, RerouteError, RopeConfig};

/// Channels of the widest head that [`DecoderConfig::validate`] lets pass.
pub const MAX_HEAD_DIM: usize = 1 << 12;

/// Axes that positions may have: time, height and width.
const MAX_AXES: usize = 3;

/// A resolved decoder configuration: every family's text model maps onto this one.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Rows of the embedding table and of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// ε of every RMS norm.
    pub rms_norm_eps: f64,
    /// Whether the q, k and v projections have biases (Qwen2 family).
    pub qkv_bias: bool,
    /// Whether q and k are RMS-normalised per head before rotation (Qwen3 family).
    pub qk_norm: bool,
    /// Whether the logits reuse the embedding table.
    pub tie_word_embeddings: bool,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    /// Rows that a row attends to at most, itself included (Mistral). Within so many positions the
    /// window hides nothing; further than that the model is not run.
    pub sliding_window: Option<usize>,
    /// Rotary positions.
    pub rope: RopeConfig,
}

impl DecoderConfig {
    /// Checks that the numbers agree with each other.
    ///
    /// # Errors
    /// [`RerouteError::Config`]
    pub fn validate(&self) -> Result<(), RerouteError> {
        // Far above any published model. Layers, blocks of the vocabulary and rotary tables take memory
        // before a weight is read, so a number that only looks like one must not get that far.
        let sizes = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 24),
            ("num_hidden_layers", self.num_layers, 1 << 10),
            ("num_attention_heads", self.num_attention_heads, 1 << 16),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 16),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                u32::MAX as usize / 2,
            ),
        ];
        let inconsistent = |reason: String| Err(RerouteError::Config(reason));
        for (name, value, limit) in sizes {
            if value == 0 || value > limit {
                return inconsistent(format!("{name} is {value}, 1 to {limit} are possible"));
            }
        }
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            return inconsistent(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return inconsistent(format!("head_dim {} is odd", self.head_dim));
        }
        if self.rope.axis_of_frequency.len() != self.head_dim / 2 {
            return inconsistent(format!(
                "rotary sections cover {} frequencies, head_dim {} has {}",
                self.rope.axis_of_frequency.len(),
                self.head_dim,
                self.head_dim / 2
            ));
        }
        if self.rope.axes() > MAX_AXES {
            return inconsistent(format!("rotary positions have {} axes", self.rope.axes()));
        }
        let theta = self.rope.theta as f32;
        if !(theta.is_finite() && theta > 0.0) {
            return inconsistent(format!("rope_theta is {}", self.rope.theta));
        }
        if self.sliding_window == Some(0) {
            return inconsistent("sliding_window is 0".into());
        }
        if let Some(problem) = self.rope.scaling.problem() {
            return inconsistent(problem);
        }
        if !((self.rms_norm_eps as f32).is_finite() && self.rms_norm_eps >= 0.0) {
            return inconsistent(format!("rms_norm_eps is {}", self.rms_norm_eps));
        }
        Ok(())
    }

    /// Positions that the model can be run for, and the name of what limits them in config.json.
    pub fn context(&self) -> (usize, &'static str) {
        let positions = self.max_position_embeddings;
        match self.sliding_window {
            Some(window) if window < positions => (window, "sliding_window"),
            _ => (positions, "max_position_embeddings"),
        }
    }

    /// The sizes that cost accounting needs.
    pub fn shape(&self) -> DecoderShape {
        DecoderShape {
            num_layers: u16::try_from(self.num_layers).unwrap_or(u16::MAX),
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            intermediate_size: self.intermediate_size,
        }
    }

    /// Builds the decoder; parameters are lazily random until loaded.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<Decoder<B>, RerouteError> {
        self.validate()?;
        Ok(Decoder::new(self, device))
    }
}
