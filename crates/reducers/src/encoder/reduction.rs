use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, IndexingUpdateOp, Tensor};

use crate::ReducerError;
use crate::device::{indices, upload};

/// What a method makes of one picture: the tokens that the decoder gets.
#[derive(Debug, Clone)]
pub struct Reduction<B: Backend> {
    /// Where each token stands: the grid cell (row by row) whose position it takes. `None`: a token
    /// without a place, such as the class token; it stands before the first cell.
    pub places: Vec<Option<usize>>,
    /// What each token is made of.
    pub weights: Weights<B>,
}

/// What the tokens of a reduction are made of. *Sources* are the columns of
/// [`Tap::Features`](super::Tap::Features); if the method sees
/// [`Tap::ClassToken`](super::Tap::ClassToken), that is one more source, the last.
#[derive(Debug, Clone)]
pub enum Weights<B: Backend> {
    /// Every token is that of its own place, unchanged; one without a place is the class token.
    Unchanged,
    /// Weighted sums of few sources: memory and work as many as there are parts.
    Parts(Vec<Part>),
    /// `[sources, kept]`: each column makes one token, a weighted sum of all sources.
    Dense(Tensor<B, 2>),
}

/// A source's part in a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// The token, counted as [`Reduction::places`] are.
    pub token: usize,
    /// The source.
    pub source: usize,
    /// Its weight.
    pub weight: f32,
}

impl<B: Backend> Reduction<B> {
    /// The tokens of these cells, unchanged.
    pub fn selection(mut cells: Vec<usize>) -> Self {
        cells.sort_unstable();
        Self {
            places: cells.into_iter().map(Some).collect(),
            weights: Weights::Unchanged,
        }
    }

    /// Tokens at these places, of few sources each.
    pub fn of_parts(places: Vec<Option<usize>>, parts: Vec<Part>) -> Self {
        Self {
            places,
            weights: Weights::Parts(parts),
        }
    }

    /// The tokens, made of what belongs to those of the picture: features, or anything else of which
    /// there is a column per token.
    ///
    /// # Shapes
    /// - `of`: `[features, tokens]`
    /// - `class`: `[features, 1]`, what belongs to the class token; without it, its part is left out
    /// - returns `[features, kept]`
    ///
    /// # Errors
    /// [`ReducerError::Reduction`] if a token without a place stands for the class token, and there
    /// is no `class`; or if places, parts or weights are beyond `of`.
    pub fn apply(
        &self,
        of: Tensor<B, 2>,
        class: Option<Tensor<B, 2>>,
    ) -> Result<Tensor<B, 2>, ReducerError> {
        let tokens = of.dims()[1];
        let sources = match class {
            Some(class) if (class.dims()[0], class.dtype()) != (of.dims()[0], of.dtype()) => {
                return refuse(format!(
                    "a class token of {} features in {:?} beside tokens of {} in {:?}",
                    class.dims()[0],
                    class.dtype(),
                    of.dims()[0],
                    of.dtype()
                ));
            }
            Some(class) => Tensor::cat(vec![of, class], 1),
            None => of,
        };
        let columns = sources.dims()[1];
        match &self.weights {
            Weights::Unchanged => {
                let places = self.places.iter().map(|place| place.unwrap_or(tokens));
                let places: Vec<usize> = places.collect();
                if let Some(place) = places.iter().find(|&&place| place >= columns) {
                    return refuse(format!("place {place} is beyond the {columns} columns"));
                }
                let places = indices(places, &sources.device());
                Ok(sources.select(1, places))
            }
            Weights::Parts(parts) => self.sum(sources, parts),
            Weights::Dense(weights) => {
                let [rows, kept] = weights.dims();
                if rows < columns {
                    return refuse(format!("weights of {rows} sources for {columns} columns"));
                }
                let weights = weights.clone().cast(sources.dtype());
                Ok(sources.matmul(weights.slice([0..columns, 0..kept])))
            }
        }
    }

