use std::array::from_fn;
use std::marker::PhantomData;

use pulp::{Arch, Simd};

use super::Weight;
use super::inputs::{code, inverse, scale_of};
use crate::blocks::{
    Blocks, CHUNK, CHUNKS, Coding, Factors, Format, ROOM, SPAN, Span, with_coding,
};
use crate::isa::{self, Isa};
use crate::precision::Widen;
use crate::split::{Work, pieces, pieces_on, reading};

/// Rows in a piece: with 4096 columns of f32, 1.1 MiB. Between 36 and 144, which differed by 1 to 3 %,
/// and few enough for many threads. Streams that are a power of two apart were slower: 32 rows of
/// 11008 f16 gave 30 GB/s, 36 gave 32.
const ROWS: usize = 72;

/// Parts of a piece that are read at the same time, each from its first row to its last: a single
/// stream does not saturate memory, and one that jumps at the end of a row waits there.
pub(crate) const STREAMS: usize = 4;

/// Registers of independent sums for each stream. With those of the streams no more than the
/// processor has, or they live in memory: 27 instead of 36 GB/s.
const REGISTERS: usize = 2;

/// Inputs that meet what is read of a row, or of two, together: their sums stay in registers.
const TOGETHER: usize = 4;

/// `W · x`, which reads `W` once at the speed of memory.
///
/// Weights in codes of fewer than 8 bits or with scales of groups meet inputs that are rounded to 8 bits,
/// with a scale for as many columns as share one of the weight.
///
/// # Shapes
/// - `weight`: `[output, x.len()]`
/// - returns `[output]`
///
/// # Panics
/// If the weight has fewer rows, or rows of another length.
pub fn matrix_vector(weight: Weight, x: &[f32], output: usize) -> Vec<f32> {
    of_few(Isa::of_this_processor(), weight, &[x], output)
}

/// The same for a few rows of inputs, all as long: what a row comes to does not depend on the others.
///
/// # Shapes
/// - `xs`: at least one, `[features]` each
/// - returns `[output, xs.len()]`
pub(super) fn of_few(isa: Isa, weight: Weight, xs: &[&[f32]], output: usize) -> Vec<f32> {
    let columns = xs[0].len();
    let mut y = vec![0.0; output * xs.len()];
    let piece = ROWS * xs.len();
    match weight {
        Weight::F32(weight) => {
            let numbers = Numbers { weight, columns };
            pieces_on(reading(), &mut y, piece, &Product::new(numbers, xs));
        }
        Weight::F16(weight) => {
            let numbers = Numbers { weight, columns };
            pieces_on(Arch::new(), &mut y, piece, &Product::new(numbers, xs));
        }
        Weight::BF16(weight) => {
            let numbers = Numbers { weight, columns };
            pieces_on(Arch::new(), &mut y, piece, &Product::new(numbers, xs));
        }
        Weight::Blocks(blocks) if blocks.format() == Format::Int8 => {
            assert_eq!(blocks.columns(), columns, "columns of the weight");
            pieces_on(
                Arch::new(),
                &mut y,
                piece,
                &Product::<i8, _>::new(blocks, xs),
            );
        }
        Weight::Blocks(blocks) => with_coding!(blocks.format(), C => {
            assert_eq!(blocks.columns(), columns, "columns of the weight");
            let bytes = |x: &&[f32]| {
                Arch::new().dispatch(#[inline(always)] || ByteInputs::new(x, C::GROUP))
            };
            let xs: Vec<ByteInputs> = xs.iter().map(bytes).collect();
            let xs: Vec<&ByteInputs> = xs.iter().collect();
            let coded = Coded::<C> {
                bytes: isa.bytes,
                blocks,
                of: PhantomData,
            };
            pieces(&mut y, piece, |index, y: &mut [f32]| {
                coded.in_streams(index * ROWS, &xs, y);
            });
        }),
    }
    y
}

/// Inputs as signed bytes, in spans; zeros beyond the last.
pub(crate) struct ByteInputs {
    /// Beside them their scales, and the sums of what they are scales of; of a whole chunk the first, where
    /// its halves share a scale.
    pub(crate) spans: Vec<([[i8; CHUNK]; CHUNKS], Factors)>,
}

impl ByteInputs {
    /// With a scale for every `group` columns.
    #[inline(always)]
    pub(crate) fn new(x: &[f32], group: usize) -> Self {
        let mut spans = vec![([[0; CHUNK]; CHUNKS], Factors::default()); x.len().div_ceil(SPAN)];
        for (x, (codes, factors)) in x.chunks(SPAN).zip(&mut spans) {
            let codes = codes.as_flattened_mut();
            for (index, (x, codes)) in x.chunks(group).zip(codes.chunks_mut(group)).enumerate() {
                let bits = x.iter().map(|x| x.to_bits() & 0x7fff_ffff);
                let scale = scale_of(bits.max().unwrap_or(0));
                let inverse = inverse(scale);
                for (to, &x) in codes.iter_mut().zip(x) {
                    *to = code(x, inverse);
                }
                for (part, codes) in codes.chunks(CHUNK.min(group)).enumerate() {
                    let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
                    let column = index * group + part * CHUNK;
                    let (chunk, half) = (column / CHUNK, column % CHUNK / (CHUNK / 2));
                    factors.scale[half][chunk] = scale;
                    factors.least[half][chunk] = scale * sum as f32;
                }
            }
        }
        Self { spans }
    }
}

/// The products of rows of a weight with inputs.
trait Dots {
    type Input: ?Sized;

    /// What is read of a row meets all inputs, which are as long. The product of a row and an input does not
    /// depend on the others.
    fn dots<const N: usize, const M: usize>(
        &self,
        rows: [usize; N],
        xs: [&Self::Input; M],
    ) -> [[f32; M]; N];

    /// Those of a piece: `y` is `[rows, xs.len()]` from the row `first` on.
    #[inline(always)]
    fn in_streams(&self, first: usize, xs: &[&Self::Input], y: &mut [f32]) {
        let count = y.len() / xs.len();
        let part = count / STREAMS;
        for at in 0..part {
            let rows = from_fn::<_, STREAMS, _>(|stream| stream * part + at);
            self.of_rows(first, rows, xs, y);
        }
        for at in part * STREAMS..count {
            self.of_rows(first, [at], xs, y);
        }
    }

    #[inline(always)]
    fn of_rows<const N: usize>(
        &self,
        first: usize,
        rows: [usize; N],
        xs: &[&Self::Input],
        y: &mut [f32],
    ) {
        let (together, others) = xs.as_chunks::<TOGETHER>();
        for (group, together) in together.iter().enumerate() {
            let (twos, ones) = rows.as_chunks::<2>();
            for &[one, other] in twos {
                let sums = self.dots([first + one, first + other], *together);
                for (at, sums) in [one, other].into_iter().zip(sums) {
                    y[at * xs.len() + group * TOGETHER..][..TOGETHER].copy_from_slice(&sums);
                }
            }
            for at in ones {
                let [sums] = self.dots([first + at], *together);
                y[at * xs.len() + group * TOGETHER..][..TOGETHER].copy_from_slice(&sums);
            }
        }
        for (column, x) in others.iter().enumerate() {
            let sums = self.dots(rows.map(|at| first + at), [*x]);
            for (at, [sum]) in rows.into_iter().zip(sums) {
                y[at * xs.len() + together.len() * TOGETHER + column] = sum;
            }
        }
    }
}

/// Rows of codes.
struct Coded<'a, C> {
    bytes: Option<isa::Bytes>,
    blocks: Blocks<'a>,
    of: PhantomData<C>,
}

