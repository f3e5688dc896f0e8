//! Named schedules, as data.
//!
//! A name is a method and a budget, `pdrop@64`, or `dense`. The budget `B` means that a decoder
//! layer works on a share `B/576` of the visual tokens on average: `B` tokens of the 576 that
//! LLaVA-1.5 makes of a picture, and as much in proportion of any other number.
//!
//! Plain names carry the keep ratios released with Reroute (arXiv 2606.12412) to the digit. They
//! were made for 32 layers, and not all keep what their name promises: on LLaVA-1.5 `pdrop@64`
//! averages 80 tokens and `reroute-pdrop@64` 84. The same name with `-exact` carries ratios solved
//! for the budget at the depth of the model at hand (see [`crate::budget`]), so that methods of one
//! budget compare at equal cost.
//!
//! Decision layers are given for 32 layers and move in proportion: layer `l` becomes
//! `round(l·N/32)` of `N`, and at least 1. For `N = 28` this gives the layers released for
//! Qwen2.5-VL-7B.

use crate::{Action, Profile, ReducerError, Schedule, Stage, budget};

/// Depth the decision layers of the methods are given for, in layers (LLaVA-1.5-7B).
const REFERENCE_DEPTH: usize = 32;
/// Visual tokens the budgets are named after: 24 × 24 patches (LLaVA-1.5).
const REFERENCE_TOKENS: usize = 576;

/// A family of schedules: where it decides and what it does, for every budget.
#[derive(Debug, Clone, PartialEq)]
pub struct Method {
    /// The name before the `@`.
    pub name: &'static str,
    /// One line for tables.
    pub description: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// What becomes of the tokens not selected.
    pub action: Action,
    /// See [`Schedule::new`].
    pub monotonic: bool,
    /// Decision layers in a decoder of 32 layers.
    pub layers: &'static [usize],
    /// Shape of the keep ratios when they are solved for a budget.
    pub profile: Profile,
    /// Released keep ratios by budget in tokens of 576, one ratio per decision layer.
    pub released: &'static [(usize, &'static [f64])],
}

static METHODS: [Method; 5] = [
    Method {
        name: "dense",
        description: "the plain model: every layer works on every token",
        source: "no reduction",
        action: Action::Remove,
        monotonic: false,
        layers: &[],
        profile: Profile::Uniform,
        released: &[],
    },
    Method {
        name: "fastv",
        description: "one early decision, the rest is removed",
        source: "FastV, arXiv 2403.06764; ratios: Reroute, arXiv 2606.12412",
        action: Action::Remove,
        monotonic: false,
        layers: &[3],
        profile: Profile::Uniform,
        released: &[(192, &[0.2644]), (128, &[0.1418]), (64, &[0.01916])],
    },
    Method {
        name: "pdrop",
        description: "four decisions, each removes more of the survivors",
        source: "PyramidDrop, arXiv 2410.17247; layers and ratios: Reroute, arXiv 2606.12412",
        action: Action::Remove,
        monotonic: true,
        layers: &[2, 7, 15, 23],
        profile: Profile::Geometric,
        released: &[
            (192, &[0.5965, 0.3558, 0.2123, 0.1266]),
            (128, &[0.4570, 0.2088, 0.0954, 0.0436]),
            (64, &[0.2789, 0.0937, 0.0315, 0.0106]),
        ],
    },
    Method {
        name: "reroute-fastv",
        description: "four decisions at FastV's ratio, the rest bypasses and may come back",
        source: "Reroute, arXiv 2606.12412",
        action: Action::Reroute,
        monotonic: false,
        layers: &[3, 7, 15, 23],
        profile: Profile::Uniform,
        released: &[
            (192, &[0.2644; 4]),
            (128, &[0.1418; 4]),
            (64, &[0.01916; 4]),
        ],
    },
    Method {
        name: "reroute-pdrop",
        description: "four decisions in a pyramid, the rest bypasses and may come back",
        source: "Reroute, arXiv 2606.12412",
        action: Action::Reroute,
        monotonic: false,
        layers: &[2, 7, 15, 23],
        profile: Profile::Pyramid,
        released: &[
            (192, &[0.4502, 0.4502, 0.2251, 0.1126]),
            (128, &[0.2655, 0.2655, 0.1328, 0.0664]),
            (64, &[0.1392, 0.1392, 0.0696, 0.0348]),
        ],
    },
];

/// A method at a budget.
#[derive(Debug, Clone, PartialEq)]
pub struct Preset {
    /// Such as `reroute-pdrop@64-exact`.
    pub name: String,
    /// The method.
    pub method: &'static Method,
    /// Average visual tokens per layer, of 576; none for `dense`.
    pub budget: Option<usize>,
    /// Whether the keep ratios are solved for the budget rather than taken from the release.
    pub exact: bool,
}

/// Every preset: `dense` first, then by method, budget and exactness.
pub fn presets() -> impl Iterator<Item = Preset> {
    METHODS.iter().flat_map(|method| {
        let dense = method
            .released
            .is_empty()
            .then(|| Preset::new(method, None, false));
        let budgeted = method.released.iter().flat_map(move |&(budget, _)| {
            [false, true].map(|exact| Preset::new(method, Some(budget), exact))
        });
        dense.into_iter().chain(budgeted)
    })
}

/// The preset of this name.
///
/// # Errors
/// [`ReducerError::UnknownPreset`], with the nearest name and all names.
pub fn find(name: &str) -> Result<Preset, ReducerError> {
    presets().find(|preset| preset.name == name).ok_or_else(|| {
        let known: Vec<String> = presets().map(|preset| preset.name).collect();
        let nearest = known.iter().min_by_key(|known| edit_distance(known, name));
        ReducerError::UnknownPreset {
            name: name.to_owned(),
            nearest: nearest.cloned().unwrap_or_default(),
            known: known.join(", "),
        }
    })
}

