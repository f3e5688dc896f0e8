//! The inputs of a product with many rows, packed.

use std::ops::Range;

use super::layout::{InputChunk, TOKENS, WORDS};
use crate::precision::Number;
use crate::split::{made, pieces};

/// Chunks that are packed at a time.
const CHUNKS: usize = 64;

/// Chunks of all panels. Blocks of `block` chunks of every panel stand one after another: all that a block
/// of a weight meets lies side by side.
pub(crate) struct Packed {
    /// `[blocks, panels, block]`; the last block may be shorter.
    chunks: Vec<InputChunk>,
    block: usize,
    /// Chunks of a panel.
    pub(crate) depth: usize,
    /// Tokens, without those that fill the last panel.
    pub(crate) tokens: usize,
}

impl Packed {
    /// Lets `fill` write every chunk, which is zero before: the `n`th of the panel whose first token is given,
    /// with so many of them.
    fn new(
        tokens: usize,
        depth: usize,
        block: usize,
        fill: impl Fn(&mut InputChunk, usize, [usize; 2]) + Sync,
    ) -> Self {
        let panels = tokens.div_ceil(TOKENS);
        let chunks = made(
            panels * depth,
            CHUNKS,
            #[inline(always)]
            |at| {
                let first = at / (panels * block) * block;
                let (width, within) = (block.min(depth - first), at - first * panels);
                let start = within / width * TOKENS;
                let mut chunk = InputChunk::ZERO;
                let tokens = [start, TOKENS.min(tokens - start)];
                fill(&mut chunk, first + within % width, tokens);
                chunk
            },
        );
        Self {
            chunks,
            block,
            depth,
            tokens,
        }
    }

    /// The chunks of a panel in the block that begins with chunk `first`.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize, first: usize) -> &[InputChunk] {
        let width = self.block.min(self.depth - first);
        let panels = self.tokens.div_ceil(TOKENS);
        &self.chunks[first * panels + panel * width..][..width]
    }
}

/// Inputs in bf16, two features in a word; zeros beyond the last token and the last feature.
pub(crate) struct Pairs(pub(crate) Packed);

impl Pairs {
    /// Features of a chunk.
    pub(crate) const FEATURES: usize = 2 * WORDS;

    /// Packs `[features, tokens]`, of which there is at least one.
    pub(crate) fn pack<T: Number>(x: &[T], features: usize, block: usize) -> Self {
        let tokens = x.len() / features;
        let depth = features.div_ceil(Self::FEATURES);
        Self(Packed::new(
            tokens,
            depth,
            block,
            #[inline(always)]
            |chunk, at, [start, count]| {
                let row = |feature: usize| &x[feature * tokens + start..][..count];
                let first = at * Self::FEATURES;
                for (feature, words) in (first..features).step_by(2).zip(&mut chunk.0) {
                    match feature + 1 < features {
                        true => pair(words, row(feature), row(feature + 1)),
                        false => pair(words, row(feature), &[T::default(); TOKENS][..count]),
                    }
                }
            },
        ))
    }
}

/// Two features of some tokens side by side.
#[inline(always)]
fn pair<T: Number>(words: &mut [u32; TOKENS], even: &[T], odd: &[T]) {
    let bits = |x: T| u32::from(x.to_bf16().to_bits());
    if let (Some(even), Some(odd)) = (even.first_chunk(), odd.first_chunk::<TOKENS>()) {
        let even: &[T; TOKENS] = even;
        for at in 0..TOKENS {
            words[at] = bits(even[at]) | bits(odd[at]) << 16;
        }
        return;
    }
    for ((word, &even), &odd) in words.iter_mut().zip(even).zip(odd) {
        *word = bits(even) | bits(odd) << 16;
    }
}

/// Inputs as signed bytes, four features in a word, with a scale for every token and group of features.
pub(crate) struct Quads {
    pub(crate) packed: Packed,
    group: usize,
    /// `[panels, groups]`: the scales of tokens, and the sums of what they are scales of.
    factors: Vec<[[f32; TOKENS]; 2]>,
}

impl Quads {
    /// Features of a chunk.
    pub(crate) const FEATURES: usize = 4 * WORDS;

