use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use vision_encoder::{Grid, to_tensor};

use crate::visual::{Form, Prepared};
use crate::{FamilyError, Modality};

/// Pixels of images, or of videos, as a vision tower takes them.
#[derive(Debug, Clone)]
pub enum Pictures<B: Backend> {
    /// Images of one size, `[images, 3, height, width]`.
    Fixed(Tensor<B, 4>),
    /// Patches of pictures of any size, `[features, patches]`, and how those of each are arranged.
    Patches(Tensor<B, 2>, Vec<Grid>),
}

impl<B: Backend> Pictures<B> {
    /// The pixels in another type.
    pub fn cast(self, dtype: DType) -> Self {
        match self {
            Self::Fixed(pixels) => Self::Fixed(pixels.cast(dtype)),
            Self::Patches(patches, grids) => Self::Patches(patches.cast(dtype), grids),
        }
    }

    /// How the patches of each picture are arranged; empty where all are of one size.
    pub fn grids(&self) -> &[Grid] {
        match self {
            Self::Fixed(_) => &[],
            Self::Patches(_, grids) => grids,
        }
    }

    /// The form, for messages.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::Fixed(_) => "squares [images, 3, height, width]",
            Self::Patches(..) => "patches [patches, features] with their grids",
        }
    }
}

/// Pixels of all images and of all videos of a call.
#[derive(Debug, Clone)]
pub struct PixelTensors<B: Backend> {
    /// Images, in order of appearance.
    pub images: Option<Pictures<B>>,
    /// Videos, in order of appearance.
    pub videos: Option<Pictures<B>>,
}

impl<B: Backend> Default for PixelTensors<B> {
    fn default() -> Self {
        let (images, videos) = (None, None);
        Self { images, videos }
    }
}

impl<B: Backend> PixelTensors<B> {
    /// Images alone.
    pub fn images(pictures: Pictures<B>) -> Self {
        Self {
            images: Some(pictures),
            videos: None,
        }
    }

    /// Puts preprocessed visuals together, images and videos apart.
    pub fn of(prepared: Vec<Prepared>, device: &B::Device) -> Result<Self, FamilyError> {
        let (mut fixed, mut images, mut videos) = (Vec::new(), Vec::new(), Vec::new());
        for Prepared(form) in prepared {
            match form {
                Form::Image(pixels) => fixed.push(pixels),
                Form::Patches(Modality::Image, patches) => images.push(patches),
                Form::Patches(Modality::Video, patches) => videos.push(patches),
            }
        }
        let pack = |pixels: Vec<_>| {
            let packed = (!pixels.is_empty()).then(|| vision_encoder::pack(pixels, device));
            let packed = packed.transpose()?;
            Ok::<_, FamilyError>(packed.map(|(patches, grids)| Pictures::Patches(patches, grids)))
        };
        if !(fixed.is_empty() || images.is_empty()) {
            return Err(FamilyError::WrongPixels {
                given: "squares and patches together",
                wanted: "one of them",
            });
        }
        let images = match fixed.is_empty() {
            true => pack(images)?,
            false => Some(Pictures::Fixed(to_tensor(&fixed, device)?)),
        };
        let videos = pack(videos)?;
        Ok(Self { images, videos })
    }

    /// The pixels in another type.
    pub fn cast(self, dtype: DType) -> Self {
        Self {
            images: self.images.map(|pictures| pictures.cast(dtype)),
            videos: self.videos.map(|pictures| pictures.cast(dtype)),
        }
    }

    /// Those of a modality.
    pub fn of_modality(&self, modality: Modality) -> Option<&Pictures<B>> {
        match modality {
            Modality::Image => self.images.as_ref(),
            Modality::Video => self.videos.as_ref(),
        }
    }
}
