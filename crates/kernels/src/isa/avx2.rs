//! Registers of 256 bits: codes of rows, and products of bytes with them.

use std::arch::x86_64::*;

use crate::blocks::{Blocks, CHUNK, CHUNKS, Codes, Coding, Factors, Place, ROOM, Span};
use crate::isa::prefetch;
use crate::product::layout::{QuadRows, QuadTokens, Sums, TOKENS, WORDS};
use crate::product::one_row::ByteInputs;
use crate::split::some;

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

    /// The products of rows with inputs, all as long: what is read of a row meets all of them. That of a row
    /// and an input does not depend on the others.
    #[inline(always)]
    pub(crate) fn dots<C: Coding, const N: usize, const M: usize>(
        self,
        blocks: Blocks<'_>,
        rows: [usize; N],
        xs: [&ByteInputs; M],
    ) -> [[f32; M]; N] {
        // SAFETY: the processor has the instructions of this kind (`self`).
        unsafe {
            match self.0 {
                Kind::Avx2 => of_twos::dots::<C, N, M>(blocks, rows, xs),
                Kind::AvxVnni => avx_vnni::dots::<C, N, M>(blocks, rows, xs),
                Kind::Avx512Vnni => avx512_vnni::dots::<C, N, M>(blocks, rows, xs),
            }
        }
    }

    /// Whether there is an instruction for products of four bytes, or one for products of two that codes up to
    /// the largest do not saturate.
    pub(crate) fn multiplies(self, largest: u8) -> bool {
        self.0 != Kind::Avx2 || largest < 128
    }

    /// [`Vnni::multiply`](super::avx512::Vnni::multiply), of fewer rows.
    ///
    /// # Panics
    /// As there.
    #[inline(always)]
    pub(crate) fn multiply<C: Coding>(
        self,
        weight: QuadRows<'_, ROWS>,
        input: QuadTokens<'_>,
        sums: &mut Sums<ROWS>,
        adds: bool,
    ) {
        assert_eq!(weight.0.len(), input.0.len());
        // SAFETY: as in `dots`.
        unsafe {
            match self.0 {
                Kind::Avx2 => of_twos::multiply::<C>(weight, input, sums, adds),
                Kind::AvxVnni => avx_vnni::multiply::<C>(weight, input, sums, adds),
                Kind::Avx512Vnni => avx512_vnni::multiply::<C>(weight, input, sums, adds),
            }
        }
    }

    /// The codes and the factors of a span.
    #[inline(always)]
    pub(crate) fn read<C: Coding>(
        self,
        span: Span<'_, C>,
        codes: &mut [[u8; CHUNK]; CHUNKS],
    ) -> Factors {
        // SAFETY: the processor has the instructions of this kind (`self`), which are at least these.
        unsafe { read::<C>(span, codes) }
    }
}

/// Rows of a weight in a register tile: with two registers of tokens, 12 of the 16 registers hold sums.
pub(crate) const ROWS: usize = 6;

/// Bytes that are fetched ahead.
const AHEAD: usize = 4096;

/// Independent sums of a row.
const SUMS: usize = 2;

