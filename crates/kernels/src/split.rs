//! How work is cut into pieces for threads.

use std::sync::Mutex;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Numbers in a piece (64 KiB in f32): large enough to outweigh handing it to a thread, small enough
/// for a first-level or second-level cache.
pub(crate) const PIECE: usize = 16 << 10;

/// What is done with a piece, compiled once per instruction set.
///
/// It should be `#[inline(always)]` down to its loops, or they are compiled for the oldest processor.
pub(crate) trait Work<T>: Sync {
    /// Does it with the piece of this number.
    fn run<S: Simd>(&self, simd: S, index: usize, piece: &mut [T]);
}

/// Loops that compilers vectorise.
impl<T, F: Fn(usize, &mut [T]) + Sync> Work<T> for F {
    #[inline(always)]
    fn run<S: Simd>(&self, _: S, index: usize, piece: &mut [T]) {
        self(index, piece);
    }
}

/// So many numbers from a place on, or none, if there are not so many.
#[inline(always)]
pub(crate) fn some<T>(numbers: &[T], start: usize, count: usize) -> &[T] {
    numbers.get(start..start + count).unwrap_or_default()
}

/// Runs `work` on every `size` numbers of `values`, on all threads, compiled for this processor.
pub(crate) fn pieces<T: Send>(
    values: &mut [T],
    size: usize,
    work: impl Fn(usize, &mut [T]) + Sync,
) {
    pieces_on(Arch::new(), values, size, &work);
}

/// The same with certain instructions of this processor.
pub(crate) fn pieces_on<T: Send>(arch: Arch, values: &mut [T], size: usize, work: &impl Work<T>) {
    let run = |(index, piece)| arch.dispatch(Piece { work, index, piece });
    let size = size.max(1);
    if values.len() <= size {
        values.chunks_mut(size).enumerate().for_each(run);
    } else {
        values.par_chunks_mut(size).enumerate().for_each(run);
    }
}

/// The same with memory to work in, which every thread makes once.
pub(crate) fn pieces_with<T: Send, M>(
    values: &mut [T],
    size: usize,
    memory: impl Fn() -> M + Sync + Send,
    work: impl Fn(&mut M, usize, &mut [T]) + Sync,
) {
    let arch = Arch::new();
    let size = size.max(1);
    let threads = rayon::current_num_threads().min(values.len().div_ceil(size));
    let pieces = Mutex::new(values.chunks_mut(size).enumerate());
    let next = || pieces.lock().ok()?.next();
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
        let mut made = None;
        while let Some((index, piece)) = next() {
            arch.dispatch(With {
                work: &work,
                memory: made.get_or_insert_with(&memory),
                index,
                piece,
            });
        }
    });
}

/// So many zeros, written on all threads: one alone writes those of a product for a twentieth of its time.
pub(crate) fn zeros<T: Default + Send>(count: usize) -> Vec<T> {
    let all = (0..count).into_par_iter().with_min_len(PIECE);
    all.map(|_| T::default()).collect()
}

/// What `make` makes for each of so many numbers, on all threads, compiled for this processor.
pub(crate) fn made<T: Send>(count: usize, size: usize, make: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let arch = Arch::new();
    let make = &make;
    let each = |index| arch.dispatch(Make { make, index });
    let all = (0..count).into_par_iter().with_min_len(size);
    all.map(each).collect()
}

/// A call of `make`.
struct Make<'a, F> {
    make: &'a F,
    index: usize,
}

impl<T, F: Fn(usize) -> T> WithSimd for Make<'_, F> {
    type Output = T;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> T {
        (self.make)(self.index)
    }
}

/// A call of `work` with memory.
struct With<'a, T, M, W> {
    work: &'a W,
    memory: &'a mut M,
    index: usize,
    piece: &'a mut [T],
}

impl<T, M, W: Fn(&mut M, usize, &mut [T])> WithSimd for With<'_, T, M, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        (self.work)(self.memory, self.index, self.piece);
    }
}

/// The instructions to read memory with as fast as it goes: registers of 256 bits at most. With loads
/// of 512, a whole cache line, the same loop read 28 instead of 34 GB/s on a Xeon.
pub(crate) fn reading() -> Arch {
    match Arch::new() {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(v4) => Arch::V3(*v4),
        arch => arch,
    }
}

/// A call of `work`. Not a closure: those are called through a function that is not always inlined.
struct Piece<'a, T, W> {
    work: &'a W,
    index: usize,
    piece: &'a mut [T],
}

impl<T, W: Work<T>> WithSimd for Piece<'_, T, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.work.run(simd, self.index, self.piece);
    }
}
