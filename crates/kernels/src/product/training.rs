//! What a product gives back where its results have gradients: `Wᵀ · G` to its inputs, `G · Xᵀ` to its
//! weight.

use std::any::TypeId;
use std::borrow::Cow;
use std::marker::PhantomData;

use gemm::Parallelism;
use half::bf16;

use super::inputs::Pairs;
use super::kernels::{CodedRows, PairTile, PlainRows};
use super::layout::{WORDS, WeightChunk};
use super::many_rows::Rows;
use super::{Inputs, WIDENED, Weight, singles};
use crate::blocks::{SPAN, with_coding};
use crate::isa::Isa;
use crate::isa::single::{Operand, multiply_into, product};
use crate::precision::{Number, widen};
use crate::split::pieces;

/// Rows and columns that are turned at a time: a chunk of as many rows.
const SQUARE: usize = Pairs::FEATURES;

impl<T: Number> Inputs<'_, T> {
    /// `Wᵀ · x`, where `x` are the gradients of `W · inputs`. Nothing of `W` is held twice but a block.
    ///
    /// bf16 weights and codes meet gradients that are rounded to bf16 where the processor multiplies
    /// those; anything else is computed in f32.
    ///
    /// # Shapes
    /// - `weight`: `[features, input]`
    /// - returns `[input, rows]`
    ///
    /// # Panics
    /// If the weight has another number of rows.
    pub fn product_of_transposed<Y: Number>(&self, weight: Weight<'_>) -> Vec<Y> {
        let features = self.features;
        let columns = match weight {
            Weight::F32(weight) => weight.len() / features,
            Weight::F16(weight) => weight.len() / features,
            Weight::BF16(weight) => weight.len() / features,
            Weight::Blocks(blocks) => blocks.columns(),
        };
        match weight {
            Weight::F32(weight) => {
                assert_eq!(weight.len(), columns * features, "rows of the weight");
                let weight = Operand::new(weight, [features, columns], columns).transposed();
                let x = Operand::new(self.singles(), [features, self.rows()], self.rows());
                Y::of_singles(product([weight, x]))
            }
            Weight::F16(weight) => self.transposed_in_blocks(columns, |row, to| {
                widen(&weight[row * columns..][..to.len()], to);
            }),
            Weight::BF16(weight) if self.isa.pairs.is_some() => {
                self.transposed_in_pairs(&PlainRows { weight, columns }, columns)
            }
            Weight::BF16(weight) => self.transposed_in_blocks(columns, |row, to| {
                widen(&weight[row * columns..][..to.len()], to);
            }),
            Weight::Blocks(blocks) => {
                assert_eq!(blocks.rows(), features, "rows of the weight");
                match self.isa.pairs {
                    Some(_) => with_coding!(blocks.format(), C => {
                        let coded = CodedRows::<C> {
                            blocks,
                            bytes: self.isa.bytes,
                            widen: self.isa.widen,
                            coding: PhantomData,
                        };
                        self.transposed_in_pairs(&coded, columns)
                    }),
                    None => self.transposed_in_blocks(columns, |first, to| {
                        pieces(to, columns, |row, to| blocks.widen(first + row, to));
                    }),
                }
            }
        }
    }

    /// With columns of the weight turned into rows of bf16, a block at a time.
    fn transposed_in_pairs<Y: Number>(
        &self,
        weight: &impl Rows<PairTile<SQUARE>>,
        columns: usize,
    ) -> Vec<Y> {
        let spans = (WIDENED / SPAN / self.features).max(1);
        let width = columns.min(spans * SPAN);
        let mut turned = vec![bf16::ZERO; width * self.features];
        let mut y = vec![Y::default(); columns * self.rows()];
        for (block, y) in y.chunks_mut((width * self.rows()).max(1)).enumerate() {
            let turned = &mut turned[..y.len() / self.rows() * self.features];
            turn(weight, self.features, block * spans, turned);
            self.of_pairs(turned, y);
        }
        y
    }

    /// With what `widened` writes of the weight, from a row on, whole rows at a time.
    fn transposed_in_blocks<Y: Number>(
        &self,
        columns: usize,
        widened: impl Fn(usize, &mut [f32]),
    ) -> Vec<Y> {
        let height = (WIDENED / columns.max(1)).clamp(1, self.features);
        let mut block = vec![0.0; height * columns];
        let mut sums = vec![0.0; columns * self.rows()];
        for first in (0..self.features).step_by(height) {
            let count = height.min(self.features - first);
            let block = &mut block[..count * columns];
            widened(first, block);
            self.add_transposed(block, first, &mut sums);
        }
        Y::of_singles(sums)
    }

    /// Adds the products of rows of a weight from `first` on.
    fn add_transposed(&self, weight: &[f32], first: usize, sums: &mut [f32]) {
        let rows = self.rows();
        let columns = sums.len() / rows;
        let count = weight.len() / columns.max(1);
        let x = &self.singles()[first * rows..];
        let weight = Operand::new(weight, [count, columns], columns).transposed();
        let x = Operand::new(x, [count, rows], rows);
        multiply_into([weight, x], (sums, rows), first > 0, Parallelism::Rayon(0));
    }
}

