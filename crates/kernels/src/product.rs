use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::Arch;

use crate::split::{pieces_on, reading};

/// A matrix, row by row.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision; widened on the way into the product.
    F16(&'a [f16]),
    /// The upper half of single precision, widened likewise.
    BF16(&'a [bf16]),
}

/// Rows in a piece: with 4096 columns of f32, 576 KiB. Streams that are a power of two apart were
/// slower: 32 rows of 11008 f16 gave 30 GB/s, 36 gave 32.
const ROWS: usize = 36;

/// Independent sums of a row. Several registers: a loop of one or two is unrolled before it is vectorised.
pub(crate) const LANES: usize = 64;

/// `W · x`, which reads `W` once at the speed of memory.
///
/// # Shapes
/// - `weight`: `[output, x.len()]`
/// - returns `[output]`
pub fn matrix_vector(weight: Weight, x: &[f32], output: usize) -> Vec<f32> {
    match weight {
        Weight::F32(weight) => product::<_, _, 2>(reading(), (), weight, x, output),
        Weight::F16(weight) => match Arch::new() {
            #[cfg(target_arch = "x86_64")]
            Arch::V4(v4) => product::<_, _, 4>(Arch::V4(v4), v4, weight, x, output),
            arch => product::<_, _, 4>(arch, (), weight, x, output),
        },
        Weight::BF16(weight) => product::<_, _, 4>(Arch::new(), (), weight, x, output),
    }
}

/// Reads `STREAMS` parts of a piece at the same time, each from its first row to its last: a single
/// stream does not saturate memory, and one that jumps at the end of a row waits there. Numbers that
/// are widened before use take more of them, and the widest registers.
fn product<T: Widen<I>, I: Copy + Sync, const STREAMS: usize>(
    arch: Arch,
    instructions: I,
    weight: &[T],
    x: &[f32],
    output: usize,
) -> Vec<f32> {
    let mut y = vec![0.0; output];
    pieces_on(
        arch,
        &mut y,
        ROWS,
        #[inline(always)]
        |index, y| {
            let row = |row: usize| {
                let start = (index * ROWS + row) * x.len();
                &weight[start..start + x.len()]
            };
            let part = y.len() / STREAMS;
            for at in 0..part {
                let rows: [_; STREAMS] = std::array::from_fn(|stream| row(stream * part + at));
                let sums = dots(rows, x, instructions);
                for stream in 0..STREAMS {
                    y[stream * part + at] = sums[stream];
                }
            }
            for (at, y) in y.iter_mut().enumerate().skip(part * STREAMS) {
                [*y] = dots([row(at)], x, instructions);
            }
        },
    );
    y
}

/// The products of rows with `x`. The sum of a row does not depend on how many are read at a time.
///
/// Without closures: they are compiled for the oldest processor where they are not inlined.
#[inline(always)]
pub(crate) fn dots<T: Widen<I>, I: Copy, const N: usize>(
    rows: [&[T]; N],
    x: &[f32],
    instructions: I,
) -> [f32; N] {
    let (chunks, x_rest) = x.as_chunks::<LANES>();
    let row_chunks = rows.map(|row| &row.as_chunks::<LANES>().0[..chunks.len()]);
    let mut lanes = [[0.0; LANES]; N];
    for (at, x) in chunks.iter().enumerate() {
        for (lanes, row) in lanes.iter_mut().zip(row_chunks) {
            let w = T::widen_chunk(&row[at], instructions);
            for lane in 0..LANES {
                lanes[lane] += w[lane] * x[lane];
            }
        }
    }
    let mut sums = [0.0; N];
    for ((sum, mut lanes), row) in sums.iter_mut().zip(lanes).zip(rows) {
        let row_rest = &row[chunks.len() * LANES..];
        for (lane, (w, x)) in lanes.iter_mut().zip(row_rest.iter().zip(x_rest)) {
            *lane += w.widen() * x;
        }
        *sum = total(lanes);
    }
    sums
}

/// Their sum, half added to half: of one after the other, each waits for the one before.
#[inline(always)]
pub(crate) fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES;
    while half > 1 {
        half /= 2;
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// A number that becomes an f32, by certain instructions of a processor or by those of all.
pub(crate) trait Widen<I>: Copy + Sync {
    /// The same number.
    fn widen(self) -> f32;

    /// All numbers of a chunk.
    #[inline(always)]
    fn widen_chunk(chunk: &[Self; LANES], _: I) -> [f32; LANES] {
        let mut wide = [0.0; LANES];
        for lane in 0..LANES {
            wide[lane] = chunk[lane].widen();
        }
        wide
    }
}

impl<I> Widen<I> for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl<I> Widen<I> for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Widen<()> for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_f16(self)
    }
}

