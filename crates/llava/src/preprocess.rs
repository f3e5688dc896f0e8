use std::sync::Arc;

use reroute_checkpoint::{CONFIG_MAX_BYTES, Folder};
use reroute_family::{FamilyError, ImageOptions, Picture, Prepared, Preprocessor, View, Visual};
use vision_encoder::{ClipPreprocessor, ClipPreprocessorConfig, Geometry, Grid, RgbImage};

use crate::LlavaConfig;

/// Images as squares of one size.
#[derive(Debug, Clone)]
pub struct LlavaPreprocessor {
    clip: ClipPreprocessor,
    /// Patches along each side of the square.
    side: usize,
}

impl LlavaPreprocessor {
    /// Reads `preprocessor_config.json`, which must make what the tower takes.
    pub fn open(
        folder: &Folder,
        config: &LlavaConfig,
        options: &ImageOptions,
    ) -> Result<Self, FamilyError> {
        if options.max_pixels.is_some() {
            return Err(FamilyError::Option {
                option: "max_pixels",
                instead: "sees every picture at one size",
            });
        }
        let file: ClipPreprocessorConfig =
            folder.read_json("preprocessor_config.json", CONFIG_MAX_BYTES)?;
        let mut clip = file.resolve()?;
        if let Some(pad) = options.pad_to_square {
            clip = clip.with_pad_to_square(pad);
        }
        let (size, side) = (config.vision.image_size, config.vision.grid());
        let [height, width] = clip.output_size();
        if [height, width] != [size, size] {
            return Err(FamilyError::ImageSize {
                made: format!("{width}×{height}"),
                wanted: format!("{size}×{size}"),
            });
        }
        Ok(Self { clip, side })
    }

    fn image<'a>(&self, visual: &'a Visual) -> Result<&'a RgbImage, FamilyError> {
        match visual {
            Visual::Image(image) => Ok(image),
            Visual::Video(_) => Err(FamilyError::NoVideos),
        }
    }
}

impl Preprocessor for LlavaPreprocessor {
    fn prepare(&self, visual: &Visual) -> Result<(View, Prepared), FamilyError> {
        let image = self.image(visual)?;
        let pixels = self.clip.preprocess(image)?;
        let [height, width] = self.clip.output_size();
        let [t, h, w] = [1, self.side, self.side];
        let view = View {
            original: [image.width(), image.height()],
            resized: [width, height],
            grid: Grid { t, h, w },
            tokens: [t, h, w],
            time: None,
            allowed: [width, height],
        };
        Ok((view, Prepared::image(pixels)))
    }

    fn pictures(&self, visual: &Visual, _: &View) -> Result<Vec<RgbImage>, FamilyError> {
        Ok(vec![self.clip.view(self.image(visual)?)?])
    }

    fn picture(&self, _: [usize; 2]) -> Result<Picture, FamilyError> {
        let [height, width] = self.clip.output_size();
        let patches = self.side * self.side;
        Ok(Picture {
            resized: [width, height],
            patches,
            visual_tokens: patches,
        })
    }

    fn geometry(&self, view: &View) -> Geometry {
        self.clip.geometry(view.original)
    }

    fn check(&self, visual: &Visual) -> Result<(), FamilyError> {
        self.image(visual).map(drop)
    }

    fn with_max_pixels(&self, _: usize) -> Option<Arc<dyn Preprocessor>> {
        None
    }
}
