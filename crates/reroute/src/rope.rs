//! Rotary positions: their frequencies, and how config.json writes them.

use std::f32::consts::PI;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Int, Tensor};
use reroute_layers::{Rotary, indices};
use serde::Deserialize;

use crate::MAX_HEAD_DIM;

/// Rotary position configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are changed for contexts longer than those of the training.
    pub scaling: RopeScaling,
    /// Which position axis turns each of the `head_dim / 2` frequencies: all 0 for plain text
    /// positions, sectioned or interleaved over (t, h, w) for M-RoPE.
    pub axis_of_frequency: Vec<usize>,
}

/// Frequencies for contexts longer than those of the training.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// As trained.
    #[default]
    None,
    /// All divided (arXiv 2306.15595).
    Linear {
        /// Divides every frequency.
        factor: f64,
    },
    /// The low ones divided, the high ones kept, those between blended (Llama 3.1).
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// Frequencies with fewer turns than this in the context of the training are low.
        low_freq_factor: f64,
        /// Frequencies with more turns than this are high.
        high_freq_factor: f64,
        /// Positions of the training.
        original_max_position_embeddings: usize,
    },
}

impl RopeConfig {
    /// Plain one-axis positions.
    pub fn one_axis(theta: f64, head_dim: usize) -> Self {
        Self {
            theta,
            scaling: RopeScaling::None,
            // Of a wider head, which is refused later, no memory is asked for.
            axis_of_frequency: vec![0; head_dim.min(MAX_HEAD_DIM) / 2],
        }
    }

    /// The same with other frequencies.
    pub fn with_scaling(self, scaling: RopeScaling) -> Self {
        Self { scaling, ..self }
    }

    /// Number of position axes.
    pub fn axes(&self) -> usize {
        let last = self.axis_of_frequency.iter().max();
        last.map_or(1, |axis| axis.saturating_add(1))
    }

    /// Radians per position of each pair of channels, computed in f32 as the reference does.
    pub fn frequencies(&self) -> Vec<f32> {
        let half = self.axis_of_frequency.len();
        let trained = |i: usize| 1.0 / (self.theta as f32).powf((2 * i) as f32 / (2 * half) as f32);
        (0..half).map(|i| self.scaling.apply(trained(i))).collect()
    }

    /// The table for explicit positions, computed in f32 as the reference does.
    ///
    /// # Shapes
    /// - `positions`: `[axes, rows]`
    pub fn table<B: Backend>(&self, positions: Tensor<B, 2, Int>, dtype: DType) -> Rotary<B> {
        let device = positions.device();
        let axes = indices(&self.axis_of_frequency, &device);
        let frequencies = self.frequencies();
        let frequencies = Tensor::<B, 1>::from_data(frequencies.as_slice(), (&device, DType::F32));
        // Not by `float`, whose type is the backend's: half precision rounds a position above 256.
        let positions = positions.cast(FloatDType::F32).select(0, axes);
        Rotary::from_angles(positions * frequencies.unsqueeze_dim(1), dtype)
    }
}

impl RopeScaling {
    /// Why the numbers make no sense, if they do not.
    pub(crate) fn problem(&self) -> Option<String> {
        let is_positive = |x: f64| (x as f32).is_finite() && x > 0.0;
        match *self {
            Self::None => None,
            Self::Linear { factor } => {
                (!is_positive(factor)).then(|| format!("the rope factor is {factor}"))
            }
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: trained,
            } => {
                let fits = [factor, low, high].into_iter().all(is_positive) && low < high;
                (!fits || trained == 0).then(|| {
                    format!(
                        "rope type \"llama3\" with factor {factor}, low_freq_factor {low}, high_freq_factor \
                         {high} and original_max_position_embeddings {trained}: all must be above 0, and low \
                         below high"
                    )
                })
            }
        }
    }

    fn apply(&self, frequency: f32) -> f32 {
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let (factor, trained) = (factor as f32, original_max_position_embeddings as f32);
                let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
                let wavelength = 2.0 * PI / frequency;
                if wavelength > trained / low {
                    frequency / factor
                } else if wavelength < trained / high {
                    frequency
                } else {
                    let kept = (trained / wavelength - low) / (high - low);
                    (1.0 - kept) * frequency / factor + kept * frequency
                }
            }
        }
    }
}

/// What config.json says of rotary positions: `rope_theta`, and an object called `rope_scaling` by
/// older libraries and `rope_parameters` by current ones. A part of a text configuration, which it
/// joins by `#[serde(flatten)]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct RopeFields {
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    rope_scaling: Option<RopeObject>,
    rope_parameters: Option<RopeObject>,
}

/// Older libraries write `type`, current ones `rope_type`, some both.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
struct RopeObject {
    rope_type: Option<String>,
    r#type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    mrope_section: Option<[usize; 3]>,
    mrope_interleaved: Option<bool>,
}

