use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::{DecisionRows, DecisionView, Embedded, Rule, Scorer};
use crate::device::{indices, read_back};
use crate::{DecoderShape, ReducerError};

/// Attention that a row receives from the prompt's last rows. The default is the score of Reroute
/// (arXiv 2606.12412).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Attention {
    /// Whose attention.
    pub layer: ScoreLayer,
    /// Of which rows.
    pub query: Query,
    /// How heads come together.
    pub heads: HeadReduce,
    /// In which type the probabilities are ranked.
    pub dtype: ScoreDtype,
    /// Whether queries and keys carry their rotary positions.
    pub rope: bool,
    /// Over which rows the softmax runs.
    pub keys: SoftmaxKeys,
}

impl Default for Attention {
    fn default() -> Self {
        Self {
            layer: ScoreLayer::This,
            query: Query::Last,
            heads: HeadReduce::Mean,
            dtype: ScoreDtype::F32,
            rope: true,
            keys: SoftmaxKeys::All,
        }
    }
}

/// The layer whose queries and keys are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScoreLayer {
    /// The decision layer's own, on its input (PyramidDrop, Reroute).
    This,
    /// The layer before, as it was executed (FastV, Nüwa).
    Previous,
}

/// The rows whose attention counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Query {
    /// The last row.
    Last,
    /// The mean over the last rows, as many as said (Nüwa on Qwen2.5-VL: 3).
    LastMean(usize),
    /// The mean over the text rows behind the picture that are more alike to it than the average of
    /// them, as embedded (SparseVLM's raters).
    Raters,
}

/// The rows that share a head's probability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SoftmaxKeys {
    /// All, text included.
    All,
    /// The candidates (FEATHER).
    Candidates,
}

/// How the heads of a score come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadReduce {
    /// Their mean.
    Mean,
    /// The highest of them (Nüwa on Qwen2.5-VL).
    Max,
    /// The mean of these alone, such as those that were seen to look at what is asked for.
    Only(Heads),
}

/// Some of the query heads of a layer, counted from 0: at most [`Heads::MAX`]. Written as a list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<usize>", into = "Vec<usize>")]
pub struct Heads(u128);

impl Heads {
    /// One more than the highest head that can be named.
    pub const MAX: usize = u128::BITS as usize;

    /// These heads; one that is named twice counts once. `None` if one of them is not below
    /// [`Heads::MAX`].
    pub fn new(heads: impl IntoIterator<Item = usize>) -> Option<Self> {
        let add = |all: u128, head: usize| (head < Self::MAX).then(|| all | 1 << head);
        heads.into_iter().try_fold(0, add).map(Self)
    }

    /// The heads, ascending.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..Self::MAX).filter(move |head| self.0 >> head & 1 == 1)
    }
}

impl TryFrom<Vec<usize>> for Heads {
    type Error = String;

    fn try_from(heads: Vec<usize>) -> Result<Self, String> {
        let most = Self::MAX - 1;
        Self::new(heads).ok_or_else(|| format!("heads are counted from 0 to {most}"))
    }
}

impl From<Heads> for Vec<usize> {
    fn from(heads: Heads) -> Self {
        heads.iter().collect()
    }
}

/// The type in which probabilities are reduced and ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScoreDtype {
    /// f32, whatever the model's type.
    F32,
    /// The model's: probabilities are rounded to it after the softmax, and their reduction again.
    /// Half types make many ties (original FastV, PyramidDrop, Nüwa).
    Model,
}

impl Rule for Attention {
    fn layer(&self) -> Option<ScoreLayer> {
        Some(self.layer)
    }

    fn is_unrotated(&self) -> bool {
        !self.rope
    }

    fn check(&self) -> Result<(), &'static str> {
        match (self.query, self.heads) {
            (Query::LastMean(0), _) => {
                Err("the mean of the last 0 rows is nothing; use at least 1")
            }
            (_, HeadReduce::Only(heads)) if heads.iter().next().is_none() => {
                Err("without a head there is no score; name at least one, or use \"mean\"")
            }
            _ => Ok(()),
        }
    }

    /// Of `q` asking rows over `S` rows: products `2·q·H·d_h·S`, and queries `2·(q - 1)·d·H·d_h`
    /// where they are this layer's (one row's are not counted, as in the convention). Raters are all
    /// of the text at most, and cost `2·visual·text·d` to find.
    fn flops(&self, shape: &DecoderShape, rows: DecisionRows) -> f64 {
        let all = rows.text as f64 + rows.candidates as f64;
        let asking = match self.query {
            Query::Last => 1.0,
            Query::LastMean(count) => (count as f64).min(all),
            Query::Raters => rows.text as f64,
        };
        let width = shape.hidden_size as f64;
        let queries = match self.layer {
            ScoreLayer::This => 2.0 * (asking - 1.0).max(0.0) * width * shape.query_width(),
            ScoreLayer::Previous => 0.0,
        };
        let raters = match self.query {
            Query::Raters => 2.0 * rows.visual as f64 * rows.text as f64 * width,
            _ => 0.0,
        };
        2.0 * asking * shape.query_width() * all + queries + raters
    }
}

