//! Half precision: stored and moved in two bytes, computed with in four.

use std::any::Any;
use std::slice;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3, V4};
use pulp::{Simd, bytemuck, cast};

use crate::split::{PIECE, pieces};

/// The same numbers in f32; `wide` is as long as `halves`.
pub fn widen<T: Sync>(halves: &[T], wide: &mut [f32])
where
    [T]: HalfFloatSliceExt,
{
    pieces(wide, PIECE, |index, wide| {
        let start = index * PIECE;
        halves[start..start + wide.len()].convert_to_f32_slice(wide);
    });
}

/// The nearest numbers in half precision; `halves` is as long as `numbers`.
pub fn narrow<T: Send>(numbers: &[f32], halves: &mut [T])
where
    [T]: HalfFloatSliceExt,
{
    pieces(halves, PIECE, |index, halves| {
        let start = index * PIECE;
        halves.convert_from_f32_slice(&numbers[start..start + halves.len()]);
    });
}

/// Numbers that are widened on their way into registers of f32.
pub(crate) trait Widen: Copy + Default + Sync {
    /// A register of these numbers, of which there are as many as it has lanes.
    fn load<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s;

    /// A register whose last lanes hold the last of these numbers, as many as there are.
    #[inline(always)]
    fn load_last<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s {
        if let Some(start) = numbers.len().checked_sub(S::F32_LANES) {
            return Self::load(simd, &numbers[start..]);
        }
        let mut padded = [Self::default(); MOST_LANES];
        let start = S::F32_LANES - numbers.len();
        padded[start..S::F32_LANES].copy_from_slice(numbers);
        Self::load(simd, &padded[..S::F32_LANES])
    }
}

/// Numbers that products take and give.
pub trait Number: Copy + Default + Send + Sync + sealed::Sealed {
    /// The nearest bf16.
    fn to_bf16(self) -> bf16;

    /// The same in f32.
    fn to_f32(self) -> f32;

    /// The nearest of these.
    fn of(x: f32) -> Self;

    /// The numbers as they are, if they are f32.
    fn as_singles(_: &[Self]) -> Option<&[f32]> {
        None
    }

    /// The nearest of these to many, which are moved if they are f32.
    fn of_singles(singles: Vec<f32>) -> Vec<Self> {
        let mut numbers = vec![Self::default(); singles.len()];
        pieces(&mut numbers, PIECE, |index, numbers| {
            let singles = &singles[index * PIECE..];
            for (number, single) in numbers.iter_mut().zip(singles) {
                *number = Self::of(*single);
            }
        });
        numbers
    }
}

impl Number for f32 {
    fn as_singles(numbers: &[f32]) -> Option<&[f32]> {
        Some(numbers)
    }

    fn of_singles(singles: Vec<f32>) -> Vec<f32> {
        singles
    }

    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        let bits = self.to_bits();
        // To the nearest, and to the even one of two; a NaN keeps a digit.
        let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
        let rounded = if self.is_nan() {
            bits >> 16 | 0x40
        } else {
            rounded
        };
        bf16::from_bits(rounded as u16)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn of(x: f32) -> Self {
        x
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        self
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn of(x: f32) -> Self {
        x.to_bf16()
    }
}

impl Number for f16 {
    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        Number::to_f32(self).to_bf16()
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        single_of_half(self.to_bits())
    }

    #[inline(always)]
    fn of(x: f32) -> Self {
        f16::from_f32(x)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// Those of the widest registers.
const MOST_LANES: usize = 16;

impl Widen for f32 {
    #[inline(always)]
    fn load<S: Simd>(_: S, numbers: &[Self]) -> S::f32s {
        bytemuck::pod_read_unaligned(bytemuck::cast_slice(numbers))
    }
}

impl Widen for i8 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s {
        #[cfg(target_arch = "x86_64")]
        {
            let bytes: &[u8] = bytemuck::cast_slice(numbers);
            if let Some(v4) = instructions::<V4>(&simd) {
                let words = v4
                    .avx512f
                    ._mm512_cvtepi8_epi32(bytemuck::pod_read_unaligned(bytes));
                return bytemuck::cast(v4.avx512f._mm512_cvtepi32_ps(words));
            }
            if let Some(v3) = instructions::<V3>(&simd) {
                let mut padded = [0; 16];
                padded[..8].copy_from_slice(bytes);
                let words = v3.avx2._mm256_cvtepi8_epi32(bytemuck::cast(padded));
                return bytemuck::cast(v3.avx._mm256_cvtepi32_ps(words));
            }
        }
        let mut register = simd.splat_f32s(0.0);
        let singles: &mut [f32] = bytemuck::cast_slice_mut(slice::from_mut(&mut register));
        for (single, &number) in singles.iter_mut().zip(numbers) {
            *single = f32::from(number);
        }
        register
    }
}

impl Widen for bf16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s {
        let words = load_words(simd, numbers.reinterpret_cast());
        cast(simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16)))
    }
}

impl Widen for f16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, numbers: &[Self]) -> S::f32s {
        #[cfg(target_arch = "x86_64")]
        if let Some(v4) = instructions::<V4>(&simd) {
            let halves = bytemuck::cast_slice(numbers.reinterpret_cast());
            return bytemuck::cast(
                v4.avx512f
                    ._mm512_cvtph_ps(bytemuck::pod_read_unaligned(halves)),
            );
        }
        widen_f16(simd, load_words(simd, numbers.reinterpret_cast()))
    }
}

