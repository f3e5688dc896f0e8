use std::sync::Arc;

use reroute_checkpoint::{Folder, ProcessorSettings};
use reroute_family::{FamilyError, ImageOptions, Picture, Prepared, Preprocessor, View, Visual};
use vision_encoder::{Geometry, Grid, RgbImage, VitPreprocessor, VitPreprocessorConfig};

use crate::LlavaConfig;

/// Images as squares of one size.
#[derive(Debug, Clone)]
pub struct LlavaPreprocessor {
    squares: VitPreprocessor,
    /// Patches along each side of the square.
    side: usize,
    /// Visual tokens of an image: rows and columns, or one row where they are not the patches.
    tokens: [usize; 2],
}

impl LlavaPreprocessor {
    /// Reads the settings of the image processor, which must make what the tower takes.
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
        let mut squares = read(folder)?;
        if let Some(pad) = options.pad_to_square {
            squares = squares.with_pad_to_square(pad);
        }
        let (size, side) = (config.vision.image_size, config.vision.grid());
        let [height, width] = squares.output_size();
        if [height, width] != [size, size] {
            return Err(FamilyError::ImageSize {
                made: format!("{width}×{height}"),
                wanted: format!("{size}×{size}"),
            });
        }
        Ok(Self {
            squares,
            side,
            tokens: config.token_grid(),
        })
    }

    fn image<'a>(&self, visual: &'a Visual) -> Result<&'a RgbImage, FamilyError> {
        match visual {
            Visual::Image(image) => Ok(image),
            Visual::Video(_) => Err(FamilyError::NoVideos),
        }
    }
}

/// Reads the settings of the image processor.
pub(crate) fn read(folder: &Folder) -> Result<VitPreprocessor, FamilyError> {
    let ProcessorSettings { settings, place } =
        folder.image_processor::<VitPreprocessorConfig>()?;
    settings.resolve().map_err(|error| error.at(place).into())
}

impl Preprocessor for LlavaPreprocessor {
    fn prepare(&self, visual: &Visual) -> Result<(View, Prepared), FamilyError> {
        let image = self.image(visual)?;
        let pixels = self.squares.preprocess(image)?;
        let [height, width] = self.squares.output_size();
        let [h, w] = [self.side; 2];
        let [rows, columns] = self.tokens;
        let view = View {
            original: [image.width(), image.height()],
            resized: [width, height],
            grid: Grid { t: 1, h, w },
            tokens: [1, rows, columns],
            time: None,
            allowed: [width, height],
        };
        Ok((view, Prepared::image(pixels)))
    }

    fn pictures(&self, visual: &Visual, _: &View) -> Result<Vec<RgbImage>, FamilyError> {
        Ok(vec![self.squares.view(self.image(visual)?)?])
    }

    fn picture(&self, _: [usize; 2]) -> Result<Picture, FamilyError> {
        let [height, width] = self.squares.output_size();
        Ok(Picture {
            resized: [width, height],
            patches: self.side * self.side,
            visual_tokens: self.tokens.iter().product(),
        })
    }

    fn geometry(&self, view: &View) -> Geometry {
        self.squares.geometry(view.original)
    }

    fn check(&self, visual: &Visual) -> Result<(), FamilyError> {
        self.image(visual).map(drop)
    }

    fn with_max_pixels(&self, _: usize) -> Option<Arc<dyn Preprocessor>> {
        None
    }
}
