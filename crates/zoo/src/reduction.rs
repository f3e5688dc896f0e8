//! Visual tokens on their way to the decoder: every picture is reduced by itself, and the prompt keeps
//! the slots that are left.

use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use reducers::encoder::{self, EncoderShape, Reduction, Seen, Tap, Taps};
use reducers::{Positions, ReducerError, Rest};
use reroute::Survivors;

use crate::{EncoderStep, ZooError};

/// What a vision tower showed of images, or of videos, side by side.
pub(crate) struct Shown<B: Backend> {
    pub(crate) taps: Taps<B>,
    /// See [`reroute::Prompt::deepstack`].
    pub(crate) deepstack: Vec<Tensor<B, 2>>,
    /// Time steps, rows and columns of tokens of each image or video.
    pub(crate) grids: Vec<[usize; 3]>,
    /// The text asked about each, as embeddings `[hidden_size, tokens]`; empty if nobody needs it.
    pub(crate) questions: Vec<Tensor<B, 2>>,
}

/// What is left of them.
pub(crate) struct Left<B: Backend> {
    /// As [`Tap::Features`].
    pub(crate) features: Tensor<B, 2>,
    pub(crate) deepstack: Vec<Tensor<B, 2>>,
    /// Of each image or video.
    pub(crate) kept: Vec<Kept>,
}

/// What is left of an image or a video.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// Visual tokens before.
    pub tokens: usize,
    /// Where each token that is left stood among them; `None`: nowhere, before the first.
    pub places: Vec<Option<usize>>,
    /// How the reduction ranks those that are left, if it left all of them.
    pub salience: Option<Vec<f32>>,
}

/// Reduces every picture.
pub(crate) fn reduce<B: Backend>(
    shown: &Shown<B>,
    step: &EncoderStep<'_, B>,
    encoder: EncoderShape,
) -> Result<Left<B>, ZooError> {
    let (mut features, mut kept) = (Vec::new(), Vec::new());
    let mut deepstack = vec![Vec::new(); shown.deepstack.len()];
    let (mut start, mut picture) = (0, 0);
    for (visual, &[steps, rows, columns]) in shown.grids.iter().enumerate() {
        let mut of_visual = Kept {
            tokens: steps * rows * columns,
            places: Vec::new(),
            salience: None,
        };
        for time in 0..steps {
            let range = start..start + rows * columns;
            let seen = Seen {
                grid: [rows, columns],
                taps: shown.slice(visual, picture, &range),
                encoder,
            };
            let reduced = encoder::reduce(step.reducer, &seen, step.keep.count(range.len()))?;
            let class = seen.taps.get(&Tap::ClassToken);
            features.push(apply(
                &seen.get(Tap::Features)?,
                class,
                &reduced,
                step.rest,
            )?);
            for (layers, all) in deepstack.iter_mut().zip(&shown.deepstack) {
                let all = all.clone().narrow(1, start, range.len());
                layers.push(apply(&all, None, &reduced, step.rest)?);
            }
            of_visual.add(time * range.len(), range.len(), &reduced, step.rest);
            (start, picture) = (range.end, picture + 1);
        }
        kept.push(of_visual);
    }
    Ok(Left {
        features: Tensor::cat(features, 1),
        deepstack: deepstack
            .into_iter()
            .map(|layer| Tensor::cat(layer, 1))
            .collect(),
        kept,
    })
}

impl<B: Backend> Shown<B> {
    /// What belongs to one picture.
    fn slice(&self, visual: usize, picture: usize, range: &Range<usize>) -> Taps<B> {
        let mut taps = Taps::new();
        for (&tap, all) in &self.taps {
            let (start, columns) = match tap {
                Tap::ClassToken | Tap::ClassQuery { .. } | Tap::ClassKey { .. } => (picture, 1),
                _ => (range.start, range.len()),
            };
            taps.insert(tap, all.clone().narrow(1, start, columns));
        }
        if let Some(question) = self.questions.get(visual) {
            taps.insert(Tap::Question, question.clone());
        }
        taps
    }
}

impl Kept {
    fn add<B: Backend>(
        &mut self,
        before: usize,
        tokens: usize,
        reduced: &Reduction<B>,
        rest: Rest,
    ) {
        match rest {
            Rest::Drop => {
                let places = reduced.places.iter();
                self.places
                    .extend(places.map(|place| place.map(|place| before + place)));
            }
            Rest::Defer => {
                let is_kept = |place| reduced.places.contains(&Some(place));
                self.places.extend((before..before + tokens).map(Some));
                self.salience
                    .get_or_insert_default()
                    .extend((0..tokens).map(|place| f32::from(is_kept(place))));
            }
        }
    }
}

/// The tokens that a reduction makes of these.
///
/// # Shapes
/// - `features`: `[features, tokens]`, `class`: `[features, 1]`
/// - returns `[features, kept]`, or `[features, tokens]` if the rest is deferred
fn apply<B: Backend>(
    features: &Tensor<B, 2>,
    class: Option<&Tensor<B, 2>>,
    reduced: &Reduction<B>,
    rest: Rest,
) -> Result<Tensor<B, 2>, ZooError> {
    let (device, tokens) = (features.device(), features.dims()[1]);
    let columns = |columns: &[usize]| {
        let columns: Vec<i64> = columns.iter().map(|&column| column as i64).collect();
        Tensor::<B, 1, Int>::from_data(columns.as_slice(), &device)
    };
    let kept = reduced.apply(features.clone(), class.cloned())?;
    if rest == Rest::Drop {
        return Ok(kept);
    }
    let mut order: Vec<usize> = (0..tokens).collect();
    for (at, place) in reduced.places.iter().enumerate() {
        let place = place.ok_or_else(|| ReducerError::Reduction {
            reason: "a token without a place cannot be deferred; drop the rest instead".into(),
        })?;
        order[place] = tokens + at;
    }
    Ok(Tensor::cat(vec![features.clone(), kept], 1).select(1, columns(&order)))
}

/// The rows of a prompt that are left when each visual keeps some of its slots.
///
/// `slots` are the rows of the slots of images, and of videos; `kept` what is left of each image, and
/// of each video, taken from the front.
pub(crate) fn survivors(
    rows: usize,
    slots: [Vec<usize>; 2],
    kept: &mut [&[Kept]; 2],
    positions: Positions,
) -> Survivors {
    let mut left: Vec<(usize, Option<f32>)> = Vec::new();
    let mut is_slot = vec![false; rows];
    for (slots, kept) in slots.iter().zip(kept) {
        let mut rest = &slots[..];
        while let ([visual, others @ ..], false) = (*kept, rest.is_empty()) {
            // A prompt with other slots is refused when it is filled.
            let (of_visual, after) = rest.split_at(visual.tokens.min(rest.len()));
            of_visual.iter().for_each(|&row| is_slot[row] = true);
            for (at, place) in visual.places.iter().enumerate() {
                let salience = visual.salience.as_ref().map(|salience| salience[at]);
                let row = of_visual.get(place.unwrap_or(0));
                left.extend(row.map(|&row| (row, salience)));
            }
            (rest, *kept) = (after, others);
        }
    }
    let text = (0..rows).filter(|&row| !is_slot[row]);
    let salience: Option<Vec<f32>> = match left.is_empty() {
        true => None,
        false => {
            let mut visual = left.clone();
            visual.sort_by_key(|&(row, _)| row);
            visual.into_iter().map(|(_, salience)| salience).collect()
        }
    };
    let mut left: Vec<usize> = left.into_iter().map(|(row, _)| row).chain(text).collect();
    left.sort_unstable();
    Survivors {
        rows: left,
        salience,
        positions,
    }
}
