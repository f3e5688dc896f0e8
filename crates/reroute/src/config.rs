use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};
use reducers::DecoderShape;
use reroute_layers::Rotary;

use crate::{Decoder, RerouteError};

/// Channels of the widest head that [`DecoderConfig::validate`] lets pass.
pub const MAX_HEAD_DIM: usize = 1 << 12;

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
    /// Rotary positions.
    pub rope: RopeConfig,
}

/// Rotary position configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Which position axis turns each of the `head_dim / 2` frequencies: all 0 for plain text
    /// positions, sectioned or interleaved over (t, h, w) for M-RoPE.
    pub axis_of_frequency: Vec<usize>,
}

impl RopeConfig {
    /// Plain one-axis positions.
    pub fn one_axis(theta: f64, head_dim: usize) -> Self {
        Self {
            theta,
            // Of a wider head, which is refused later, no memory is asked for.
            axis_of_frequency: vec![0; head_dim.min(MAX_HEAD_DIM) / 2],
        }
    }

    /// Number of position axes.
    pub fn axes(&self) -> usize {
        self.axis_of_frequency
            .iter()
            .max()
            .map_or(1, |axis| axis + 1)
    }

    /// The table for explicit positions, computed in f32 as the reference does.
    ///
    /// # Shapes
    /// - `positions`: `[axes, rows]`
    pub fn table<B: Backend>(&self, positions: Tensor<B, 2, Int>, dtype: DType) -> Rotary<B> {
        let device = positions.device();
        let half = self.axis_of_frequency.len();
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 1.0 / (self.theta as f32).powf((2 * i) as f32 / (2 * half) as f32))
            .collect();
        let axes: Vec<i64> = self.axis_of_frequency.iter().map(|&a| a as i64).collect();
        let axes = Tensor::<B, 1, Int>::from_data(axes.as_slice(), &device);
        let frequencies = Tensor::<B, 1>::from_data(frequencies.as_slice(), (&device, DType::F32));
        let positions = positions.float().cast(DType::F32).select(0, axes);
        Rotary::from_angles(positions * frequencies.unsqueeze_dim(1), dtype)
    }
}

impl DecoderConfig {
    /// Checks that the numbers agree with each other.
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
        if !(self.rope.theta.is_finite() && self.rope.theta > 0.0) {
            return inconsistent(format!("rope_theta is {}", self.rope.theta));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return inconsistent(format!("rms_norm_eps is {}", self.rms_norm_eps));
        }
        Ok(())
    }

    /// The sizes that cost accounting needs.
    pub fn shape(&self) -> DecoderShape {
        DecoderShape {
            num_layers: self.num_layers,
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
