//! What an answer needs, and what to change where it does not fit.

use burn::tensor::DType;
use reducers::{Cost, KvType, Schedule, presets};
use reroute_zoo::{Memory, ModelConfig, Parameters, Picture, Preprocessor, ZooError};

use super::name;
use crate::backend::{self, Adapter};

/// Fewest pixels of a picture, and fewest tokens of question and answer, that are worth advising.
pub(super) const LEAST_PIXELS: usize = 56 * 56;
pub(super) const LEAST_TEXT: usize = 64;

/// What the program and each of its threads take more once they compute, in bytes: stacks, and the
/// allocator's own pages. Measured.
const RUNNING: u64 = 10 << 20;
const THREAD: u64 = 256 << 10;

/// Which share of the program's file is code that is first touched then, one of so many. Measured with
/// files of 38, 47 and 52 MB: 8.7, 10.9 and 11.3 MB.
const CODE: u64 = 4;

/// What a program that has read everything but the weights, and takes `own` bytes, takes while it
/// computes.
pub(super) fn computing(own: u64) -> u64 {
    let file = std::env::current_exe().and_then(std::fs::metadata);
    let code = file.map_or(0, |file| file.len() / CODE);
    own + code + RUNNING + rayon::current_num_threads() as u64 * THREAD
}

/// Memory that a routing needs, in bytes.
pub(super) struct Need {
    pub(super) routing: String,
    pub(super) weights: u64,
    pub(super) kv: u64,
    pub(super) activations: u64,
    /// The program itself.
    pub(super) program: u64,
    /// The largest of the tensors that an operation takes.
    pub(super) largest: u64,
}

impl Need {
    /// All of it but the largest tensor, which is part of it.
    pub(super) fn total(&self) -> u64 {
        let parts = [self.weights, self.kv, self.activations, self.program];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// What an answer is reckoned for.
#[derive(Clone, Copy)]
pub(super) struct Answer<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) parameters: Parameters,
    pub(super) preprocessor: &'a dyn Preprocessor,
    pub(super) image_size: [usize; 2],
    pub(super) text_tokens: usize,
    pub(super) dtype: DType,
    /// The type of keys and values, if it is not this.
    pub(super) kv: Option<KvType>,
    /// What the program itself takes, in bytes.
    pub(super) program: u64,
    /// See [`reroute_zoo::ImageOptions::max_pixels`].
    pub(super) max_pixels: Option<usize>,
}

