//! Named plans, as data: the one registry of methods.
//!
//! A name is a method and a budget, `pdrop@64`, or `dense`. The budget `B` means that a decoder
//! layer works on a share `B/576` of the visual tokens on average: `B` tokens of the 576 that
//! LLaVA-1.5 makes of a picture, and as much in proportion of any other number. Nüwa's 25, 50 and
//! 75 % for Qwen2.5-VL are `@144`, `@288` and `@432`.
//!
//! Plain names carry what was released, to the digit, and not all of it keeps what its name
//! promises: on LLaVA-1.5 `pdrop@64` averages 80 tokens and `reroute-pdrop@64` 84. The same name
//! with `-exact` carries ratios solved for the budget at the depth of the model at hand (see
//! [`crate::budget`]), so that methods of one budget compare at equal cost.
//!
//! Decision layers are given for 32 layers and move in proportion: layer `l` becomes
//! `round(l·N/32)` of `N`, and at least 1. For `N = 28` this gives the layers released for
//! Qwen2.5-VL-7B.

mod methods;
mod recipe;

use crate::encoder::{EncoderShape, Tower};
use crate::{About, Plan, ReducerError, Schedule, Support};

use methods::METHODS;
use recipe::Recipe;

/// A way of reducing visual tokens, for every budget. The name says which.
#[derive(Debug, Clone)]
pub struct Method {
    /// The name before the `@`.
    pub name: &'static str,
    /// Where it comes from, what is exact, which towers it was published for.
    pub about: About,
    recipe: Recipe,
}

/// Kinds of towers that people meet, at the sizes of a checkpoint: the columns of support tables.
pub const TOWERS: &[(&str, EncoderShape)] = &[
    (
        "CLIP (LLaVA-1.5)",
        EncoderShape {
            num_layers: 24,
            feature_layer: 23,
            num_heads: 16,
            class_token: true,
            position_axes: 1,
            tower: Tower::Clip,
        },
    ),
    (
        "Qwen-VL",
        EncoderShape {
            num_layers: 32,
            feature_layer: 32,
            num_heads: 16,
            class_token: false,
            position_axes: 3,
            tower: Tower::QwenVl,
        },
    ),
    (
        "SigLIP",
        EncoderShape {
            num_layers: 27,
            feature_layer: 26,
            num_heads: 16,
            class_token: false,
            position_axes: 1,
            tower: Tower::Other,
        },
    ),
    (
        "DINOv2",
        EncoderShape {
            num_layers: 24,
            feature_layer: 23,
            num_heads: 16,
            class_token: true,
            position_axes: 1,
            tower: Tower::Other,
        },
    ),
];

impl Method {
    /// Whether it works behind a tower.
    pub fn support(&self, encoder: &EncoderShape) -> Support {
        match self.check(encoder) {
            Err(ReducerError::Unsupported { reason, .. }) => Support::No(reason),
            Err(error) => Support::No(error.to_string()),
            Ok(()) => match self.about.towers {
                [] => Support::Yes,
                towers if towers.contains(&encoder.tower) => Support::Yes,
                _ => Support::Adapted,
            },
        }
    }

    fn check(&self, encoder: &EncoderShape) -> Result<(), ReducerError> {
        if self.recipe.renumbers() && encoder.position_axes != 1 {
            return Err(ReducerError::Unsupported {
                method: self.name,
                reason: "positions of several axes cannot be numbered anew; use pdrop@192, which \
                         keeps them"
                    .into(),
            });
        }
        match self.recipe.encoder_method() {
            Some(method) => method.works_behind(encoder),
            None => Ok(()),
        }
    }
}

impl PartialEq for Method {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

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

/// Every method, `dense` first.
pub fn methods() -> impl Iterator<Item = &'static Method> {
    METHODS.iter()
}

/// Every preset: by method, budget and exactness.
pub fn presets() -> impl Iterator<Item = Preset> {
    METHODS.iter().flat_map(|method| {
        let names = method.recipe.budgets().into_iter();
        names.map(|(budget, exact)| Preset::new(method, budget, exact))
    })
}

/// Characters of a name that is looked for, at most.
const LONGEST: usize = 64;

