//! Registers of 256 bits: products of bytes with a row of codes.

use std::arch::x86_64::*;

use crate::blocks::{Blocks, CHUNK, Coding};
use crate::isa::prefetch;
use crate::product::one_row::Codes;

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
        let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
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

#[target_feature(enable = "avx2,fma")]
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

#[target_feature(enable = "avx2,fma,avxvnni")]
fn dot_avx_vnni<C: Coding>(blocks: Blocks<'_>, row: usize, x: &Codes) -> f32 {
    dot::<C>(blocks, row, x, |codes, x| {
        _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes, x)
    })
}

#[target_feature(enable = "avx2,fma,avx512vnni,avx512vl")]
fn dot_avx512_vnni<C: Coding>(blocks: Blocks<'_>, row: usize, x: &Codes) -> f32 {
    dot::<C>(blocks, row, x, |codes, x| {
        _mm256_dpbusd_epi32(_mm256_setzero_si256(), codes, x)
    })
}

/// Bytes that are fetched ahead.
const AHEAD: usize = 4096;

#[inline]
#[target_feature(enable = "avx2,fma")]
fn dot<C: Coding>(
    blocks: Blocks<'_>,
    row: usize,
    x: &Codes,
    multiply: impl Fn(__m256i, __m256i) -> __m256i,
) -> f32 {
    let (bytes, start) = blocks.bytes_and_start(row);
    let row = blocks.row(row);
    let mut total = _mm256_setzero_ps();
    let mut least = 0.0;
    let mut codes = [0; CHUNK];
    let bytes_of_chunk = CHUNK * (1 + usize::from(C::LARGEST > 15)) / 2;
    for (chunk, (inputs, sides)) in x.codes.iter().zip(&x.factors).enumerate() {
        if chunk % 2 == 0 {
            prefetch(bytes, start + chunk * bytes_of_chunk + AHEAD);
        }
        let factors = C::chunk(row, blocks.columns(), chunk, &mut codes);
        // SAFETY: both are 32 bytes.
        let (codes, inputs) = unsafe {
            (
                _mm256_loadu_si256(codes.as_ptr().cast()),
                _mm256_loadu_si256(inputs.as_ptr().cast()),
            )
        };
        let sums = _mm256_cvtepi32_ps(multiply(codes, inputs));
        let scale = if C::GROUP < CHUNK {
            _mm256_set_m128(
                _mm_set1_ps(factors.scale[1] * sides.scale[1]),
                _mm_set1_ps(factors.scale[0] * sides.scale[0]),
            )
        } else {
            _mm256_set1_ps(factors.scale[0] * sides.scale[0])
        };
        total = _mm256_fmadd_ps(sums, scale, total);
        least += factors.least[0] * sides.least[0];
        if C::GROUP < CHUNK {
            least += factors.least[1] * sides.least[1];
        }
    }
    let half = _mm_add_ps(
        _mm256_castps256_ps128(total),
        _mm256_extractf128_ps::<1>(total),
    );
    let half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    let half = _mm_add_ss(half, _mm_shuffle_ps::<1>(half, half));
    _mm_cvtss_f32(half) + least
}
