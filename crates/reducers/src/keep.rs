//! How many visual tokens a decision keeps.

/// How many visual tokens a decision keeps, always in terms of the *original* visual tokens, never
/// of the survivors of the decision before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    /// A share of the original visual tokens, in (0, 1].
    Ratio(f64),
    /// A number of tokens, at least 1.
    Count(usize),
}

impl Keep {
    /// Tokens kept of `visual_tokens`: in `1..=visual_tokens`, and 0 only if there are none.
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
    /// ```
    pub fn count(self, visual_tokens: usize) -> usize {
        let wanted = match self {
            Keep::Ratio(ratio) => (visual_tokens as f64 * ratio) as usize,
            Keep::Count(count) => count,
        };
        wanted.max(1).min(visual_tokens)
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
    fn unvalidated_ratios_stay_in_range_too() {
        for ratio in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 2.0] {
            assert!((1..=576).contains(&Keep::Ratio(ratio).count(576)));
        }
    }
}
