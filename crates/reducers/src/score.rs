//! How much a visual token matters to a decision of the decoder.
//!
//! [`Score`] is the data of a schedule: which rule, with which settings. A [`Scorer`] is the rule
//! itself; every built-in one is a file here, and a new one is a type with one function.

mod attention;
mod duplication;
mod encoder;
mod random;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::{DecoderShape, ReducerError};

pub use attention::{
    Attention, HeadReduce, Heads, Query, ScoreDtype, ScoreLayer, SoftmaxKeys, last_row_scores,
};
pub use duplication::Duplication;
pub use random::Random;

/// The rule that ranks the candidates of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// Attention of the prompt's last rows, as its settings say.
    Attention(Attention),
    /// What the reduction before the decoder gave each token, without looking again: 1 for those
    /// it would have kept and 0 for the others.
    Encoder,
    /// How little a token repeats a few pivots (DART).
    Duplication(Duplication),
    /// Chance: the baseline that every rule must beat.
    Random(Random),
}

impl Default for Score {
    fn default() -> Self {
        Self::Attention(Attention::default())
    }
}

impl Score {
    /// What the rule says of itself.
    fn rule(&self) -> &dyn Rule {
        match self {
            Self::Attention(attention) => attention,
            Self::Encoder => &encoder::Encoder,
            Self::Duplication(duplication) => duplication,
            Self::Random(random) => random,
        }
    }

    /// The rule itself.
    fn scorer<B: Backend>(&self) -> &dyn Scorer<B> {
        match self {
            Self::Attention(attention) => attention,
            Self::Encoder => &encoder::Encoder,
            Self::Duplication(duplication) => duplication,
            Self::Random(random) => random,
        }
    }

    /// Whether deferred tokens can be scored too. The attention of the layer before cannot: they
    /// took no part in it.
    pub fn sees_deferred(&self) -> bool {
        !self.uses(ScoreLayer::Previous)
    }

    /// Whether it reads queries or keys of that layer.
    pub fn uses(&self, layer: ScoreLayer) -> bool {
        self.rule().layer() == Some(layer)
    }

    /// Whether it needs keys and queries without their positions, which a cache does not hold.
    pub fn is_unrotated(&self) -> bool {
        self.rule().is_unrotated()
    }

    /// Floating-point operations of ranking at one decision, in the convention of [`crate::cost`].
    pub fn flops(&self, shape: &DecoderShape, rows: DecisionRows) -> f64 {
        self.rule().flops(shape, rows)
    }

    /// Checks the settings of a decision at `layer`.
    pub(crate) fn check(&self, stage: usize, layer: usize) -> Result<(), ReducerError> {
        let refuse = |reason: &str| {
            Err(ReducerError::Combination {
                stage,
                reason: reason.into(),
            })
        };
        if self.uses(ScoreLayer::Previous) && layer == 0 {
            return refuse("layer 0 has no layer before it; score with \"this\" layer");
        }
        self.rule().check().or_else(refuse)
    }
}

/// What a built-in rule says of itself, beside being a [`Scorer`].
trait Rule {
    /// The layer whose queries or keys it reads, if it reads any.
    fn layer(&self) -> Option<ScoreLayer> {
        None
    }

    /// See [`Score::is_unrotated`].
    fn is_unrotated(&self) -> bool {
        false
    }

    /// Refuses settings without sense, and says what to use instead.
    fn check(&self) -> Result<(), &'static str> {
        Ok(())
    }

    /// See [`Score::flops`].
    fn flops(&self, _: &DecoderShape, _: DecisionRows) -> f64 {
        0.0
    }
}

/// How many rows of one sample a decision is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecisionRows {
    /// Visual rows of the whole prompt.
    pub visual: usize,
    /// Text rows.
    pub text: usize,
    /// Visual rows that are ranked.
    pub candidates: usize,
}

/// One sample at one decision, as a scorer sees it. Rows are its text and the candidates, in prompt
/// order.
pub trait DecisionView<B: Backend> {
    /// Number of rows.
    fn rows(&self) -> usize;

    /// The rows that are candidates, ascending.
    fn candidates(&self) -> &[usize];

    /// The decision layer.
    fn layer(&self) -> usize;

    /// What the reduction before the decoder says of each candidate, if there was one.
    fn salience(&self) -> Option<Vec<f32>>;

    /// The layer's input.
    ///
    /// # Shapes
    /// - returns `[hidden_size, rows]`
    fn hidden_states(&self) -> Tensor<B, 2>;

    /// The layer's input under the norm behind the last layer.
    ///
    /// # Shapes
    /// - returns `[hidden_size, rows]`
    fn output_normed(&self) -> Tensor<B, 2>;

    /// The sample's whole prompt.
    fn prompt(&self) -> Embedded<B>;

    /// The row of the prompt that each row is, ascending.
    fn rows_in_prompt(&self) -> Vec<usize>;

    /// How many candidates will be kept.
    fn keep_count(&self) -> usize;

    /// Queries of some rows, with rotary positions if `rope`.
    ///
    /// # Shapes
    /// - returns `[num_heads, head_dim, queries]`
    ///
    /// # Errors
    /// [`ReducerError::Row`] for a row that there is not.
    fn queries(
        &self,
        layer: ScoreLayer,
        rows: &[usize],
        rope: bool,
    ) -> Result<Tensor<B, 3>, ReducerError>;

    /// Keys of all rows, behind those of earlier turns, with rotary positions if `rope`.
    ///
    /// # Shapes
    /// - returns `[num_kv_heads, head_dim, earlier + rows]`
    fn keys(&self, layer: ScoreLayer, rope: bool) -> Tensor<B, 3>;
}

/// A sample as it enters the decoder.
#[derive(Debug, Clone)]
pub struct Embedded<B: Backend> {
    /// `[hidden_size, prompt rows]`
    pub embeddings: Tensor<B, 2>,
    /// Its visual rows, ascending.
    pub visual: Vec<usize>,
}

/// A rule that ranks the candidates of a decision.
pub trait Scorer<B: Backend>: Send + Sync {
    /// One score per row; those of rows that are no candidates are not read. Higher is better,
    /// the lower row wins a tie, and NaN is refused when it is read.
    ///
    /// # Shapes
    /// - returns `[rows]`
    fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError>;
}

impl<B: Backend> Scorer<B> for Score {
    /// A decision without candidates has nothing to rank, whatever the rule.
    fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
        if view.candidates().is_empty() {
            let device = view.hidden_states().device();
            return Ok(Tensor::zeros([view.rows()], (&device, DType::F32)));
        }
        self.scorer().score(view)
    }
}
