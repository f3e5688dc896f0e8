//! Products of a weight, as it is stored, with one row of inputs or many.

pub(crate) mod inputs;
mod kernels;
pub(crate) mod layout;
mod many_rows;
pub(crate) mod one_row;
#[cfg(test)]
mod tests;
mod training;

use std::cell::OnceCell;
use std::marker::PhantomData;

use half::{bf16, f16};
pub use one_row::matrix_vector;
pub(crate) use one_row::{STREAMS, dots};
pub use training::product_with_transposed;

use crate::blocks::{Blocks, Coding, with_coding};
use crate::isa::{self, Isa};
use crate::precision::{Number, widen};
use crate::split::{PIECE, pieces, zeros};
use inputs::{Pairs, Quads};
use kernels::{CodedRows, OfCodes, PlainRows, QUAD_DEPTH};
use layout::TOKENS;
use many_rows::Kernel;

/// Most numbers of a weight that are widened to f32 at a time (16 MiB).
pub const WIDENED: usize = 4 << 20;

/// Most rows of inputs that meet a weight as a single one does: where reading it from memory still takes
/// longer than multiplying.
const FEW: usize = 8;

/// A matrix, row by row.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Weight<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision; widened on the way into the product.
    F16(&'a [f16]),
    /// The upper half of single precision.
    BF16(&'a [bf16]),
    /// Codes of fewer bits.
    Blocks(Blocks<'a>),
}

/// Inputs of products, at least one row: what they are packed to is packed once for all weights that they
/// meet.
pub struct Inputs<'a, T> {
    x: &'a [T],
    features: usize,
    isa: Isa,
    pairs: OnceCell<Pairs>,
    /// By the size of their groups.
    quads: [OnceCell<Quads>; 4],
    singles: OnceCell<Vec<f32>>,
}

impl<'a, T: Number> Inputs<'a, T> {
    /// `None` if there are no numbers, or no whole rows of them.
    ///
    /// # Shapes
    /// - `x`: `[features, rows]`
    pub fn new(x: &'a [T], features: usize) -> Option<Self> {
        Self::on(Isa::of_this_processor(), x, features)
    }

    /// With certain instructions.
    fn on(isa: Isa, x: &'a [T], features: usize) -> Option<Self> {
        let whole = !x.is_empty() && features > 0 && x.len().is_multiple_of(features);
        whole.then(|| Self {
            x,
            features,
            isa,
            pairs: OnceCell::new(),
            quads: [const { OnceCell::new() }; 4],
            singles: OnceCell::new(),
        })
    }

    /// `W · x`
    ///
    /// bf16 weights meet inputs that are rounded to bf16; codes meet the same where the processor
    /// multiplies tiles of them (AMX), and inputs that are rounded to 8 bits, with a scale for as many
    /// columns as share one of the weight, where it multiplies bytes (AVX512-VNNI, AVX-VNNI, AVX2 if they have
    /// fewer than 8 bits). Anything else is computed in f32. A few rows meet halves and codes as a single one
    /// does ([`matrix_vector`]), each to the bit as if it were alone.
    ///
    /// # Shapes
    /// - `weight`: `[output, features]`
    /// - returns `[output, rows]`
    ///
    /// # Panics
    /// If the weight has rows of another length.
    pub fn product<Y: Number>(&self, weight: Weight<'_>) -> Vec<Y> {
        let numbers = match weight {
            Weight::F32(weight) => weight.len(),
            Weight::F16(weight) => weight.len(),
            Weight::BF16(weight) => weight.len(),
            Weight::Blocks(blocks) => {
                assert_eq!(blocks.columns(), self.features, "columns of the weight");
                blocks.rows() * self.features
            }
        };
        assert!(
            numbers.is_multiple_of(self.features),
            "columns of the weight"
        );
        let output = numbers / self.features;
        match weight {
            Weight::F32(_) => self.of_many(weight, output),
            _ if self.rows() > FEW => self.of_many(weight, output),
            _ => {
                let rows = self.by_row();
                let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
                Y::of_singles(one_row::of_few(self.isa, weight, &rows, output))
            }
        }
    }

    /// The inputs row by row.
    fn by_row(&self) -> Vec<Vec<f32>> {
        let row = |row| {
            let numbers = self.x.iter().skip(row).step_by(self.rows());
            numbers.map(|x| x.to_f32()).collect()
        };
        (0..self.rows()).map(row).collect()
    }

    /// [`product`](Self::product) by the loops for many rows.
    fn of_many<Y: Number>(&self, weight: Weight<'_>, output: usize) -> Vec<Y> {
        let filled = |fill: &dyn Fn(&mut [Y])| {
            let mut y = zeros(output * self.rows());
            if !y.is_empty() {
                fill(&mut y);
            }
            y
        };
        match weight {
            Weight::F32(weight) => {
                let operands = isa::single::operands(weight, self.singles(), self.features);
                Y::of_singles(isa::single::product(operands))
            }
            Weight::F16(weight) => filled(&|y| {
                self.in_singles(weight.len(), y, |from, to| {
                    widen(&weight[from..from + to.len()], to);
                });
            }),
            Weight::BF16(weight) => filled(&|y| self.of_pairs(weight, y)),
            Weight::Blocks(blocks) => filled(&|y| {
                with_coding!(blocks.format(), C => self.of_codes::<C, Y>(blocks, y));
            }),
        }
    }

    fn rows(&self) -> usize {
        self.x.len() / self.features
    }

    fn panels(&self) -> usize {
        self.rows().div_ceil(TOKENS)
    }

    fn pairs<const ROWS: usize, K: Kernel<ROWS>>(&self, _: K) -> &Pairs {
        let block = K::blocks(self.panels()).depth;
        self.pairs
            .get_or_init(|| Pairs::pack(self.x, self.features, block))
    }

    fn quads(&self, group: usize) -> &Quads {
        self.quads[group.ilog2() as usize - 4]
            .get_or_init(|| Quads::pack(self.x, self.features, group, QUAD_DEPTH))
    }

    fn of_pairs<Y: Number>(&self, weight: &[bf16], y: &mut [Y]) {
        let plain = PlainRows {
            weight,
            columns: self.features,
        };
        match self.isa.pairs {
            Some(isa::PairKernel::Amx(amx)) => {
                many_rows::product(amx, &plain, self.pairs(amx), y);
            }
            Some(isa::PairKernel::Avx512(avx512)) => {
                many_rows::product(avx512, &plain, self.pairs(avx512), y);
            }
            None => self.in_singles(weight.len(), y, |from, to| {
                widen(&weight[from..from + to.len()], to);
            }),
        }
    }

    fn of_codes<C: Coding, Y: Number>(&self, blocks: Blocks<'_>, y: &mut [Y]) {
        let coded = CodedRows::<C> {
            blocks,
            bytes: self.isa.bytes,
            widen: self.isa.widen,
            coding: PhantomData,
        };
        match self.isa.quads_of(C::LARGEST) {
            Some(isa::QuadKernel::Amx(amx)) => {
                many_rows::product(amx, &coded, self.pairs(amx), y);
            }
            Some(isa::QuadKernel::Avx512(vnni)) => {
                let kernel = OfCodes(vnni, PhantomData::<C>);
                many_rows::product(kernel, &coded, self.quads(C::GROUP), y);
            }
            Some(isa::QuadKernel::Avx2(bytes)) => {
                let kernel = OfCodes(bytes, PhantomData::<C>);
                many_rows::product(kernel, &coded, self.quads(C::GROUP), y);
            }
            None => self.in_singles(blocks.rows() * self.features, y, |from, to| {
                let first = from / self.features;
                pieces(to, self.features, |row, to| blocks.widen(first + row, to));
            }),
        }
    }

    /// The inputs in f32.
    fn singles(&self) -> &[f32] {
        T::as_singles(self.x).unwrap_or_else(|| self.singles.get_or_init(|| singles(self.x)))
    }

    /// With what `widened` writes of a weight, from one of its numbers on, whole rows at a time.
    fn in_singles<Y: Number>(
        &self,
        numbers: usize,
        y: &mut [Y],
        widened: impl Fn(usize, &mut [f32]),
    ) {
        let rows = self.rows();
        let x = self.singles();
        let height = (WIDENED / self.features).max(1);
        let mut weight = vec![0.0; numbers.min(height * self.features)];
        let mut sums = vec![0.0; y.len().min(height * rows)];
        for (block, y) in y.chunks_mut(height * rows).enumerate() {
            let count = y.len() / rows;
            let weight = &mut weight[..count * self.features];
            widened(block * height * self.features, weight);
            let sums = &mut sums[..y.len()];
            isa::single::multiply(weight, x, self.features, sums);
            pieces(y, PIECE, |index, y| {
                let sums = &sums[index * PIECE..];
                y.iter_mut().zip(sums).for_each(|(y, sum)| *y = Y::of(*sum));
            });
        }
    }
}

/// The same numbers in f32.
fn singles<T: Number>(x: &[T]) -> Vec<f32> {
    let mut singles = vec![0.0; x.len()];
    pieces(&mut singles, PIECE, |index, to| {
        let from = &x[index * PIECE..];
        to.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_f32());
    });
    singles
}
