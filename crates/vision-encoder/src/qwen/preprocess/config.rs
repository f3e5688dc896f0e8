use serde::Deserialize;

use super::{DEFAULT_MAX_PIXELS, QwenPreprocessor};
use crate::VisionError;
use crate::normalise::{
    CLIP_STATISTICS, Normalisation, NormalisationConfig, OtherKeys, STANDARD_STATISTICS, Statistics,
};
use crate::qwen::smart_resize::PixelBounds;
use crate::qwen::{QwenGeneration, QwenTowerConfig};
use crate::resize::Resample;

// Far above any checkpoint; what an image becomes stays below the memory of a machine.
const MAX_AREA: usize = 1 << 28;
const MAX_TOKEN_SIDE: usize = 1 << 9;
const MAX_TEMPORAL_PATCH: usize = 1 << 4;

/// What a class of the library does where a checkpoint says nothing.
struct Defaults {
    statistics: Statistics,
    bounds: PixelBounds,
    /// Whether the bounds are on all pictures together.
    together: bool,
    /// `max_video_tokens` of a video.
    tokens: usize,
}

/// `Qwen2VLImageProcessor`
const IMAGES: Defaults = Defaults {
    statistics: CLIP_STATISTICS,
    bounds: PixelBounds {
        min: 56 * 56,
        max: 1280 * 28 * 28,
    },
    together: false,
    tokens: 0,
};

/// `Qwen2VLVideoProcessor`
const QWEN2_VIDEOS: Defaults = Defaults {
    statistics: CLIP_STATISTICS,
    bounds: PixelBounds {
        min: 128 * 28 * 28,
        max: 768 * 28 * 28,
    },
    together: false,
    tokens: 128_000,
};

/// `Qwen3VLVideoProcessor`
const QWEN3_VIDEOS: Defaults = Defaults {
    statistics: STANDARD_STATISTICS,
    bounds: PixelBounds {
        min: 128 * 32 * 32,
        max: 768 * 32 * 32,
    },
    together: true,
    tokens: 768,
};

/// `preprocessor_config.json` or `video_preprocessor_config.json` of a Qwen model, hub-era or
/// current; `null` is as good as absent.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct QwenPreprocessorConfig {
    #[serde(flatten)]
    pixels: NormalisationConfig,
    /// Hub-era; goes before `size`.
    min_pixels: Option<usize>,
    /// Hub-era; goes before `size`.
    max_pixels: Option<usize>,
    size: Option<Area>,
    patch_size: Option<usize>,
    temporal_patch_size: Option<usize>,
    merge_size: Option<usize>,
    /// Of videos, in current releases of transformers.
    cap_pixels_per_frame: Option<bool>,
    max_video_tokens: Option<usize>,
    image_processor_type: Option<String>,
    #[serde(flatten)]
    other: OtherKeys,
}

/// Keys of the library's image and video processors that change no pixel here: which frames of a video are
/// taken is the caller's choice, and sides of squares have no meaning.
const HARMLESS: [&str; 9] = [
    "default_to_square",
    "do_sample_frames",
    "fps",
    "max_frames",
    "min_frames",
    "num_frames",
    "return_metadata",
    "video_metadata",
    "video_processor_type",
];

/// Bounds on the area in pixels, under names that once meant sides.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Area {
    #[serde(alias = "min_pixels")]
    shortest_edge: Option<usize>,
    #[serde(alias = "max_pixels")]
    longest_edge: Option<usize>,
    #[serde(flatten)]
    other: OtherKeys,
}

impl QwenPreprocessorConfig {
    /// Checks the numbers, also against the tower that the patches are for.
    ///
    /// `videos` is `video_preprocessor_config.json`; checkpoints without it preprocess videos by the
    /// one file that they have.
    pub fn resolve(
        &self,
        videos: Option<&Self>,
        tower: &QwenTowerConfig,
    ) -> Result<QwenPreprocessor, VisionError> {
        let (factor, temporal) = (
            tower.patch_size * tower.spatial_merge_size,
            tower.temporal_patch_size,
        );
        if factor > MAX_TOKEN_SIDE || temporal > MAX_TEMPORAL_PATCH {
            return wrong(format!(
                "a visual token of {factor}×{factor} pixels and {temporal} pictures; \
                 {MAX_TOKEN_SIDE} and {MAX_TEMPORAL_PATCH} are possible"
            ));
        }
        let of_videos = match tower.generation {
            QwenGeneration::Qwen3 => QWEN3_VIDEOS,
            _ => QWEN2_VIDEOS,
        };
        let videos = videos.unwrap_or(self).recipe(tower, &of_videos);
        Ok(QwenPreprocessor {
            patch_size: tower.patch_size,
            temporal_patch_size: temporal,
            merge_size: tower.spatial_merge_size,
            images: self.recipe(tower, &IMAGES)?,
            videos: videos.map_err(|error| match error {
                VisionError::Preprocessor { place, reason } => VisionError::Preprocessor {
                    place,
                    reason: format!("for videos, {reason}"),
                },
                other => other,
            })?,
            min_pixels: None,
            max_pixels: DEFAULT_MAX_PIXELS,
        })
    }

