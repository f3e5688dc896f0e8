use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reducers::Positions;
use reroute_checkpoint::{CONFIG_MAX_BYTES, Folder};
use vision_encoder::qwen::{
    Grid, QwenPixels, QwenPreprocessor, QwenPreprocessorConfig, QwenTowerConfig, QwenVisionOutput,
    pack,
};
use vision_encoder::{
    Canvas, ClipPreprocessor, ClipPreprocessorConfig, Geometry, Pixels as ClipPixels, RgbImage,
    Window, resize_bicubic, to_tensor,
};

use crate::messages::patch_seconds;
use crate::reduction::Kept;
use crate::{ModelConfig, OpenOptions, ZooError};

/// Something to look at.
#[derive(Debug, Clone)]
pub enum Visual {
    /// A picture.
    Image(RgbImage),
    /// Pictures in time.
    Video(Video),
}

/// The frames of a video, all of one size, as many as the model shall see.
#[derive(Debug, Clone)]
pub struct Video {
    /// In order of time.
    pub frames: Vec<RgbImage>,
    /// How many of these frames make a second.
    pub fps: f64,
}

/// How the model sees a visual.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// Width and height as given, in pixels.
    pub original: [usize; 2],
    /// Width and height that the vision tower sees, in pixels.
    pub resized: [usize; 2],
    /// Time steps, rows and columns of patches.
    pub grid: Grid,
    /// Time steps, rows and columns of visual tokens.
    pub tokens: [usize; 3],
    /// When it happens, if it is a video.
    pub time: Option<VideoTime>,
    /// Width and height that the checkpoint's own limits would have left it, in pixels.
    pub allowed: [usize; 2],
}

/// When the time steps of a video happen.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoTime {
    /// Middle of each step, in seconds from the start.
    pub seconds: Vec<f64>,
    /// From one step to the next, in seconds.
    pub seconds_per_step: f64,
}

impl View {
    /// Number of its visual tokens.
    pub fn token_count(&self) -> usize {
        self.tokens.iter().product()
    }

    /// What `max_pixels` took from it, for people to read.
    pub fn notice(&self) -> Option<String> {
        let [width, height] = self.original;
        let [seen_width, seen_height] = self.resized;
        let [allowed_width, allowed_height] = self.allowed;
        (self.resized != self.allowed).then(|| {
            format!(
                "{width}×{height} pixels resized to {seen_width}×{seen_height}, which are {} visual \
                 tokens; without max_pixels the checkpoint would see {allowed_width}×{allowed_height}",
                self.token_count()
            )
        })
    }
}

/// A checkpoint's preprocessing of images and videos.
#[derive(Debug, Clone)]
pub enum Preprocessor {
    /// LLaVA-1.5: squares of one size.
    Clip {
        /// Resizing and normalisation.
        preprocessor: ClipPreprocessor,
        /// Patches along each side of the square.
        grid: usize,
    },
    /// Qwen-VL: whole patches, as many as the picture has.
    Qwen {
        /// Resizing and normalisation.
        preprocessor: QwenPreprocessor,
        /// The vision tower.
        tower: Box<QwenTowerConfig>,
    },
}

/// A preprocessed image or video.
#[derive(Debug, Clone)]
pub struct Prepared(Pixels);

#[derive(Debug, Clone)]
enum Pixels {
    Square(ClipPixels),
    Image(QwenPixels),
    Video(QwenPixels),
}

impl Preprocessor {
    /// Reads and checks `preprocessor_config.json`.
    pub(crate) fn open(
        folder: &Folder,
        config: &ModelConfig,
        options: &OpenOptions,
    ) -> Result<Self, ZooError> {
        const NAME: &str = "preprocessor_config.json";
        const VIDEO_NAME: &str = "video_preprocessor_config.json";
        if options.max_pixels == Some(0) {
            return Err(ZooError::NoPixels);
        }
        match config {
            ModelConfig::Llava(_) if options.max_pixels.is_some() => Err(ZooError::Option {
                option: "max_pixels",
                meant: "Qwen-VL",
                instead: "sees every picture at one size",
            }),
            ModelConfig::Qwen(_) if options.pad_to_square == Some(true) => Err(ZooError::Option {
                option: "pad_to_square",
                meant: "LLaVA",
                instead: "sees every picture whole, at its own shape",
            }),
            ModelConfig::Llava(config) => {
                let file: ClipPreprocessorConfig = folder.read_json(NAME, CONFIG_MAX_BYTES)?;
                let mut preprocessor = file.resolve()?;
                if let Some(pad) = options.pad_to_square {
                    preprocessor = preprocessor.with_pad_to_square(pad);
                }
                let (size, grid) = (config.vision.image_size, config.vision.grid());
                let [height, width] = preprocessor.output_size();
                if [height, width] != [size, size] {
                    return Err(ZooError::ImageSize {
                        made: format!("{width}×{height}"),
                        wanted: format!("{size}×{size}"),
                    });
                }
                Ok(Self::Clip { preprocessor, grid })
            }
            ModelConfig::Qwen(config) => {
                let file: QwenPreprocessorConfig = folder.read_json(NAME, CONFIG_MAX_BYTES)?;
                let videos: Option<QwenPreprocessorConfig> = match folder.has(VIDEO_NAME) {
                    true => Some(folder.read_json(VIDEO_NAME, CONFIG_MAX_BYTES)?),
                    false => None,
                };
                let mut preprocessor = file.resolve(videos.as_ref(), &config.vision)?;
                if let Some(max_pixels) = options.max_pixels {
                    preprocessor = preprocessor.with_max_pixels(max_pixels);
                }
                let tower = Box::new(config.vision.clone());
                Ok(Self::Qwen {
                    preprocessor,
                    tower,
                })
            }
        }
    }

