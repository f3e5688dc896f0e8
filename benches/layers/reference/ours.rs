//! The reference design on the very layers that the router uses: the two differ in how they decide
//! and in nothing else.

use std::ops::Range;

use anyhow::Context;
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor};
use reducers::Schedule;
use reroute::{PrefillOptions, Prompt, SampleLayout};
use reroute_cli::backend::Backend;
use reroute_layers::Rotary;

use super::{Layers, indices};
use crate::setup::Setup;

/// The decoder's own layers, on `[hidden_size, rows]`.
pub struct OurLayers<'a> {
    setup: &'a Setup,
    rope: Rotary<Backend>,
}

impl<'a> OurLayers<'a> {
    /// Those of the measured decoder, for the rows of its prompt.
    pub fn new(setup: &'a Setup) -> Self {
        let prompt = &setup.prompt;
        let rope = &setup.decoder.config().rope;
        Self {
            rope: rope.table(prompt.positions.clone(), prompt.embeddings.dtype()),
            setup,
        }
    }
}

impl Layers for OurLayers<'_> {
    const ROWS: usize = 1;

    fn run(
        &self,
        layers: Range<usize>,
        hidden_states: Tensor<Backend, 2>,
        active: &[usize],
    ) -> anyhow::Result<Tensor<Backend, 2>> {
        let setup = self.setup;
        let layers = setup.decoder.layers()[layers].to_vec();
        let decoder = setup.decoder.clone().with_layers(layers)?;
        let positions = setup.prompt.positions.clone();
        let prompt = Prompt {
            embeddings: hidden_states,
            positions: positions.select(1, indices(active, setup)),
            deepstack: Vec::new(),
            samples: vec![SampleLayout {
                rows: active.len(),
                visual: Vec::new(),
                next_position: setup.rows() as i64,
                salience: None,
                cells: Vec::new(),
            }],
        };
        let options = PrefillOptions {
            hidden_states: true,
            ..Default::default()
        };
        let prefill = decoder.prefill(&prompt, &Schedule::dense(), options)?;
        let output = prefill.hidden_states.last().context("no layers")?;
        Ok(output.values.clone())
    }

    fn attention_matrix(
        &self,
        layer: usize,
        hidden_states: Tensor<Backend, 2>,
    ) -> Tensor<Backend, 3> {
        let config = self.setup.decoder.config();
        let layer = &self.setup.decoder.layers()[layer];
        let (kv_heads, head_dim) = (config.num_key_value_heads, config.head_dim);
        let group = config.num_attention_heads / kv_heads;
        let rows = hidden_states.dims()[1];
        let normed = layer.input_layernorm.forward(hidden_states);
        let queries = layer.self_attn.queries(normed.clone(), &self.rope);
        let keys = layer.self_attn.keys(normed, &self.rope);
        let queries = queries.reshape([kv_heads, group, head_dim, rows]);
        let keys = keys.reshape([kv_heads, 1, head_dim, rows]);
        let scores = queries.swap_dims(2, 3).matmul(keys).cast(DType::F32);
        let scores = scores.mul_scalar((head_dim as f64).powf(-0.5));
        softmax(scores, 3).reshape([kv_heads * group, rows, rows])
    }
}