impl<B: Backend> Scorer<B> for Attention {
    fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
        let rows = view.rows();
        if rows == 0 {
            let device = view.hidden_states().device();
            return Ok(Tensor::zeros([0], (&device, DType::F32)));
        }
        let keys = view.keys(self.layer, self.rope).swap_dims(1, 2);
        let earlier = keys.dims()[1] - rows;
        let (mut asking, count): (Vec<usize>, usize) = match self.query {
            Query::Last => (vec![rows - 1], 1),
            // Rows of earlier turns come before every candidate and attend to none.
            Query::LastMean(count) => (
                (rows.saturating_sub(count)..rows).collect(),
                count.min(earlier + rows),
            ),
            Query::Raters => {
                let raters = raters(view)?;
                let count = raters.len();
                (raters, count)
            }
        };
        let candidates = match self.keys {
            SoftmaxKeys::All => None,
            SoftmaxKeys::Candidates => Some(view.candidates()),
        };
        if let Some(candidates) = candidates {
            // A row before all candidates has nothing to share among them.
            asking.retain(|row| candidates.first().is_some_and(|first| first <= row));
        }
        if asking.is_empty() {
            return Ok(Tensor::zeros([rows], (&keys.device(), DType::F32)));
        }
        let queries = view.queries(self.layer, &asking, self.rope)?;
        self.check_heads(queries.dims()[0])?;
        let mask = hidden_keys(&asking, earlier, rows, candidates, &keys);
        let scores = self.reduce(queries.swap_dims(1, 2), keys, mask, count);
        Ok(scores.narrow(0, earlier, rows))
    }
}

impl Attention {
    /// Probabilities of the asking rows over all rows, brought together: their sum over `count`, then
    /// the heads.
    ///
    /// # Shapes
    /// - `queries`: `[num_heads, queries, head_dim]`
    /// - `keys`: `[num_kv_heads, rows, head_dim]`
    /// - `mask`: `[queries, rows]`, added to the logits
    /// - returns `[rows]`
    fn reduce<B: Backend>(
        &self,
        queries: Tensor<B, 3>,
        keys: Tensor<B, 3>,
        mask: Option<Tensor<B, 2>>,
        count: usize,
    ) -> Tensor<B, 1> {
        let [num_heads, asking, head_dim] = queries.dims();
        let [num_kv_heads, rows, _] = keys.dims();
        let model = keys.dtype();

        // Query heads that share a key head become rows of one matrix: no key is repeated.
        let queries = queries.cast(FloatDType::F32).reshape([
            num_kv_heads,
            num_heads / num_kv_heads * asking,
            head_dim,
        ]);
        let keys = keys.cast(FloatDType::F32);

        // Scaled after the product, like the reference: scaling the query first rounds differently.
        let logits = queries.matmul(keys.transpose()) * (head_dim as f64).powf(-0.5);
        let logits = logits.reshape([num_heads, asking, rows]);
        let logits = match mask {
            Some(mask) => logits + mask.unsqueeze_dim(0),
            None => logits,
        };
        let mut scores = self.round(softmax(logits, 2), model);
        if count > 1 {
            scores = self.round(scores.sum_dim(1) / count as f64, model);
        }
        let scores = scores.reshape([num_heads, rows]);
        let scores = match self.heads {
            HeadReduce::Mean => scores.mean_dim(0),
            HeadReduce::Max => scores.max_dim(0),
            HeadReduce::Only(heads) => {
                let heads = indices(heads.iter(), &scores.device());
                scores.select(0, heads).mean_dim(0)
            }
        };
        self.round(scores.reshape([rows]), model)
    }

    /// Whether a layer of so many query heads has those that are named.
    pub(crate) fn check_heads(&self, num_heads: usize) -> Result<(), ReducerError> {
        let HeadReduce::Only(heads) = self.heads else {
            return Ok(());
        };
        match heads.iter().find(|&head| head >= num_heads) {
            Some(head) => Err(ReducerError::Head { head, num_heads }),
            None => Ok(()),
        }
    }