    /// Makes what the vision tower takes, and says what became of the visual.
    pub fn prepare(&self, visual: &Visual) -> Result<(View, Prepared), ZooError> {
        match (self, visual) {
            (Self::Clip { preprocessor, grid }, Visual::Image(image)) => {
                let pixels = preprocessor.preprocess(image)?;
                let [height, width] = preprocessor.output_size();
                let [t, h, w] = [1, *grid, *grid];
                let view = View {
                    original: [image.width(), image.height()],
                    resized: [width, height],
                    grid: Grid { t, h, w },
                    tokens: [t, h, w],
                    time: None,
                    allowed: [width, height],
                };
                Ok((view, Prepared(Pixels::Square(pixels))))
            }
            (Self::Clip { .. }, Visual::Video(_)) => Err(ZooError::NoVideos),
            (Self::Qwen { preprocessor, .. }, Visual::Image(image)) => {
                let pixels = preprocessor.image(image)?;
                let view = self.view(&pixels, None);
                Ok((view, Prepared(Pixels::Image(pixels))))
            }
            (
                Self::Qwen {
                    preprocessor,
                    tower,
                },
                Visual::Video(Video { frames, fps }),
            ) => {
                let pixels = preprocessor.video(frames)?;
                let numbers: Vec<usize> = (0..frames.len()).collect();
                let steps = tower.temporal_patch_size;
                let time = VideoTime {
                    seconds: patch_seconds(&numbers, *fps, steps)?,
                    seconds_per_step: steps as f64 / fps,
                };
                let view = self.view(&pixels, Some(time));
                Ok((view, Prepared(Pixels::Video(pixels))))
            }
        }
    }

    /// The pictures that the vision tower sees, as `view` says: one of an image, one per time step of
    /// a video.
    pub fn pictures(&self, visual: &Visual, view: &View) -> Result<Vec<RgbImage>, ZooError> {
        let [width, height] = view.resized;
        let (x, y) = (0..width, 0..height);
        let window = Window { x, y };
        let resize = |image: &RgbImage| resize_bicubic(&Canvas::of(image), width, height, &window);
        match (self, visual) {
            (Self::Clip { preprocessor, .. }, Visual::Image(image)) => {
                Ok(vec![preprocessor.view(image)?])
            }
            (Self::Clip { .. }, Visual::Video(_)) => Err(ZooError::NoVideos),
            (Self::Qwen { .. }, Visual::Image(image)) => Ok(vec![resize(image)?]),
            (Self::Qwen { tower, .. }, Visual::Video(Video { frames, .. })) => {
                let firsts = frames.iter().step_by(tower.temporal_patch_size);
                Ok(firsts.map(resize).collect::<Result<_, _>>()?)
            }
        }
    }

    /// What of a picture the model sees, and where.
    pub fn geometry(&self, view: &View) -> Geometry {
        match self {
            Self::Clip { preprocessor, .. } => preprocessor.geometry(view.original),
            Self::Qwen { .. } => Geometry::whole(view.original),
        }
    }