#[cfg(target_arch = "x86_64")]
impl Widen<pulp::x86::V4> for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_f16(self)
    }

    /// By one instruction: the steps of [`widen_f16`] are slower than memory.
    #[inline(always)]
    fn widen_chunk(chunk: &[Self; LANES], v4: pulp::x86::V4) -> [f32; LANES] {
        let mut wide = [0.0; LANES];
        let (registers, _) = chunk.reinterpret_cast().as_chunks::<16>();
        for (wide, &halves) in wide.as_chunks_mut::<16>().0.iter_mut().zip(registers) {
            *wide = pulp::cast(v4.avx512f._mm512_cvtph_ps(pulp::cast(halves)));
        }
        wide
    }
}

/// In steps that compilers vectorise; `f16::to_f32` asks for the processor at every number.
#[inline(always)]
fn widen_f16(half: f16) -> f32 {
    /// What the exponents differ by, in place.
    const BIAS: u32 = (127 - 15) << 23;
    const INFINITE: u32 = 0x7c00 << 13;
    /// The smallest normal f16.
    const NORMAL: u32 = 0x0400 << 13;
    let bits = u32::from(half.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    let wide = match magnitude {
        // Digits below a leading one that is then taken away.
        0..NORMAL => {
            let one = BIAS + NORMAL;
            (f32::from_bits(magnitude + one) - f32::from_bits(one)).to_bits()
        }
        NORMAL..INFINITE => magnitude + BIAS,
        _ => magnitude + 2 * BIAS,
    };
    f32::from_bits(wide | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_exactly() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            let wide = widen_f16(half);
            assert!(wide.is_nan() == half.is_nan(), "{bits:#x}");
            assert!(
                half.is_nan() || wide.to_bits() == half.to_f32().to_bits(),
                "{bits:#x}"
            );
        }
    }

    #[test]
    fn is_the_formula_in_every_precision() {
        for [output, columns] in [[0, 5], [3, 0], [1, 1], [33, 70], [64, 2100], [7, 1024]] {
            let value = |i: usize| (i as f32 * 0.61).sin() / 32.0;
            let weight: Vec<f32> = (0..output * columns).map(value).collect();
            let half: Vec<f16> = weight.iter().map(|&x| f16::from_f32(x)).collect();
            let upper: Vec<bf16> = weight.iter().map(|&x| bf16::from_f32(x)).collect();
            let x: Vec<f32> = (0..columns).map(|i| value(i + 17)).collect();
            let exact = |weight: &dyn Fn(usize) -> f64, row: usize| -> f64 {
                let product = |column| weight(row * columns + column) * f64::from(x[column]);
                (0..columns).map(product).sum()
            };
            let single = matrix_vector(Weight::F32(&weight), &x, output);
            let halved = matrix_vector(Weight::F16(&half), &x, output);
            let shortened = matrix_vector(Weight::BF16(&upper), &x, output);
            assert_eq!((single.len(), halved.len()), (output, output));
            for row in 0..output {
                let expected = exact(&|at| f64::from(weight[at]), row);
                assert!((f64::from(single[row]) - expected).abs() < 1e-6);
                let expected = exact(&|at| f64::from(half[at].to_f32()), row);
                assert!((f64::from(halved[row]) - expected).abs() < 1e-6);
                let expected = exact(&|at| f64::from(upper[at].to_f32()), row);
                assert!((f64::from(shortened[row]) - expected).abs() < 1e-6);
            }
        }
    }
}