    /// Weighted sums in f32, as many parts at a time as there are columns.
    fn sum(&self, sources: Tensor<B, 2>, parts: &[Part]) -> Result<Tensor<B, 2>, ReducerError> {
        let [features, columns] = sources.dims();
        let (device, dtype, kept) = (sources.device(), sources.dtype(), self.places.len());
        if let Some(part) = parts.iter().find(|part| part.token >= kept) {
            return refuse(format!(
                "a part of token {}, where {kept} are kept",
                part.token
            ));
        }
        // What a tensor without the class token lacks.
        let present: Vec<Part> = parts
            .iter()
            .copied()
            .filter(|part| part.source < columns)
            .collect();
        let mut sums = Tensor::zeros([features, kept], (&device, FloatDType::F32.into()));
        for block in present.chunks(columns.max(1)) {
            let weights: Vec<f32> = block.iter().map(|part| part.weight).collect();
            let weights = upload::<B>(&weights, &device).unsqueeze_dim(0);
            let of = indices(block.iter().map(|part| part.source), &device);
            let to = indices(block.iter().map(|part| part.token), &device);
            let terms = sources.clone().select(1, of).cast(FloatDType::F32) * weights;
            sums = sums.select_assign(1, to, terms, IndexingUpdateOp::Add);
        }
        Ok(sums.cast(dtype))
    }

    /// Whether it is a reduction to at most `keep` of the tokens.
    pub(super) fn check(
        &self,
        tokens: usize,
        keep: usize,
        sees_class: bool,
    ) -> Result<(), ReducerError> {
        let kept = self.places.len();
        if kept == 0 || kept > keep {
            return refuse(format!(
                "it kept {kept} tokens of {tokens}, asked for {keep}"
            ));
        }
        let mut taken = vec![false; tokens];
        for &place in self.places.iter().flatten() {
            match taken.get_mut(place) {
                Some(taken) if !*taken => *taken = true,
                Some(_) => return refuse(format!("it put two tokens at place {place}")),
                None => return refuse(format!("place {place} is beyond the {tokens} tokens")),
            }
        }
        let sources = tokens + usize::from(sees_class);
        match &self.weights {
            Weights::Unchanged if self.places.contains(&None) && !sees_class => {
                refuse("a token without a place has no weights either".into())
            }
            Weights::Unchanged => Ok(()),
            Weights::Parts(parts) => {
                let is_beyond = |part: &&Part| part.source >= sources || part.token >= kept;
                match parts.iter().find(is_beyond) {
                    Some(Part { token, source, .. }) => refuse(format!(
                        "source {source} of token {token} is beyond the {sources} sources and \
                         {kept} tokens"
                    )),
                    None => Ok(()),
                }
            }
            Weights::Dense(weights) if weights.dims() != [sources, kept] => refuse(format!(
                "its weights are {:?}, expected [{sources}, {kept}]",
                weights.dims()
            )),
            Weights::Dense(_) => Ok(()),
        }
    }

    /// The same tokens by place: first those without one.
    pub(super) fn in_order(self) -> Self {
        if self.places.is_sorted() {
            return self;
        }
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.sort_by_key(|&at| self.places[at]);
        let places = order.iter().map(|&at| self.places[at]).collect();
        let weights = match self.weights {
            Weights::Unchanged => Weights::Unchanged,
            Weights::Dense(weights) => {
                let order = indices(order, &weights.device());
                Weights::Dense(weights.select(1, order))
            }
            Weights::Parts(mut parts) => {
                let mut now = vec![0; order.len()];
                order
                    .iter()
                    .enumerate()
                    .for_each(|(at, &was)| now[was] = at);
                parts
                    .iter_mut()
                    .for_each(|part| part.token = now[part.token]);
                Weights::Parts(parts)
            }
        };
        Self { places, weights }
    }
}

fn refuse<T>(reason: String) -> Result<T, ReducerError> {
    Err(ReducerError::Reduction { reason })
}
