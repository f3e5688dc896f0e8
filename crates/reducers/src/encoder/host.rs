//! What methods decide on the host: numbers read back, and lists of tokens.

use std::cmp::Ordering;

use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Tensor};

use super::EncoderShape;
use crate::ReducerError;
use crate::device::read_back;

/// The numbers of a tensor whose columns are tokens, row by row.
///
/// # Errors
/// [`ReducerError::NanScore`] names the first token that has one.
pub(super) fn read<B: Backend>(tensor: Tensor<B, 2>) -> Result<Vec<f32>, ReducerError> {
    let columns = tensor.dims()[1];
    let values = read_back(tensor)?;
    match values.iter().position(|value| value.is_nan()) {
        Some(at) => Err(ReducerError::NanScore {
            index: at % columns,
        }),
        None => Ok(values),
    }
}

/// The mean over rows (heads), `[rows, tokens]` → one score per token.
pub(super) fn read_mean<B: Backend>(tensor: Tensor<B, 2>) -> Result<Vec<f32>, ReducerError> {
    read(tensor.cast(FloatDType::F32).mean_dim(0))
}

/// Refuses towers without a class token.
pub(super) fn require_class_token(
    method: &'static str,
    encoder: &EncoderShape,
) -> Result<(), ReducerError> {
    if encoder.class_token {
        return Ok(());
    }
    Err(ReducerError::Unsupported {
        method,
        reason: "it ranks by the class token's attention, and this vision tower has no class token; \
                 use visionzip@192, hiprune@192 or vscan@192, which rank by received attention there"
            .into(),
    })
}

/// Refuses a layer that the tower does not have.
pub(super) fn require_layer(
    method: &'static str,
    setting: &str,
    layer: Option<usize>,
    encoder: &EncoderShape,
) -> Result<(), ReducerError> {
    match layer {
        Some(layer) if layer >= encoder.num_layers => Err(ReducerError::Unsupported {
            method,
            reason: format!(
                "{setting} {layer} is beyond the {} layers of this vision tower, counted from 0",
                encoder.num_layers
            ),
        }),
        _ => Ok(()),
    }
}

/// Refuses what is no share from 0 to 1.
pub(super) fn require_share(
    method: &'static str,
    setting: &str,
    share: f64,
) -> Result<(), ReducerError> {
    // NaN is in no range.
    match (0.0..=1.0).contains(&share) {
        true => Ok(()),
        false => Err(ReducerError::Unsupported {
            method,
            reason: format!("{setting} {share} is no share; use a number from 0 to 1"),
        }),
    }
}

/// The tokens that are not among `chosen`, ascending.
pub(super) fn others(chosen: &[usize], tokens: usize) -> Vec<usize> {
    let mut is_chosen = vec![false; tokens];
    chosen.iter().for_each(|&token| is_chosen[token] = true);
    (0..tokens).filter(|&token| !is_chosen[token]).collect()
}

/// Tokens by score, highest first, lower index first among equals; scores are not NaN.
pub(super) fn ranked(scores: &[f32]) -> Vec<usize> {
    let mut tokens: Vec<usize> = (0..scores.len()).collect();
    let descending = |a: f32, b: f32| b.partial_cmp(&a).unwrap_or(Ordering::Equal);
    tokens.sort_by(|&a, &b| descending(scores[a], scores[b]));
    tokens
}

/// The first of the highest values; values are not NaN, and there is at least one.
pub(super) fn argmax<T: PartialOrd + Copy>(values: impl IntoIterator<Item = T>) -> usize {
    let mut values = values.into_iter().enumerate();
    let first = values.next();
    let best = values.fold(first, |best, next| match best {
        Some(best) if next.1 > best.1 => Some(next),
        best => best,
    });
    best.map_or(0, |(index, _)| index)
}
