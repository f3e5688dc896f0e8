//! What a schedule costs: floating-point operations of one prefill and bytes of key-value cache.
//!
//! Operations are counted in the convention of DeepSpeed's profiler, which the Reroute paper (arXiv
//! 2606.12412) reports in: a matrix product of `m×k` and `k×n` is `2·m·k·n` (a multiply and an
//! add), attention is counted without the causal half, element-wise work is not counted. Only the
//! decoder's layers are: no vision tower, no projector, no `lm_head`. Other papers count
//! multiply-adds, or visual tokens only; do not compare across conventions.
//!
//! In the last layer only the row whose logits are asked for goes past keys and values, which changes no
//! number. Papers count all rows there: what they would publish is a figure of its own.
//!
//! Symbols below: `d` hidden size, `H` query heads, `H_kv` key-value heads, `d_h` channels of a
//! head, `m` width of the feed-forward, `n` rows a layer works on (text and visual).

use crate::{Action, DecisionRows, KvType, Schedule};

/// The sizes of a decoder that its cost depends on. Field names are those of a checkpoint's
/// configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderShape {
    /// Layers: a cost has an entry for each, and no decoder has more than this type counts.
    pub num_layers: u16,
    /// Channels of the residual stream, `d`.
    pub hidden_size: usize,
    /// Query heads, `H`.
    pub num_attention_heads: usize,
    /// Key-value heads, `H_kv`.
    pub num_key_value_heads: usize,
    /// Channels of a head, `d_h`.
    pub head_dim: usize,
    /// Channels inside the gated feed-forward, `m`.
    pub intermediate_size: usize,
}

impl DecoderShape {
    /// Floating-point operations of one layer on `rows` rows:
    /// `2n·(2·d·H·d_h + 2·d·H_kv·d_h + 3·d·m) + 4·n²·H·d_h`.
    pub fn layer_flops(&self, rows: usize) -> f64 {
        self.partial_layer_flops(rows, rows, rows)
    }

    /// Floating-point operations of one layer that makes keys and values of `rows` rows `n`, of which
    /// `queries` rows `q` go further and see `keys` rows, those an earlier turn has cached among them:
    /// `2n·2·d·H_kv·d_h + 2q·(2·d·H·d_h + 3·d·m) + 4·q·keys·H·d_h`.
    pub fn partial_layer_flops(&self, rows: usize, queries: usize, keys: usize) -> f64 {
        let (n, q) = (rows as f64, queries as f64);
        let keys_values = 2.0 * self.d() * self.key_width();
        let others = 2.0 * self.d() * self.query_width();
        let feed_forward = 3.0 * self.d() * self.intermediate_size as f64;
        let attention = 4.0 * q * keys as f64 * self.query_width();
        2.0 * n * keys_values + 2.0 * q * (others + feed_forward) + attention
    }

    /// Floating-point operations the *reference* implementation of Reroute spends on one decision
    /// over `pool_rows` rows `S`: queries and keys projected once more and a full score matrix, to
    /// read one row of it. `2·S·d·(H + H_kv)·d_h + 2·H·d_h·S²`. For comparison; nothing here runs
    /// it.
    pub fn reference_scorer_flops(&self, pool_rows: usize) -> f64 {
        let s = pool_rows as f64;
        2.0 * s * self.d() * (self.query_width() + self.key_width())
            + 2.0 * self.query_width() * s * s
    }

    /// Floating-point operations one decision by the attention of the last row adds here, over
    /// `pool_rows` rows `S` of which `kept_rows` go on: keys of the rows that do not (the layer
    /// reuses the others), and one row of dot products. `2·(S - S_kept)·d·H_kv·d_h + 2·H·d_h·S`.
    pub fn scorer_flops(&self, pool_rows: usize, kept_rows: usize) -> f64 {
        self.idle_key_flops(pool_rows, kept_rows) + 2.0 * self.query_width() * pool_rows as f64
    }

    /// Floating-point operations of the keys that a decision projects for rows that do not go on,
    /// whatever it ranks by: `2·(S - S_kept)·d·H_kv·d_h`.
    fn idle_key_flops(&self, pool_rows: usize, kept_rows: usize) -> f64 {
        let idle = pool_rows.saturating_sub(kept_rows) as f64;
        2.0 * idle * self.d() * self.key_width()
    }

