use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use reducers::encoder::Tap;
use vision_encoder::VisionOutput;

use crate::reduction::{EncoderStep, KeptTokens, KeptVisuals, reduce};
use crate::{FamilyConfig, FamilyError, FamilyModel, Look, Pictures, PixelTensors};

/// What a vision tower made of images and videos.
#[derive(Debug, Clone)]
pub struct VisualTokens<B: Backend> {
    /// The features of images before the projector, `[vision hidden_size, rows]`, where there is one.
    pub features: Option<Tensor<B, 2>>,
    /// Visual tokens of images, in order of appearance.
    pub images: Option<VisionOutput<B>>,
    /// Visual tokens of videos, in order of appearance.
    pub videos: Option<VisionOutput<B>>,
    /// What a reduction kept of them; `None` if there was none.
    pub kept: Option<KeptVisuals>,
}

impl<B: Backend> Default for VisualTokens<B> {
    fn default() -> Self {
        Self {
            features: None,
            images: None,
            videos: None,
            kept: None,
        }
    }
}

impl<B: Backend> VisualTokens<B> {
    /// These tokens, then those.
    ///
    /// # Errors
    /// [`FamilyError::OtherTokens`] for tokens of another model.
    pub fn followed_by(self, more: Self) -> Result<Self, FamilyError> {
        let kept = match (self.kept, more.kept) {
            (Some(a), Some(b)) => Some(a.followed_by(b)),
            (a, b) => a.or(b),
        };
        Ok(Self {
            features: None,
            images: join(self.images, more.images)?,
            videos: join(self.videos, more.videos)?,
            kept,
        })
    }
}

/// The tokens of both, side by side.
fn join<B: Backend>(
    a: Option<VisionOutput<B>>,
    b: Option<VisionOutput<B>>,
) -> Result<Option<VisionOutput<B>>, FamilyError> {
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (a, b) => return Ok(a.or(b)),
    };
    let form = |x: &VisionOutput<B>| {
        let layers = x.deepstack.iter().chain([&x.tokens]);
        let layers = layers.map(|layer| (layer.dims()[0], layer.dtype()));
        layers.collect::<Vec<_>>()
    };
    if form(&a) != form(&b) {
        return Err(FamilyError::OtherTokens);
    }
    let cat = |a: Tensor<B, 2>, b: Tensor<B, 2>| Tensor::cat(vec![a, b], 1);
    let deepstack = a.deepstack.into_iter().zip(b.deepstack);
    Ok(Some(VisionOutput {
        tokens: cat(a.tokens, b.tokens),
        deepstack: deepstack.map(|(a, b)| cat(a, b)).collect(),
    }))
}

/// Visual tokens of preprocessed images and videos; with a `step`, every picture reduced by itself.
///
/// `questions` are embeddings `[hidden_size, tokens]` of the text asked about each image, and about
/// each video, for methods that want to see it ([`Tap::Question`]).
pub fn see<B: Backend, M: FamilyModel<B>>(
    model: &M,
    pixels: PixelTensors<B>,
    step: Option<&EncoderStep<'_, B>>,
    questions: [Vec<Tensor<B, 2>>; 2],
) -> Result<VisualTokens<B>, FamilyError> {
    let needs = match step {
        Some(step) => {
            model.config().check_reducible()?;
            step.reducer.needs(&model.config().encoder())?
        }
        None => Vec::new(),
    };
    let [of_images, of_videos] = questions;
    let images = of_kind(model, pixels.images, step, &needs, of_images)?;
    let videos = of_kind(model, pixels.videos, step, &needs, of_videos)?;
    let reduced = step.filter(|_| images.is_some() || videos.is_some());
    let of = |seen: &Option<Of<B>>| seen.as_ref().map(|seen| seen.kept.clone());
    let kept = reduced.map(|step| KeptVisuals {
        images: of(&images).unwrap_or_default(),
        videos: of(&videos).unwrap_or_default(),
        positions: step.positions,
    });
    Ok(VisualTokens {
        features: images.as_ref().and_then(|seen| seen.features.clone()),
        images: images.map(|seen| seen.output),
        videos: videos.map(|seen| seen.output),
        kept,
    })
}

/// What became of all images, or of all videos.
struct Of<B: Backend> {
    features: Option<Tensor<B, 2>>,
    output: VisionOutput<B>,
    kept: Vec<KeptTokens>,
}

fn of_kind<B: Backend, M: FamilyModel<B>>(
    model: &M,
    pictures: Option<Pictures<B>>,
    step: Option<&EncoderStep<'_, B>>,
    needs: &[Tap],
    questions: Vec<Tensor<B, 2>>,
) -> Result<Option<Of<B>>, FamilyError> {
    let Some(pictures) = pictures else {
        return Ok(None);
    };
    let mut look = model.look(pictures, needs)?;
    look.check()?;
    if needs.contains(&Tap::Question) && questions.len() != look.grids.len() {
        return Err(FamilyError::Questions {
            questions: questions.len(),
            pictures: look.grids.len(),
        });
    }
    let mut kept = Vec::new();
    let features = match step {
        Some(step) => {
            let reduced = reduce(&look, &questions, step, model.config().encoder())?;
            look.deepstack = reduced.deepstack;
            kept = reduced.kept;
            Some(reduced.features)
        }
        None => look.taps.remove(&Tap::Features),
    };
    let features = features.ok_or(reducers::ReducerError::NotSeen { tap: Tap::Features })?;
    let Look { deepstack, .. } = look;
    let (features, tokens) = match model.project(&features) {
        Some(tokens) => (Some(features), tokens),
        None => (None, features),
    };
    let output = VisionOutput { tokens, deepstack };
    Ok(Some(Of {
        features,
        output,
        kept,
    }))
}