impl Preset {
    fn new(method: &'static Method, budget: Option<usize>, exact: bool) -> Self {
        let name = match budget {
            None => method.name.to_owned(),
            Some(budget) => format!(
                "{}@{budget}{}",
                method.name,
                if exact { "-exact" } else { "" }
            ),
        };
        Self {
            name,
            method,
            budget,
            exact,
        }
    }

    /// The schedule for a decoder of `num_layers` layers.
    ///
    /// # Errors
    /// * [`ReducerError::TooShallow`]: the decisions fall together (four of them in fewer than 7
    ///   layers).
    /// * [`ReducerError::Infeasible`]: an exact budget is below what the layers before the first
    ///   decision cost.
    pub fn schedule(&self, num_layers: usize) -> Result<Schedule, ReducerError> {
        let layers = self.layers(num_layers)?;
        let ratios = self.ratios(&layers, num_layers)?;
        let stages = layers
            .into_iter()
            .zip(ratios)
            .map(|(layer, ratio)| Stage::ratio(layer, ratio));
        Schedule::new(self.method.action, self.method.monotonic, stages.collect())
    }

    fn layers(&self, num_layers: usize) -> Result<Vec<usize>, ReducerError> {
        let layers: Vec<usize> = self
            .method
            .layers
            .iter()
            .map(|&layer| rescale(layer, num_layers))
            .collect();
        let increasing = layers.windows(2).all(|pair| pair[0] < pair[1]);
        if increasing && layers.iter().all(|&layer| layer < num_layers) {
            Ok(layers)
        } else {
            Err(ReducerError::TooShallow {
                name: self.name.clone(),
                num_layers,
                layers,
            })
        }
    }

    fn ratios(&self, layers: &[usize], num_layers: usize) -> Result<Vec<f64>, ReducerError> {
        match self.budget {
            Some(budget) if self.exact => {
                let share = budget as f64 / REFERENCE_TOKENS as f64;
                budget::solve(self.method.profile, layers, num_layers, share)
            }
            budget => {
                let released = self
                    .method
                    .released
                    .iter()
                    .find(|&&(released, _)| Some(released) == budget);
                Ok(released.map_or_else(Vec::new, |&(_, ratios)| ratios.to_vec()))
            }
        }
    }
}

/// Moves a decision layer from the reference depth to `num_layers`, halves rounded away from zero.
fn rescale(layer: usize, num_layers: usize) -> usize {
    let moved = layer as f64 * num_layers as f64 / REFERENCE_DEPTH as f64;
    (moved.round() as usize).max(1)
}

/// Insertions, deletions and substitutions of characters between two strings (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &b) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::{edit_distance, find, presets};
    use crate::{ReducerError, Schedule};

    fn layers(name: &str, num_layers: usize) -> Vec<usize> {
        let schedule = find(name).unwrap().schedule(num_layers).unwrap();
        schedule.stages().iter().map(|stage| stage.layer).collect()
    }

    #[test]
    fn there_are_25_presets_and_each_finds_itself() {
        assert_eq!(presets().count(), 25);
        for preset in presets() {
            assert_eq!(find(&preset.name).unwrap(), preset);
        }
        assert_eq!(
            find("dense").unwrap().schedule(1).unwrap(),
            Schedule::dense()
        );
    }

    #[test]
    fn decisions_move_with_the_depth() {
        for (num_layers, expected) in [
            (32, [2, 7, 15, 23]),
            (28, [2, 6, 13, 20]),
            (8, [1, 2, 4, 6]),
        ] {
            assert_eq!(layers("pdrop@192", num_layers), expected);
        }
        for (num_layers, expected) in [
            (32, [3, 7, 15, 23]),
            (28, [3, 6, 13, 20]),
            (8, [1, 2, 4, 6]),
        ] {
            assert_eq!(layers("reroute-fastv@192", num_layers), expected);
        }
        assert_eq!(layers("fastv@192", 2), [1]);
    }

    #[test]
    fn four_decisions_need_seven_layers() {
        for preset in presets().filter(|preset| preset.method.layers.len() == 4 && !preset.exact) {
            assert!(preset.schedule(7).is_ok());
            let error = preset.schedule(6).unwrap_err();
            assert!(matches!(error, ReducerError::TooShallow { .. }), "{error}");
            assert!(error.to_string().contains("schedule file"));
        }
        let error = find("fastv@64").unwrap().schedule(1).unwrap_err();
        assert!(matches!(error, ReducerError::TooShallow { .. }), "{error}");
    }

    #[test]
    fn an_exact_budget_below_the_dense_head_is_refused() {
        let error = find("fastv@64-exact").unwrap().schedule(8).unwrap_err();
        assert!(
            matches!(
                error,
                ReducerError::Infeasible {
                    smallest: 0.125,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn an_unknown_name_gets_a_suggestion_and_the_list() {
        let message = find("reroute-pdorp@128").unwrap_err().to_string();
        assert!(
            message.contains("did you mean \"reroute-pdrop@128\""),
            "{message}"
        );
        assert!(
            presets().all(|preset| message.contains(&preset.name)),
            "{message}"
        );
        assert!(find("").is_err());
    }

    #[test]
    fn edit_distances() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("abc", ""), 3);
        assert_eq!(edit_distance("pdrop", "pdrop"), 0);
    }
}
