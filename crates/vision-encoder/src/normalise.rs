//! From bytes to the numbers that towers take: the part of preprocessing that every family shares.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::VisionError;
use crate::resize::Resample;

/// Mean and standard deviation of the channels, of values from 0 to 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Statistics {
    mean: [f64; 3],
    std: [f64; 3],
}

/// Those of CLIP's training images.
pub(crate) const CLIP_STATISTICS: Statistics = Statistics {
    mean: [0.48145466, 0.4578275, 0.40821073],
    std: [0.26862954, 0.26130258, 0.27577711],
};

/// Values from −1 to 1.
pub(crate) const STANDARD_STATISTICS: Statistics = Statistics {
    mean: [0.5; 3],
    std: [0.5; 3],
};

/// What `preprocessor_config.json` says of any family's pixels; `null` is as good as absent.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NormalisationConfig {
    do_resize: Option<bool>,
    resample: Option<u32>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<Vec<f64>>,
    image_std: Option<Vec<f64>>,
}

/// Keys of `preprocessor_config.json` that change no pixel, whatever the processor.
const HARMLESS: [&str; 11] = [
    "auto_map",
    "data_format",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "feature_extractor_type",
    "image_seq_length",
    "input_data_format",
    "processor_class",
    "return_tensors",
    "transformers_version",
];

/// Keys that a reader has no field for, which it joins by `#[serde(flatten)]` as the last.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(transparent)]
pub(crate) struct OtherKeys(BTreeMap<String, Option<Setting>>);

/// Switched on or off, or anything else.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Setting {
    Switch(bool),
    Value(IgnoredAny),
}

impl OtherKeys {
    /// Refuses a key that might change pixels in a way that is not known here: one that is neither off nor
    /// null, nor among those that do not matter to any processor, or to this one (`harmless`).
    pub(crate) fn check(&self, harmless: &[&str]) -> Result<(), VisionError> {
        let matters = |(key, value): &(&String, &Option<Setting>)| {
            let is_known = |known: &[&str]| known.contains(&key.as_str());
            let on = !matches!(value, None | Some(Setting::Switch(false)));
            on && !key.starts_with('_') && !is_known(&HARMLESS) && !is_known(harmless)
        };
        match self.0.iter().find(matters) {
            None => Ok(()),
            Some((key, _)) => Err(VisionError::preprocessor(format!(
                "{key} is not known and might change pixels; take it out if it does not"
            ))),
        }
    }
}

impl NormalisationConfig {
    /// How images are resized, of the ways that are `possible`; bicubic if it is not said.
    pub(crate) fn resample(&self, possible: &[Resample]) -> Result<Resample, VisionError> {
        let number = self.resample.unwrap_or(3);
        let named = match number {
            2 => Some(Resample::Bilinear),
            3 => Some(Resample::Bicubic),
            _ => None,
        };
        let Some(resample) = named.filter(|named| possible.contains(named)) else {
            let possible = possible.iter().map(|resample| match resample {
                Resample::Bilinear => "2 (bilinear)",
                Resample::Bicubic => "3 (bicubic)",
            });
            let possible = possible.collect::<Vec<_>>().join(" or ");
            return Err(VisionError::preprocessor(format!(
                "resample {number} is not {possible}"
            )));
        };
        Ok(resample)
    }

    /// Checks the other numbers; `default` are the library's for the family.
    pub(crate) fn resolve(&self, default: Statistics) -> Result<Normalisation, VisionError> {
        let wrong = |reason: String| Err(VisionError::preprocessor(reason));
        for (name, on) in [
            ("do_resize", self.do_resize),
            ("do_rescale", self.do_rescale),
            ("do_normalize", self.do_normalize),
        ] {
            require(name, on)?;
        }
        let three = |values: &Option<Vec<f64>>, default: [f64; 3]| match values {
            Some(values) => <[f64; 3]>::try_from(values.as_slice()),
            None => Ok(default),
        };
        let (Ok(mean), Ok(std)) = (
            three(&self.image_mean, default.mean),
            three(&self.image_std, default.std),
        ) else {
            return wrong("image_mean and image_std must have three numbers each".into());
        };
        let normalisation = Normalisation {
            rescale: self.rescale_factor.unwrap_or(1.0 / 255.0),
            mean: mean.map(|value| value as f32),
            std: std.map(|value| value as f32),
            fill: mean.map(|value| (value * 255.0) as u8),
        };
        // Numbers that are fine in JSON may be infinite or zero as f32.
        let ends = (0..3).flat_map(|channel| [0, 255].map(|v| normalisation.apply(v, channel)));
        if !{ ends }.all(f32::is_finite) {
            return wrong(
                "image_mean, image_std and rescale_factor must make finite pixels, \
                 with an image_std that is not 0"
                    .into(),
            );
        }
        Ok(normalisation)
    }
}

/// Refuses a step that is switched off.
fn require(name: &str, on: Option<bool>) -> Result<(), VisionError> {
    match on {
        Some(false) => Err(VisionError::preprocessor(format!(
            "{name} is off, the vision tower needs it on"
        ))),
        _ => Ok(()),
    }
}

/// Rescales and normalises.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Normalisation {
    rescale: f64,
    mean: [f32; 3],
    std: [f32; 3],
    /// The mean colour, for padding.
    pub(crate) fill: [u8; 3],
}

impl Normalisation {
    /// One value of a channel, in the number types that NumPy goes through.
    pub(crate) fn apply(&self, value: u8, channel: usize) -> f32 {
        ((f64::from(value) * self.rescale) as f32 - self.mean[channel]) / self.std[channel]
    }
}
