//! Registers of 256 bits: products of bytes with a row of codes.

use std::arch::x86_64::*;

use crate::blocks::{Blocks, CHUNK, Coding};
use crate::isa::prefetch;
use crate::product::one_row::{Codes, Eight};

/// Which instruction multiplies bytes. A value exists only where the processor has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Products of two bytes in 16 bits.
    Avx2,
    /// Of four in 32, in the encoding of AVX.
    AvxVnni,
    /// The same in that of AVX-512.
    Avx512Vnni,
}

impl Bytes {
    /// AVX2 alone.
    pub(crate) fn without_vnni() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(Kind::Avx2))
    }

    /// The instructions of AVX.
    pub(crate) fn avx_vnni() -> Option<Self> {
        Self::without_vnni()?;
        is_x86_feature_detected!("avxvnni").then_some(Self(Kind::AvxVnni))
    }

    /// The instructions of AVX-512.
    pub(crate) fn avx512_vnni() -> Option<Self> {
        Self::without_vnni()?;
        let found = is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl");
        found.then_some(Self(Kind::Avx512Vnni))
    }

    /// The product of a row with inputs.
    #[inline(always)]
    pub(crate) fn dot<C: Coding>(self, blocks: Blocks<'_>, row: usize, x: &Codes) -> f32 {
        // SAFETY: the processor has the instructions of this kind (`self`).
        unsafe {
            match self.0 {
                Kind::Avx2 => dot_avx2::<C>(blocks, row, x),
                Kind::AvxVnni => dot_avx_vnni::<C>(blocks, row, x),
                Kind::Avx512Vnni => dot_avx512_vnni::<C>(blocks, row, x),
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dot_avx2<C: Coding>(blocks: Blocks<'_>, row: usize, x: &Codes) -> f32 {
    dot::<C>(blocks, row, x, |codes, x| {
        let ones = _mm256_set1_epi16(1);
        if C::LARGEST < 128 {
            // At most 2 · 127 · 127: no sum of two saturates.
            return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones);
        }
        // Either half of a code, for the same reason.
        let low = _mm256_and_si256(codes, _mm256_set1_epi8(15));
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), _mm256_set1_epi8(15));
        let low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones);
        let high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones);
        _mm256_add_epi32(low, _mm256_slli_epi32::<4>(high))
    })
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn dot_avx_vnni<C: Coding>(blocks: Blocks<'_>, row: usize, x: &Codes) -> f32 {
    dot::<C>(blocks, row, x, |codes, x| {
        _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes, x)
    })
}

#[target_feature(enable = "avx2,fma,f16c,avx512vnni,avx512vl")]
fn dot_avx512_vnni<C: Coding>(blocks: Blocks<'_>, row: usize, x: &Codes) -> f32 {
    dot::<C>(blocks, row, x, |codes, x| {
        _mm256_dpbusd_epi32(_mm256_setzero_si256(), codes, x)
    })
}

/// Bytes that are fetched ahead.
const AHEAD: usize = 4096;

#[expect(clippy::needless_range_loop, reason = "several arrays by one index")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot<C: Coding>(
    blocks: Blocks<'_>,
    row: usize,
    x: &Codes,
    multiply: impl Fn(__m256i, __m256i) -> __m256i,
) -> f32 {
    let (bytes, start) = blocks.bytes_and_start(row);
    let row = blocks.row(row);
    let mut total = _mm256_setzero_ps();
    let mut least = _mm256_setzero_ps();
    let mut codes = [0; CHUNK];
    for (eight, (inputs, sides)) in x.codes.chunks(8).zip(&x.factors).enumerate() {
        let first = eight * 8;
        // The scales of eight chunks at a time.
        let mut halves = [[0; 8]; 2];
        for chunk in 0..8 {
            let [scale, low] = C::halves(row, first + chunk);
            (halves[0][chunk], halves[1][chunk]) = (scale, low);
        }
        let [scales, lows] = halves.map(|halves| singles(&halves));
        let mut factors = Eight::default();
        for chunk in 0..8 {
            let halves = [scales[chunk], lows[chunk]];
            factors.put(chunk, C::factors(row, first + chunk, halves));
        }
        let parts = if C::GROUP < CHUNK { 2 } else { 1 };
        let mut scale = [_mm256_setzero_ps(); 2];
        for part in 0..parts {
            scale[part] =
                _mm256_mul_ps(eight_of(&factors.scale[part]), eight_of(&sides.scale[part]));
            let (low, sum) = (eight_of(&factors.least[part]), eight_of(&sides.least[part]));
            least = _mm256_fmadd_ps(low, sum, least);
        }
        for (chunk, inputs) in inputs.iter().enumerate() {
            prefetch(bytes, start + C::start(first + chunk) + AHEAD);
            C::codes(row, blocks.columns(), first + chunk, &mut codes);
            // SAFETY: both are 32 bytes.
            let (codes, inputs) = unsafe {
                (
                    _mm256_loadu_si256(codes.as_ptr().cast()),
                    _mm256_loadu_si256(inputs.as_ptr().cast()),
                )
            };
            let sums = _mm256_cvtepi32_ps(multiply(codes, inputs));
            let at = _mm256_set1_epi32(chunk as i32);
            let mut factor = _mm256_permutevar8x32_ps(scale[0], at);
            if parts > 1 {
                let upper = _mm256_permutevar8x32_ps(scale[1], at);
                factor = _mm256_blend_ps::<0b1111_0000>(factor, upper);
            }
            total = _mm256_fmadd_ps(sums, factor, total);
        }
    }
    let total = _mm256_add_ps(total, least);
    let half = _mm_add_ps(
        _mm256_castps256_ps128(total),
        _mm256_extractf128_ps::<1>(total),
    );
    let half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    let half = _mm_add_ss(half, _mm_shuffle_ps::<1>(half, half));
    _mm_cvtss_f32(half)
}

#[target_feature(enable = "avx2,f16c")]
fn singles(halves: &[u16; 8]) -> [f32; 8] {
    let mut singles = [0.0; 8];
    // SAFETY: eight halves are 16 bytes, eight singles 32.
    unsafe {
        let halves = _mm_loadu_si128(halves.as_ptr().cast());
        _mm256_storeu_ps(singles.as_mut_ptr(), _mm256_cvtph_ps(halves));
    }
    singles
}

#[target_feature(enable = "avx2")]
fn eight_of(numbers: &[f32; 8]) -> __m256 {
    // SAFETY: eight numbers are a register.
    unsafe { _mm256_loadu_ps(numbers.as_ptr()) }
}
