use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use reroute_layers::{
    Linear, LinearConfig, Rotary, add, attention, gelu_tanh, linears, quick_gelu,
    received_attention, silu, silu_product,
};

use super::arrangement::Run;
use super::config::Activation;
use super::norm::Norm;
use super::{QwenGeneration, QwenTowerConfig};

/// One pre-norm transformer block.
#[derive(Module, Debug)]
pub(super) struct Block<B: Backend> {
    norm1: Norm<B>,
    attn: Attention<B>,
    norm2: Norm<B>,
    mlp: Mlp<B>,
}

#[derive(Module, Debug)]
struct Attention<B: Backend> {
    /// Queries, keys and values, one below the other.
    qkv: Linear<B>,
    proj: Linear<B>,
    num_heads: usize,
}

/// `fc2(act(fc1(x)))`, or `fc2(act(gate(x)) · fc1(x))` where there is a gate (arXiv 2002.05202).
#[derive(Module, Debug)]
struct Mlp<B: Backend> {
    gate: Option<Linear<B>>,
    fc1: Linear<B>,
    fc2: Linear<B>,
    #[module(skip)]
    activation: Activation,
}

linears!(Block: attn, mlp);
linears!(Attention: qkv, proj);
linears!(Mlp: gate, fc1, fc2);

impl<B: Backend> Block<B> {
    pub(super) fn new(config: &QwenTowerConfig, device: &B::Device) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let qwen2_5 = config.generation == QwenGeneration::Qwen2_5;
        let norm = || Norm::new(hidden, !qwen2_5, device);
        let linear = |input, output| {
            LinearConfig::new(input, output)
                .with_bias(true)
                .init(device)
        };
        Self {
            norm1: norm(),
            attn: Attention {
                qkv: linear(hidden, 3 * hidden),
                proj: linear(hidden, hidden),
                num_heads: config.num_heads,
            },
            norm2: norm(),
            mlp: Mlp {
                gate: qwen2_5.then(|| linear(hidden, inner)),
                fc1: linear(hidden, inner),
                fc2: linear(inner, hidden),
                activation: config.activation,
            },
        }
    }

    /// The output, and the rotated queries and keys that led to it.
    ///
    /// # Shapes
    /// - `hidden_states`: `[hidden_size, rows]`, the rows of the runs side by side
    /// - returns `[hidden_size, rows]` each
    pub(super) fn forward(
        &self,
        hidden_states: Tensor<B, 2>,
        rotary: &Rotary<B>,
        runs: &[Run],
    ) -> [Tensor<B, 2>; 3] {
        let normed = self.norm1.forward(hidden_states.clone());
        let [attended, queries, keys] = self.attn.forward(normed, rotary, runs);
        let hidden_states = add(hidden_states, attended);
        let normed = self.norm2.forward(hidden_states.clone());
        let output = add(hidden_states, self.mlp.forward(normed));
        [output, queries, keys]
    }
}

impl<B: Backend> Block<B> {
    /// Attention that each row receives from the rows of its segment.
    ///
    /// # Shapes
    /// - `queries`, `keys`: `[hidden_size, rows]`
    /// - returns `[1, rows]`
    pub(super) fn received(
        &self,
        queries: &Tensor<B, 2>,
        keys: &Tensor<B, 2>,
        runs: &[Run],
    ) -> Tensor<B, 2> {
        let hidden = queries.dims()[0];
        let heads = self.attn.num_heads;
        let lengths = runs
            .iter()
            .flat_map(|run| std::iter::repeat_n(run.length, run.segments));
        let mut start = 0;
        let of_segments = lengths.map(|length| {
            let of_segment = |x: &Tensor<B, 2>| {
                let x = x.clone().narrow(1, start, length);
                x.reshape([heads, hidden / heads, length])
            };
            let received = received_attention(of_segment(queries), of_segment(keys));
            start += length;
            received
        });
        Tensor::cat(of_segments.collect(), 1)
    }
}

impl<B: Backend> Attention<B> {
    /// Every segment attends to itself; heads of a segment are as independent as segments.
    /// The output, queries and keys.
    fn forward(&self, normed: Tensor<B, 2>, rotary: &Rotary<B>, runs: &[Run]) -> [Tensor<B, 2>; 3] {
        let hidden = normed.dims()[0];
        let (heads, head_dim) = (self.num_heads, hidden / self.num_heads);
        let qkv = self.qkv.forward(normed);
        let part = |index| qkv.clone().narrow(0, index * hidden, hidden);
        let (query, key, value) = (rotary.apply(part(0)), rotary.apply(part(1)), part(2));
        let mut start = 0;
        let context = runs.iter().map(|&Run { segments, length }| {
            let rows = segments * length;
            let split = |x: &Tensor<B, 2>| {
                let run = x.clone().narrow(1, start, rows);
                let segments_first = swap_leading(run.reshape([hidden, segments, length]));
                segments_first.reshape([segments * heads, head_dim, length])
            };
            let query = split(&query).unsqueeze_dim::<4>(1);
            let context = attention(query, split(&key), split(&value), None);
            start += rows;
            let features_first = swap_leading(context.reshape([segments, hidden, length]));
            features_first.reshape([hidden, rows])
        });
        let output = self.proj.forward(Tensor::cat(context.collect(), 1));
        [output, query, key]
    }
}

/// `[a, b, length]` → `[b, a, length]`, as a selection of rows: CPU backends copy whole rows several
/// times as fast as they permute axes.
fn swap_leading<B: Backend>(x: Tensor<B, 3>) -> Tensor<B, 3> {
    let [a, b, length] = x.dims();
    if a == 1 || b == 1 {
        return x.reshape([b, a, length]);
    }
    let rows = Tensor::<B, 1, Int>::arange(0..(a * b) as i64, &x.device());
    let swapped = rows.reshape([a, b]).transpose().reshape([a * b]);
    x.reshape([a * b, length])
        .select(0, swapped)
        .reshape([b, a, length])
}

impl<B: Backend> Mlp<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let activate = match self.activation {
            Activation::QuickGelu => quick_gelu,
            Activation::Silu => silu,
            Activation::GeluTanh => gelu_tanh,
        };
        let inner = match &self.gate {
            Some(gate) if self.activation == Activation::Silu => {
                silu_product(gate.forward(x.clone()), self.fc1.forward(x))
            }
            Some(gate) => activate(gate.forward(x.clone())) * self.fc1.forward(x),
            None => activate(self.fc1.forward(x)),
        };
        self.fc2.forward(inner)
    }
}
