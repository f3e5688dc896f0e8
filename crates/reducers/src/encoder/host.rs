//! What methods decide on the host: numbers read back, and lists of tokens.

use std::cmp::Ordering;

use burn::tensor::backend::Backend;
use burn::tensor::{FloatDType, Tensor};

use super::{EncoderShape, Tap};
use crate::ReducerError;

/// The numbers of a tensor whose columns are tokens, row by row.
///
/// # Errors
/// [`ReducerError::NanScore`] names the first token that has one.
pub(super) fn read<B: Backend>(tensor: Tensor<B, 2>) -> Result<Vec<f32>, ReducerError> {
    let columns = tensor.dims()[1];
    let data = tensor.cast(FloatDType::F32).try_into_data();
    let values = data
        .map_err(|error| error.to_string())
        .and_then(|data| data.into_vec::<f32>().map_err(|error| format!("{error:?}")))
        .map_err(|error| ReducerError::Reduction {
            reason: format!("its numbers could not be read back from the device: {error}"),
        })?;
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

/// The attention that says which tokens matter: the class token's, or where there is none, what a
/// token receives.
pub(super) fn attention(encoder: &EncoderShape, layer: usize) -> Tap {
    match encoder.class_token {
        true => Tap::ClassAttention { layer },
        false => Tap::ReceivedAttention { layer },
    }
}

/// The layer whose output becomes visual tokens.
pub(super) fn feature_layer(encoder: &EncoderShape) -> usize {
    encoder.feature_layer.saturating_sub(1)
}

/// Refuses encoders without a class token.
pub(super) fn require_class_token(
    method: &'static str,
    encoder: &EncoderShape,
) -> Result<(), ReducerError> {
    if encoder.class_token {
        return Ok(());
    }
    Err(ReducerError::Unsupported {
        method,
        reason: "it ranks by the class token's attention, and this vision encoder has no class \
                 token; use vision-zip, hi-prune or vscan, which rank by received attention there"
            .into(),
    })
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
