use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};

use crate::{DecoderConfig, RerouteError};

/// A batch of embedded prompts, packed: the rows of all samples side by side, without padding.
#[derive(Debug, Clone)]
pub struct Prompt<B: Backend> {
    /// `[hidden_size, rows]`, text and visual rows in prompt order.
    pub embeddings: Tensor<B, 2>,
    /// `[axes, rows]`, the (m)RoPE positions of every row.
    pub positions: Tensor<B, 2, Int>,
    /// DeepStack features (Qwen3-VL, arXiv 2406.04334): the `l`-th entry is added to the output of
    /// decoder layer `l`. Each is `[hidden_size, visual rows]`, the visual rows of all samples in
    /// prompt order; empty where the model has none.
    pub deepstack: Vec<Tensor<B, 2>>,
    /// How the rows divide into samples.
    pub samples: Vec<SampleLayout>,
}

/// One sample's share of a [`Prompt`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleLayout {
    /// Number of rows.
    pub rows: usize,
    /// Which of them are visual, ascending; the rows of several images form one pool.
    pub visual: Vec<usize>,
    /// Position of the first generated token.
    pub next_position: i64,
}

impl<B: Backend> Prompt<B> {
    /// The packed rows of each sample.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        ranges(self.samples.iter().map(|sample| sample.rows))
    }

    pub(crate) fn validate(&self, config: &DecoderConfig) -> Result<(), RerouteError> {
        let malformed = |reason: String| Err(RerouteError::Prompt(reason));
        let [features, rows] = self.embeddings.dims();
        if features != config.hidden_size {
            return malformed(format!(
                "embeddings have {features} features, the decoder has hidden_size {}",
                config.hidden_size
            ));
        }
        let [axes, positions] = self.positions.dims();
        if axes != config.rope.axes() || positions != rows {
            return malformed(format!(
                "positions are [{axes}, {positions}], expected [{}, {rows}]",
                config.rope.axes()
            ));
        }
        let total: usize = self.samples.iter().map(|sample| sample.rows).sum();
        if total != rows || self.samples.is_empty() {
            return malformed(format!("samples cover {total} rows of {rows}"));
        }
        let visual: usize = self.samples.iter().map(|sample| sample.visual.len()).sum();
        for features in &self.deepstack {
            if features.dims() != [config.hidden_size, visual] {
                return malformed(format!(
                    "DeepStack features are {:?}, expected [{}, {visual}]",
                    features.dims(),
                    config.hidden_size
                ));
            }
        }
        if self.deepstack.len() > config.num_layers {
            return malformed(format!(
                "there are DeepStack features for {} layers, the decoder has {}",
                self.deepstack.len(),
                config.num_layers
            ));
        }
        for (index, sample) in self.samples.iter().enumerate() {
            if sample.rows == 0 {
                return malformed(format!("sample {index} is empty"));
            }
            if !sample.visual.is_sorted_by(|a, b| a < b)
                || sample.visual.last().is_some_and(|&row| row >= sample.rows)
            {
                return malformed(format!(
                    "the visual rows of sample {index} are not ascending rows of the sample"
                ));
            }
            if sample.visual.last() == Some(&(sample.rows - 1)) {
                return malformed(format!(
                    "sample {index} ends with a visual row; its last row must be text, \
                     because that row asks which visual tokens matter"
                ));
            }
            if sample.next_position < 0 {
                return malformed(format!("sample {index} continues at a negative position"));
            }
            let needed = sample.next_position.max(sample.rows as i64) as usize;
            if needed > config.max_position_embeddings {
                return Err(RerouteError::ContextLength {
                    needed,
                    available: config.max_position_embeddings,
                });
            }
        }
        Ok(())
    }
}

/// Consecutive ranges of the given lengths.
pub(crate) fn ranges(lengths: impl IntoIterator<Item = usize>) -> Vec<Range<usize>> {
    let mut start = 0;
    let next = |length| {
        let range = start..start + length;
        start = range.end;
        range
    };
    lengths.into_iter().map(next).collect()
}
