use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::backend::Backend;
use reducers::encoder::Tap;
use sha2::{Digest, Sha256};

use super::recent::Recent;
use crate::vlm::identity;
use crate::{EncoderStep, Prepared, View, Visual, VisualTokens, Vlm, ZooError};

/// What a picture is, how it is preprocessed, which tower sees it, and how it is reduced for what.
pub(super) type PictureKey = [u8; 32];

/// Most bytes of pixels that wait for the tower; those beyond are made again when it is their turn.
const MAX_WAITING_BYTES: u64 = 256 << 20;

/// Pictures by their keys: how they are seen, and what the tower made of them.
type Seen<B> = Recent<PictureKey, (View, VisualTokens<B>)>;

/// How pictures are seen, and what the tower made of those that were seen last.
pub(super) struct Pictures<B: Backend> {
    seen: Mutex<Seen<B>>,
    /// What all keys have in common: the preprocessing and the tower.
    tower: PictureKey,
    /// Bytes of pixels that wait for the tower.
    waiting: Arc<AtomicU64>,
}

/// An image or a video of a request.
pub(super) struct Shown {
    pub(super) key: PictureKey,
    pub(super) view: View,
    visual: Arc<Visual>,
    /// Pixels for the tower, unless it has seen them.
    pixels: Option<Pixels>,
    /// What is said beside it.
    text: String,
    /// Whether the key says all that its tokens depend on.
    known: bool,
}

/// Pixels that wait, and count while they do.
struct Pixels {
    prepared: Prepared,
    _counted: Counted,
}

struct Counted {
    bytes: u64,
    waiting: Arc<AtomicU64>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Shown {
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
            seen: Mutex::new(Recent::new(most_bytes)),
            tower: hash.finalize().into(),
            waiting: Arc::default(),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.seen().bytes()
    }

    /// Forgets the oldest until no more than so many bytes are left.
    pub(super) fn shrink(&self, bytes: u64) {
        self.seen().shrink(bytes);
    }

    /// Nothing of a caller's runs under the lock, so that it is whole whatever has panicked.
    fn seen(&self) -> MutexGuard<'_, Seen<B>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Preprocesses what the tower has not seen yet. Without `keyed` nobody asks for it again, so that it is
    /// told from no other.
    pub(super) fn show(
        &self,
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
        let seen = known.then(|| self.seen().get(&key).map(|(view, _)| view.clone()));
        let (view, pixels) = match seen.flatten() {
            Some(view) => (view, None),
            None => {
                let (view, prepared) = vlm.preprocessor().prepare(visual)?;
                (view, self.wait(prepared))
            }
        };
        Ok(Shown {
            key,
            view,
            pixels,
            known,
            visual: visual.clone(),
            text: text.into(),
        })
    }

    /// Pixels that wait, unless too many do.
    fn wait(&self, prepared: Prepared) -> Option<Pixels> {
        let (bytes, waiting) = (prepared.bytes(), self.waiting.clone());
        let before = waiting.fetch_add(bytes, Ordering::Relaxed);
        let _counted = Counted { bytes, waiting };
        let pixels = Pixels { prepared, _counted };
        (before.saturating_add(bytes) <= MAX_WAITING_BYTES).then_some(pixels)
    }

    /// The visual tokens of a picture, whose pixels are then forgotten.
    pub(super) fn see(
        &self,
        vlm: &Vlm<B>,
        shown: &mut Shown,
        step: Option<&EncoderStep<'_, B>>,
    ) -> Result<VisualTokens<B>, ZooError> {
        let pixels = shown.pixels.take();
        let seen = { shown.known }.then(|| self.seen().get(&shown.key).cloned());
        if let Some((_, tokens)) = seen.flatten() {
            return Ok(tokens);
        }
        let prepared = match pixels {
            Some(pixels) => pixels.prepared,
            // It has been forgotten since.
            None => vlm.preprocessor().prepare(&shown.visual)?.1,
        };
        let views = [shown.view.clone()];
        let mut tokens = vlm.see(&views, vec![prepared], &[&shown.text], step)?;
        tokens.features = None;
        let [view] = views;
        if shown.known {
            let bytes = bytes(&tokens);
            self.seen().insert(shown.key, (view, tokens.clone()), bytes);
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