/// What a family has where config.json is silent.
#[derive(Debug, Clone, Copy)]
pub struct RopeDefaults {
    /// Base of the frequencies.
    pub theta: f64,
    /// Positions of the model.
    pub max_position_embeddings: usize,
    /// Whether positions have several axes: rope type "mrope" is then another word for "default".
    pub mrope: bool,
}

/// What a configuration says of rotary positions, in one reading for all families.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeReading {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are changed.
    pub scaling: RopeScaling,
    /// Frequencies of the time, height and width axes, if given.
    pub mrope_section: Option<[usize; 3]>,
    /// Whether the axes take turns, if given.
    pub mrope_interleaved: Option<bool>,
}

/// Why rotary positions cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RopeError {
    /// A rule for long contexts that is not known here.
    #[error(
        "rope type \"{name}\" is not supported, only {known} are: remove the scaling for long \
         contexts to run the model as it was trained"
    )]
    Type {
        /// The name in config.json.
        name: String,
        /// Names that are supported.
        known: &'static str,
    },
    /// The two spellings of the type disagree.
    #[error(
        "\"rope_type\" is \"{rope_type}\", but \"type\" beside it is \"{legacy}\": remove the wrong one"
    )]
    Contradiction {
        /// The current spelling's.
        rope_type: String,
        /// The older spelling's.
        legacy: String,
    },
    /// A type needs a number that is not given.
    #[error("rope type \"{name}\" needs \"{field}\", which config.json does not give")]
    Missing {
        /// The type.
        name: &'static str,
        /// The number.
        field: &'static str,
    },
    /// Only some channels of a head would be rotated.
    #[error("partial_rotary_factor {0} is not supported, only 1 is")]
    Partial(f64),
}

impl RopeFields {
    /// Reads them as transformers does: `rope_scaling` goes before `rope_parameters`, and what is in
    /// either before what stands beside it.
    ///
    /// # Errors
    /// [`RopeError`]
    pub fn read(&self, defaults: RopeDefaults) -> Result<RopeReading, RopeError> {
        let objects = [&self.rope_scaling, &self.rope_parameters];
        // An object that says nothing counts as none.
        let says = |object: &&RopeObject| **object != RopeObject::default();
        let object = objects.into_iter().flatten().find(says);
        let object = object.cloned().unwrap_or_default();
        let partial = object.partial_rotary_factor.or(self.partial_rotary_factor);
        if let Some(partial) = partial.filter(|&partial| partial != 1.0) {
            return Err(RopeError::Partial(partial));
        }
        Ok(RopeReading {
            theta: object
                .rope_theta
                .or(self.rope_theta)
                .unwrap_or(defaults.theta),
            scaling: object.scaling(defaults)?,
            mrope_section: object.mrope_section,
            mrope_interleaved: object.mrope_interleaved,
        })
    }
}