impl<C: Coding> Dots for Coded<'_, C> {
    type Input = ByteInputs;

    #[inline(always)]
    fn dots<const N: usize, const M: usize>(
        &self,
        rows: [usize; N],
        xs: [&ByteInputs; M],
    ) -> [[f32; M]; N] {
        match self.bytes {
            // Sums of several rows and several inputs would not all stay in registers.
            Some(bytes) if M > 1 => rows.map(|row| {
                let [sums] = bytes.dots::<C, 1, M>(self.blocks, [row], xs);
                sums
            }),
            Some(bytes) => bytes.dots::<C, N, M>(self.blocks, rows, xs),
            None => rows.map(|row| xs.map(|x| plain_dot::<C>(self.blocks, row, x))),
        }
    }
}

/// [`Coded`] in plain Rust.
fn plain_dot<C: Coding>(blocks: Blocks<'_>, row: usize, x: &ByteInputs) -> f32 {
    let part = CHUNK.min(C::GROUP);
    let mut room = [0; ROOM];
    let mut total = 0.0;
    for (index, (inputs, sides)) in x.spans.iter().enumerate() {
        let span = Span::<C>::new(blocks, row, index, &mut room);
        let factors = span.factors();
        for (chunk, inputs) in inputs.iter().enumerate() {
            let codes = span.codes(chunk);
            let parts = codes.chunks(part).zip(inputs.chunks(part));
            for (half, (codes, inputs)) in parts.enumerate() {
                let products = codes.iter().zip(inputs);
                let products = products.map(|(&code, &x)| i32::from(code) * i32::from(x));
                let sum: i32 = products.sum();
                total += factors.scale[half][chunk] * sides.scale[half][chunk] * sum as f32
                    + factors.least[half][chunk] * sides.least[half][chunk];
            }
        }
    }
    total
}

/// Rows of numbers, each behind a scale.
trait Scaled<T>: Sync {
    fn row(&self, row: usize) -> &[T];

    fn scale(&self, row: usize) -> f32;
}

/// Without scales.
struct Numbers<'a, T> {
    weight: &'a [T],
    columns: usize,
}

impl<T: Sync> Scaled<T> for Numbers<'_, T> {
    #[inline(always)]
    fn row(&self, row: usize) -> &[T] {
        &self.weight[row * self.columns..][..self.columns]
    }

    #[inline(always)]
    fn scale(&self, _: usize) -> f32 {
        1.0
    }
}

