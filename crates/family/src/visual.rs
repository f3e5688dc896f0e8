use std::fmt::Debug;
use std::sync::Arc;

use vision_encoder::{Geometry, Grid, PatchPixels, Pixels, RgbImage};

use crate::{FamilyError, Modality, Picture};

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
        self.tokens.iter().copied().fold(1, usize::saturating_mul)
    }

    /// Whether its visual tokens divide the picture like its patches; else they have no places in it.
    pub fn is_grid(&self) -> bool {
        let [_, rows, columns] = self.tokens;
        let Grid { h, w, .. } = self.grid;
        let merged = h.checked_div(rows).unwrap_or(0);
        merged > 0 && [rows * merged, columns * merged] == [h, w]
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

/// A preprocessed image or video.
#[derive(Debug, Clone)]
pub struct Prepared(pub(crate) Form);

#[derive(Debug, Clone)]
pub(crate) enum Form {
    Image(Pixels),
    Patches(Modality, PatchPixels),
}

impl Prepared {
    /// An image of the size that every image has.
    pub fn image(pixels: Pixels) -> Self {
        Self(Form::Image(pixels))
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> u64 {
        let numbers = match &self.0 {
            Form::Image(pixels) => &pixels.data,
            Form::Patches(_, patches) => &patches.data,
        };
        size_of_val(&numbers[..]) as u64
    }

    /// An image or a video as patches.
    pub fn patches(modality: Modality, patches: PatchPixels) -> Self {
        Self(Form::Patches(modality, patches))
    }
}

/// What a caller asks of preprocessing beyond what the checkpoint says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImageOptions {
    /// Pad images to a square instead of cropping them, as the original LLaVA code does; `None` follows
    /// the checkpoint. For families whose images are all of one size.
    pub pad_to_square: Option<bool>,
    /// Largest area of an image in pixels; `None` is the checkpoint's own limit, but at most
    /// [`DEFAULT_MAX_PIXELS`](vision_encoder::qwen::DEFAULT_MAX_PIXELS). For families that see pictures at
    /// their own size.
    pub max_pixels: Option<usize>,
}

/// A checkpoint's preprocessing of images and videos.
pub trait Preprocessor: Debug + Send + Sync {
    /// Makes what the vision tower takes, and says what became of the visual.
    fn prepare(&self, visual: &Visual) -> Result<(View, Prepared), FamilyError>;

    /// The pictures that the vision tower sees, as `view` says: one of an image, one per time step of
    /// a video.
    fn pictures(&self, visual: &Visual, view: &View) -> Result<Vec<RgbImage>, FamilyError>;

    /// What becomes of a picture of this width and height in pixels.
    fn picture(&self, size: [usize; 2]) -> Result<Picture, FamilyError>;

    /// What of a picture the model sees, and where.
    fn geometry(&self, view: &View) -> Geometry;

    /// Whether the model can look at something of this kind, shape and pace; makes no pixels.
    fn check(&self, visual: &Visual) -> Result<(), FamilyError>;

    /// The same with another limit on the area of a picture; `None` where all are of one size.
    fn with_max_pixels(&self, max_pixels: usize) -> Option<Arc<dyn Preprocessor>>;
}