    /// Bytes of keys and values one layer caches for `rows` rows: `2·n·H_kv` times the bytes of a head's
    /// `d_h` numbers and their scale ([`KvType::head_bytes`]).
    pub fn kv_bytes(&self, rows: usize, kv: KvType) -> u64 {
        let head = kv.head_bytes(self.head_dim);
        [2, rows, self.num_key_value_heads, head]
            .iter()
            .fold(1, |product: u64, &factor| {
                product.saturating_mul(factor as u64)
            })
    }

    fn d(&self) -> f64 {
        self.hidden_size as f64
    }

    /// Channels of all queries, `H·d_h`.
    pub(crate) fn query_width(&self) -> f64 {
        self.num_attention_heads as f64 * self.head_dim as f64
    }

    /// Channels of all keys, `H_kv·d_h`.
    fn key_width(&self) -> f64 {
        self.num_key_value_heads as f64 * self.head_dim as f64
    }
}

/// What one prefill costs, layer by layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Cost {
    /// Text rows of the prompt: every layer works on them.
    pub text_tokens: usize,
    /// Rows each layer works on and caches: text and selected visual tokens.
    pub rows: Vec<usize>,
    /// Floating-point operations of each layer, decisions not included.
    pub layer_flops: Vec<f64>,
    /// The same as papers count them: all rows of the last layer, too, go all the way.
    pub published_layer_flops: Vec<f64>,
    /// Floating-point operations of the decision at each layer; 0 where none is taken.
    pub scorer_flops: Vec<f64>,
    /// Bytes of keys and values each layer caches.
    pub kv_bytes: Vec<u64>,
}

impl Cost {
    /// The cost of a prompt of `visual_tokens` and `text_tokens` under `schedule`, the cache
    /// holding keys and values in `kv`.
    ///
    /// Under [`Action::Remove`] a decision ranks the tokens not removed before; under
    /// [`Action::Reroute`] every token, each time. What ranking costs is the rule's to say
    /// ([`Score::flops`](crate::Score::flops)). A prompt without visual tokens is dense whatever the
    /// schedule.
    pub fn of(
        shape: &DecoderShape,
        schedule: &Schedule,
        visual_tokens: usize,
        text_tokens: usize,
        kv: KvType,
    ) -> Self {
        let with_text = |visual: usize| visual.saturating_add(text_tokens);
        let visual = schedule.visual_tokens_per_layer(shape.num_layers.into(), visual_tokens);
        let visual: Vec<usize> = visual.collect();
        let rows: Vec<usize> = visual.iter().copied().map(with_text).collect();

        let decision = |layer: usize| {
            let stage = schedule
                .decision_at(layer)
                .filter(|_| visual_tokens > 0)
                .map(|stage| &schedule.stages()[stage])?;
            let candidates = match (schedule.action(), layer.checked_sub(1)) {
                (Action::Remove, Some(before)) => visual[before],
                _ => visual_tokens,
            };
            let pool = DecisionRows {
                visual: visual_tokens,
                text: text_tokens,
                candidates,
            };
            let keys = shape.idle_key_flops(with_text(candidates), rows[layer]);
            Some(keys + stage.score.flops(shape, pool))
        };

        let published = rows.iter().map(|&rows| shape.layer_flops(rows));
        let published_layer_flops: Vec<f64> = published.collect();
        let mut layer_flops = published_layer_flops.clone();
        if let (Some(last), Some(&rows)) = (layer_flops.last_mut(), rows.last()) {
            *last = shape.partial_layer_flops(rows, rows.min(1), rows);
        }
        Self {
            text_tokens,
            layer_flops,
            published_layer_flops,
            scorer_flops: (0..rows.len())
                .map(|layer| decision(layer).unwrap_or(0.0))
                .collect(),
            kv_bytes: rows.iter().map(|&rows| shape.kv_bytes(rows, kv)).collect(),
            rows,
        }
    }

    /// Floating-point operations of all layers, decisions not included.
    pub fn total_layer_flops(&self) -> f64 {
        self.layer_flops.iter().sum()
    }

    /// Floating-point operations of all decisions.
    pub fn total_scorer_flops(&self) -> f64 {
        self.scorer_flops.iter().sum()
    }

    /// Floating-point operations of layers and decisions.
    pub fn total_flops(&self) -> f64 {
        self.total_layer_flops() + self.total_scorer_flops()
    }

    /// The same as papers count them ([`published_layer_flops`](Self::published_layer_flops)).
    pub fn published_flops(&self) -> f64 {
        self.published_layer_flops.iter().sum::<f64>() + self.total_scorer_flops()
    }

