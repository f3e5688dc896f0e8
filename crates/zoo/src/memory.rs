//! How much memory answering takes, predicted from shapes.

use reducers::{Cost, Schedule};

use crate::{ModelConfig, Preprocessor, ZooError};

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
    /// estimate.
    pub activations: u64,
}

/// Queries that attend at a time, and the most bytes of their scores (`layers::attention`).
const SCORE_ROWS: u64 = 128;
const MAX_SCORE_BYTES: u64 = 16 << 20;

/// Scores that exist at a time: as they come, masked, and after softmax.
const SCORE_COPIES: u64 = 3;

/// Vectors as wide as the residual stream that a row has beside those of attention or of the MLP: the
/// input, the residual stream, its normalised form.
const STREAMS: usize = 3;

impl Preprocessor {
    /// What becomes of a picture of this width and height in pixels.
    pub fn picture(&self, size: [usize; 2]) -> Result<Picture, ZooError> {
        match self {
            Self::Clip { preprocessor, grid } => {
                let [height, width] = preprocessor.output_size();
                Ok(Picture {
                    resized: [width, height],
                    patches: grid * grid,
                    visual_tokens: grid * grid,
                })
            }
            Self::Qwen {
                preprocessor,
                tower,
            } => {
                let resized = preprocessor.image_size(size)?;
                let patches = resized.map(|side| side / tower.patch_size).iter().product();
                Ok(Picture {
                    resized,
                    patches,
                    visual_tokens: patches / tower.spatial_merge_size.pow(2),
                })
            }
        }
    }
}

impl ModelConfig {
    /// Memory of an answer to a question about one picture, beside the weights. `text_tokens` are
    /// those of the prompt and of the answer.
    pub fn memory(
        &self,
        picture: &Picture,
        text_tokens: usize,
        schedule: &Schedule,
        bytes_per_element: usize,
    ) -> Memory {
        let shape = self.decoder().shape();
        let visual = picture.visual_tokens;
        let cost = Cost::of(&shape, schedule, visual, text_tokens, bytes_per_element);
        let rows = cost.rows.iter().copied().max().unwrap_or(0);
        let tower = self.tower_layer().bytes(picture.patches, bytes_per_element);
        let decoder = self.decoder_layer().bytes(rows, bytes_per_element);
        Memory {
            kv: cost.total_kv_bytes(),
            activations: tower.max(decoder),
        }
    }

    fn decoder_layer(&self) -> Layer {
        let config = self.decoder();
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        Layer {
            heads: config.num_attention_heads,
            streams: STREAMS * config.hidden_size,
            // Queries, scaled queries, and contexts, block by block and together.
            attention: 4 * queries + 2 * keys,
            // Gate, its activation, and what it multiplies.
            feed_forward: 3 * config.intermediate_size,
        }
    }

    fn tower_layer(&self) -> Layer {
        let (heads, hidden, inner) = match self {
            Self::Llava(config) => {
                let vision = &config.vision;
                (
                    vision.num_heads,
                    vision.hidden_size,
                    vision.intermediate_size,
                )
            }
            Self::Qwen(config) => {
                let vision = &config.vision;
                (
                    vision.num_heads,
                    vision.hidden_size,
                    vision.intermediate_size,
                )
            }
        };
        Layer {
            heads,
            streams: STREAMS * hidden,
            attention: 6 * hidden,
            feed_forward: 3 * inner,
        }
    }
}

/// Numbers of one row that exist at the same time in a layer.
struct Layer {
    heads: usize,
    streams: usize,
    attention: usize,
    feed_forward: usize,
}

impl Layer {
    /// What a layer holds at its peak, be it in attention or in the MLP.
    fn bytes(&self, rows: usize, bytes_per_element: usize) -> u64 {
        let product = |factors: [usize; 3]| {
            let factors = factors.into_iter().map(|factor| factor as u64);
            factors.fold(1, u64::saturating_mul)
        };
        let of = |numbers: usize| product([rows, self.streams + numbers, bytes_per_element]);
        let scores = product([self.heads, rows, size_of::<f32>()]).saturating_mul(SCORE_ROWS);
        let scores = SCORE_COPIES * scores.min(MAX_SCORE_BYTES);
        let attention = of(self.attention).saturating_add(scores);
        attention.max(of(self.feed_forward))
    }
}