    fn view(&self, pixels: &QwenPixels, time: Option<VideoTime>) -> View {
        let Grid { t, h, w } = pixels.grid;
        let merge = match self {
            Self::Clip { .. } => 1,
            Self::Qwen { tower, .. } => tower.spatial_merge_size,
        };
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

/// Pixels as a vision tower takes them.
#[derive(Debug, Clone)]
pub enum PixelTensors<B: Backend> {
    /// None at all.
    Nothing,
    /// LLaVA-1.5: `[images, 3, height, width]`.
    Squares(Tensor<B, 4>),
    /// Qwen-VL: `[features, patches]`, and the patches of each image or video.
    Patches {
        /// Images, in order of appearance.
        images: Option<(Tensor<B, 2>, Vec<Grid>)>,
        /// Videos, in order of appearance.
        videos: Option<(Tensor<B, 2>, Vec<Grid>)>,
    },
}

impl<B: Backend> PixelTensors<B> {
    /// Puts preprocessed visuals together, images and videos apart.
    pub fn of(prepared: Vec<Prepared>, device: &B::Device) -> Result<Self, ZooError> {
        let (mut squares, mut images, mut videos) = (Vec::new(), Vec::new(), Vec::new());
        for Prepared(pixels) in prepared {
            match pixels {
                Pixels::Square(pixels) => squares.push(pixels),
                Pixels::Image(pixels) => images.push(pixels),
                Pixels::Video(pixels) => videos.push(pixels),
            }
        }
        if !squares.is_empty() {
            return Ok(Self::Squares(to_tensor(&squares, device)?));
        }
        if images.is_empty() && videos.is_empty() {
            return Ok(Self::Nothing);
        }
        let pack = |pixels: Vec<QwenPixels>| {
            let packed = (!pixels.is_empty()).then(|| pack(pixels, device));
            packed.transpose()
        };
        Ok(Self::Patches {
            images: pack(images)?,
            videos: pack(videos)?,
        })
    }

    /// The pixels in another type.
    pub fn cast(self, dtype: DType) -> Self {
        let cast = |patches: Option<(Tensor<B, 2>, Vec<Grid>)>| {
            patches.map(|(patches, grids)| (patches.cast(dtype), grids))
        };
        match self {
            Self::Nothing => Self::Nothing,
            Self::Squares(pixels) => Self::Squares(pixels.cast(dtype)),
            Self::Patches { images, videos } => Self::Patches {
                images: cast(images),
                videos: cast(videos),
            },
        }
    }

    /// Patches of every image and of every video.
    pub(crate) fn grids(&self) -> [&[Grid]; 2] {
        let Self::Patches { images, videos } = self else {
            return [&[], &[]];
        };
        [images, videos].map(|patches| patches.as_ref().map_or(&[][..], |(_, grids)| grids))
    }

    pub(crate) fn describe(&self) -> &'static str {
        match self {
            Self::Nothing => "missing",
            Self::Squares(_) => "squares [images, 3, height, width]",
            Self::Patches { .. } => "patches [patches, features] with their grids",
        }
    }
}

/// What a vision tower made of images and videos.
#[derive(Debug, Clone)]
pub struct VisualTokens<B: Backend> {
    /// LLaVA-1.5: the features before the projector, `[vision hidden_size, rows]`.
    pub features: Option<Tensor<B, 2>>,
    /// Visual tokens of images, in order of appearance.
    pub images: Option<QwenVisionOutput<B>>,
    /// Visual tokens of videos, in order of appearance.
    pub videos: Option<QwenVisionOutput<B>>,
    /// What a reduction left of them; `None` if there was none.
    pub left: Option<Leftover>,
}

/// What a reduction before the decoder left of images and videos.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Leftover {
    /// Of each image, in order of appearance.
    pub images: Vec<Kept>,
    /// Of each video, in order of appearance.
    pub videos: Vec<Kept>,
    /// The positions of what is left.
    pub positions: Positions,
}

impl<B: Backend> Default for VisualTokens<B> {
    fn default() -> Self {
        Self {
            features: None,
            images: None,
            videos: None,
            left: None,
        }
    }
}

impl<B: Backend> VisualTokens<B> {
    /// These tokens, then those.
    pub(crate) fn followed_by(self, more: Self) -> Self {
        let cat = |a: Tensor<B, 2>, b: Tensor<B, 2>| Tensor::cat(vec![a, b], 1);
        let join = |a: Option<QwenVisionOutput<B>>, b: Option<QwenVisionOutput<B>>| match (a, b) {
            (Some(a), Some(b)) => Some(QwenVisionOutput {
                tokens: cat(a.tokens, b.tokens),
                deepstack: a
                    .deepstack
                    .into_iter()
                    .zip(b.deepstack)
                    .map(|(a, b)| cat(a, b))
                    .collect(),
            }),
            (a, b) => a.or(b),
        };
        let left = match (self.left, more.left) {
            (Some(a), Some(b)) => Some(Leftover {
                images: [a.images, b.images].concat(),
                videos: [a.videos, b.videos].concat(),
                positions: b.positions,
            }),
            (a, b) => a.or(b),
        };
        Self {
            features: None,
            images: join(self.images, more.images),
            videos: join(self.videos, more.videos),
            left,
        }
    }
}
