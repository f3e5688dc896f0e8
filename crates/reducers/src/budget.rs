//! The budget solver: keep ratios that make a schedule average a target number of visual tokens per
//! layer.
//!
//! With decision layers `d_0 < d_1 < …` of `N`, the layers before `d_0` work on all visual tokens
//! and the layers of stage `s` on a share `r_s`. The average share is `(d_0 + Σ_s (d_{s+1} -
//! d_s)·r_s) / N`, the last segment ending at `N`. A [`Profile`] fixes the shape of the ratios up
//! to one unknown, and the average grows with it, so one bisection solves every profile. The
//! published schedules of Reroute (arXiv 2606.12412) at 192 and 128 tokens are these solutions
//! rounded to four digits; those at 64 are not, and average 80 tokens and more (see
//! [`crate::presets`]).

use crate::ReducerError;

/// The shape of the keep ratios over the stages, up to one unknown `x` in (0, 1].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// `x, x, x, …`: the same tokens' worth in every stage (FastV, arXiv 2403.06764, and its
    /// rerouted form).
    Uniform,
    /// `x, x², x³, …`: every stage keeps the same share of the one before (PyramidDrop, arXiv
    /// 2410.17247).
    Geometric,
    /// `x, x, x/2, x/4, …`: two wide stages, then halving (Reroute, arXiv 2606.12412).
    Pyramid,
}

impl Profile {
    fn ratio(self, x: f64, stage: usize) -> f64 {
        let exponent = i32::try_from(stage).unwrap_or(i32::MAX);
        let ratio = match self {
            Profile::Uniform => x,
            Profile::Geometric => x.powi(exponent.saturating_add(1)),
            Profile::Pyramid => x * 0.5_f64.powi((exponent - 1).max(0)),
        };
        // A ratio may be minute, but a keep ratio is never 0.
        ratio.max(f64::MIN_POSITIVE)
    }
}

/// Keep ratios, one per decision layer, that make `num_layers` layers average `target_share` of the
/// visual tokens.
///
/// `target_share` is a share in (0, 1]: for an average of `T` of `V` visual tokens, `T / V`. The
/// solution is exact for ratios; keep counts are truncated to whole tokens, so that the true
/// average lies up to one token below.
///
/// # Errors
/// * [`ReducerError::TargetShare`]: the target is not in (0, 1].
/// * [`ReducerError::NoDecisionLayer`], [`ReducerError::LayerOrder`], [`ReducerError::LayerDepth`]:
///   `layers` is empty, out of order or beyond `num_layers`.
/// * [`ReducerError::Infeasible`]: the dense layers before the first decision alone exceed the
///   target, or a ratio would exceed 1. The message names the averages within reach.
///
/// ```
/// use reducers::{Profile, budget};
///
/// let ratios = budget::solve(Profile::Pyramid, &[2, 7, 15, 23], 32, 192.0 / 576.0)?;
/// let digits: Vec<f64> = ratios.iter().map(|ratio| (ratio * 1e4).round() / 1e4).collect();
/// assert_eq!(digits, [0.4502, 0.4502, 0.2251, 0.1126]);
/// # Ok::<(), reducers::ReducerError>(())
/// ```
pub fn solve(
    profile: Profile,
    layers: &[usize],
    num_layers: usize,
    target_share: f64,
) -> Result<Vec<f64>, ReducerError> {
    check(layers, num_layers, target_share)?;
    let ratios = |x: f64| (0..layers.len()).map(move |stage| profile.ratio(x, stage));
    let average = |x: f64| average_share(layers, num_layers, ratios(x));

    let smallest = layers[0] as f64 / num_layers as f64;
    let largest = average(1.0);
    if target_share <= smallest || target_share > largest + ROUNDING {
        return Err(ReducerError::Infeasible {
            target: target_share,
            layers: layers.to_vec(),
            num_layers,
            smallest,
            largest,
        });
    }

    let x = bisect(|x| average(x) < target_share);
    // On paper `V·r` is often a whole number (576 · 4/9 = 256). A breath upwards keeps it from
    // being truncated to 255.
    Ok(ratios(x)
        .map(|ratio| (ratio * (1.0 + ROUNDING)).min(1.0))
        .collect())
}

/// Relative slack for rounding errors of double precision, far below one token in any picture.
const ROUNDING: f64 = 1e-12;

fn check(layers: &[usize], num_layers: usize, target_share: f64) -> Result<(), ReducerError> {
    // Written so that NaN is refused as well.
    if !(target_share > 0.0 && target_share <= 1.0) {
        return Err(ReducerError::TargetShare {
            share: target_share,
        });
    }
    if layers.is_empty() {
        return Err(ReducerError::NoDecisionLayer);
    }
    for (before, pair) in layers.windows(2).enumerate() {
        if pair[1] <= pair[0] {
            return Err(ReducerError::LayerOrder {
                stage: before + 1,
                layer: pair[1],
                previous: pair[0],
            });
        }
    }
    match layers.iter().position(|&layer| layer >= num_layers) {
        Some(stage) => Err(ReducerError::LayerDepth {
            stage,
            layer: layers[stage],
            num_layers,
        }),
        None => Ok(()),
    }
}

/// Average share of the visual tokens over all layers.
fn average_share(layers: &[usize], num_layers: usize, ratios: impl Iterator<Item = f64>) -> f64 {
    let ends = layers.iter().skip(1).chain([&num_layers]);
    let reduced: f64 = layers
        .iter()
        .zip(ends)
        .zip(ratios)
        .map(|((start, end), ratio)| (end - start) as f64 * ratio)
        .sum();
    (layers[0] as f64 + reduced) / num_layers as f64
}

/// The point of [0, 1] where `below` turns from true to false, to the last bit.
fn bisect(below: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (0.0_f64, 1.0_f64);
    loop {
        let middle = low.midpoint(high);
        if middle <= low || middle >= high {
            return high;
        }
        if below(middle) {
            low = middle
        } else {
            high = middle
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Profile, solve};
    use crate::ReducerError;

    #[test]
    fn a_target_of_all_tokens_keeps_all_tokens() {
        for profile in [Profile::Uniform, Profile::Geometric] {
            assert_eq!(solve(profile, &[2, 7, 15], 32, 1.0).unwrap(), [1.0; 3]);
        }
    }

    #[test]
    fn a_dense_head_above_the_target_is_infeasible() {
        let error = solve(Profile::Uniform, &[4], 32, 0.125).unwrap_err();
        assert!(
            matches!(
                error,
                ReducerError::Infeasible {
                    smallest: 0.125,
                    largest: 1.0,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn a_pyramid_cannot_keep_everything() {
        let error = solve(Profile::Pyramid, &[0, 1, 2, 3], 4, 0.75).unwrap_err();
        assert!(
            matches!(
                error,
                ReducerError::Infeasible {
                    largest: 0.6875,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for share in [f64::NAN, f64::INFINITY, 0.0, -0.1, 1.1] {
            let error = solve(Profile::Uniform, &[3], 32, share).unwrap_err();
            assert!(matches!(error, ReducerError::TargetShare { .. }), "{error}");
        }
        let error = |layers: &[usize]| solve(Profile::Uniform, layers, 32, 0.5).unwrap_err();
        assert!(matches!(error(&[]), ReducerError::NoDecisionLayer));
        assert!(matches!(
            error(&[3, 3]),
            ReducerError::LayerOrder { stage: 1, .. }
        ));
        assert!(matches!(
            error(&[3, 32]),
            ReducerError::LayerDepth {
                stage: 1,
                layer: 32,
                num_layers: 32
            }
        ));
    }
}