    /// Rounds to the model's type if that is the type to rank in.
    fn round<B: Backend, const D: usize>(&self, x: Tensor<B, D>, model: DType) -> Tensor<B, D> {
        let half = match model {
            DType::F16 => FloatDType::F16,
            DType::BF16 => FloatDType::BF16,
            _ => return x,
        };
        match self.dtype {
            ScoreDtype::F32 => x,
            ScoreDtype::Model => x.cast(half).cast(FloatDType::F32),
        }
    }
}

/// -inf for the keys that an asking row does not see, because they come after it or are no
/// candidates where only these count; `None` if it is the last row that asks, and sees all.
fn hidden_keys<B: Backend>(
    asking: &[usize],
    earlier: usize,
    rows: usize,
    candidates: Option<&[usize]>,
    like: &Tensor<B, 3>,
) -> Option<Tensor<B, 2>> {
    if asking == [rows - 1] && candidates.is_none() {
        return None;
    }
    let counts = |key: usize| {
        let row = key.checked_sub(earlier);
        candidates.is_none_or(|all| row.is_some_and(|row| all.binary_search(&row).is_ok()))
    };
    let counts: Vec<bool> = (0..earlier + rows).map(counts).collect();
    let mut mask = Vec::with_capacity(asking.len() * (earlier + rows));
    for &row in asking {
        let sees = |(key, counts): (usize, &bool)| *counts && key <= earlier + row;
        let value = |key| if sees(key) { 0.0 } else { f32::NEG_INFINITY };
        mask.extend(counts.iter().enumerate().map(value));
    }
    let data = TensorData::new(mask, [asking.len(), earlier + rows]);
    Some(Tensor::from_data(data, (&like.device(), DType::F32)))
}

/// SparseVLM's raters among the rows of a decision (arXiv 2410.04417): of the text rows behind the last
/// visual one, those that get more than an equal share when every visual row spreads a softmax over
/// them by dot product, all as embedded; all of them if none does.
fn raters<B: Backend>(view: &dyn DecisionView<B>) -> Result<Vec<usize>, ReducerError> {
    let Embedded { embeddings, visual } = view.prompt();
    let first = visual.last().map_or(0, |last| last + 1);
    let text = embeddings.dims()[1].saturating_sub(first);
    if visual.is_empty() || text == 0 {
        return Ok(Vec::new());
    }
    let of_visual = indices(visual, &embeddings.device());
    let of_visual = embeddings.clone().select(1, of_visual).transpose();
    let products = of_visual.matmul(embeddings.narrow(1, first, text));
    let shares = read_back(softmax(products.cast(FloatDType::F32), 1).mean_dim(0))?;
    let above = |row: &usize| {
        shares
            .get(row - first)
            .is_some_and(|&s| s > 1.0 / text as f32)
    };
    let rows = view.rows_in_prompt();
    let all: Vec<usize> = (0..rows.len()).filter(|&at| rows[at] >= first).collect();
    let raters: Vec<usize> = all.iter().copied().filter(|&at| above(&rows[at])).collect();
    Ok(if raters.is_empty() { all } else { raters })
}

/// Attention probabilities of one query row over all rows of one sample, averaged over the query
/// heads: the score of Reroute (arXiv 2606.12412), which ranks with the decision layer's own
/// projections instead of the attention of the layer before as FastV (arXiv 2403.06764) does.
///
/// `query` is the last prompt row. The causal mask never hides anything from it, so no mask is
/// needed, and one row of the attention matrix is all there is to compute. Everything is in f32
/// whatever the dtype of the model, and stays on the device. The probabilities of a head sum to 1
/// over *all* rows, text included; a caller reads off the visual ones and does not normalise again.
/// Rows of padding must not be among `keys`.
///
/// # Shapes
/// * `query`: `[num_heads, head_dim]`, rotated to its position
/// * `keys`: `[num_kv_heads, rows, head_dim]`, rotated to their positions; `num_heads` is a
///   multiple of `num_kv_heads`, and query head `j` belongs to key head `j / (num_heads /
///   num_kv_heads)`
/// * returns `[rows]`
pub fn last_row_scores<B: Backend>(query: Tensor<B, 2>, keys: Tensor<B, 3>) -> Tensor<B, 1> {
    Attention::default().reduce(query.unsqueeze_dim(1), keys, None, 1)
}