/// `G · Xᵀ`, where `G` are the gradients of `W · X`; bf16 in bf16 where the processor multiplies that, or
/// else in f32.
///
/// # Shapes
/// - `gradient`: `[output, rows]`
/// - `x`: `[input, rows]`
/// - returns `[output, input]`
///
/// # Panics
/// If there are no rows, or no whole ones.
pub fn product_with_transposed<T: Number + 'static>(
    gradient: &[T],
    x: &[T],
    rows: usize,
) -> Vec<T> {
    product_with_transposed_on(Isa::of_this_processor(), gradient, x, rows)
}

/// The same with certain instructions.
fn product_with_transposed_on<T: Number + 'static>(
    isa: Isa,
    gradient: &[T],
    x: &[T],
    rows: usize,
) -> Vec<T> {
    let (output, input) = (gradient.len() / rows, x.len() / rows);
    assert_eq!((output * rows, input * rows), (gradient.len(), x.len()));
    if isa.pairs.is_some() && TypeId::of::<T>() == TypeId::of::<bf16>() {
        let upper = |x: &[T]| x.iter().map(|x| x.to_bf16()).collect::<Vec<_>>();
        let (gradient, weight) = (upper(gradient), &upper(x));
        let mut turned = vec![bf16::ZERO; x.len()];
        let columns = rows;
        turn(&PlainRows { weight, columns }, input, 0, &mut turned);
        let mut y = vec![T::default(); output * input];
        if let Some(inputs) = Inputs::on(isa, &turned, rows) {
            inputs.of_pairs(&gradient, &mut y);
        }
        return y;
    }
    let height = match T::as_singles(gradient) {
        Some(_) => output,
        None => WIDENED / input.max(1),
    };
    let block = height.max(1) * rows;
    let [gradient, x] = [gradient, x].map(|numbers| match T::as_singles(numbers) {
        Some(numbers) => Cow::Borrowed(numbers),
        None => Cow::Owned(singles(numbers)),
    });
    let x = Operand::new(&x, [input, rows], rows).transposed();
    let products = gradient.chunks(block).map(|gradient| {
        let count = gradient.len() / rows;
        let gradient = Operand::new(gradient, [count, rows], rows);
        T::of_singles(product([gradient, x]))
    });
    // As it is, if it is one.
    products
        .reduce(|mut all, block| {
            all.extend(block);
            all
        })
        .unwrap_or_default()
}

