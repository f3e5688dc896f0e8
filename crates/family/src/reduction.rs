//! Visual tokens on their way to the decoder: every picture is reduced by itself, and the prompt keeps
//! the slots of the tokens kept.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor};
use reducers::encoder::{self, EncoderReducer, EncoderShape, Reduction, Seen, Tap, Taps};
use reducers::{Keep, Positions, ReducerError, Rest};
use reroute::KeptRows;

use crate::{FamilyError, Look};

/// A reduction of every picture before the decoder.
#[derive(Clone)]
pub struct EncoderStep<'a, B: Backend> {
    /// Which tokens, and what they are made of.
    pub reducer: Arc<dyn EncoderReducer<B> + 'a>,
    /// How many of a picture, or of a time step of a video.
    pub keep: Keep,
    /// What becomes of the others.
    pub rest: Rest,
    /// The positions of those kept.
    pub positions: Positions,
}

/// What a reduction before the decoder kept of images and videos.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeptVisuals {
    /// Of each image, in order of appearance.
    pub images: Vec<KeptTokens>,
    /// Of each video, in order of appearance.
    pub videos: Vec<KeptTokens>,
    /// The positions of the tokens kept.
    pub positions: Positions,
}

impl KeptVisuals {
    /// These images and videos, then those.
    pub(crate) fn followed_by(self, more: Self) -> Self {
        Self {
            images: [self.images, more.images].concat(),
            videos: [self.videos, more.videos].concat(),
            positions: more.positions,
        }
    }
}

/// What a reduction made of images, or of videos.
pub(crate) struct ReducedTokens<B: Backend> {
    /// As [`Tap::Features`].
    pub(crate) features: Tensor<B, 2>,
    pub(crate) deepstack: Vec<Tensor<B, 2>>,
    /// Of each image or video.
    pub(crate) kept: Vec<KeptTokens>,
}

/// What a reduction kept of an image or a video.
#[derive(Debug, Clone, PartialEq)]
pub struct KeptTokens {
    /// Visual tokens before.
    pub tokens: usize,
    /// Where each token kept stood among them; `None`: nowhere, before the first.
    pub places: Vec<Option<usize>>,
    /// How the reduction ranks them, if it kept all of them.
    pub salience: Option<Vec<f32>>,
}

/// Reduces every picture.
pub(crate) fn reduce<B: Backend>(
    look: &Look<B>,
    questions: &[Tensor<B, 2>],
    step: &EncoderStep<'_, B>,
    encoder: EncoderShape,
) -> Result<ReducedTokens<B>, FamilyError> {
    // A program may make what no file can say.
    step.keep.check(0).map_err(|_| ReducerError::EncoderKeep)?;
    let (mut features, mut kept) = (Vec::new(), Vec::new());
    let mut deepstack = vec![Vec::new(); look.deepstack.len()];
    let (mut start, mut picture) = (0, 0);
    for (visual, &[steps, rows, columns]) in look.grids.iter().enumerate() {
        let mut of_visual = KeptTokens {
            tokens: steps * rows * columns,
            places: Vec::new(),
            salience: None,
        };
        for time in 0..steps {
            let range = start..start + rows * columns;
            let seen = Seen {
                grid: [rows, columns],
                taps: of_picture(&look.taps, questions.get(visual), picture, &range),
                encoder,
            };
            let reduced = encoder::reduce(&*step.reducer, &seen, step.keep.count(range.len()))?;
            let class = seen.taps.get(&Tap::ClassToken);
            features.push(apply(
                &seen.get(Tap::Features)?,
                class,
                &reduced,
                step.rest,
            )?);
            for (layers, all) in deepstack.iter_mut().zip(&look.deepstack) {
                let all = all.clone().narrow(1, start, range.len());
                layers.push(apply(&all, None, &reduced, step.rest)?);
            }
            of_visual.add(time * range.len(), range.len(), &reduced, step.rest);
            (start, picture) = (range.end, picture + 1);
        }
        kept.push(of_visual);
    }
    Ok(ReducedTokens {
        features: Tensor::cat(features, 1),
        deepstack: deepstack
            .into_iter()
            .map(|layer| Tensor::cat(layer, 1))
            .collect(),
        kept,
    })
}

/// The taps of one picture.
fn of_picture<B: Backend>(
    all: &Taps<B>,
    question: Option<&Tensor<B, 2>>,
    picture: usize,
    range: &Range<usize>,
) -> Taps<B> {
    let mut taps = Taps::new();
    for (&tap, all) in all {
        let (start, columns) = match tap {
            Tap::ClassToken | Tap::ClassQuery { .. } | Tap::ClassKey { .. } => (picture, 1),
            _ => (range.start, range.len()),
        };
        taps.insert(tap, all.clone().narrow(1, start, columns));
    }
    taps.extend(question.map(|question| (Tap::Question, question.clone())));
    taps
}

impl KeptTokens {
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
) -> Result<Tensor<B, 2>, FamilyError> {
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

/// The rows of a prompt that stay when each visual keeps some of its slots.
///
/// `slots` are the rows of the slots of images, and of videos; `kept` what each image, and each video,
/// keeps, taken from the front.
pub(crate) fn kept_of_slots(
    rows: usize,
    slots: [Vec<usize>; 2],
    kept: &mut [&[KeptTokens]; 2],
    positions: Positions,
) -> KeptRows {
    let mut chosen: Vec<(usize, Option<f32>)> = Vec::new();
    let mut is_slot = vec![false; rows];
    for (slots, kept) in slots.iter().zip(kept) {
        let mut rest = &slots[..];
        while let ([visual, others @ ..], false) = (*kept, rest.is_empty()) {
            // A prompt with other slots is refused when it is filled.
            let (of_visual, after) = rest.split_at(visual.tokens.min(rest.len()));
            of_visual.iter().for_each(|&row| is_slot[row] = true);
            for (at, place) in visual.places.iter().enumerate() {
                let salience = visual.salience.as_ref();
                let salience = salience.and_then(|salience| salience.get(at).copied());
                let row = of_visual.get(place.unwrap_or(0));
                chosen.extend(row.map(|&row| (row, salience)));
            }
            (rest, *kept) = (after, others);
        }
    }
    let text = (0..rows).filter(|&row| !is_slot[row]);
    let salience: Option<Vec<f32>> = match chosen.is_empty() {
        true => None,
        false => {
            let mut visual = chosen.clone();
            visual.sort_by_key(|&(row, _)| row);
            visual.into_iter().map(|(_, salience)| salience).collect()
        }
    };
    let mut rows: Vec<usize> = chosen.into_iter().map(|(row, _)| row).chain(text).collect();
    rows.sort_unstable();
    KeptRows {
        rows,
        salience,
        positions,
    }
}