    /// Packs `[features, tokens]`, of which there is at least one, in groups of so many features.
    pub(crate) fn pack<T: Number>(x: &[T], features: usize, group: usize, block: usize) -> Self {
        let tokens = x.len() / features;
        let depth = features.div_ceil(Self::FEATURES);
        // As many as whole chunks have, which may be more than there are features for.
        let groups = (depth * Self::FEATURES).div_ceil(group);
        let mut factors = vec![[[0.0; TOKENS]; 2]; tokens.div_ceil(TOKENS) * groups];
        pieces(
            &mut factors,
            CHUNKS,
            #[inline(always)]
            |piece, factors| {
                for (at, factors) in factors.iter_mut().enumerate() {
                    let at = piece * CHUNKS + at;
                    let (start, first) = (at / groups * TOKENS, at % groups * group);
                    let count = TOKENS.min(tokens - start);
                    let rows = first..features.min(first + group);
                    let row = |feature: usize| &x[feature * tokens + start..][..count];
                    *factors = scales(rows, row);
                }
            },
        );
        let packed = Packed::new(
            tokens,
            depth,
            block,
            #[inline(always)]
            |chunk, at, [start, count]| {
                let factors = &factors[start / TOKENS * groups..][..groups];
                let first = at * Self::FEATURES;
                for (feature, words) in (first..features).step_by(4).zip(&mut chunk.0) {
                    let scales = &factors[feature / group][0];
                    for feature in feature..features.min(feature + 4) {
                        let row = &x[feature * tokens + start..][..count];
                        let shift = feature % 4 * 8;
                        for ((word, &x), &scale) in words.iter_mut().zip(row).zip(scales) {
                            let code = code(x.to_f32(), inverse(scale));
                            *word |= u32::from(code as u8) << shift;
                        }
                    }
                }
            },
        );
        Self {
            packed,
            group,
            factors,
        }
    }

    /// The factors of a panel from the group on in which chunk `first` begins.
    #[inline(always)]
    pub(crate) fn factors(&self, panel: usize, first: usize) -> &[[[f32; TOKENS]; 2]] {
        let groups = self.factors.len() / self.packed.tokens.div_ceil(TOKENS);
        &self.factors[panel * groups..][..groups][first * Self::FEATURES / self.group..]
    }
}

/// The scales of some features of tokens, and the sums of those features once they are rounded.
#[inline(always)]
fn scales<'a, T: Number + 'a>(
    features: Range<usize>,
    row: impl Fn(usize) -> &'a [T],
) -> [[f32; TOKENS]; 2] {
    let mut largest = [0; TOKENS];
    for feature in features.clone() {
        for (largest, x) in largest.iter_mut().zip(row(feature)) {
            *largest = (x.to_f32().to_bits() & 0x7fff_ffff).max(*largest);
        }
    }
    let scale = largest.map(scale_of);
    let mut sums = [0; TOKENS];
    for feature in features {
        for ((sum, x), &scale) in sums.iter_mut().zip(row(feature)).zip(&scale) {
            *sum += i32::from(code(x.to_f32(), inverse(scale)));
        }
    }
    let mut totals = [0.0; TOKENS];
    for ((total, sum), scale) in totals.iter_mut().zip(sums).zip(scale) {
        *total = sum as f32 * scale;
    }
    [scale, totals]
}

/// The scale of numbers, of which these are the bits of the largest magnitude: not finite if one is not.
#[inline(always)]
pub(crate) fn scale_of(largest: u32) -> f32 {
    f32::from_bits(largest) / 127.0
}

/// What numbers are multiplied with to become codes.
#[inline(always)]
pub(crate) fn inverse(scale: f32) -> f32 {
    // Below, the inverse is infinite: the numbers are zeros, or would be.
    if scale > 1e-38 { 1.0 / scale } else { 0.0 }
}

/// The nearest code.
#[inline(always)]
pub(crate) fn code(x: f32, inverse: f32) -> i8 {
    /// Adding it rounds to a whole number, in the lowest bits: 1.5 · 2²³.
    const ROUND: f32 = 12_582_912.0;
    (x * inverse + ROUND).to_bits() as u8 as i8
}

impl AsRef<Packed> for Pairs {
    fn as_ref(&self) -> &Packed {
        &self.0
    }
}

impl AsRef<Packed> for Quads {
    fn as_ref(&self) -> &Packed {
        &self.packed
    }
}
