//! How much memory answering takes, predicted from shapes.

use std::num::Saturating;

use reducers::{Cost, KvType, Schedule};
use reroute::DecoderConfig;
use reroute_layers::{QUERY_BLOCK, WIDENED, queries_at_a_time};

use crate::FamilyConfig;

/// A picture as the model would see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Picture {
    /// Width and height as the vision tower sees it, in pixels.
    pub resized: [usize; 2],
    /// Patches that the tower works on.
    pub patches: usize,
    /// Visual tokens that it makes of them.
    pub visual_tokens: usize,
}

/// Memory of one answer, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Keys and values of the prompt and of what is generated: exact.
    pub kv: u64,
    /// Everything else that is computed, at its peak, in the vision tower or in the decoder: an
    /// estimate, which is to be no less than what is measured.
    pub activations: u64,
    /// The largest tensor that a product of matrices makes.
    pub largest: u64,
}

/// How a backend keeps numbers, and what it computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arithmetic {
    /// Bytes of a weight or of an activation: 4, or 2 for f16 and bf16.
    pub bytes: usize,
    /// Threads, where loops of this program compute with the numbers (`reroute_layers::host`): in f32, whatever
    /// they are given, and without a matrix of scores in attention.
    pub threads: Option<usize>,
}

/// Numbers or bytes of a row: sizes that nothing has checked are only large.
type Count = Saturating<usize>;

/// Bytes of what loops compute.
const SINGLE: Count = Saturating(size_of::<f32>());

/// Scores that exist at a time: as they come, masked, and after softmax.
const SCORE_COPIES: u64 = 3;

/// Most bytes that a thread keeps for products.
const BUFFER: usize = 2 << 20;

impl Memory {
    /// Memory of an answer to a question about one picture, beside the weights. `text_tokens` are
    /// those of the prompt and of the answer, `kv` the type of keys and values.
    pub fn of(
        config: &dyn FamilyConfig,
        picture: &Picture,
        text_tokens: usize,
        schedule: &Schedule,
        numbers: Arithmetic,
        kv: KvType,
    ) -> Self {
        let shape = config.decoder().shape();
        let visual = picture.visual_tokens;
        let cost = Cost::of(&shape, schedule, visual, text_tokens, kv);
        let rows = cost.rows.iter().copied().max().unwrap_or(0);
        let tower = (config.tower_memory(), picture.patches);
        let decoder = (decoder_layer(config.decoder(), numbers, kv), rows);
        let peaks = [&tower, &decoder].map(|(layer, rows)| layer.peak(*rows, numbers));
        let products =
            [&tower, &decoder].map(|(layer, rows)| layer.largest_product(*rows, numbers));
        // In the last layer one row goes past keys and values: at the peak its own are not there yet.
        let last = cost.kv_bytes.last().copied().unwrap_or(0);
        Self {
            kv: cost.total_kv_bytes(),
            activations: peaks[0].max(peaks[1].saturating_sub(last)),
            largest: products[0].max(products[1]),
        }
    }
}

fn decoder_layer(config: &DecoderConfig, numbers: Arithmetic, kv: KvType) -> LayerMemory {
    let (hidden, queries) = (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
    );
    let keys = config.num_key_value_heads * config.head_dim;
    // Keys and values lie in the cache; those of a layer are widened.
    let copies = if kv.dtype().size() == numbers.bytes {
        0
    } else {
        2 * keys
    };
    LayerMemory {
        heads: config.num_attention_heads,
        // Visual tokens, the prompt, the residual stream, queries, a rotary table.
        held: 3 * hidden + queries + 2 * config.head_dim,
        hidden,
        queries,
        keys,
        projected: queries,
        copies,
        in_place: 0,
        inner: config.intermediate_size,
        gated: true,
        causal: true,
        input: 0,
    }
}

/// Numbers that a row has in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerMemory {
    /// Attention heads.
    pub heads: usize,
    /// There from the first to the last operation.
    pub held: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of all queries.
    pub queries: usize,
    /// Width of all keys, and of all values.
    pub keys: usize,
    /// The widest output of a projection before attention.
    pub projected: usize,
    /// Held while rows attend.
    pub copies: usize,
    /// Of these copies, what loops in f32 read where it is instead.
    pub in_place: usize,
    /// Width of the MLP.
    pub inner: usize,
    /// Whether the MLP has a gate.
    pub gated: bool,
    /// Whether a row attends to earlier rows alone.
    pub causal: bool,
    /// What the first layer's input is made of, if that is in memory at the same time.
    pub input: usize,
}

impl LayerMemory {
    /// A layer of a vision transformer whose MLP has no gate, and whose rows attend to all others.
    pub fn vision(heads: usize, hidden: usize, inner: usize) -> Self {
        let head = hidden / heads.max(1);
        Self {
            heads,
            // The input of the layer, the residual stream, queries and keys, a rotary table.
            held: (Saturating(4) * Saturating(hidden) + Saturating(2) * Saturating(head)).0,
            hidden,
            queries: hidden,
            keys: hidden,
            projected: hidden,
            // Values.
            copies: hidden,
            in_place: 0,
            inner,
            gated: false,
            causal: false,
            input: 0,
        }
    }