/// The loops with the instructions of a kind. They are made once for each: what has more features is not
/// inlined into what has fewer, and one call for every 32 products takes twice the time.
macro_rules! kind {
    ($name:ident, $feature:literal, |$sums:ident, $codes:ident, $x:ident| $products:expr) => {
        mod $name {
            use super::*;

            /// Adds the products of four bytes each to sums.
            #[inline]
            #[target_feature(enable = $feature)]
            fn products<C: Coding>($sums: __m256i, $codes: __m256i, $x: __m256i) -> __m256i {
                $products
            }

            #[target_feature(enable = $feature)]
            pub(super) fn multiply<C: Coding>(
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
                    let [scales, leasts] = &weight.1[group];
                    let [token_scales, token_sums] = &input.1[group];
                    // Sixteen tokens at a time.
                    for first in (0..TOKENS / 8).step_by(2) {
                        let mut quads = [[_mm256_setzero_si256(); 2]; ROWS];
                        for word in group * each..words.min((group + 1) * each) {
                            let (chunk, word) = (word / WORDS, word % WORDS);
                            let (tokens, _) = input.0[chunk].0[word].as_chunks();
                            let tokens = [words_of(&tokens[first]), words_of(&tokens[first + 1])];
                            for row in 0..ROWS {
                                let codes = _mm256_set1_epi32(weight.0[chunk].0[row][word] as i32);
                                quads[row][0] = products::<C>(quads[row][0], codes, tokens[0]);
                                quads[row][1] = products::<C>(quads[row][1], codes, tokens[1]);
                            }
                        }
                        for row in 0..ROWS {
                            let (scale, least) =
                                (_mm256_set1_ps(scales[row]), _mm256_set1_ps(leasts[row]));
                            let (totals, _) = sums.0[row].as_chunks_mut();
                            for part in 0..2 {
                                let product = _mm256_cvtepi32_ps(quads[row][part]);
                                let product = _mm256_mul_ps(product, scale);
                                let by = load(&token_scales.as_chunks().0[first + part]);
                                let of = load(&token_sums.as_chunks().0[first + part]);
                                let total = _mm256_fmadd_ps(of, least, load(&totals[first + part]));
                                totals[first + part] = store(_mm256_fmadd_ps(product, by, total));
                            }
                        }
                    }
                }
            }

            #[target_feature(enable = $feature)]
            pub(super) fn dots<C: Coding, const N: usize, const M: usize>(
                blocks: Blocks<'_>,
                rows: [usize; N],
                xs: [&ByteInputs; M],
            ) -> [[f32; M]; N] {
                let mut room = [0; ROOM];
                let mut totals = [[[_mm256_setzero_ps(); SUMS]; M]; N];
                let mut leasts = [[_mm256_setzero_ps(); M]; N];
                for index in 0..xs[0].spans.len() {
                    let xs = xs.map(|x| &x.spans[index]);
                    for ((&row, totals), leasts) in rows.iter().zip(&mut totals).zip(&mut leasts) {
                        let (bytes, start) = blocks.bytes_and_start(row);
                        prefetch(some(bytes, start + index * C::BYTES + AHEAD, C::BYTES));
                        let span = Span::<C>::new(blocks, row, index, &mut room);
                        let (scale, least) = factors(span);
                        let mut scales = [scale; M];
                        for (((_, sides), scale), leasts) in xs.iter().zip(&mut scales).zip(leasts)
                        {
                            for half in 0..halves(C::GROUP) {
                                scale[half] = _mm256_mul_ps(scale[half], load(&sides.scale[half]));
                                *leasts =
                                    _mm256_fmadd_ps(least[half], load(&sides.least[half]), *leasts);
                            }
                        }
                        for group in 0..CHUNKS / shared(C::GROUP) {
                            let first = group * shared(C::GROUP);
                            let mut sums = [_mm256_setzero_si256(); M];
                            for chunk in first..first + shared(C::GROUP) {
                                let codes = codes(span, chunk);
                                for (sums, (inputs, _)) in sums.iter_mut().zip(xs) {
                                    // SAFETY: 32 bytes.
                                    let inputs = unsafe {
                                        _mm256_loadu_si256(inputs[chunk].as_ptr().cast())
                                    };
                                    *sums = products::<C>(*sums, codes, inputs);
                                }
                            }
                            let at = _mm256_set1_epi32(first as i32);
                            for ((sums, scale), totals) in
                                sums.iter().zip(scales).zip(totals.iter_mut())
                            {
                                let mut factor = _mm256_permutevar8x32_ps(scale[0], at);
                                if halves(C::GROUP) > 1 {
                                    let upper = _mm256_permutevar8x32_ps(scale[1], at);
                                    factor = _mm256_blend_ps::<0b1111_0000>(factor, upper);
                                }
                                let total = &mut totals[group % SUMS];
                                *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(*sums), factor, *total);
                            }
                        }
                    }
                }
                let mut sums = [[0.0; M]; N];
                let of_rows = sums.iter_mut().zip(totals).zip(leasts);
                for ((sums, totals), leasts) in of_rows {
                    for ((sum, [even, odd]), leasts) in sums.iter_mut().zip(totals).zip(leasts) {
                        let total = _mm256_add_ps(_mm256_add_ps(even, odd), leasts);
                        let half = _mm_add_ps(
                            _mm256_castps256_ps128(total),
                            _mm256_extractf128_ps::<1>(total),
                        );
                        let half = _mm_add_ps(half, _mm_movehl_ps(half, half));
                        let half = _mm_add_ss(half, _mm_shuffle_ps::<1>(half, half));
                        *sum = _mm_cvtss_f32(half);
                    }
                }
                sums
            }
        }
    };
}

