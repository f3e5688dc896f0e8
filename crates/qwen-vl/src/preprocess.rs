use std::sync::Arc;

use reroute_checkpoint::{Folder, ProcessorSettings};
use reroute_family::{
    FamilyError, ImageOptions, Modality, Picture, Prepared, Preprocessor, Video, VideoTime, View,
    Visual,
};
use vision_encoder::qwen::{QwenPreprocessor, QwenPreprocessorConfig, QwenTowerConfig};
use vision_encoder::{
    Canvas, Geometry, Grid, PatchPixels, RgbImage, VisionError, Window, resize_bicubic,
};

use crate::QwenVlConfig;

/// Images and videos as whole patches, as many as the picture has.
#[derive(Debug, Clone)]
pub struct QwenVlPreprocessor {
    pixels: QwenPreprocessor,
    tower: QwenTowerConfig,
}

impl QwenVlPreprocessor {
    /// Reads the settings of the image processor, and of the video processor where there are such.
    pub fn open(
        folder: &Folder,
        config: &QwenVlConfig,
        options: &ImageOptions,
    ) -> Result<Self, FamilyError> {
        if options.pad_to_square == Some(true) {
            return Err(FamilyError::Option {
                option: "pad_to_square",
                instead: "sees every picture whole, at its own shape",
            });
        }
        let ProcessorSettings { settings, place } =
            folder.image_processor::<QwenPreprocessorConfig>()?;
        let videos = folder.video_processor()?.map(|found| found.settings);
        let pixels = settings.resolve(videos.as_ref(), &config.vision);
        let mut pixels = pixels.map_err(|error| error.at(place))?;
        if options.max_pixels == Some(0) {
            return Err(FamilyError::NoPixels);
        }
        if let Some(max_pixels) = options.max_pixels {
            pixels = pixels.with_max_pixels(max_pixels);
        }
        let tower = config.vision.clone();
        Ok(Self { pixels, tower })
    }

    fn view(&self, pixels: &PatchPixels, time: Option<VideoTime>) -> View {
        let Grid { t, h, w } = pixels.grid;
        let merge = self.tower.spatial_merge_size;
        View {
            original: pixels.original,
            resized: pixels.resized,
            grid: pixels.grid,
            tokens: [t, h / merge, w / merge],
            time,
            allowed: pixels.unbounded,
        }
    }
}

impl Preprocessor for QwenVlPreprocessor {
    fn prepare(&self, visual: &Visual) -> Result<(View, Prepared), FamilyError> {
        match visual {
            Visual::Image(image) => {
                let pixels = self.pixels.image(image)?;
                let view = self.view(&pixels, None);
                Ok((view, Prepared::patches(Modality::Image, pixels)))
            }
            Visual::Video(Video { frames, fps }) => {
                let pixels = self.pixels.video(frames)?;
                let numbers: Vec<usize> = (0..frames.len()).collect();
                let steps = self.tower.temporal_patch_size;
                let time = VideoTime {
                    seconds: patch_seconds(&numbers, *fps, steps)?,
                    seconds_per_step: steps as f64 / fps,
                };
                let view = self.view(&pixels, Some(time));
                Ok((view, Prepared::patches(Modality::Video, pixels)))
            }
        }
    }

    fn pictures(&self, visual: &Visual, view: &View) -> Result<Vec<RgbImage>, FamilyError> {
        let [width, height] = view.resized;
        let (x, y) = (0..width, 0..height);
        let window = Window { x, y };
        let resize = |image: &RgbImage| resize_bicubic(&Canvas::of(image), width, height, &window);
        let seen = match visual {
            Visual::Image(image) => std::slice::from_ref(image),
            Visual::Video(Video { frames, .. }) => frames,
        };
        let firsts = seen.iter().step_by(self.tower.temporal_patch_size);
        Ok(firsts.map(resize).collect::<Result<_, _>>()?)
    }

    fn picture(&self, size: [usize; 2]) -> Result<Picture, FamilyError> {
        let resized = self.pixels.image_size(size)?;
        let sides = resized.map(|side| side / self.tower.patch_size);
        let patches = sides.iter().product();
        Ok(Picture {
            resized,
            patches,
            visual_tokens: patches / self.tower.spatial_merge_size.pow(2),
        })
    }

    fn geometry(&self, view: &View) -> Geometry {
        Geometry::whole(view.original)
    }

    fn check(&self, visual: &Visual) -> Result<(), FamilyError> {
        let size = |image: &RgbImage| [image.width(), image.height()];
        match visual {
            Visual::Image(image) => self.pixels.image_size(size(image)).map(drop)?,
            Visual::Video(Video { frames, fps }) => {
                let expected = frames.first().map(size).ok_or(VisionError::NoFrames)?;
                patch_seconds(&[0], *fps, 1)?;
                for (frame, found) in frames.iter().map(size).enumerate() {
                    if found != expected {
                        return Err(FamilyError::Vision(VisionError::MixedFrames {
                            frame,
                            found,
                            expected,
                        }));
                    }
                }
                self.pixels.video_size(frames.len(), expected)?;
            }
        }
        Ok(())
    }

    fn with_max_pixels(&self, max_pixels: usize) -> Option<Arc<dyn Preprocessor>> {
        let pixels = self.pixels.clone().with_max_pixels(max_pixels);
        let tower = self.tower.clone();
        Some(Arc::new(Self { pixels, tower }))
    }
}

/// The time of each temporal patch of a video in seconds: midway between its first and its last frame.
///
/// `frames` are the numbers of the frames that were taken from a video of `fps` frames per second. The
/// last one is repeated to fill the last patch, as the Qwen3-VL processor does.
pub fn patch_seconds(
    frames: &[usize],
    fps: f64,
    temporal_patch_size: usize,
) -> Result<Vec<f64>, FamilyError> {
    let seconds = |frame: Option<&usize>| frame.map(|&frame| frame as f64 / fps);
    // Models are told in f32 how long a patch lasts.
    let longest = f64::from(f32::MAX) / temporal_patch_size.max(1) as f64;
    let is_short = |frame: f64| frame / fps <= longest;
    let last = frames.iter().max().map_or(0.0, |&frame| frame as f64);
    if !(fps.is_finite() && fps > 0.0 && is_short(1.0) && is_short(last)) {
        return Err(FamilyError::FrameRate { fps });
    }
    let patches = frames.chunks(temporal_patch_size.max(1));
    let middle = |patch: &[usize]| Some((seconds(patch.first())? + seconds(patch.last())?) / 2.0);
    Ok(patches.filter_map(middle).collect())
}