    /// Bytes at the peak: where patches are embedded, rows attend, or the MLP widens, activates and
    /// narrows them.
    fn peak(&self, rows: usize, numbers: Arithmetic) -> u64 {
        let loops = numbers.threads;
        let halves = loops.is_some() && numbers.bytes < SINGLE.0;
        let bytes = Saturating(numbers.bytes);
        let [hidden, queries, keys, inner] =
            [self.hidden, self.queries, self.keys, self.inner].map(Saturating);
        let nothing = Saturating(0);
        // Which has a column for each query of a block.
        let mask = if self.causal {
            SINGLE * Saturating(QUERY_BLOCK)
        } else {
            nothing
        };
        let held = bytes * Saturating(self.held) + mask;
        let gate = if self.gated { bytes * inner } else { nothing };
        // Halves are widened in one piece, computed with, and narrowed.
        let widened = |numbers: Count| if halves { SINGLE * numbers } else { nothing };
        let copies = Saturating(self.copies);
        let (attention, scores) = match loops {
            // Keys and values of a thread's head once more, in panels, and its context in tiles.
            Some(threads) => {
                let head = Saturating(self.queries / self.heads.max(1));
                let panels = Saturating(3) * head * Saturating(threads.min(self.heads));
                let wide = widened(Saturating(2) * queries + Saturating(2) * keys);
                let copies = match halves {
                    true => copies + Saturating(2) * queries,
                    // And contexts.
                    false => copies - Saturating(self.in_place) + queries,
                };
                (bytes * copies + wide + SINGLE * panels, 0)
            }
            // Queries, scaled queries, and contexts, block by block and together.
            None => {
                let copies = bytes * (copies + Saturating(4) * queries);
                (copies, self.scores(rows).saturating_mul(SCORE_COPIES))
            }
        };
        let activation = match (halves, self.gated) {
            (true, true) => Saturating(2) * bytes * inner + widened(Saturating(2) * inner),
            (true, false) => Saturating(2) * bytes * inner + widened(inner),
            // In place.
            (false, _) if loops.is_some() => bytes * inner + gate,
            (false, _) => Saturating(2) * bytes * inner + gate,
        };
        // A cast from f32 to halves goes through f64.
        let cast = if halves {
            Saturating(size_of::<f64>()) + bytes
        } else {
            nothing
        };
        let product = |beside: Count, input: Count, output: Count| {
            let weight = widened((input * output).min(Saturating(WIDENED)));
            (beside + numbers.product(input, output), weight.0 as u64)
        };
        let (input, projected) = (Saturating(self.input), Saturating(self.projected));
        let stages = [
            (input * (SINGLE + cast), 0),
            product(nothing, input, hidden),
            product(held, hidden, projected),
            (held + attention, scores),
            product(held + gate, hidden, inner),
            (held + activation, 0),
            product(held, inner, hidden),
        ];
        let stages = stages.map(|(row, fixed)| bytes_of(rows, row).saturating_add(fixed));
        let buffers = bytes_of(loops.unwrap_or(0), Saturating(BUFFER));
        let most = stages.into_iter().max().unwrap_or(0);
        most.saturating_add(buffers)
    }

    /// Bytes of the largest tensor that a product of matrices makes.
    fn largest_product(&self, rows: usize, numbers: Arithmetic) -> u64 {
        let widest = self.projected.max(self.inner).max(self.hidden);
        let output = bytes_of(rows, Saturating(numbers.bytes) * Saturating(widest));
        match numbers.threads {
            Some(_) => output,
            None => output.max(self.scores(rows)),
        }
    }

    /// Bytes of the scores of as many queries as attend at a time.
    fn scores(&self, rows: usize) -> u64 {
        let per_query = self.heads.saturating_mul(rows).max(1);
        let queries = queries_at_a_time(self.heads, rows);
        bytes_of(per_query, SINGLE * Saturating(queries.min(rows)))
    }
}

impl Arithmetic {
    /// Bytes of a row in a product with a weight, what goes in and what comes out.
    fn product(self, input: Count, output: Count) -> Count {
        let given = Saturating(self.bytes) * (input + output);
        // Halves in f32, as many rows of the weight at a time as are widened at a time.
        match self.threads.is_some() && self.bytes < SINGLE.0 {
            true => {
                let block = output.min(Saturating(WIDENED / input.0.max(1)));
                given + SINGLE * input + SINGLE * block
            }
            false => given,
        }
    }
}

fn bytes_of(rows: usize, row: Count) -> u64 {
    (rows as u64).saturating_mul(row.0 as u64)
}