impl RopeObject {
    fn scaling(&self, defaults: RopeDefaults) -> Result<RopeScaling, RopeError> {
        let known = |name: &String| match name.as_str() {
            "mrope" if defaults.mrope => "default".to_owned(),
            _ => name.clone(),
        };
        let names = [&self.rope_type, &self.r#type].map(|name| name.as_ref().map(known));
        let name = match names {
            [Some(rope_type), Some(legacy)] if rope_type != legacy => {
                return Err(RopeError::Contradiction { rope_type, legacy });
            }
            [rope_type, legacy] => rope_type.or(legacy),
        };
        let needed =
            |name, field, value: Option<f64>| value.ok_or(RopeError::Missing { name, field });
        match name.as_deref() {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: needed("linear", "factor", self.factor)?,
            }),
            Some("llama3") => {
                let needed = |field, value| needed("llama3", field, value);
                Ok(RopeScaling::Llama3 {
                    factor: needed("factor", self.factor)?,
                    low_freq_factor: needed("low_freq_factor", self.low_freq_factor)?,
                    high_freq_factor: needed("high_freq_factor", self.high_freq_factor)?,
                    original_max_position_embeddings: self
                        .original_max_position_embeddings
                        .unwrap_or(defaults.max_position_embeddings),
                })
            }
            Some(other) => Err(RopeError::Type {
                name: other.into(),
                known: match defaults.mrope {
                    true => "\"default\", \"mrope\", \"linear\" and \"llama3\"",
                    false => "\"default\", \"linear\" and \"llama3\"",
                },
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: RopeDefaults = RopeDefaults {
        theta: 1e4,
        max_position_embeddings: 4096,
        mrope: false,
    };

    fn read(json: &str) -> Result<RopeReading, RopeError> {
        serde_json::from_str::<RopeFields>(json)
            .unwrap()
            .read(DEFAULTS)
    }

    fn read_mrope(json: &str) -> Result<RopeReading, RopeError> {
        let defaults = RopeDefaults {
            mrope: true,
            ..DEFAULTS
        };
        serde_json::from_str::<RopeFields>(json)
            .unwrap()
            .read(defaults)
    }

    #[test]
    fn theta_is_where_transformers_looks_for_it() {
        let theta = |json: &str| read(json).unwrap().theta;
        assert_eq!(theta("{}"), 1e4);
        assert_eq!(theta(r#"{"rope_theta": 2e4}"#), 2e4);
        assert_eq!(
            theta(r#"{"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}"#),
            5e5
        );
        assert_eq!(
            theta(r#"{"rope_theta": 2e4, "rope_scaling": {"rope_theta": 5e5}}"#),
            5e5
        );
        assert_eq!(
            theta(r#"{"rope_theta": 2e4, "rope_parameters": {"rope_theta": 5e5}}"#),
            5e5
        );
        assert_eq!(
            theta(
                r#"{"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 6e5}}"#
            ),
            5e5
        );
        for nothing in ["null", "{}"] {
            let json = format!(
                r#"{{"rope_scaling": {nothing}, "rope_parameters": {{"rope_theta": 6e5}}}}"#
            );
            assert_eq!(theta(&json), 6e5);
        }
    }

    #[test]
    fn the_type_may_be_spelled_twice_but_not_differently() {
        let scaling = |json| read(json).map(|reading| reading.scaling);
        let linear = Ok(RopeScaling::Linear { factor: 4.0 });
        for json in [
            r#"{"rope_scaling": {"type": "linear", "factor": 4.0}}"#,
            r#"{"rope_scaling": {"rope_type": "linear", "factor": 4}}"#,
            r#"{"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}"#,
        ] {
            assert_eq!(scaling(json), linear);
        }
        let error = scaling(r#"{"rope_scaling": {"type": "linear", "rope_type": "default"}}"#);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("\"linear\"") && error.contains("\"default\""),
            "{error}"
        );
        // What older libraries write for Qwen2-VL.
        let json = r#"{"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 2, 3]}}"#;
        let reading = read_mrope(json).unwrap();
        assert_eq!(reading.scaling, RopeScaling::None);
        assert_eq!(reading.mrope_section, Some([1, 2, 3]));
        assert!(read(json).is_err());
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for name in ["dynamic", "yarn", "longrope", "su", "mrope"] {
            let json = format!(r#"{{"rope_parameters": {{"rope_type": "{name}", "factor": 2}}}}"#);
            let error = read(&json).unwrap_err();
            assert!(matches!(&error, RopeError::Type { .. }), "{error}");
            assert!(
                error.to_string().contains(&format!("\"{name}\"")),
                "{error}"
            );
        }
        let missing = read(r#"{"rope_scaling": {"type": "linear"}}"#).unwrap_err();
        assert!(missing.to_string().contains("\"factor\""), "{missing}");
        let partial = read(r#"{"partial_rotary_factor": 0.5}"#);
        assert_eq!(partial, Err(RopeError::Partial(0.5)));
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = RopeConfig::one_axis(1e4, 8);
        let scaled = plain
            .clone()
            .with_scaling(RopeScaling::Linear { factor: 4.0 });
        let expected: Vec<f32> = plain.frequencies().iter().map(|f| f / 4.0).collect();
        assert_eq!(scaled.frequencies(), expected);
    }

    /// `_compute_llama3_parameters` of transformers with the numbers of Llama 3.1 8B, in f64.
    #[test]
    fn llama3_scaling_is_that_of_transformers() {
        let json = r#"{"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#;
        let reading = read(json).unwrap();
        let config = RopeConfig::one_axis(reading.theta, 128).with_scaling(reading.scaling);
        let actual = config.frequencies();
        for (i, actual) in actual.iter().enumerate() {
            let frequency = 5e5f64.powf(-(i as f64) / 64.0);
            let turns = 8192.0 * frequency / (2.0 * std::f64::consts::PI);
            let expected = if turns < 1.0 {
                frequency / 8.0
            } else if turns > 4.0 {
                frequency
            } else {
                let smooth = (turns - 1.0) / (4.0 - 1.0);
                (1.0 - smooth) * frequency / 8.0 + smooth * frequency
            };
            let error = (f64::from(*actual) - expected).abs() / expected;
            assert!(error < 2e-6, "{i}: {actual} instead of {expected}");
        }
        // Of each kind there is one: kept, blended, divided.
        for (i, expected) in LLAMA3 {
            assert!(
                (actual[i] / expected - 1.0).abs() < 1e-5,
                "{i}: {}",
                actual[i]
            );
        }
        let fallback = read(&json.replace(r#", "original_max_position_embeddings": 8192"#, ""));
        assert!(matches!(
            fallback.unwrap().scaling,
            RopeScaling::Llama3 {
                original_max_position_embeddings: 4096,
                ..
            }
        ));
    }

    /// Frequencies of Llama 3.1 8B by their index.
    const LLAMA3: [(usize, f32); 3] = [(28, 3.211_446e-3), (31, 8.567_514e-4), (63, 3.068_926e-7)];
}
