//! How many visual tokens a decision keeps.

use serde::{Deserialize, Serialize};

use crate::ReducerError;

/// How many visual tokens a decision keeps, always in terms of the *original* visual tokens, never
/// of those that the decision before kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    /// A share of the original visual tokens, in (0, 1], truncated to whole tokens, at least one.
    Ratio(f64),
    /// A number of tokens, at least 1.
    Count(usize),
    /// A share in (0, 1], rounded to the nearest whole number, halves to even, at least one: the
    /// original FastV.
    Rounded(f64),
    /// A share in (0, 1], truncated, possibly to none: the original PyramidDrop.
    Truncated(f64),
    /// A share in (0, 1], rounded up: Nüwa on Qwen2.5-VL.
    Raised(f64),
}

/// How a share becomes a whole number, as files spell it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Rounding {
    /// [`Keep::Ratio`]
    #[default]
    AtLeastOne,
    /// [`Keep::Rounded`]
    HalfEven,
    /// [`Keep::Truncated`]
    Truncate,
    /// [`Keep::Raised`]
    Up,
}

impl Rounding {
    pub(crate) fn of(keep: Keep) -> Self {
        match keep {
            Keep::Ratio(_) | Keep::Count(_) => Self::AtLeastOne,
            Keep::Rounded(_) => Self::HalfEven,
            Keep::Truncated(_) => Self::Truncate,
            Keep::Raised(_) => Self::Up,
        }
    }

    pub(crate) fn keep(self, ratio: f64) -> Keep {
        match self {
            Self::AtLeastOne => Keep::Ratio(ratio),
            Self::HalfEven => Keep::Rounded(ratio),
            Self::Truncate => Keep::Truncated(ratio),
            Self::Up => Keep::Raised(ratio),
        }
    }
}

impl Keep {
    /// Tokens kept of `visual_tokens`: in `1..=visual_tokens`, and 0 only if there are none (or by
    /// [`Keep::Truncated`]).
    ///
    /// A ratio is multiplied in double precision and truncated, not rounded, as in the reference
    /// implementation of Reroute (arXiv 2606.12412): single precision or rounding would change
    /// published keep counts.
    ///
    /// ```
    /// use reducers::Keep;
    ///
    /// assert_eq!(Keep::Ratio(0.2644).count(576), 152); // 152.29
    /// assert_eq!(Keep::Ratio(0.01916).count(40), 1); // never none
    /// assert_eq!(Keep::Count(64).count(40), 40); // never more than there are
    /// assert_eq!(Keep::Rounded(0.5).count(5), 2); // 2.5
    /// assert_eq!(Keep::Truncated(0.125).count(7), 0); // 0.875
    /// ```
    pub fn count(self, visual_tokens: usize) -> usize {
        let share = |ratio: f64| visual_tokens as f64 * ratio;
        let wanted = match self {
            Keep::Ratio(ratio) => (share(ratio) as usize).max(1),
            Keep::Count(count) => count.max(1),
            Keep::Rounded(ratio) => (share(ratio).round_ties_even() as usize).max(1),
            Keep::Truncated(ratio) => share(ratio) as usize,
            Keep::Raised(ratio) => share(ratio).ceil() as usize,
        };
        wanted.min(visual_tokens)
    }

    /// Whether it is a share in (0, 1], or a number of at least 1.
    ///
    /// # Errors
    /// [`ReducerError::KeepRatio`], [`ReducerError::KeepCount`]; both name the `stage`.
    pub fn check(self, stage: usize) -> Result<(), ReducerError> {
        match (self.ratio(), self) {
            // Written so that NaN is refused as well.
            (Some(ratio), _) if !(ratio > 0.0 && ratio <= 1.0) => {
                Err(ReducerError::KeepRatio { stage, ratio })
            }
            (_, Keep::Count(0)) => Err(ReducerError::KeepCount {
                stage,
                count: "0".into(),
            }),
            _ => Ok(()),
        }
    }

    /// The share, if it is one.
    pub fn ratio(self) -> Option<f64> {
        match self {
            Keep::Ratio(ratio)
            | Keep::Rounded(ratio)
            | Keep::Truncated(ratio)
            | Keep::Raised(ratio) => Some(ratio),
            Keep::Count(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Keep;

    #[test]
    fn ratios_truncate_and_keep_at_least_one() {
        for (visual_tokens, ratio, expected) in [
            (576, 0.2644, 152),
            (576, 0.01916, 11),
            (576, 0.5965, 343),
            (576, 0.1126, 64),
            (345, 0.01916, 6),
            (40, 0.01916, 1),
            (576, 1.0, 576),
            (0, 0.5, 0),
        ] {
            assert_eq!(
                Keep::Ratio(ratio).count(visual_tokens),
                expected,
                "{visual_tokens} * {ratio}"
            );
        }
    }

    #[test]
    fn counts_stay_between_one_and_all() {
        for (visual_tokens, count, expected) in
            [(576, 64, 64), (40, 64, 40), (40, 0, 1), (0, 64, 0)]
        {
            assert_eq!(Keep::Count(count).count(visual_tokens), expected);
        }
    }

    #[test]
    fn other_roundings_are_those_of_their_sources() {
        for (keep, visual_tokens, expected) in [
            (Keep::Rounded(0.5), 576, 288),
            (Keep::Rounded(0.5), 7, 4),  // 3.5
            (Keep::Rounded(0.5), 9, 4),  // 4.5
            (Keep::Rounded(0.01), 9, 1), // never none
            (Keep::Truncated(0.5), 7, 3),
            (Keep::Truncated(0.125), 7, 0), // possibly none
            (Keep::Raised(0.35), 63, 23),   // 22.05
            (Keep::Raised(1.0), 63, 63),
        ] {
            assert_eq!(
                keep.count(visual_tokens),
                expected,
                "{keep:?} of {visual_tokens}"
            );
        }
    }

    #[test]
    fn unvalidated_ratios_stay_in_range_too() {
        for ratio in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 2.0] {
            assert!((1..=576).contains(&Keep::Ratio(ratio).count(576)));
        }
    }
}