kind!(of_twos, "avx2,fma,f16c", |sums, codes, x| {
    let ones = _mm256_set1_epi16(1);
    if C::LARGEST < 128 {
        // At most 2 · 127 · 127: no sum of two saturates.
        let products = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones);
        return _mm256_add_epi32(sums, products);
    }
    // Either half of a code, for the same reason.
    let low = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), _mm256_set1_epi8(15));
    let low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones);
    let high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones);
    let products = _mm256_add_epi32(low, _mm256_slli_epi32::<4>(high));
    _mm256_add_epi32(sums, products)
});

kind!(avx_vnni, "avx2,fma,f16c,avxvnni", |sums, codes, x| {
    _mm256_dpbusd_avx_epi32(sums, codes, x)
});

kind!(
    avx512_vnni,
    "avx2,fma,f16c,avx512vnni,avx512vl",
    |sums, codes, x| _mm256_dpbusd_epi32(sums, codes, x)
);

/// Chunks that share their scales.
const fn shared(group: usize) -> usize {
    if group > CHUNK { group / CHUNK } else { 1 }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn read<C: Coding>(span: Span<'_, C>, to: &mut [[u8; CHUNK]; CHUNKS]) -> Factors {
    for (chunk, to) in to.iter_mut().enumerate() {
        // SAFETY: 32 bytes.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), codes(span, chunk)) };
    }
    let (scale, least) = factors(span);
    Factors {
        scale: [store(scale[0]), store(scale[1])],
        least: [store(least[0]), store(least[1])],
    }
}

/// Parts of a chunk that have scales of their own.
pub(super) const fn halves(group: usize) -> usize {
    if group < CHUNK { 2 } else { 1 }
}

/// [`Span::codes`].
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn codes<C: Coding>(span: Span<'_, C>, chunk: usize) -> __m256i {
    let low = _mm256_set1_epi8(15);
    match C::CODES {
        Codes::Bytes { first, step } => {
            let bytes = bytes(span.bytes(first + chunk * step));
            _mm256_xor_si256(bytes, _mm256_set1_epi8(i8::MIN))
        }
        Codes::Halves { first, step } => {
            let bytes = sixteen(span.bytes(first + chunk * step));
            // The upper ones come down in the upper lane alone.
            let down = _mm256_set_epi64x(4, 4, 0, 0);
            let both = _mm256_broadcastsi128_si256(bytes);
            _mm256_and_si256(_mm256_srlv_epi64(both, down), low)
        }
        Codes::Shared { first, step } => {
            let bytes = bytes(span.bytes(first + chunk / 2 * step));
            match chunk % 2 {
                0 => _mm256_and_si256(bytes, low),
                _ => _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low),
            }
        }
        Codes::SixBits => {
            let (half, quarter) = (chunk / 4, chunk % 4);
            let bytes = |at| bytes(span.bytes(at));
            let lower = bytes(half * 64 + quarter % 2 * CHUNK);
            let upper = bytes(128 + half * CHUNK);
            let (lower, upper) = match quarter {
                0 => (lower, _mm256_slli_epi16::<4>(upper)),
                1 => (lower, _mm256_slli_epi16::<2>(upper)),
                2 => (_mm256_srli_epi16::<4>(lower), upper),
                _ => (_mm256_srli_epi16::<4>(lower), _mm256_srli_epi16::<2>(upper)),
            };
            let upper = _mm256_and_si256(upper, _mm256_set1_epi8(48));
            _mm256_or_si256(_mm256_and_si256(lower, low), upper)
        }
    }
}

