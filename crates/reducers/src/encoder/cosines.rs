//! Cosine similarity between tokens: products on the device, looked up on the host.

use std::borrow::Cow;
use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Tensor};
use rayon::prelude::*;

use super::host::{argmax, read};
use crate::ReducerError;
use crate::device::indices;

/// Most similarities held at a time, 64 MiB of them: all pairs of 4096 tokens.
pub(super) const MOST: usize = 1 << 24;

/// Cosine similarity of every token to every token. A zero vector is similar to none.
pub(super) struct Cosines<B: Backend> {
    /// `[features, tokens]`, every column of length 1.
    unit: Tensor<B, 2>,
    /// All of them, row by row, if they are few: one large product is faster than many small ones.
    table: Option<Vec<f32>>,
}

impl<B: Backend> Cosines<B> {
    /// # Shapes
    /// - `features`: `[features, tokens]`
    pub(super) fn new(features: Tensor<B, 2>) -> Result<Self, ReducerError> {
        let mut cosines = Self {
            unit: unit(features)?,
            table: None,
        };
        let tokens = cosines.tokens();
        if tokens * tokens <= MOST {
            cosines.table = Some(cosines.rows(0..tokens)?);
        }
        Ok(cosines)
    }

    /// Similarities of one token to all, itself included.
    pub(super) fn row(&self, token: usize) -> Result<Cow<'_, [f32]>, ReducerError> {
        let tokens = self.tokens();
        Ok(match &self.table {
            Some(table) => Cow::Borrowed(&table[token * tokens..][..tokens]),
            None => Cow::Owned(self.rows(token..token + 1)?),
        })
    }

    /// Each token's similarity to the other token most like it; `-inf` if it is alone.
    pub(super) fn to_nearest(&self) -> Result<Vec<f32>, ReducerError> {
        let tokens = self.tokens();
        let mut nearest = Vec::with_capacity(tokens);
        while nearest.len() < tokens {
            let (start, block) = match &self.table {
                Some(table) => (0, Cow::Borrowed(&table[..])),
                None => {
                    let start = nearest.len();
                    let end = tokens.min(start + (MOST / tokens).max(1));
                    (start, Cow::Owned(self.rows(start..end)?))
                }
            };
            nearest.extend(block.chunks(tokens).zip(start..).map(|(row, token)| {
                let others = row[..token].iter().chain(&row[token + 1..]);
                others.copied().fold(f32::NEG_INFINITY, f32::max)
            }));
        }
        Ok(nearest)
    }

    /// Each token's mean similarity to other vectors.
    ///
    /// # Shapes
    /// - `others`: `[features, others]`, at least one
    pub(super) fn mean_to(&self, others: Tensor<B, 2>) -> Result<Vec<f32>, ReducerError> {
        let mean = unit(others)?.mean_dim(1);
        read(mean.transpose().matmul(self.unit.clone()))
    }

    fn tokens(&self) -> usize {
        self.unit.dims()[1]
    }

    fn rows(&self, rows: Range<usize>) -> Result<Vec<f32>, ReducerError> {
        let rows = self.unit.clone().narrow(1, rows.start, rows.len());
        read(rows.transpose().matmul(self.unit.clone()))
    }
}

/// Similarities of pairs, asked for in no order: those of many tokens are products on the host, of
/// vectors that are read back when a token is first asked for.
pub(super) struct Pairs<'a, B: Backend> {
    cosines: &'a Cosines<B>,
    /// The tokens' columns, as far as they were read back.
    vectors: Vec<Vec<f32>>,
}

impl<'a, B: Backend> Pairs<'a, B> {
    pub(super) fn new(cosines: &'a Cosines<B>) -> Self {
        Self {
            vectors: vec![Vec::new(); cosines.tokens()],
            cosines,
        }
    }

