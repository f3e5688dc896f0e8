//! Selection: the highest scores, and one rule for ties.

use std::cmp::Ordering;

use crate::ReducerError;

/// Indices of the `k` highest scores, ascending; all of them if there are fewer than `k`.
///
/// Among equal scores the lower index wins, so a selection is the same on every machine. `-inf` is
/// a score like any other, and the lowest. Linear in the number of scores (plus sorting the `k`
/// winners' indices).
///
/// # Errors
/// [`ReducerError::NanScore`] if any score is NaN, selected or not.
///
/// ```
/// let scores = [0.1, 0.3, 0.3, 0.2, 0.3, 0.05, 0.2, 0.0];
/// assert_eq!(reducers::top_k(&scores, 4)?, [1, 2, 3, 4]); // of the two 0.2, the first
/// # Ok::<(), reducers::ReducerError>(())
/// ```
pub fn top_k(scores: &[f32], k: usize) -> Result<Vec<usize>, ReducerError> {
    if let Some(index) = scores.iter().position(|score| score.is_nan()) {
        return Err(ReducerError::NanScore { index });
    }
    let mut indices: Vec<usize> = (0..scores.len()).collect();
    if k < indices.len() {
        indices.select_nth_unstable_by(k, |&a, &b| best_first(scores, a, b));
        indices.truncate(k);
        indices.sort_unstable();
    }
    Ok(indices)
}

fn best_first(scores: &[f32], a: usize, b: usize) -> Ordering {
    // Not `total_cmp`, which would rank -0.0 below 0.0. NaN was ruled out above.
    scores[b]
        .partial_cmp(&scores[a])
        .unwrap_or(Ordering::Equal)
        .then(a.cmp(&b))
}

#[cfg(test)]
mod tests {
    use super::top_k;
    use crate::ReducerError;

    #[test]
    fn ties_go_to_the_lower_index() {
        let scores = [0.1, 0.3, 0.3, 0.2, 0.3, 0.05, 0.2, 0.0];
        assert_eq!(top_k(&scores, 3).unwrap(), [1, 2, 4]);
        assert_eq!(top_k(&scores, 4).unwrap(), [1, 2, 3, 4]);
        assert_eq!(top_k(&[-0.0, 0.0], 1).unwrap(), [0]);
    }

    #[test]
    fn no_scores_none_wanted_and_too_many_wanted() {
        assert!(top_k(&[], 3).unwrap().is_empty());
        assert!(top_k(&[1.0, 2.0], 0).unwrap().is_empty());
        assert_eq!(top_k(&[1.0, 2.0], 9).unwrap(), [0, 1]);
    }

    #[test]
    fn negative_infinity_ranks_last() {
        let scores = [f32::NEG_INFINITY, -1e30, f32::NEG_INFINITY, f32::INFINITY];
        assert_eq!(top_k(&scores, 2).unwrap(), [1, 3]);
        assert_eq!(top_k(&scores, 3).unwrap(), [0, 1, 3]);
    }

    #[test]
    fn nan_is_an_error_wherever_it_is() {
        let error = top_k(&[0.5, f32::NAN, 0.1], 1).unwrap_err();
        assert!(
            matches!(error, ReducerError::NanScore { index: 1 }),
            "{error}"
        );
    }
}
