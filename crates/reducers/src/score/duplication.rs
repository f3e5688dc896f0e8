use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Tensor};
use serde::{Deserialize, Serialize};

use super::{DecisionRows, DecisionView, Rule, ScoreLayer, Scorer};
use crate::device::{indices, read_back, upload};
use crate::{DecoderShape, ReducerError, top_k};

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

impl Rule for Duplication {
    fn layer(&self) -> Option<ScoreLayer> {
        Some(self.layer)
    }

    fn check(&self) -> Result<(), &'static str> {
        match (self.visual_pivots, self.text_pivots) {
            (0, 0) => Err("without a pivot there is nothing to repeat; use at least 1"),
            _ => Ok(()),
        }
    }

    /// Cosines of pivots and candidates: `2·pivots·candidates·d`.
    fn flops(&self, shape: &DecoderShape, rows: DecisionRows) -> f64 {
        let visual = self.visual_pivots.min(rows.candidates);
        let pivots = visual as f64 + self.text_pivots.min(rows.text) as f64;
        2.0 * pivots * rows.candidates as f64 * shape.hidden_size as f64
    }
}

impl<B: Backend> Scorer<B> for Duplication {
    fn score(&self, view: &dyn DecisionView<B>) -> Result<Tensor<B, 1>, ReducerError> {
        let (rows, candidates) = (view.rows(), view.candidates());
        let device = view.hidden_states().device();
        let keep = view.keep_count().min(candidates.len());
        let keys = view.keys(self.layer, true);
        let [heads, head_dim, all] = keys.dims();
        let lengths = keys.cast(FloatDType::F32).abs();
        let lengths = lengths.reshape([heads * head_dim, all]).sum_dim(0);
        let lengths = read_back(lengths.narrow(1, all - rows, rows))?;
        let behind = candidates.last().map_or(0, |last| last + 1);
        let text: Vec<usize> = (behind..rows).collect();
        // Without text behind the picture all pivots are visual.
        let visual_pivots = self.visual_pivots.max(usize::from(text.is_empty()));
        let visual_pivots = longest(&lengths, candidates, visual_pivots.min(keep))?;
        let text_pivots = longest(&lengths, &text, self.text_pivots)?;
        let pivots = [&visual_pivots[..], &text_pivots].concat();

        if pivots.is_empty() || candidates.is_empty() {
            // Nothing is kept, or there is nothing to choose from.
            return Ok(upload(&vec![0.0; rows], &device));
        }
        let columns = |rows: &[usize]| indices(rows.iter().copied(), &device);
        let hidden = view.output_normed().cast(FloatDType::F32);
        let norms = (hidden.clone() * hidden.clone()).sum_dim(0).sqrt();
        let unit = hidden / norms.clamp_min(1e-8);
        let of_pivots = unit.clone().select(1, columns(&pivots)).transpose();
        let alike = read_back(of_pivots.matmul(unit.select(1, columns(candidates))))?;

        let mut taken: Vec<usize> = visual_pivots;
        let mut open: Vec<usize> = (0..candidates.len())
            .filter(|&at| !taken.contains(&candidates[at]))
            .collect();
        let (share, spare) = quota(keep - taken.len(), pivots.len());
        for (pivot, alike) in alike.chunks(candidates.len()).enumerate() {
            let count = share + usize::from(pivot < spare);
            let unlike: Vec<f32> = open.iter().map(|&at| -alike[at]).collect();
            let chosen = top_k(&unlike, count)?;
            taken.extend(chosen.iter().map(|&at| candidates[open[at]]));
            let mut index = 0..;
            open.retain(|_| chosen.binary_search(&index.next().unwrap_or(0)).is_err());
        }
        let mut scores = vec![0.0; rows];
        for (order, &row) in taken.iter().enumerate() {
            scores[row] = 1.0 - order as f32 / (2 * taken.len()) as f32;
        }
        Ok(upload(&scores, &device))
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