    /// Similarities of some tokens to others, token by token, `others.len()` numbers each.
    pub(super) fn between(
        &mut self,
        tokens: &[usize],
        others: &[usize],
    ) -> Result<Vec<f32>, ReducerError> {
        if let Some(table) = &self.cosines.table {
            let row = |&token: &usize| &table[token * self.cosines.tokens()..];
            let of = |token| others.iter().map(move |&other| row(token)[other]);
            return Ok(tokens.iter().flat_map(of).collect());
        }
        self.read(tokens)?;
        self.read(others)?;
        let vectors = &self.vectors;
        let row = |&token: &usize| {
            let cosine = move |&other: &usize| dot(&vectors[token], &vectors[other]);
            others.iter().map(cosine).collect::<Vec<f32>>()
        };
        Ok(tokens.par_iter().flat_map_iter(row).collect())
    }

    fn read(&mut self, tokens: &[usize]) -> Result<(), ReducerError> {
        let mut missing = tokens.to_vec();
        missing.retain(|&token| self.vectors[token].is_empty());
        if missing.is_empty() {
            return Ok(());
        }
        let unit = &self.cosines.unit;
        let columns = indices(missing.iter().copied(), &unit.device());
        let columns = read(unit.clone().select(1, columns).transpose())?;
        let columns = columns.chunks(unit.dims()[0]);
        for (token, column) in missing.into_iter().zip(columns) {
            self.vectors[token] = column.to_vec();
        }
        Ok(())
    }
}

/// Where in `among` the token stands that is most like each of `tokens`; the first if several are.
///
/// # Shapes
/// - `features`: `[features, tokens]`
pub(super) fn nearest<B: Backend>(
    features: Tensor<B, 2>,
    tokens: &[usize],
    among: &[usize],
) -> Result<Vec<usize>, ReducerError> {
    let mut nearest = Vec::with_capacity(tokens.len());
    if tokens.is_empty() || among.is_empty() {
        return Ok(nearest);
    }
    let unit = unit(features)?;
    let columns = |tokens: &[usize]| {
        let tokens = indices(tokens.iter().copied(), &unit.device());
        unit.clone().select(1, tokens)
    };
    let candidates = columns(among);
    for block in tokens.chunks((MOST / among.len()).max(1)) {
        let similarity = read(columns(block).transpose().matmul(candidates.clone()))?;
        let rows = similarity.chunks(among.len());
        nearest.extend(rows.map(|row| argmax(row.iter().copied())));
    }
    Ok(nearest)
}

/// The product of two vectors of one length.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let (blocks, others) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = blocks.remainder().iter().zip(others.remainder());
    let rest: f32 = rest.map(|(a, b)| a * b).sum();
    for (a, b) in blocks.zip(others) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Every column scaled to length 1, in f32.
pub(super) fn unit<B: Backend>(features: Tensor<B, 2>) -> Result<Tensor<B, 2>, ReducerError> {
    let features = features.cast(FloatDType::F32);
    let lengths = (features.clone() * features.clone()).sum_dim(0).sqrt();
    let read = read(lengths.clone())?;
    if let Some(index) = read.iter().position(|length| length.is_infinite()) {
        return Err(ReducerError::NanScore { index });
    }
    Ok(features / lengths.clamp_min(f32::MIN_POSITIVE))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tensor};
    use burn_flex::Flex;

    use super::{Cosines, Pairs};

    #[test]
    fn products_on_the_host_are_those_of_the_device() {
        let features = Tensor::<Flex, 2>::random(
            [37, 50],
            Distribution::Uniform(-1.0, 1.0),
            &Default::default(),
        );
        let mut cosines = Cosines::new(features).unwrap();
        let (tokens, others) = ([3, 0, 49], [7, 3, 8, 0]);
        let by_table = Pairs::new(&cosines).between(&tokens, &others).unwrap();
        cosines.table = None;
        let mut pairs = Pairs::new(&cosines);
        let by_vectors = pairs.between(&tokens, &others).unwrap();
        assert_eq!(by_table.len(), 12);
        for (a, b) in by_table.iter().zip(&by_vectors) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
        assert_eq!(pairs.between(&tokens, &others).unwrap(), by_vectors);
        assert!(pairs.between(&tokens, &[]).unwrap().is_empty());
    }
}