/// The bits of an f16 as f32, without a branch.
#[inline(always)]
pub(crate) fn single_of_half(half: u16) -> f32 {
    const BIAS: u32 = (127 - 15) << 23;
    /// As below.
    const ONE: u32 = BIAS + (0x0400 << 13);
    let magnitude = u32::from(half & 0x7fff) << 13;
    let normal = magnitude + BIAS;
    let infinite = normal + BIAS;
    let small = f32::from_bits(magnitude + ONE) - f32::from_bits(ONE);
    let wide = if magnitude < 0x7c00 << 13 {
        normal
    } else {
        infinite
    };
    let wide = if magnitude < 0x0400 << 13 {
        small.to_bits()
    } else {
        wide
    };
    f32::from_bits(wide | u32::from(half & 0x8000) << 16)
}

/// The bits of f16 as f32, in steps that all processors have.
#[inline(always)]
fn widen_f16<S: Simd>(simd: S, halves: S::u32s) -> S::f32s {
    /// What the exponents differ by, in place.
    const BIAS: u32 = (127 - 15) << 23;
    const INFINITE: u32 = 0x7c00 << 13;
    /// The smallest normal f16.
    const NORMAL: u32 = 0x0400 << 13;
    let magnitude = simd.and_u32s(halves, simd.splat_u32s(0x7fff));
    let sign = simd.wrapping_dyn_shl_u32s(simd.xor_u32s(halves, magnitude), simd.splat_u32s(16));
    let magnitude = simd.wrapping_dyn_shl_u32s(magnitude, simd.splat_u32s(13));
    let bias = simd.splat_u32s(BIAS);
    let normal = simd.add_u32s(magnitude, bias);
    let infinite = simd.add_u32s(normal, bias);
    // Digits below a leading one that is then taken away.
    let one = simd.splat_u32s(BIAS + NORMAL);
    let small = simd.sub_f32s(cast(simd.add_u32s(magnitude, one)), cast(one));
    let is_finite = simd.less_than_u32s(magnitude, simd.splat_u32s(INFINITE));
    let is_small = simd.less_than_u32s(magnitude, simd.splat_u32s(NORMAL));
    let wide = simd.select_u32s(is_finite, normal, infinite);
    let wide = simd.select_u32s(is_small, cast(small), wide);
    cast(simd.or_u32s(wide, sign))
}

/// A register of these numbers, each in four bytes.
#[inline(always)]
fn load_words<S: Simd>(simd: S, halves: &[u16]) -> S::u32s {
    #[cfg(target_arch = "x86_64")]
    {
        let halves = bytemuck::cast_slice(halves);
        if let Some(v4) = instructions::<V4>(&simd) {
            return bytemuck::cast(
                v4.avx512f
                    ._mm512_cvtepu16_epi32(bytemuck::pod_read_unaligned(halves)),
            );
        }
        if let Some(v3) = instructions::<V3>(&simd) {
            return bytemuck::cast(
                v3.avx2
                    ._mm256_cvtepu16_epi32(bytemuck::pod_read_unaligned(halves)),
            );
        }
    }
    let mut register = simd.splat_u32s(0);
    let words: &mut [u32] = bytemuck::cast_slice_mut(slice::from_mut(&mut register));
    for (word, &half) in words.iter_mut().zip(halves) {
        *word = u32::from(half);
    }
    register
}

/// The instructions that `simd` stands for, if these are they; known when it is compiled.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn instructions<I: Copy + 'static>(simd: &impl Simd) -> Option<I> {
    (simd as &dyn Any).downcast_ref().copied()
}

#[cfg(test)]
mod tests {
    use pulp::Arch;

    use super::*;
    use crate::split::{Work, pieces_on, reading};

    /// Writes the bits of the numbers that it loads.
    struct Loaded<T>(Vec<T>);

    impl<T: Widen> Work<f32> for Loaded<T> {
        fn run<S: Simd>(&self, simd: S, _: usize, wide: &mut [f32]) {
            let chunks = wide.chunks_mut(S::F32_LANES);
            for (wide, numbers) in chunks.zip(self.0.chunks(S::F32_LANES)) {
                simd.partial_store_f32s(wide, T::load(simd, numbers));
            }
        }
    }

    #[test]
    fn every_half_is_loaded_exactly_by_all_instructions() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let uppers: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let f16s: Vec<f32> = halves.iter().map(|half| half.to_f32()).collect();
        let bf16s: Vec<f32> = uppers.iter().map(|half| half.to_f32()).collect();
        for arch in [Arch::new(), reading(), Arch::Scalar] {
            let mut wide = vec![0.0; 1 << 16];
            let same = |a: &f32, b: &f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            pieces_on(arch, &mut wide, 1 << 16, &Loaded(halves.clone()));
            assert!(wide.iter().zip(&f16s).all(|(a, b)| same(a, b)));
            pieces_on(arch, &mut wide, 1 << 16, &Loaded(uppers.clone()));
            assert!(wide.iter().zip(&bf16s).all(|(a, b)| same(a, b)));
        }
    }

    #[test]
    fn is_that_of_each_number_across_pieces() {
        for count in [0, 1, PIECE, 2 * PIECE + 17] {
            let numbers: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();

            let mut halves = vec![f16::ZERO; count];
            narrow(&numbers, &mut halves);
            assert!(
                halves
                    .iter()
                    .zip(&numbers)
                    .all(|(h, &x)| *h == f16::from_f32(x))
            );
            let mut wide = vec![0.0; count];
            widen(&halves, &mut wide);
            assert!(wide.iter().zip(&halves).all(|(&x, h)| x == h.to_f32()));

            let mut halves = vec![bf16::ZERO; count];
            narrow(&numbers, &mut halves);
            assert!(
                halves
                    .iter()
                    .zip(&numbers)
                    .all(|(h, &x)| *h == bf16::from_f32(x))
            );
            let mut wide = vec![0.0; count];
            widen(&halves, &mut wide);
            assert!(wide.iter().zip(&halves).all(|(&x, h)| x == h.to_f32()));
        }
    }
}
