//! Instructions that no library reaches: which of them this processor has, and what is made of them.
//!
//! All `unsafe` of the libraries is here, behind functions that cannot be misused: a value of a type such
//! as [`amx::Amx`] exists only where the processor has the instructions, and slices are checked before
//! pointers are made of them.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(not(target_arch = "x86_64"))]
mod elsewhere;
#[cfg(target_arch = "x86_64")]
mod limit;
pub(crate) mod single;

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Bytes;
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use elsewhere::{Bytes, Loop, amx, avx2, avx512, clock};
#[cfg(target_arch = "x86_64")]
pub(crate) use limit::{Loop, clock};

use crate::limit::Multiplied;
use crate::product::layout::Sums;

/// What multiplies bf16.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PairKernel {
    Amx(amx::Amx),
    Avx512(avx512::Bf16),
}

/// What multiplies codes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum QuadKernel {
    Amx(amx::Amx),
    Avx512(avx512::Vnni),
    Avx2(Bytes),
}

/// The instructions that products use; without any of them, f32 and plain loops.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Isa {
    /// For many rows and bf16.
    pub(crate) pairs: Option<PairKernel>,
    /// For many rows and codes.
    pub(crate) quads: Option<QuadKernel>,
    /// For one row and codes, and to read codes.
    pub(crate) bytes: Option<Bytes>,
    /// For what becomes bf16.
    pub(crate) widen: Option<avx512::Widen>,
}

/// How far instructions go, each with all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    #[cfg(test)]
    Portable,
    Avx2,
    Avx512,
    Amx,
}

impl Isa {
    /// What there is of a level.
    fn of(level: Level) -> Self {
        let mut isa = Self::default();
        if level >= Level::Avx2 {
            isa.bytes = Bytes::avx_vnni().or_else(Bytes::without_vnni);
            isa.quads = isa.bytes.map(QuadKernel::Avx2);
        }
        if level >= Level::Avx512 {
            isa.bytes = Bytes::avx512_vnni().or(isa.bytes);
            isa.pairs = avx512::Bf16::detect().map(PairKernel::Avx512);
            isa.quads = (avx512::Vnni::detect().map(QuadKernel::Avx512)).or(isa.quads);
            isa.widen = avx512::Widen::detect();
        }
        if let (Level::Amx, Some(amx)) = (level, amx::Amx::detect()) {
            isa.pairs = Some(PairKernel::Amx(amx));
            isa.quads = Some(QuadKernel::Amx(amx));
        }
        isa
    }

    /// All that this processor has.
    pub(crate) fn of_this_processor() -> Self {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| Self::of(Level::Amx))
    }

    /// What multiplies codes up to the largest. Without an instruction for products of four bytes, those of 8
    /// bits take twice as many: f32 is as fast.
    pub(crate) fn quads_of(self, largest: u8) -> Option<QuadKernel> {
        (self.quads)
            .filter(|quads| !matches!(quads, QuadKernel::Avx2(bytes) if !bytes.multiplies(largest)))
    }

    /// Every way that this processor has.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let levels = [Level::Portable, Level::Avx2, Level::Avx512, Level::Amx];
        let mut all: Vec<Self> = levels.into_iter().map(Self::of).collect();
        let bytes = Bytes::without_vnni();
        all.push(Self {
            bytes,
            quads: bytes.map(QuadKernel::Avx2),
            ..Self::default()
        });
        all
    }
}

/// The loop that multiplies as fast as this processor can.
pub(crate) fn multiply_loop(of: Multiplied) -> Option<Loop> {
    match of {
        Multiplied::F32 => Loop::f32(),
        Multiplied::BF16 => Loop::bf16(),
        Multiplied::Bytes => Loop::bytes(),
    }
}

/// Fetches numbers into the second cache.
#[inline(always)]
pub(crate) fn prefetch<T>(numbers: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let start = numbers.as_ptr().cast::<i8>();
        for line in (0..size_of_val(numbers)).step_by(64) {
            // SAFETY: fetching changes nothing, whatever the address, and this one is inside the slice.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(start.add(line)) }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = numbers;
}

/// The numbers of tiles, row by row.
pub(crate) fn numbers<const ROWS: usize>(tiles: &mut [Sums<ROWS>]) -> &mut [f32] {
    let count = size_of_val(tiles) / size_of::<f32>();
    // SAFETY: tiles are rows of numbers and nothing else: a row is as long as their alignment, or twice.
    unsafe { std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast(), count) }
}
