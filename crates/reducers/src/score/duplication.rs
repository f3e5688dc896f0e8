use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Int, Tensor};
use serde::{Deserialize, Serialize};

use super::{ScoreLayer, Scorer, Standing, read_back};
use crate::{ReducerError, top_k};

/// Tokens that repeat the pivots least (DART, arXiv 2502.11494): each pivot in turn takes the
/// candidates that are least alike to it.
///
/// Pivots are the rows with the longest keys (sum of magnitudes), some visual and some of the text
/// behind the picture. Visual pivots are kept. Alike is the cosine of the layer's inputs under the
/// norm behind the last layer. This is a quota for each pivot and no score; it is expressed as one,
/// by the order in which tokens are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Duplication {
    /// Whose keys choose the pivots.
    pub layer: ScoreLayer,
    /// Visual pivots.
    pub visual_pivots: usize,
    /// Text pivots.
    pub text_pivots: usize,
}

impl Default for Duplication {
    fn default() -> Self {
        Self {
            layer: ScoreLayer::Previous,
            visual_pivots: 4,
            text_pivots: 4,
        }
    }
}

impl<B: Backend> Scorer<B> for Duplication {
    fn score(&self, standing: &dyn Standing<B>) -> Result<Tensor<B, 1>, ReducerError> {
        let (rows, candidates) = (standing.rows(), standing.candidates());
        let keep = standing.keep_count().min(candidates.len());
        let keys = standing.keys(self.layer, true);
        let [heads, head_dim, all] = keys.dims();
        let lengths = keys.cast(FloatDType::F32).abs();
        let lengths = lengths.reshape([heads * head_dim, all]).sum_dim(0);
        let lengths = read_back(lengths.narrow(1, all - rows, rows))?;
        let behind = candidates.last().map_or(0, |last| last + 1);
        let text: Vec<usize> = (behind..rows).collect();
        let visual_pivots = longest(&lengths, candidates, self.visual_pivots.min(keep))?;
        let text_pivots = longest(&lengths, &text, self.text_pivots)?;
        let pivots = [&visual_pivots[..], &text_pivots].concat();

        let device = standing.hidden_states().device();
        let columns = |rows: &[usize]| {
            let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
            Tensor::<B, 1, Int>::from_data(rows.as_slice(), &device)
        };
        let hidden = standing.output_normed().cast(FloatDType::F32);
        let norms = (hidden.clone() * hidden.clone()).sum_dim(0).sqrt();
        let unit = hidden / norms.clamp_min(1e-8);
        let of_pivots = unit.clone().select(1, columns(&pivots)).transpose();
        let alike = read_back(of_pivots.matmul(unit.select(1, columns(candidates))))?;

        let mut taken: Vec<usize> = visual_pivots;
        let mut left: Vec<usize> = (0..candidates.len())
            .filter(|&at| !taken.contains(&candidates[at]))
            .collect();
        let (share, spare) = quota(keep - taken.len(), pivots.len());
        for (pivot, alike) in alike.chunks(candidates.len()).enumerate() {
            let count = share + usize::from(pivot < spare);
            let unlike: Vec<f32> = left.iter().map(|&at| -alike[at]).collect();
            let chosen = top_k(&unlike, count)?;
            taken.extend(chosen.iter().map(|&at| candidates[left[at]]));
            let mut index = 0..;
            left.retain(|_| chosen.binary_search(&index.next().unwrap_or(0)).is_err());
        }
        let mut scores = vec![0.0; rows];
        for (order, &row) in taken.iter().enumerate() {
            scores[row] = 1.0 - order as f32 / (2 * taken.len()) as f32;
        }
        Ok(Tensor::from_data(scores.as_slice(), (&device, DType::F32)))
    }
}

/// Tokens for every pivot, and how many pivots take one more.
fn quota(tokens: usize, pivots: usize) -> (usize, usize) {
    match pivots {
        0 => (0, 0),
        pivots => (tokens / pivots, tokens % pivots),
    }
}

/// The rows with the longest keys, longest first.
fn longest(lengths: &[f32], rows: &[usize], count: usize) -> Result<Vec<usize>, ReducerError> {
    let of_rows: Vec<f32> = rows.iter().map(|&row| lengths[row]).collect();
    let mut chosen = top_k(&of_rows, count)?;
    chosen.sort_by(|&a, &b| of_rows[b].total_cmp(&of_rows[a]).then(a.cmp(&b)));
    Ok(chosen.into_iter().map(|at| rows[at]).collect())
}