impl Answer<'_> {
    /// Whether the model sees pictures at their own size.
    pub(super) fn takes_any_size(&self) -> bool {
        self.preprocessor.with_max_pixels(LEAST_PIXELS).is_some()
    }

    /// The picture as the model would see it.
    pub(super) fn picture(&self) -> Result<Picture, ZooError> {
        let most = self.max_pixels;
        let bounded = most.and_then(|most| self.preprocessor.with_max_pixels(most));
        let preprocessor = bounded.as_deref().unwrap_or(self.preprocessor);
        Ok(preprocessor.picture(self.image_size)?)
    }

    /// Bytes of the keys and values of a dense answer in every type.
    pub(super) fn kv_bytes(&self) -> Vec<(KvType, u64)> {
        let visual = self.picture().map_or(0, |picture| picture.visual_tokens);
        let (shape, dense) = (self.config.decoder().shape(), Schedule::dense());
        let cost = |kv| Cost::of(&shape, &dense, visual, self.text_tokens, kv);
        KvType::ALL.map(|kv| (kv, cost(kv).total_kv_bytes())).into()
    }

    /// What the dense model and every preset need; `dense` is the first. Nothing for a picture that
    /// cannot be seen.
    pub(super) fn needs(&self) -> Vec<Need> {
        let Ok(picture) = self.picture() else {
            return Vec::new();
        };
        let (depth, encoder) = (self.config.decoder().num_layers, self.config.encoder());
        let presets = presets::presets().filter(|preset| !preset.exact);
        // Those that work with this model, and leave the reduction to the decoder.
        let schedules = presets.filter_map(|preset| {
            let plan = preset.plan(depth, &encoder).ok()?;
            (plan.encoder.is_none()).then(|| (preset.name.clone(), plan.schedule))
        });
        let kv = self.kv.unwrap_or(self.dtype.into());
        let need = |(routing, schedule): (String, Schedule)| {
            let numbers = backend::numbers(self.dtype);
            let text = self.text_tokens;
            let memory = Memory::of(&**self.config, &picture, text, &schedule, numbers, kv);
            let weight = tensor_bytes(self.parameters.largest_elements, self.dtype);
            let adapters = tensor_bytes(self.parameters.adapter_elements, DType::F32);
            let weights = self.parameters.bytes(self.dtype.size());
            let weights = weights.saturating_add(adapters);
            // What the allocator keeps of the memory that weights were read into and converted in, and
            // a hundredth between them.
            let kept = match backend::ON_HOST {
                true => weight.saturating_mul(2).saturating_add(weights / 100),
                false => 0,
            };
            Need {
                routing,
                weights,
                kv: memory.kv,
                activations: memory.activations.saturating_add(kept),
                program: self.program,
                largest: memory.largest.max(weight),
            }
        };
        schedules.map(need).collect()
    }

    /// What makes the answer fit, losing as little as possible: another routing, a smaller one of the
    /// types that the adapter computes in, fewer pixels, fewer tokens of text, in this order.
    pub(super) fn remedy(&self, adapter: &Adapter, dtypes: &[DType]) -> Option<String> {
        let fits = |need: &Need| {
            let (free, most) = (adapter.available_bytes, adapter.largest_binding_bytes);
            free.is_none_or(|free| need.total() <= free)
                && most.is_none_or(|most| need.largest <= most)
        };
        let halved = |n: usize, least: usize| {
            std::iter::successors(Some(n), move |n| Some(n / 2).filter(|&n| n >= least))
        };
        let halves = [DType::F16, DType::BF16].into_iter();
        let halves =
            halves.filter(|dtype| dtype.size() < self.dtype.size() && dtypes.contains(dtype));
        let dtypes: Vec<DType> = std::iter::once(self.dtype).chain(halves).collect();
        let areas: Vec<Option<usize>> = match self.picture() {
            Ok(Picture {
                resized: [w, h], ..
            }) if self.takes_any_size() => {
                let fewer = halved(w * h, LEAST_PIXELS).skip(1).map(Some);
                std::iter::once(self.max_pixels).chain(fewer).collect()
            }
            _ => vec![self.max_pixels],
        };
        let positions = self.config.decoder().context().0;
        for text_tokens in halved(self.text_tokens.min(positions), LEAST_TEXT) {
            for &max_pixels in &areas {
                for &dtype in &dtypes {
                    let other = Answer {
                        text_tokens,
                        max_pixels,
                        dtype,
                        ..*self
                    };
                    let needs = other.needs();
                    if let Some(need) = needs.iter().find(|need| fits(need)) {
                        return Some(other.instead_of(self, &need.routing));
                    }
                }
            }
        }
        None
    }

    /// What to do to get this answer instead of another.
    fn instead_of(&self, other: &Self, routing: &str) -> String {
        let mut flags = Vec::new();
        if self.dtype != other.dtype {
            flags.push(format!("--dtype {}", name(self.dtype)));
        }
        if let Some(most) = self.max_pixels
            && self.max_pixels != other.max_pixels
        {
            flags.push(format!("--max-pixels {most}"));
        }
        if routing != "dense" {
            flags.push(format!("--routing {routing}"));
        }
        let flags = (!flags.is_empty()).then(|| format!("use {}", flags.join(" ")));
        let text = (self.text_tokens != other.text_tokens).then(|| less_text(self.text_tokens));
        let both: Vec<String> = flags.into_iter().chain(text).collect();
        both.join(", and ")
    }
}

/// What to do for no more tokens of text.
pub(super) fn less_text(tokens: usize) -> String {
    format!("keep question and answer to {tokens} tokens (--max-new-tokens)")
}

/// Bytes of so many numbers.
pub(super) fn tensor_bytes(elements: u64, dtype: DType) -> u64 {
    elements.saturating_mul(dtype.size() as u64)
}

/// One line about the keys and values of a dense answer.
pub(super) fn kv_line(kv_bytes: &[(KvType, u64)]) -> String {
    let kibibytes = kv_bytes.iter();
    let kibibytes = kibibytes.map(|(kv, bytes)| format!("{kv} {:.1}", *bytes as f64 / 1024.0));
    let kibibytes: Vec<String> = kibibytes.collect();
    format!(
        "KV of a dense answer by type (--kv), KiB: {}",
        kibibytes.join(", ")
    )
}
