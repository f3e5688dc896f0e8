/// What can be wrong with an image, its preprocessing or a vision tower's configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VisionError {
    /// A tower's configuration contradicts itself.
    #[error("config.json: {0}")]
    Config(String),
    /// A preprocessor's configuration asks for something unknown or impossible.
    #[error("preprocessor_config.json: {0}")]
    Preprocessor(String),
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
    /// Images of different size in one tensor.
    #[error("images of one batch must have the same size after preprocessing")]
    MixedSizes,
}