/// Columns of a matrix as rows, from span `first` of every row on.
///
/// # Shapes
/// - `matrix`: `[rows, columns]`
/// - `to`: `[some columns, rows]`
fn turn(matrix: &impl Rows<PairTile<SQUARE>>, rows: usize, first: usize, to: &mut [bf16]) {
    pieces(
        to,
        SPAN * rows,
        #[inline(always)]
        |span, to| {
            let mut tile = PairTile(vec![WeightChunk::ZERO; SPAN / SQUARE]);
            for row in (0..rows).step_by(SQUARE) {
                let count = SQUARE.min(rows - row);
                for within in 0..count {
                    matrix.read(row + within, first + span, &mut tile, [within, 0]);
                    let scale = matrix.scale(row + within);
                    if scale != 1.0 {
                        let words = tile.0.iter_mut().map(|chunk| &mut chunk.0[within]);
                        words.for_each(|words| lengthen(words, scale));
                    }
                }
                for (square, to) in tile.0.iter().zip(to.chunks_mut(SQUARE * rows)) {
                    let lines = to.chunks_exact_mut(rows);
                    for (line, column) in lines.zip(turned(&square.0)) {
                        let column: [bf16; SQUARE] = column.map(bf16::from_bits);
                        line[row..row + count].copy_from_slice(&column[..count]);
                    }
                }
            }
        },
    );
}

/// bf16 times a number.
#[inline(always)]
fn lengthen(words: &mut [u32; WORDS], scale: f32) {
    let numbers: &mut [u16; SQUARE] = bytemuck::cast_mut(words);
    for x in numbers {
        *x = (Number::to_f32(bf16::from_bits(*x)) * scale)
            .to_bf16()
            .to_bits();
    }
}