    /// Bytes of keys and values over all layers.
    pub fn total_kv_bytes(&self) -> u64 {
        self.kv_bytes
            .iter()
            .fold(0, |total, &bytes| total.saturating_add(bytes))
    }

    /// Visual tokens a layer works on, on average.
    pub fn average_tokens(&self) -> f64 {
        let visual = self.rows.iter();
        let visual: u128 = visual
            .map(|rows| rows.saturating_sub(self.text_tokens) as u128)
            .sum();
        visual as f64 / self.rows.len().max(1) as f64
    }

    /// How many times faster than `dense` the prefill could be if time were operations: a ceiling
    /// for measurements.
    pub fn speedup_ceiling(&self, dense: &Cost) -> f64 {
        dense.total_flops() / self.total_flops()
    }
}

#[cfg(test)]
mod tests {
    use super::{Cost, DecoderShape};
    use crate::{Action, KvType, Schedule, Stage};

    const TOY: DecoderShape = DecoderShape {
        num_layers: 4,
        hidden_size: 8,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        intermediate_size: 16,
    };

    #[test]
    fn a_layer_is_its_matrix_products() {
        let products = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)];
        let linear: usize = products
            .iter()
            .map(|(inputs, outputs)| 2 * 3 * inputs * outputs)
            .sum();
        let attention = 2 * (2 * 2 * 3 * 3 * 4); // two products, two heads
        assert_eq!(TOY.layer_flops(3), (linear + attention) as f64);
    }

    #[test]
    fn the_last_layer_takes_one_row_all_the_way() {
        let cost = Cost::of(&TOY, &Schedule::dense(), 10, 5, KvType::F16);
        let products = |outputs: &[(usize, usize)]| -> usize {
            outputs
                .iter()
                .map(|(inputs, outputs)| 2 * inputs * outputs)
                .sum()
        };
        let keys_values = 15 * products(&[(8, 4), (8, 4)]);
        let others = products(&[(8, 8), (8, 8), (8, 16), (8, 16), (16, 8)]);
        let attention = 2 * (2 * 2 * 15 * 4);
        let last = (keys_values + others + attention) as f64;
        assert_eq!(cost.layer_flops[3], last);
        assert_eq!(cost.layer_flops[..3], cost.published_layer_flops[..3]);
        assert_eq!(cost.published_layer_flops, [TOY.layer_flops(15); 4]);
        let saved = TOY.layer_flops(15) - last;
        assert_eq!(cost.published_flops() - cost.total_flops(), saved);
        assert_eq!(
            Cost::of(&TOY, &Schedule::dense(), 0, 0, KvType::F16).layer_flops,
            [0.0; 4]
        );
    }

    #[test]
    fn removal_ranks_what_is_not_removed_and_rerouting_ranks_everyone() {
        let stages = vec![Stage::count(1, 6), Stage::count(3, 2)];
        let cost = |action| {
            let schedule = Schedule::new(action, false, stages.clone()).unwrap();
            Cost::of(&TOY, &schedule, 10, 5, KvType::F16)
        };
        let (remove, reroute) = (cost(Action::Remove), cost(Action::Reroute));
        assert_eq!(remove.rows, [15, 11, 11, 7]);
        assert_eq!(remove.rows, reroute.rows);
        assert_eq!(
            remove.scorer_flops,
            [0.0, TOY.scorer_flops(15, 11), 0.0, TOY.scorer_flops(11, 7)]
        );
        assert_eq!(
            reroute.scorer_flops,
            [0.0, TOY.scorer_flops(15, 11), 0.0, TOY.scorer_flops(15, 7)]
        );
        assert_eq!(
            remove.kv_bytes,
            [15, 11, 11, 7].map(|rows| rows * 2 * 4 * 2)
        );
        assert_eq!(remove.average_tokens(), 6.0);
    }

    #[test]
    fn a_prompt_without_a_picture_costs_what_the_plain_model_costs() {
        let schedule = Schedule::new(Action::Reroute, false, vec![Stage::count(0, 1)]).unwrap();
        let dense = Cost::of(&TOY, &Schedule::dense(), 0, 9, KvType::F16);
        assert_eq!(Cost::of(&TOY, &schedule, 0, 9, KvType::F16), dense);
        assert_eq!(dense.speedup_ceiling(&dense), 1.0);
    }
}