/// The preset of this name.
///
/// # Errors
/// [`ReducerError::UnknownPreset`], with the nearest name and all methods.
pub fn find(name: &str) -> Result<Preset, ReducerError> {
    presets().find(|preset| preset.name == name).ok_or_else(|| {
        // What is longer is no slip of a name.
        let head: String = name.chars().take(LONGEST).collect();
        // A method that is spelt right has other budgets.
        let method = head.split('@').next().unwrap_or_default();
        let nearest = presets().min_by_key(|preset| {
            let is_other = preset.method.name != method;
            (is_other, edit_distance(&preset.name, &head))
        });
        let methods: Vec<&str> = methods().map(|method| method.name).collect();
        ReducerError::UnknownPreset {
            name: match name == head {
                true => head,
                false => format!("{head}…"),
            },
            nearest: nearest.map(|preset| preset.name).unwrap_or_default(),
            methods: methods.join(", "),
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

    /// The plan for a decoder of `num_layers` layers behind a vision encoder.
    ///
    /// # Errors
    /// * [`ReducerError::TooShallow`]: the decisions fall together (four of them in fewer than 7
    ///   layers).
    /// * [`ReducerError::Infeasible`]: an exact budget is below what the layers before the first
    ///   decision cost.
    /// * [`ReducerError::Unsupported`]: the method does not work behind this encoder.
    pub fn plan(&self, num_layers: usize, encoder: &EncoderShape) -> Result<Plan, ReducerError> {
        self.method.check(encoder)?;
        self.method.recipe.plan(self, num_layers, encoder)
    }

    /// The same with decisions at other layers.
    ///
    /// # Errors
    /// As [`schedule`](Self::schedule).
    pub fn schedule_at(
        &self,
        layers: Vec<usize>,
        num_layers: usize,
    ) -> Result<Schedule, ReducerError> {
        match &self.method.recipe {
            Recipe::Decoder(recipe) => recipe.schedule_at(layers, self, num_layers),
            _ => self.schedule(num_layers),
        }
    }

    /// What happens in a decoder of `num_layers` layers, for methods that are nothing else.
    ///
    /// # Errors
    /// As [`plan`](Self::plan); [`ReducerError::Unsupported`] for methods that begin before the
    /// decoder.
    pub fn schedule(&self, num_layers: usize) -> Result<Schedule, ReducerError> {
        match &self.method.recipe {
            Recipe::Decoder(recipe) => recipe.schedule(self, num_layers),
            Recipe::Dense => Ok(Schedule::dense()),
            _ => Err(ReducerError::Unsupported {
                method: self.method.name,
                reason: "it begins before the decoder, a schedule alone is not all of it; \
                         use its plan"
                    .into(),
            }),
        }
    }
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
    fn names_are_unique_and_each_finds_its_preset() {
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
        for name in ["pdrop@192", "reroute-pdrop@64", "reroute-fastv@128"] {
            let preset = find(name).unwrap();
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
    fn an_unknown_name_gets_a_suggestion_and_the_methods() {
        let message = find("reroute-pdorp@128").unwrap_err().to_string();
        assert!(
            message.contains("did you mean \"reroute-pdrop@128\""),
            "{message}"
        );
        assert!(
            super::methods().all(|method| message.contains(method.name)),
            "{message}"
        );
        assert!(find("").is_err());
        for (name, nearest) in [
            ("reroute-pdrop@129", "reroute-pdrop@128"),
            ("random@192", "random@192-exact"),
        ] {
            let message = find(name).unwrap_err().to_string();
            assert!(
                message.contains(&format!("did you mean \"{nearest}\"")),
                "{message}"
            );
        }
    }

    /// Whoever may name a preset shall not hold a processor up.
    #[test]
    fn names_without_end_are_refused_at_once() {
        let message = find(&"reroute-".repeat(1 << 20)).unwrap_err().to_string();
        assert!(message.len() < 2000, "{}", message.len());
        assert!(message.contains("reroute-…"), "{message}");
    }

    #[test]
    fn edit_distances() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("abc", ""), 3);
        assert_eq!(edit_distance("pdrop", "pdrop"), 0);
    }
}
