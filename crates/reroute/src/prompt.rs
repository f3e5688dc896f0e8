use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};

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

/// The rows of a prompt that a reduction before the decoder has kept: all text rows, and the slots of
/// the visual tokens that it kept.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeptRows {
    /// Rows of the full prompt in order. A row may occur twice: a token without a place of its own
    /// stands at that of the first visual token.
    pub rows: Vec<usize>,
    /// See [`SampleLayout::salience`], one number per visual row that is kept.
    pub salience: Option<Vec<f32>>,
    /// Positions of the rows that are kept.
    pub positions: Positions,
}

impl KeptRows {
    /// All of a prompt's rows.
    pub fn all(rows: usize) -> Self {
        Self {
            rows: (0..rows).collect(),
            ..Self::default()
        }
    }

    /// Those of the entries of a full prompt that are kept.
    ///
    /// # Errors
    /// [`RerouteError::Prompt`] if the rows are not ascending rows of it.
    pub fn of<T: Copy>(&self, full: &[T]) -> Result<Vec<T>, RerouteError> {
        if !self.rows.is_sorted() || self.rows.last().is_some_and(|&row| row >= full.len()) {
            return Err(RerouteError::Prompt(format!(
                "the rows kept by a reduction are no ascending rows of the {} that there are",
                full.len()
            )));
        }
        Ok(self.rows.iter().map(|&row| full[row]).collect())
    }
}

impl SampleLayout {
    /// Why the layout contradicts itself, if it does.
    fn problem(&self) -> Option<String> {
        let is_row = |row: &usize| *row < self.rows;
        let visual = self.visual.len();
        let covers = |per_row: usize| per_row == visual;
        if self.rows == 0 {
            return Some("is empty".into());
        }
        if !self.visual.is_sorted_by(|a, b| a < b) || !self.visual.last().is_none_or(is_row) {
            return Some("has visual rows that are not ascending rows of the sample".into());
        }
        if self.visual.last() == Some(&(self.rows - 1)) {
            return Some(
                "ends with a visual row; its last row must be text, because that row asks which \
                 visual tokens matter"
                    .into(),
            );
        }
        if let Some(salience) = self.salience.as_ref().filter(|s| !covers(s.len())) {
            let salience = salience.len();
            return Some(format!(
                "has {visual} visual rows and the salience of {salience}"
            ));
        }
        if !self.cells.is_empty() && !covers(self.cells.len()) {
            let cells = self.cells.len();
            return Some(format!("has {visual} visual rows and the cells of {cells}"));
        }
        (self.next_position < 0).then(|| "continues at a negative position".into())
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
        // Sizes from outside: their sum may be beyond all numbers.
        let sum = |sum: usize, sample: &SampleLayout| sum.checked_add(sample.rows);
        let total = self.samples.iter().try_fold(0, sum);
        if total != Some(rows) || rows == 0 {
            let total = total.map_or("too many".into(), |total| total.to_string());
            return malformed(format!("samples cover {total} rows of {rows}"));
        }
        let (available, limit) = config.context();
        for (index, sample) in self.samples.iter().enumerate() {
            if let Some(problem) = sample.problem() {
                return malformed(format!("sample {index} {problem}"));
            }
            let needed = sample.next_position.max(sample.rows as i64) as usize;
            if needed > available {
                return Err(RerouteError::ContextLength {
                    needed,
                    available,
                    limit,
                });
            }
        }
        let visual: usize = self.samples.iter().map(|sample| sample.visual.len()).sum();
        if self.deepstack.len() > config.num_layers {
            return malformed(format!(
                "there are DeepStack features for {} layers, the decoder has {}",
                self.deepstack.len(),
                config.num_layers
            ));
        }
        for features in &self.deepstack {
            if features.dims() != [config.hidden_size, visual] {
                return malformed(format!(
                    "DeepStack features are {:?}, expected [{}, {visual}]",
                    features.dims(),
                    config.hidden_size
                ));
            }
        }
        Ok(())
    }

    /// What has a type that must be the decoder's, and the type.
    pub(crate) fn types(&self) -> impl Iterator<Item = (&'static str, DType)> {
        let embeddings = ("embeddings", self.embeddings.dtype());
        let deepstack = self.deepstack.iter();
        deepstack
            .map(|features| ("DeepStack features", features.dtype()))
            .chain([embeddings])
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
    ///
    /// # Errors
    /// [`RerouteError::TokenId`] of a text, [`RerouteError::Prompt`] if slots and visual tokens do not
    /// match.
    pub fn embed_prompt(
        &self,
        ids: &[u32],
        visual: &[Option<Tensor<B, 2>>],
        source: impl Fn(u32) -> Option<usize>,
    ) -> Result<Tensor<B, 2>, RerouteError> {
        let of_id = |&id: &u32| source(id);
        let sources: Vec<Option<usize>> = ids.iter().map(of_id).collect();
        if let Some(at) = sources.iter().flatten().find(|&&at| at >= visual.len()) {
            return Err(RerouteError::Prompt(format!(
                "a slot takes from input {at}, of {} that there are",
                visual.len()
            )));
        }
        let text = ids
            .iter()
            .zip(&sources)
            .filter(|(_, source)| source.is_none());
        let text: Vec<u32> = text.map(|(&id, _)| id).collect();
        let text = match text.is_empty() {
            true => None,
            false => Some(self.embed(&text)?),
        };
        let order: Vec<usize> = sources
            .into_iter()
            .map(|source| source.unwrap_or(visual.len()))
            .collect();
        interleave(&order, &[visual, &[text]].concat())
    }
}

/// Columns of several tensors in one order: column `c` is the next unused one of
/// `sources[order[c]]`, and none is left over. Neighbours of one source move as one block.
///
/// # Shapes
/// - `sources`: `[features, columns]` each, `None` where there are none
/// - returns `[features, order]`
///
/// # Errors
/// [`RerouteError::Prompt`] if `order` takes what is not there, leaves something over, or is empty, and
/// if sources differ in features or type.
pub fn interleave<B: Backend>(
    order: &[usize],
    sources: &[Option<Tensor<B, 2>>],
) -> Result<Tensor<B, 2>, RerouteError> {
    let malformed = |reason: String| Err(RerouteError::Prompt(reason));
    if order.is_empty() {
        return malformed("it has no tokens".into());
    }
    if let Some(at) = order.iter().find(|&&at| at >= sources.len()) {
        return malformed(format!(
            "it takes rows from input {at}, of {} that there are",
            sources.len()
        ));
    }
    let of_a_kind = sources.iter().flatten().map(|x| (x.dims()[0], x.dtype()));
    if !of_a_kind
        .clone()
        .zip(of_a_kind.skip(1))
        .all(|(a, b)| a == b)
    {
        return malformed("its inputs differ in features or type".into());
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
    let mut start = 0usize;
    let next = |length| {
        let range = start..start.saturating_add(length);
        start = range.end;
        range
    };
    lengths.into_iter().map(next).collect()
}