/// [`Span::factors`]: scales and least numbers of all chunks; of whole chunks the first, where their halves
/// share them.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn factors<C: Coding>(span: Span<'_, C>) -> ([__m256; 2], [__m256; 2]) {
    let (scale, least) = match C::FACTORS {
        Place::Nowhere { zero } => (_mm256_set1_ps(1.0), _mm256_set1_ps(-zero)),
        Place::Scales { step, zero } => {
            let at = |chunk: usize| span.half(chunk * step) as i16;
            let halves = _mm_set_epi16(at(7), at(6), at(5), at(4), at(3), at(2), at(1), at(0));
            let scale = _mm256_cvtph_ps(halves);
            (scale, _mm256_mul_ps(scale, _mm256_set1_ps(-zero)))
        }
        Place::Twos { step } => {
            let (low, high) = (four(span, 0, step), four(span, 4 * step, step));
            (
                in_order(_mm256_shuffle_ps::<0b10_00_10_00>(low, high)),
                in_order(_mm256_shuffle_ps::<0b11_01_11_01>(low, high)),
            )
        }
        Place::SharedTwos { step } => {
            let twos = four(span, 0, step);
            (_mm256_moveldup_ps(twos), _mm256_movehdup_ps(twos))
        }
        Place::SixBits => {
            let [scales, leasts] = span.six_bits();
            let (scale, least) = (single(span.half(0)), single(span.half(2)));
            let least = _mm256_xor_ps(least, _mm256_set1_ps(-0.0));
            (
                _mm256_mul_ps(scale, small(scales)),
                _mm256_mul_ps(least, small(leasts)),
            )
        }
        Place::OfHalves => {
            let even_and_odd = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            let bytes = _mm_shuffle_epi8(sixteen(span.bytes(192)), even_and_odd);
            let (unit, zero) = (single(span.half(208)), _mm256_set1_ps(-32.0));
            let even = _mm256_cvtepi8_epi32(bytes);
            let odd = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes));
            let even = _mm256_mul_ps(unit, _mm256_cvtepi32_ps(even));
            let odd = _mm256_mul_ps(unit, _mm256_cvtepi32_ps(odd));
            let leasts = [_mm256_mul_ps(even, zero), _mm256_mul_ps(odd, zero)];
            return ([even, odd], leasts);
        }
    };
    ([scale; 2], [least; 2])
}

/// Four words of two halves each, in f32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn four<C: Coding>(span: Span<'_, C>, at: usize, step: usize) -> __m256 {
    let [a, b, c, d] = [at, at + step, at + 2 * step, at + 3 * step];
    let [a, b, c, d] = [span.word(a), span.word(b), span.word(c), span.word(d)];
    _mm256_cvtph_ps(_mm_setr_epi32(a as i32, b as i32, c as i32, d as i32))
}

/// What a shuffle of two registers leaves in their lanes, one behind the other.
#[inline]
#[target_feature(enable = "avx2")]
fn in_order(numbers: __m256) -> __m256 {
    let pairs = _mm256_castps_pd(numbers);
    _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(pairs))
}

/// Eight bytes, in f32.
#[inline]
#[target_feature(enable = "avx2")]
fn small(bytes: u64) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)))
}

/// A half everywhere, in f32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn single(half: u16) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(half as i16))
}

#[inline]
#[target_feature(enable = "avx2")]
fn bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes are a register.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn sixteen(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: 16 bytes are half a register.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn words_of(words: &[u32; 8]) -> __m256i {
    // SAFETY: eight words are a register.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(numbers: &[f32; 8]) -> __m256 {
    // SAFETY: eight numbers are a register.
    unsafe { _mm256_loadu_ps(numbers.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(register: __m256) -> [f32; 8] {
    let mut numbers = [0.0; 8];
    // SAFETY: as in `load`.
    unsafe { _mm256_storeu_ps(numbers.as_mut_ptr(), register) };
    numbers
}
