/// What can be wrong with an image, its preprocessing or a vision tower's configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VisionError {
    /// A tower was called on no image.
    #[error("there are no images; leave them out of the call, or give at least one")]
    NoImages,
    /// A tower's configuration contradicts itself.
    #[error("config.json: {0}")]
    Config(String),
    /// A preprocessor's configuration asks for something unknown or impossible.
    #[error("{place}: {reason}")]
    Preprocessor {
        /// The file, or the part of one, that says so.
        place: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Pixels of the wrong size.
    #[error(
        "pixel values are {found:?} (channels, height, width), the vision tower takes {expected:?}: \
         preprocess with the checkpoint's own preprocessor_config.json"
    )]
    PixelShape {
        /// What the tower takes.
        expected: [usize; 3],
        /// What was given.
        found: [usize; 3],
    },
    /// Patches and grids that do not belong together.
    #[error("{0}")]
    Patches(String),
    /// The bytes are no image that can be read.
    #[error("this is no PNG, JPEG or WebP image; convert it to one of these")]
    Format,
    /// The image file is damaged.
    #[error("the image cannot be decoded: {source}; the file is damaged or cut off")]
    Decode {
        /// The decoder's error.
        #[source]
        source: image::ImageError,
    },
    /// The image is larger than the limits allow.
    #[error(
        "the image is {width}×{height} pixels; at most {max_pixels} pixels are read, scale it down"
    )]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Most pixels that are read.
        max_pixels: u64,
    },
    /// A side of the image is longer than the limits allow.
    #[error(
        "the image is {width}×{height} pixels; sides of at most {max_side} pixels are read, scale \
         it down or cut it into pieces"
    )]
    TooLong {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Longest side that is read, in pixels.
        max_side: u32,
    },
    /// Decoding the image would take more memory than the limits allow.
    #[error("the image takes more than {max_bytes} bytes to decode; scale it down")]
    TooManyBytes {
        /// Most bytes that decoding may allocate.
        max_bytes: u64,
    },
    /// A picture is too long and thin to be resized.
    #[error(
        "a picture of {width}×{height} pixels is more than 200 times as long as it is short; cut it \
         into pieces"
    )]
    AspectRatio {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
    },
    /// A video without pictures.
    #[error("a video needs at least one frame")]
    NoFrames,
    /// Pictures of one video differ in size.
    #[error(
        "frame {frame} is {} pixels, the frames before it {}; the frames of a video must have one \
         size",
        times(found),
        times(expected)
    )]
    MixedFrames {
        /// Index of the frame.
        frame: usize,
        /// Its width and height in pixels.
        found: [usize; 2],
        /// Width and height of the first frame in pixels.
        expected: [usize; 2],
    },
    /// A video has more pixels than fit.
    #[error(
        "{frames} frames of {} pixels are more than {max_pixels} pixels in all; take fewer frames, \
         or fewer pixels of each by a smaller max_pixels",
        times(resized)
    )]
    TooManyFrames {
        /// Number of frames.
        frames: usize,
        /// Width and height of each after resizing, in pixels.
        resized: [usize; 2],
        /// Most pixels of all frames together.
        max_pixels: usize,
    },
    /// Data of an image does not fit its size, or the size is zero.
    #[error("{bytes} bytes are no RGB image of {width}×{height} pixels")]
    ImageData {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// Bytes given.
        bytes: usize,
    },
    /// A resize that cannot be done.
    #[error("the picture cannot be resized: {0}")]
    Resize(String),
    /// Images of different size in one tensor.
    #[error("images of one batch must have the same size after preprocessing")]
    MixedSizes,
}

/// Width × height.
fn times([width, height]: &[usize; 2]) -> String {
    format!("{width}×{height}")
}

impl VisionError {
    /// What is wrong with settings of a preprocessor, wherever they are.
    pub(crate) fn preprocessor(reason: impl Into<String>) -> Self {
        Self::Preprocessor {
            place: "preprocessor_config.json",
            reason: reason.into(),
        }
    }

    /// The same of settings that were found at this place.
    pub fn at(self, place: &'static str) -> Self {
        match self {
            Self::Preprocessor { reason, .. } => Self::Preprocessor { place, reason },
            other => other,
        }
    }
}
