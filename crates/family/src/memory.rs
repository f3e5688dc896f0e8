//! How much memory answering takes, predicted from shapes.

use reducers::{Cost, Schedule};
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

/// Bytes of what loops compute.
const SINGLE: usize = size_of::<f32>();

/// Scores that exist at a time: as they come, masked, and after softmax.
const SCORE_COPIES: u64 = 3;

/// Most bytes that a thread keeps for products.
const BUFFER: usize = 2 << 20;

impl Memory {
    /// Memory of an answer to a question about one picture, beside the weights. `text_tokens` are
    /// those of the prompt and of the answer.
    pub fn of(
        config: &dyn FamilyConfig,
        picture: &Picture,
        text_tokens: usize,
        schedule: &Schedule,
        numbers: Arithmetic,
    ) -> Self {
        let shape = config.decoder().shape();
        let visual = picture.visual_tokens;
        let cost = Cost::of(&shape, schedule, visual, text_tokens, numbers.bytes);
        let rows = cost.rows.iter().copied().max().unwrap_or(0);
        let layers = [
            (config.tower_memory(), picture.patches),
            (decoder_layer(config.decoder()), rows),
        ];
        let largest = |of: &dyn Fn(&LayerMemory, usize) -> u64| {
            let bytes = layers.iter().map(|(layer, rows)| of(layer, *rows));
            bytes.max().unwrap_or(0)
        };
        Self {
            kv: cost.total_kv_bytes(),
            activations: largest(&|layer, rows| layer.peak(rows, numbers)),
            largest: largest(&|layer, rows| layer.largest_product(rows, numbers)),
        }
    }
}

fn decoder_layer(config: &DecoderConfig) -> LayerMemory {
    let (hidden, queries) = (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
    );
    LayerMemory {
        heads: config.num_attention_heads,
        // Visual tokens, the prompt, the residual stream, queries, a rotary table.
        held: 3 * hidden + queries + 2 * config.head_dim,
        hidden,
        queries,
        keys: config.num_key_value_heads * config.head_dim,
        projected: queries,
        // Keys and values lie in the cache.
        copies: 0,
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
        Self {
            heads,
            // The input of the layer, the residual stream, queries and keys, a rotary table.
            held: 4 * hidden + 2 * hidden / heads.max(1),
            hidden,
            queries: hidden,
            keys: hidden,
            projected: hidden,
            // Values.
            copies: hidden,
            inner,
            gated: false,
            causal: false,
            input: 0,
        }
    }

    /// Bytes at the peak: where patches are embedded, rows attend, or the MLP widens, activates and
    /// narrows them.
    fn peak(&self, rows: usize, numbers: Arithmetic) -> u64 {
        let Arithmetic {
            bytes,
            threads: loops,
        } = numbers;
        let halves = loops.is_some() && bytes < SINGLE;
        // Which has a column for each query of a block.
        let mask = if self.causal { SINGLE * QUERY_BLOCK } else { 0 };
        let held = bytes * self.held + mask;
        let gate = if self.gated { bytes * self.inner } else { 0 };
        // Halves are widened in one piece, computed with, and narrowed.
        let widened = |numbers: usize| if halves { SINGLE * numbers } else { 0 };
        let (attention, scores) = match loops {
            // Keys and values of a thread's head once more, in panels, and its context in tiles.
            Some(threads) => {
                let panels = 3 * (self.queries / self.heads.max(1)) * threads.min(self.heads);
                let wide = widened(2 * self.queries + 2 * self.keys);
                let copies = bytes * (self.copies + 2 * self.queries);
                (copies + wide + SINGLE * panels, 0)
            }
            // Queries, scaled queries, and contexts, block by block and together.
            None => {
                let copies = bytes * (self.copies + 4 * self.queries);
                (copies, self.scores(rows).saturating_mul(SCORE_COPIES))
            }
        };
        let activation = match (halves, self.gated) {
            (true, true) => 3 * bytes * self.inner + widened(2 * self.inner),
            (true, false) => 2 * bytes * self.inner + widened(self.inner),
            (false, _) => 2 * bytes * self.inner + gate,
        };
        // A cast from f32 to halves goes through f64.
        let cast = if halves { size_of::<f64>() + bytes } else { 0 };
        let product = |beside: usize, input: usize, output: usize| {
            let weight = widened(input.saturating_mul(output).min(WIDENED));
            (beside + numbers.product(input, output), weight as u64)
        };
        let stages = [
            (self.input * (SINGLE + cast), 0),
            product(0, self.input, self.hidden),
            product(held, self.hidden, self.projected),
            (held + attention, scores),
            product(held + gate, self.hidden, self.inner),
            (held + activation, 0),
            product(held, self.inner, self.hidden),
        ];
        let stages = stages.map(|(row, fixed)| bytes_of(rows, row).saturating_add(fixed));
        let buffers = bytes_of(loops.unwrap_or(0), BUFFER);
        let most = stages.into_iter().max().unwrap_or(0);
        most.saturating_add(buffers)
    }

    /// Bytes of the largest tensor that a product of matrices makes.
    fn largest_product(&self, rows: usize, numbers: Arithmetic) -> u64 {
        let widest = self.projected.max(self.inner).max(self.hidden);
        let output = bytes_of(rows, numbers.bytes * widest);
        match numbers.threads {
            Some(_) => output,
            None => output.max(self.scores(rows)),
        }
    }

    /// Bytes of the scores of as many queries as attend at a time.
    fn scores(&self, rows: usize) -> u64 {
        let per_query = self.heads.saturating_mul(rows).max(1);
        let queries = queries_at_a_time(self.heads, rows);
        bytes_of(per_query, SINGLE * queries.min(rows))
    }
}

impl Arithmetic {
    /// Bytes of a row in a product with a weight, what goes in and what comes out.
    fn product(self, input: usize, output: usize) -> usize {
        let given = self.bytes * (input + output);
        match (self.threads, self.bytes < SINGLE) {
            (None, _) => given,
            // The product is made and copied.
            (Some(_), false) => given + SINGLE * output,
            // The same in f32, as many rows of the weight at a time as are widened at a time.
            (Some(_), true) => {
                let block = output.min(WIDENED / input.max(1));
                given + SINGLE * input + 2 * SINGLE * block
            }
        }
    }
}

fn bytes_of(rows: usize, row: usize) -> u64 {
    (rows as u64).saturating_mul(row as u64)
}
