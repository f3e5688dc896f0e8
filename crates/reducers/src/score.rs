//! How much a visual token matters to a decision of the decoder.
//!
//! [`Score`] is the data of a schedule: which rule, with which settings. A [`Scorer`] is the rule
//! itself; every built-in one is a file here, and a new one is a type with one function.

mod attention;
mod duplication;
mod random;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Tensor};
use serde::{Deserialize, Serialize};

use crate::ReducerError;

pub use attention::{
    Attention, HeadReduce, Query, ScoreDtype, ScoreLayer, SoftmaxKeys, last_row_scores,
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
    /// Whether deferred tokens can be scored too. The attention of the layer before cannot: they
    /// took no part in it.
    pub fn sees_deferred(&self) -> bool {
        !self.uses(ScoreLayer::Previous)
    }

    /// Whether it reads queries or keys of that layer.
    pub fn uses(&self, layer: ScoreLayer) -> bool {
        match self {
            Self::Attention(attention) => attention.layer == layer,
            Self::Duplication(duplication) => duplication.layer == layer,
            Self::Encoder | Self::Random(_) => false,
        }
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
        if self.uses(ScoreLayer::Previous) && layer == 0 {
            return refuse("layer 0 has no layer before it; score with \"this\" layer");
        }
        if let Self::Attention(attention) = self
            && attention.query == Query::LastMean(0)
        {
            return refuse("the mean of the last 0 rows is nothing; use at least 1");
        }
        if let Self::Duplication(duplication) = self
            && duplication.visual_pivots + duplication.text_pivots == 0
        {
            return refuse("without a pivot there is nothing to repeat; use at least 1");
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

    /// The layer's input under the norm behind the last layer.
    ///
    /// # Shapes
    /// - returns `[hidden_size, rows]`
    fn output_normed(&self) -> Tensor<B, 2>;

    /// The sample's whole prompt, whatever stands of it.
    fn prompt(&self) -> Embedded<B>;

    /// The row of the prompt that each row is, ascending.
    fn rows_in_prompt(&self) -> Vec<usize>;

    /// How many candidates will be kept.
    fn keep_count(&self) -> usize;

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

/// A sample as it enters the decoder.
#[derive(Debug, Clone)]
pub struct Embedded<B: Backend> {
    /// `[hidden_size, prompt rows]`
    pub embeddings: Tensor<B, 2>,
    /// Its visual rows, ascending.
    pub visual: Vec<usize>,
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
            Self::Duplication(duplication) => duplication.score(standing),
            Self::Random(random) => random.score(standing),
            Self::Encoder => encoder(standing),
        }
    }
}

/// Numbers that a rule decides by.
fn read_back<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Result<Vec<f32>, ReducerError> {
    let data = tensor.cast(FloatDType::F32).try_into_data();
    data.map_err(|error| format!("{error:?}"))
        .and_then(|data| data.into_vec().map_err(|error| format!("{error:?}")))
        .map_err(|reason| ReducerError::Readback { reason })
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
