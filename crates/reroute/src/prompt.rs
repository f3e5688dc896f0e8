use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};

use reducers::Positions;

use crate::{Decoder, DecoderConfig, RerouteError};

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
#[derive(Debug, Clone, PartialEq)]
pub struct SampleLayout {
    /// Number of rows.
    pub rows: usize,
    /// Which of them are visual, ascending; the rows of several images form one pool.
    pub visual: Vec<usize>,
    /// Position of the first generated token.
    pub next_position: i64,
    /// One number per visual row, if a reduction before the decoder ranked them
    /// ([`reducers::Score::Encoder`] selects by it).
    pub salience: Option<Vec<f32>>,
    /// Row and column of each visual row in its picture; empty if nobody knows. A stage with a
    /// [`stride`](reducers::Stage::stride) needs them.
    pub cells: Vec<[usize; 2]>,
}

/// The rows of a prompt that a reduction before the decoder has left.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Survivors {
    /// Rows of the full prompt in order. A row may occur twice: a token without a place of its own
    /// stands at that of the first visual token.
    pub rows: Vec<usize>,
    /// See [`SampleLayout::salience`], one number per visual row that is left.
    pub salience: Option<Vec<f32>>,
    /// Positions of the rows that are left.
    pub positions: Positions,
}

impl Survivors {
    /// All of a prompt's rows.
    pub fn all(rows: usize) -> Self {
        Self {
            rows: (0..rows).collect(),
            ..Self::default()
        }
    }

    /// Those of the entries of a full prompt that are left.
    pub fn of<T: Copy>(&self, full: &[T]) -> Result<Vec<T>, RerouteError> {
        if !self.rows.is_sorted() || self.rows.last().is_some_and(|&row| row >= full.len()) {
            return Err(RerouteError::Prompt(format!(
                "the rows left by a reduction are no ascending rows of the {} that there are",
                full.len()
            )));
        }
        Ok(self.rows.iter().map(|&row| full[row]).collect())
    }
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
            if let Some(salience) = &sample.salience
                && salience.len() != sample.visual.len()
            {
                return malformed(format!(
                    "sample {index} has {} visual rows and the salience of {}",
                    sample.visual.len(),
                    salience.len()
                ));
            }
            if !sample.cells.is_empty() && sample.cells.len() != sample.visual.len() {
                return malformed(format!(
                    "sample {index} has {} visual rows and the cells of {}",
                    sample.visual.len(),
                    sample.cells.len()
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

impl<B: Backend> Decoder<B> {
    /// Embeds prompts: text rows from the embedding table, slots filled with visual tokens.
    ///
    /// `source` says which entry of `visual` an id is a slot of, `None` for text. Slots take the
    /// columns of their source in order, and all of them.
    ///
    /// # Shapes
    /// - `visual`: `[hidden_size, visual tokens]` each, `None` where there are none
    /// - returns `[hidden_size, ids]`
    pub fn embed_prompt(
        &self,
        ids: &[u32],
        visual: &[Option<Tensor<B, 2>>],
        source: impl Fn(u32) -> Option<usize>,
    ) -> Result<Tensor<B, 2>, RerouteError> {
        let is_text = |id: &u32| source(*id).is_none();
        let text: Vec<u32> = ids.iter().copied().filter(is_text).collect();
        let vocab_size = self.config().vocab_size;
        if let Some(&id) = text.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(RerouteError::TokenId { id, vocab_size });
        }
        let order: Vec<usize> = ids
            .iter()
            .map(|&id| source(id).unwrap_or(visual.len()))
            .collect();
        let text = (!text.is_empty()).then(|| self.embed(&text));
        interleave(&order, &[visual, &[text]].concat())
    }
}

/// Columns of several tensors in one order: column `c` is the next unused one of
/// `sources[order[c]]`, and none is left over. Neighbours of one source move as one block.
///
/// # Shapes
/// - `sources`: `[features, columns]` each, `None` where there are none
/// - returns `[features, order]`
pub fn interleave<B: Backend>(
    order: &[usize],
    sources: &[Option<Tensor<B, 2>>],
) -> Result<Tensor<B, 2>, RerouteError> {
    let malformed = |reason: String| Err(RerouteError::Prompt(reason));
    if order.is_empty() {
        return malformed("it has no tokens".into());
    }
    for (index, source) in sources.iter().enumerate() {
        let wanted = order.iter().filter(|&&other| other == index).count();
        let given = source.as_ref().map_or(0, |source| source.dims()[1]);
        if wanted != given {
            return malformed(format!(
                "it takes {wanted} rows from input {index}, which has {given}"
            ));
        }
    }
    let mut used = vec![0; sources.len()];
    let runs = order.chunk_by(|a, b| a == b);
    let blocks = runs.filter_map(|run| {
        let (source, at) = (sources[run[0]].clone()?, used[run[0]]);
        used[run[0]] += run.len();
        Some(source.narrow(1, at, run.len()))
    });
    Ok(Tensor::cat(blocks.collect(), 1))
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