    fn recipe(&self, tower: &QwenTowerConfig, default: &Defaults) -> Result<Recipe, VisionError> {
        let temporal = (self.temporal_patch_size, tower.temporal_patch_size);
        for (name, (found, expected)) in [
            ("patch_size", (self.patch_size, tower.patch_size)),
            ("temporal_patch_size", temporal),
            ("merge_size", (self.merge_size, tower.spatial_merge_size)),
        ] {
            if let Some(found) = found.filter(|&found| found != expected) {
                return wrong(format!(
                    "{name} is {found}, but {expected} in the vision_config of config.json; take \
                     both files from the same checkpoint"
                ));
            }
        }
        let size = self.size.clone().unwrap_or_default();
        size.other.check(&[])?;
        let max = self.max_pixels.or(size.longest_edge);
        let min = self.min_pixels.or(size.shortest_edge);
        // A default gives way to what the checkpoint says.
        let (min, max) = match (min, max) {
            (Some(min), Some(max)) => (min, max),
            (Some(min), None) => (min, default.bounds.max.max(min)),
            (None, max) => {
                let max = max.unwrap_or(default.bounds.max);
                (default.bounds.min.min(max), max)
            }
        };
        if min == 0 || min > max || max > MAX_AREA {
            return wrong(format!(
                "min_pixels (size.shortest_edge) {min} and max_pixels (size.longest_edge) {max} \
                 must ascend, from 1 to {MAX_AREA}"
            ));
        }
        self.other.check(&HARMLESS)?;
        if let Some(kind) = &self.image_processor_type
            && !kind.starts_with("Qwen")
        {
            return wrong(format!(
                "image_processor_type is {kind}, a tower of Qwen's takes one of Qwen's"
            ));
        }
        self.pixels.resample(&[Resample::Bicubic])?;
        Ok(Recipe {
            normalisation: self.pixels.resolve(default.statistics)?,
            bounds: PixelBounds { min, max },
            together: default.together,
            video_tokens: (default.tokens > 0 && self.cap_pixels_per_frame == Some(true))
                .then(|| self.max_video_tokens.unwrap_or(default.tokens)),
        })
    }
}

fn wrong<T>(reason: String) -> Result<T, VisionError> {
    Err(VisionError::preprocessor(reason))
}

/// How pictures of one kind are made into numbers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Recipe {
    pub(super) normalisation: Normalisation,
    /// The checkpoint's own bounds.
    pub(super) bounds: PixelBounds,
    /// Whether the bounds are on all pictures of a video together, or on each.
    pub(super) together: bool,
    /// Tokens that a video has at most (Qwen2-VL), or each of its pictures (Qwen3-VL), if they are bounded.
    pub(super) video_tokens: Option<usize>,
}

impl Recipe {
    /// The checkpoint's own bounds for so many pictures, of which `temporal` share tokens of `factor` pixels
    /// a side; those of `Qwen2VLVideoProcessor.resize` and `Qwen3VLVideoProcessor.resize`.
    pub(super) fn bounds(&self, frames: usize, temporal: usize, factor: usize) -> PixelBounds {
        let PixelBounds { min, max } = self.bounds;
        let Some(tokens) = self.video_tokens else {
            return self.bounds;
        };
        let (area, frames) = (tokens.saturating_mul(factor * factor), frames.max(1));
        let least = (min as f64 * 1.05) as usize;
        let max = match self.together {
            true => area.min(max / frames).max(least).saturating_mul(frames),
            false => {
                let all = (area as f64 * 0.9) as usize;
                max.min(all.saturating_mul(temporal) / frames).max(least)
            }
        };
        PixelBounds { min, max }
    }
}
