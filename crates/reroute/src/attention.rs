use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reroute_layers::{
    CausalMask, Linear, LinearConfig, RmsNorm, RmsNormConfig, Rotary, Segment, attention,
    attention_on_record, linears,
};

use crate::block::Run;
use crate::cache::LayerCache;
use crate::{DecoderConfig, RerouteError};

/// Grouped-query self-attention, with the projections callable one by one so that a decision layer
/// can compute keys once for all candidates and queries only for the rows that stay.
#[derive(Module, Debug)]
pub struct SelfAttention<B: Backend> {
    /// `[num_attention_heads · head_dim, hidden_size]`
    pub q_proj: Linear<B>,
    /// `[num_key_value_heads · head_dim, hidden_size]`
    pub k_proj: Linear<B>,
    /// `[num_key_value_heads · head_dim, hidden_size]`
    pub v_proj: Linear<B>,
    /// `[hidden_size, num_attention_heads · head_dim]`
    pub o_proj: Linear<B>,
    /// Normalises every head of the queries (Qwen3).
    pub q_norm: Option<RmsNorm<B>>,
    /// Normalises every head of the keys (Qwen3).
    pub k_norm: Option<RmsNorm<B>>,
    num_key_value_heads: usize,
    head_dim: usize,
}

linears!(SelfAttention: q_proj, k_proj, v_proj, o_proj);

impl<B: Backend> SelfAttention<B> {
    pub(crate) fn new(config: &DecoderConfig, device: &B::Device) -> Self {
        let hidden = config.hidden_size;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let projection = |output| {
            LinearConfig::new(hidden, output)
                .with_bias(config.qkv_bias)
                .init(device)
        };
        let norm = || {
            let norm = RmsNormConfig {
                features: config.head_dim,
                epsilon: config.rms_norm_eps,
            };
            config.qk_norm.then(|| norm.init(device))
        };
        Self {
            q_proj: projection(queries),
            k_proj: projection(keys),
            v_proj: projection(keys),
            o_proj: LinearConfig::new(queries, hidden).init(device),
            q_norm: norm(),
            k_norm: norm(),
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        }
    }

    /// Rotated queries.
    ///
    /// # Shapes
    /// - `normed`: `[hidden_size, rows]`
    /// - returns `[num_attention_heads · head_dim, rows]`
    pub fn queries(&self, normed: Tensor<B, 2>, rope: &Rotary<B>) -> Tensor<B, 2> {
        rope.apply(self.unrotated_queries(normed))
    }

    /// Rotated keys.
    ///
    /// # Shapes
    /// - `normed`: `[hidden_size, rows]`
    /// - returns `[num_key_value_heads · head_dim, rows]`
    pub fn keys(&self, normed: Tensor<B, 2>, rope: &Rotary<B>) -> Tensor<B, 2> {
        rope.apply(self.unrotated_keys(normed))
    }

    /// Queries before rotation; shapes as [`queries`](Self::queries).
    pub(crate) fn unrotated_queries(&self, normed: Tensor<B, 2>) -> Tensor<B, 2> {
        self.per_head(&self.q_norm, self.q_proj.forward(normed))
    }

    /// Keys before rotation; shapes as [`keys`](Self::keys).
    pub(crate) fn unrotated_keys(&self, normed: Tensor<B, 2>) -> Tensor<B, 2> {
        self.per_head(&self.k_norm, self.k_proj.forward(normed))
    }

    /// Values.
    ///
    /// # Shapes
    /// - `normed`: `[hidden_size, rows]`
    /// - returns `[num_key_value_heads · head_dim, rows]`
    pub fn values(&self, normed: Tensor<B, 2>) -> Tensor<B, 2> {
        self.v_proj.forward(normed)
    }

    /// Appends the keys and values of each run to the cache, and attends from its queries to all that the
    /// cache then holds of its sample.
    ///
    /// # Shapes
    /// - `queries`: `[num_attention_heads · head_dim, queries]`, rotated
    /// - `keys_values`: `[num_key_value_heads · head_dim, rows]` each, the keys rotated
    /// - returns `[num_attention_heads · head_dim, queries]`
    pub(crate) fn attend(
        &self,
        queries: Tensor<B, 2>,
        keys_values: [Tensor<B, 2>; 2],
        runs: &[Run],
        mut cache: LayerCache<'_, B>,
        causal: Option<&CausalMask<B>>,
    ) -> Result<Tensor<B, 2>, RerouteError> {
        let keys_values = keys_values.map(|x| self.split_heads(x));
        let [features, rows] = queries.dims();
        let group = features / (self.num_key_value_heads * self.head_dim);
        let shape = |rows| [self.num_key_value_heads, group, self.head_dim, rows];
        let at_once = match runs {
            [_, _, ..] if cache.begins(runs, keys_values[0].dtype()) => {
                let segments = runs.iter().map(|run| Segment {
                    queries: run.queries.clone(),
                    keys: run.packed.clone(),
                });
                let [keys, values] = &keys_values;
                let queries = &queries.clone().reshape(shape(rows));
                attention_on_record(
                    (queries, keys, values),
                    segments.collect(),
                    causal.is_some(),
                )
            }
            _ => None,
        };
        let mut append = |run: &Run| {
            let (start, rows) = (run.packed.start, run.packed.len());
            let own = keys_values.clone();
            match runs {
                [_] => cache.append(run, own),
                _ => cache.append(run, own.map(|x| x.narrow(2, start, rows))),
            }
        };
        if let Some(context) = at_once {
            runs.iter().try_for_each(|run| append(run).map(drop))?;
            return Ok(context);
        }
        let mut context = |run: &Run, queries: Tensor<B, 2>| {
            let [keys, values] = append(run)?;
            let queries = queries.reshape(shape(run.queries.len()));
            Ok(attention(queries, keys, values, causal))
        };
        if let [all] = runs {
            return context(all, queries);
        }
        let contexts = runs.iter().map(|run| {
            let (start, rows) = (run.queries.start, run.queries.len());
            context(run, queries.clone().narrow(1, start, rows))
        });
        let contexts: Result<Vec<_>, RerouteError> = contexts.collect();
        Ok(Tensor::cat(contexts?, 1))
    }

    /// The output projection.
    ///
    /// # Shapes
    /// - `context`: `[num_attention_heads · head_dim, rows]`
    /// - returns `[hidden_size, rows]`
    pub(crate) fn output(&self, context: Tensor<B, 2>) -> Tensor<B, 2> {
        self.o_proj.forward(context)
    }

    /// Splits `[heads · head_dim, rows]` into `[heads, head_dim, rows]`.
    pub(crate) fn split_heads(&self, x: Tensor<B, 2>) -> Tensor<B, 3> {
        let [features, rows] = x.dims();
        x.reshape([features / self.head_dim, self.head_dim, rows])
    }

    fn per_head(&self, norm: &Option<RmsNorm<B>>, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match norm {
            Some(norm) => {
                let shape = x.dims();
                norm.forward(self.split_heads(x)).reshape(shape)
            }
            None => x,
        }
    }
}
