//! Registers of 512 bits: bf16 in pairs (AVX512-BF16), bytes in fours (AVX512-VNNI).

use std::arch::x86_64::*;

use super::avx2::{Bytes, codes, factors, halves as parts_of};
use crate::blocks::{CHUNK, CHUNKS, Coding, Span};
use crate::product::layout::{InputChunk, QuadRows, QuadTokens, Sums, TOKENS, WORDS, WeightChunk};

/// Rows of a weight in a register tile: with two registers of tokens, 24 of the 32 registers hold sums.
pub(crate) const ROWS: usize = 12;

/// Proof that this processor has AVX512-BF16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16(());

impl Bf16 {
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        found.then_some(Self(()))
    }

    /// `sums (+)= weight · input`, over all chunks.
    ///
    /// # Panics
    /// If there are not as many chunks of the input as of the weight.
    #[inline(always)]
    pub(crate) fn multiply(
        self,
        weight: &[WeightChunk<ROWS>],
        input: &[InputChunk],
        sums: &mut Sums<ROWS>,
        adds: bool,
    ) {
        assert_eq!(weight.len(), input.len());
        // SAFETY: the processor has these instructions (`self`).
        unsafe { multiply_bf16(weight, input, sums, adds) }
    }
}

#[expect(clippy::needless_range_loop, reason = "two arrays by one index")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_bf16(
    weight: &[WeightChunk<ROWS>],
    input: &[InputChunk],
    sums: &mut Sums<ROWS>,
    adds: bool,
) {
    let mut totals = [[_mm512_setzero_ps(); 2]; ROWS];
    if adds {
        for (total, sums) in totals.iter_mut().zip(&sums.0) {
            *total = singles(sums);
        }
    }
    for (weight, input) in weight.iter().zip(input) {
        for word in 0..WORDS {
            let tokens = halves(&input.0[word]);
            for row in 0..ROWS {
                let pair = bf16_pairs(_mm512_set1_epi32(weight.0[row][word] as i32));
                for half in 0..2 {
                    totals[row][half] =
                        _mm512_dpbf16_ps(totals[row][half], pair, bf16_pairs(tokens[half]));
                }
            }
        }
    }
    for (total, sums) in totals.into_iter().zip(&mut sums.0) {
        put(total, sums);
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_pairs(words: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, of which every pattern is valid.
    unsafe { std::mem::transmute(words) }
}

#[target_feature(enable = "avx512f")]
fn halves(words: &[u32; TOKENS]) -> [__m512i; 2] {
    let words = words.as_ptr().cast::<__m512i>();
    // SAFETY: 32 words are two registers.
    unsafe { [_mm512_loadu_si512(words), _mm512_loadu_si512(words.add(1))] }
}

#[target_feature(enable = "avx512f")]
fn singles(numbers: &[f32; TOKENS]) -> [__m512; 2] {
    let numbers = numbers.as_ptr();
    // SAFETY: 32 numbers are two registers.
    unsafe { [_mm512_loadu_ps(numbers), _mm512_loadu_ps(numbers.add(16))] }
}

#[target_feature(enable = "avx512f")]
fn put(registers: [__m512; 2], numbers: &mut [f32; TOKENS]) {
    let numbers = numbers.as_mut_ptr();
    // SAFETY: as in `singles`.
    unsafe {
        _mm512_storeu_ps(numbers, registers[0]);
        _mm512_storeu_ps(numbers.add(16), registers[1]);
    }
}

/// Proof that this processor has AVX512-BF16 and what reads spans.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Widen(());

impl Widen {
    pub(crate) fn detect() -> Option<Self> {
        Bf16::detect()?;
        Bytes::without_vnni().map(|_| Self(()))
    }

    /// The numbers of a span, rounded to bf16.
    #[inline(always)]
    pub(crate) fn widen<C: Coding>(self, span: Span<'_, C>, to: [&mut [u16; CHUNK]; CHUNKS]) {
        // SAFETY: the processor has these instructions (`self`).
        unsafe { widen(span, to) }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bf16")]
fn widen<C: Coding>(span: Span<'_, C>, to: [&mut [u16; CHUNK]; CHUNKS]) {
    let (scale, least) = factors(span);
    for (chunk, to) in to.into_iter().enumerate() {
        let at = _mm512_set1_epi32(chunk as i32);
        let of_chunk = |of: __m256| _mm512_permutexvar_ps(at, _mm512_castps256_ps512(of));
        let codes = codes(span, chunk);
        let parts = [
            _mm256_castsi256_si128(codes),
            _mm256_extracti128_si256::<1>(codes),
        ];
        let mut numbers = [_mm512_setzero_ps(); 2];
        for (half, codes) in parts.into_iter().enumerate() {
            let codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
            let of = half * (parts_of(C::GROUP) - 1);
            numbers[half] = _mm512_fmadd_ps(codes, of_chunk(scale[of]), of_chunk(least[of]));
        }
        let rounded = _mm512_cvtne2ps_pbh(numbers[1], numbers[0]);
        // SAFETY: 32 numbers in 16 bits are a register.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), words(rounded)) };
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn words(pairs: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes, of which every pattern is valid.
    unsafe { std::mem::transmute(pairs) }
}

/// Proof that this processor has AVX512-VNNI.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vnni(());

impl Vnni {
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        found.then_some(Self(()))
    }

    /// `sums (+)= weight · input`, over all chunks: codes in groups, whose sums of products are whole numbers,
    /// times the scales of both; and what is added to the codes, times the sums of the inputs.
    ///
    /// # Panics
    /// If there are not as many chunks of the input as of the weight, or fewer factors than groups.
    #[inline(always)]
    pub(crate) fn multiply<C: Coding>(
        self,
        weight: QuadRows<'_, ROWS>,
        input: QuadTokens<'_>,
        sums: &mut Sums<ROWS>,
        adds: bool,
    ) {
        assert_eq!(weight.0.len(), input.0.len());
        // SAFETY: the processor has these instructions (`self`).
        unsafe { multiply_codes::<C>(weight, input, sums, adds) }
    }
}

#[expect(clippy::needless_range_loop, reason = "two arrays by one index")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply_codes<C: Coding>(
    weight: QuadRows<'_, ROWS>,
    input: QuadTokens<'_>,
    sums: &mut Sums<ROWS>,
    adds: bool,
) {
    if !adds {
        *sums = Sums::ZERO;
    }
    let words = weight.0.len() * WORDS;
    let each = C::GROUP / 4;
    for group in 0..words.div_ceil(each) {
        let mut products = [[_mm512_setzero_si512(); 2]; ROWS];
        for word in group * each..words.min((group + 1) * each) {
            let (chunk, word) = (word / WORDS, word % WORDS);
            let tokens = halves(&input.0[chunk].0[word]);
            for row in 0..ROWS {
                let codes = _mm512_set1_epi32(weight.0[chunk].0[row][word] as i32);
                for half in 0..2 {
                    products[row][half] =
                        _mm512_dpbusd_epi32(products[row][half], codes, tokens[half]);
                }
            }
        }
        let [scales, leasts] = &weight.1[group];
        let [token_scales, token_sums] = input.1[group].map(|factors| singles(&factors));
        for row in 0..ROWS {
            let (scale, least) = (_mm512_set1_ps(scales[row]), _mm512_set1_ps(leasts[row]));
            let mut totals = singles(&sums.0[row]);
            for half in 0..2 {
                let product = _mm512_mul_ps(_mm512_cvtepi32_ps(products[row][half]), scale);
                let total = _mm512_fmadd_ps(token_sums[half], least, totals[half]);
                totals[half] = _mm512_fmadd_ps(product, token_scales[half], total);
            }
            put(totals, &mut sums.0[row]);
        }
    }
}