/// [`Format::Int8`].
impl Scaled<i8> for Blocks<'_> {
    #[inline(always)]
    fn row(&self, row: usize) -> &[i8] {
        bytemuck::cast_slice(&Blocks::row(self, row)[4..][..self.columns()])
    }

    #[inline(always)]
    fn scale(&self, row: usize) -> f32 {
        self.row_scale(row)
    }
}

struct Product<'a, T, W> {
    weight: W,
    xs: &'a [&'a [f32]],
    of: PhantomData<fn() -> T>,
}

impl<'a, T, W> Product<'a, T, W> {
    fn new(weight: W, xs: &'a [&'a [f32]]) -> Self {
        let of = PhantomData;
        Self { weight, xs, of }
    }
}

impl<T: Widen, W: Scaled<T>> Work<f32> for Product<'_, T, W> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, index: usize, y: &mut [f32]) {
        Plain { simd, of: self }.in_streams(index * ROWS, self.xs, y);
    }
}

/// Rows of numbers, by certain instructions.
struct Plain<'a, S, T, W> {
    simd: S,
    of: &'a Product<'a, T, W>,
}

impl<S: Simd, T: Widen, W: Scaled<T>> Dots for Plain<'_, S, T, W> {
    type Input = [f32];

    #[inline(always)]
    fn dots<const N: usize, const M: usize>(
        &self,
        rows: [usize; N],
        xs: [&[f32]; M],
    ) -> [[f32; M]; N] {
        let weight = &self.of.weight;
        let mut sums = dots_of(self.simd, rows.map(|row| weight.row(row)), xs);
        for (sums, row) in sums.iter_mut().zip(rows) {
            let scale = weight.scale(row);
            sums.iter_mut().for_each(|sum| *sum *= scale);
        }
        sums
    }
}

/// The products of rows with `x`. The sum of a row does not depend on how many are read at a time.
#[inline(always)]
pub(crate) fn dots<S: Simd, T: Widen, const N: usize>(
    simd: S,
    rows: [&[T]; N],
    x: &[f32],
) -> [f32; N] {
    let mut sums = [0.0; N];
    for (sum, [of_row]) in sums.iter_mut().zip(dots_of(simd, rows, [x])) {
        *sum = of_row;
    }
    sums
}

/// The same with several inputs, all as long: what is read of a row meets all of them.
///
/// Without closures: they are compiled for the oldest processor where they are not inlined.
#[inline(always)]
fn dots_of<S: Simd, T: Widen, const N: usize, const M: usize>(
    simd: S,
    rows: [&[T]; N],
    xs: [&[f32]; M],
) -> [[f32; M]; N] {
    let lanes = S::F32_LANES;
    let mut sums = [[[simd.splat_f32s(0.0); M]; REGISTERS]; N];
    let chunk = REGISTERS * lanes;
    let length = xs[0].len();
    let whole = length - length % chunk;
    for start in (0..whole).step_by(chunk) {
        for (sums, row) in sums.iter_mut().zip(rows) {
            let row = &row[start..][..chunk];
            for (register, sums) in sums.iter_mut().enumerate() {
                let at = register * lanes;
                let w = T::load(simd, &row[at..][..lanes]);
                for (sum, x) in sums.iter_mut().zip(xs) {
                    let x = f32::load(simd, &x[start..][..chunk][at..][..lanes]);
                    *sum = simd.mul_add_e_f32s(w, x, *sum);
                }
            }
        }
    }
    // Behind them at most one whole register, as there are two, and then the last lanes of one that
    // ends with the row.
    let rest = length % lanes;
    let is_rest = simd
        .mask_between_m32s((lanes - rest.max(1)) as u32, lanes as u32)
        .mask();
    let mut totals = [[0.0; M]; N];
    for ((totals, [evens, odds]), row) in totals.iter_mut().zip(sums).zip(rows) {
        for (((total, mut sum), other), x) in totals.iter_mut().zip(evens).zip(odds).zip(xs) {
            sum = simd.add_f32s(sum, other);
            if whole + lanes <= length {
                let w = T::load(simd, &row[whole..][..lanes]);
                sum = simd.mul_add_e_f32s(w, f32::load(simd, &x[whole..][..lanes]), sum);
            }
            if rest > 0 {
                let x = f32::load_last(simd, x);
                let with_rest = simd.mul_add_e_f32s(T::load_last(simd, row), x, sum);
                sum = simd.select_f32s(is_rest, with_rest, sum);
            }
            *total = simd.reduce_sum_f32s(sum);
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn a_row_does_not_depend_on_those_beside_it() {
        let x: Vec<f32> = (0..777).map(|i| (i as f32 * 0.3).sin()).collect();
        let weight: Vec<f32> = (0..101 * 777).map(|i| (i as f32 * 0.7).cos()).collect();
        let together = matrix_vector(Weight::F32(&weight), &x, 101);
        for (row, together) in weight.chunks(777).zip(together) {
            assert_eq!(matrix_vector(Weight::F32(row), &x, 1), [together]);
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
