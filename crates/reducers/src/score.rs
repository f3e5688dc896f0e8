//! How much a visual token matters to a decision of the decoder.
//!
//! [`Score`] is the data of a schedule: which rule, with which settings. A [`Scorer`] is the rule
//! itself; every built-in one is a file here, and a new one is a type with one function.

mod attention;
mod random;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::ReducerError;

pub use attention::{Attention, HeadReduce, Query, ScoreDtype, ScoreLayer, last_row_scores};
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
    /// Chance: the baseline that every rule must beat.
    Random(Random),
}

impl Default for Score {
    fn default() -> Self {
        Self::Attention(Attention::default())
    }
}

impl Score {
    /// Whether deferred tokens can be scored too. The attention of the layer before cannot: they
    /// took no part in it.
    pub fn sees_deferred(&self) -> bool {
        !self.uses(ScoreLayer::Previous)
    }

    /// Whether it reads the attention of that layer.
    pub fn uses(&self, layer: ScoreLayer) -> bool {
        matches!(self, Self::Attention(attention) if attention.layer == layer)
    }

    /// Whether it needs keys and queries without their positions, which a cache does not hold.
    pub fn is_unrotated(&self) -> bool {
        matches!(self, Self::Attention(attention) if !attention.rope)
    }

    /// Checks the settings of a decision at `layer`.
    pub(crate) fn check(&self, stage: usize, layer: usize) -> Result<(), ReducerError> {
        let refuse = |reason: &str| {
            Err(ReducerError::Combination {
                stage,
                reason: reason.into(),
            })
        };
        let Self::Attention(attention) = self else {
            return Ok(());
        };
        if attention.query == Query::LastMean(0) {
            return refuse("the mean of the last 0 rows is nothing; use at least 1");
        }
        if attention.layer == ScoreLayer::Previous && layer == 0 {
            return refuse("layer 0 has no layer before it; score with \"this\" layer");
        }
        if attention.layer == ScoreLayer::Previous && !attention.rope {
            return refuse(
                "attention as executed has rotary positions; score with \"this\" layer to leave them out",
            );
        }
        Ok(())
    }
}

/// One sample at one decision, as a scorer sees it. Rows are those that stand there, text and
/// candidates, in prompt order.
pub trait Standing<B: Backend> {
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

    /// The rows as they were embedded.
    ///
    /// # Shapes
    /// - returns `[hidden_size, rows]`
    fn embeddings(&self) -> Tensor<B, 2>;

    /// Queries of some rows, with rotary positions if `rope`.
    ///
    /// # Shapes
    /// - returns `[num_heads, head_dim, queries]`
    fn queries(&self, layer: ScoreLayer, rows: &[usize], rope: bool) -> Tensor<B, 3>;

    /// Keys of all rows, behind those of earlier turns, with rotary positions if `rope`.
    ///
    /// # Shapes
    /// - returns `[num_kv_heads, head_dim, earlier + rows]`
    fn keys(&self, layer: ScoreLayer, rope: bool) -> Tensor<B, 3>;
}

/// A rule that ranks the candidates of a decision.
pub trait Scorer<B: Backend> {
    /// One score per row; those of rows that are no candidates are not read. Higher is better,
    /// the lower row wins a tie, and NaN is refused when it is read.
    ///
    /// # Shapes
    /// - returns `[rows]`
    fn score(&self, standing: &dyn Standing<B>) -> Result<Tensor<B, 1>, ReducerError>;
}

impl<B: Backend> Scorer<B> for Score {
    fn score(&self, standing: &dyn Standing<B>) -> Result<Tensor<B, 1>, ReducerError> {
        match self {
            Self::Attention(attention) => attention.score(standing),
            Self::Random(random) => random.score(standing),
            Self::Encoder => encoder(standing),
        }
    }
}

fn encoder<B: Backend>(standing: &dyn Standing<B>) -> Result<Tensor<B, 1>, ReducerError> {
    let salience = standing.salience().ok_or(ReducerError::NoSalience)?;
    let mut scores = vec![0.0; standing.rows()];
    for (&row, salience) in standing.candidates().iter().zip(salience) {
        scores[row] = salience;
    }
    let device = standing.hidden_states().device();
    Ok(Tensor::from_data(scores.as_slice(), (&device, DType::F32)))
}