/// The columns of a square. Two rows are put together first: words move as fast as halves of them.
#[inline(always)]
fn turned(square: &[[u32; WORDS]; SQUARE]) -> [[u16; SQUARE]; SQUARE] {
    let rows: &[[u16; SQUARE]; SQUARE] = bytemuck::cast_ref(square);
    let mut columns = [[0u32; WORDS]; SQUARE];
    for (pair, rows) in rows.as_chunks::<2>().0.iter().enumerate() {
        for at in 0..SQUARE {
            columns[at][pair] = u32::from(rows[0][at]) | u32::from(rows[1][at]) << 16;
        }
    }
    bytemuck::cast(columns)
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::super::tests::{assert_close, exact, numbers, rows, sizes, whole_blocks};
    use super::*;
    use crate::blocks::{Blocks, Format};

    /// `[rows, columns]` → `[columns, rows]`
    fn turned<T: Copy>(matrix: &[T], columns: usize) -> Vec<T> {
        let column = |at: usize| matrix.iter().skip(at).step_by(columns).copied();
        (0..columns).flat_map(column).collect()
    }

    /// The same numbers as bf16.
    fn upper(x: &[f32]) -> Vec<bf16> {
        x.iter().map(|x| bf16::from_f32(*x)).collect()
    }

    fn single(x: &[bf16]) -> Vec<f32> {
        x.iter().map(|x| x.to_f32()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn inputs_get_back_the_transposed_weight([output, input, tokens] in sizes(), seed in 0..1000u64) {
            let weight = numbers(output * input, seed);
            let gradient = numbers(output * tokens, seed + 1);
            let halves: Vec<f16> = weight.iter().map(|x| f16::from_f32(*x)).collect();
            let [uppers, upper_gradient] = [&weight, &gradient].map(|x| upper(x));
            let exact = |weight: &[f32], gradient: &[f32]| exact(&turned(weight, input), gradient, output);
            let of_single = exact(&weight, &gradient);
            let of_half = exact(&halves.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), &gradient);
            let of_upper = exact(&single(&uppers), &single(&upper_gradient));
            for isa in Isa::all() {
                let what = format!("{isa:?} {output} {input} {tokens}");
                let inputs = Inputs::on(isa, &gradient, output).expect("whole rows");
                assert_close(&inputs.product_of_transposed(Weight::F32(&weight)), &of_single, 1e-6, &what);
                assert_close(&inputs.product_of_transposed(Weight::F16(&halves)), &of_half, 1e-6, &what);
                // Gradients are rounded to bf16.
                let rounded = exact(&single(&uppers), &gradient);
                assert_close(&inputs.product_of_transposed(Weight::BF16(&uppers)), &rounded, 4e-3, &what);
                let inputs = Inputs::on(isa, &upper_gradient, output).expect("whole rows");
                assert_close(&inputs.product_of_transposed(Weight::BF16(&uppers)), &of_upper, 1e-6, &what);
                let found: Vec<bf16> = inputs.product_of_transposed(Weight::BF16(&uppers));
                assert_close(&single(&found), &of_upper, 5e-3, &what);
            }
        }

        #[test]
        fn inputs_get_back_what_codes_stand_for(
            [output, input, tokens] in sizes(),
            format in proptest::sample::select(Format::ALL.to_vec()),
            seed in 0..1000u64,
        ) {
            let input = whole_blocks(format, input);
            let bytes = rows(format, output, input, seed);
            let stride = format.row_bytes(input).expect("whole rows");
            let blocks = Blocks::new(format, input, stride, &bytes).expect("whole rows");
            let mut weight = vec![0.0; output * input];
            blocks.widen_all(&mut weight);
            let gradient = numbers(output * tokens, seed + 1);
            let exact = exact(&turned(&weight, input), &gradient, output);
            for isa in Isa::all() {
                let what = format!("{format:?} {isa:?} {output} {input} {tokens}");
                let inputs = Inputs::on(isa, &gradient, output).expect("whole rows");
                // Both are rounded to bf16.
                let share = if isa.pairs.is_some() { 8e-3 } else { 1e-6 };
                assert_close(&inputs.product_of_transposed(Weight::Blocks(blocks)), &exact, share, &what);
            }
        }

        #[test]
        fn weights_get_back_the_transposed_inputs([output, input, tokens] in sizes(), seed in 0..1000u64) {
            let x = numbers(input * tokens, seed);
            let gradient = numbers(output * tokens, seed + 1);
            let [upper_x, upper_gradient] = [&x, &gradient].map(|x| upper(x));
            let halves: [Vec<f16>; 2] =
                [&gradient, &x].map(|x| x.iter().map(|x| f16::from_f32(*x)).collect());
            let exact = |gradient: &[f32], x: &[f32]| exact(gradient, &turned(x, tokens), tokens);
            let of_single = exact(&gradient, &x);
            let of_upper = exact(&single(&upper_gradient), &single(&upper_x));
            // Two operands and a sum are rounded, or are subnormal.
            let of_half = of_single.iter().map(|&(sum, size)| (sum, size * 2e-3 + 3.0 * 2f64.powi(-25)));
            let of_half: Vec<_> = of_half.collect();
            for isa in Isa::all() {
                let what = format!("{isa:?} {output} {input} {tokens}");
                let found = product_with_transposed_on(isa, &gradient, &x, tokens);
                assert_close(&found, &of_single, 1e-6, &what);
                let found = product_with_transposed_on(isa, &upper_gradient, &upper_x, tokens);
                assert_close(&single(&found), &of_upper, 5e-3, &what);
                let found = product_with_transposed_on(isa, &halves[0], &halves[1], tokens);
                let found: Vec<f32> = found.iter().map(|x| x.to_f32()).collect();
                assert_close(&found, &of_half, 1.0, &what);
            }
        }
    }

    /// Weights of several blocks, in both directions.
    #[test]
    fn blocks_meet_where_they_end() {
        let (output, input, tokens) = (2100, 2100, 3);
        let weight = upper(&numbers(output * input, 1));
        let gradient = numbers(output * tokens, 2);
        let expected = exact(&turned(&single(&weight), input), &gradient, output);
        for isa in Isa::all() {
            let inputs = Inputs::on(isa, &gradient, output).expect("whole rows");
            let found = inputs.product_of_transposed(Weight::BF16(&weight));
            assert_close(&found, &expected, 4e-3, &format!("{isa:?}"));
            let x = numbers(input * tokens, 3);
            let found = product_with_transposed_on(isa, &gradient, &x, tokens);
            let expected = exact(&gradient, &turned(&x, tokens), tokens);
            assert_close(&found, &expected, 1e-6, &format!("{isa:?}"));
        }
    }
}
