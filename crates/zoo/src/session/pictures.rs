use std::sync::Arc;

use burn::tensor::backend::Backend;
use reducers::encoder::Tap;
use sha2::{Digest, Sha256};

use super::recent::Recent;
use crate::vlm::identity;
use crate::{EncoderStep, Prepared, View, Visual, VisualTokens, Vlm, ZooError};

/// What a picture is, how it is preprocessed, which tower sees it, and how it is reduced for what.
pub(super) type PictureKey = [u8; 32];

/// How pictures are seen, and what the tower made of those that were seen last.
pub(super) struct Pictures<B: Backend> {
    seen: Recent<PictureKey, (View, VisualTokens<B>)>,
    /// What all keys have in common: the preprocessing and the tower.
    tower: PictureKey,
}

/// An image or a video of a request.
pub(super) struct Shown {
    pub(super) key: PictureKey,
    pub(super) view: View,
    visual: Arc<Visual>,
    /// Pixels for the tower, unless it has seen them.
    prepared: Option<Prepared>,
    /// What is said beside it.
    text: String,
    /// Whether the key says all that its tokens depend on.
    known: bool,
}

impl Shown {
    /// Bytes of pixels that wait for the tower.
    pub(super) fn waiting_bytes(&self) -> u64 {
        self.prepared.as_ref().map_or(0, Prepared::bytes)
    }

    /// Forgets the pixels: they are made again when they are wanted.
    pub(super) fn forget_pixels(&mut self) {
        self.prepared = None;
    }

    /// Whether its key says all that its tokens depend on.
    pub(super) fn is_known(&self) -> bool {
        self.known
    }
}

impl<B: Backend> Pictures<B> {
    pub(super) fn new(vlm: &Vlm<B>, most_bytes: u64) -> Self {
        let mut hash = Sha256::new();
        hash.update(format!(
            "{:?} {:?}",
            vlm.preprocessor(),
            vlm.config().encoder()
        ));
        Self {
            seen: Recent::new(most_bytes),
            tower: hash.finalize().into(),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.seen.bytes()
    }

    /// Forgets the oldest until no more than so many bytes are left.
    pub(super) fn shrink(&mut self, bytes: u64) {
        self.seen.shrink(bytes);
    }

    /// Preprocesses what the tower has not seen yet. Without `keyed` nobody asks for it again, so that it is
    /// told from no other.
    pub(super) fn show(
        &mut self,
        vlm: &Vlm<B>,
        visual: &Arc<Visual>,
        text: &str,
        step: Option<&EncoderStep<'_, B>>,
        keyed: bool,
    ) -> Result<Shown, ZooError> {
        let (key, known) = match keyed {
            true => self.key(vlm, visual, text, step)?,
            false => (PictureKey::default(), false),
        };
        let seen = self.seen.get(&key).filter(|_| known);
        let (view, prepared) = match seen {
            Some((view, _)) => (view.clone(), None),
            None => {
                let (view, prepared) = vlm.preprocessor().prepare(visual)?;
                (view, Some(prepared))
            }
        };
        Ok(Shown {
            key,
            view,
            prepared,
            known,
            visual: visual.clone(),
            text: text.into(),
        })
    }

    /// The visual tokens of pictures, in order.
    pub(super) fn see(
        &mut self,
        vlm: &Vlm<B>,
        shown: Vec<Shown>,
        step: Option<&EncoderStep<'_, B>>,
    ) -> Result<VisualTokens<B>, ZooError> {
        let mut all = VisualTokens::default();
        for shown in shown {
            all = all.followed_by(self.see_one(vlm, shown, step)?)?;
        }
        Ok(all)
    }

    fn see_one(
        &mut self,
        vlm: &Vlm<B>,
        shown: Shown,
        step: Option<&EncoderStep<'_, B>>,
    ) -> Result<VisualTokens<B>, ZooError> {
        if let Some((_, tokens)) = self.seen.get(&shown.key).filter(|_| shown.known) {
            return Ok(tokens.clone());
        }
        let prepared = match shown.prepared {
            Some(prepared) => prepared,
            // It has been forgotten since.
            None => vlm.preprocessor().prepare(&shown.visual)?.1,
        };
        let views = [shown.view];
        let mut tokens = vlm.see(&views, vec![prepared], &[&shown.text], step)?;
        tokens.features = None;
        let [view] = views;
        if shown.known {
            let bytes = bytes(&tokens);
            self.seen.insert(shown.key, (view, tokens.clone()), bytes);
        }
        Ok(tokens)
    }

    /// The key of a picture, and whether it says everything: of a method of the caller's own nobody knows
    /// what it depends on.
    fn key(
        &self,
        vlm: &Vlm<B>,
        visual: &Visual,
        text: &str,
        step: Option<&EncoderStep<'_, B>>,
    ) -> Result<(PictureKey, bool), ZooError> {
        let mut hash = Sha256::new();
        hash.update(self.tower);
        let frames = match visual {
            Visual::Image(image) => {
                hash.update([0]);
                std::slice::from_ref(image)
            }
            Visual::Video(video) => {
                hash.update([1]);
                hash.update(video.fps.to_bits().to_le_bytes());
                &video.frames[..]
            }
        };
        for frame in frames {
            for side in [frame.width(), frame.height()] {
                hash.update((side as u64).to_le_bytes());
            }
            hash.update(frame.data());
        }
        let mut known = true;
        if let Some(step) = step {
            let (keep, rest, positions) = (step.keep, step.rest, step.positions);
            let name = step.reducer.fingerprint();
            known = name.is_some();
            if !known {
                // Like no other.
                hash.update(identity().to_le_bytes());
            }
            hash.update(format!("{name:?} {keep:?} {rest:?} {positions:?}"));
            let needs = step.reducer.needs(&vlm.config().encoder())?;
            if needs.contains(&Tap::Question) {
                hash.update(text);
            }
        }
        Ok((hash.finalize().into(), known))
    }
}

/// Bytes of visual tokens.
fn bytes<B: Backend>(tokens: &VisualTokens<B>) -> u64 {
    let outputs = [&tokens.images, &tokens.videos].into_iter().flatten();
    let tensors = outputs.flat_map(|output| output.deepstack.iter().chain([&output.tokens]));
    let bytes = tensors.map(|x| {
        let [features, rows] = x.dims();
        (features as u64) * (rows as u64) * x.dtype().size() as u64
    });
    bytes.sum()
}
