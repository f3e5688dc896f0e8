//! Every way of computing a product against f64, on what the operands are rounded to.

use half::{bf16, f16};
use proptest::prelude::*;

use super::FEW;
use super::one_row::of_few;
use super::{Inputs, Weight};
use crate::blocks::{Blocks, Coding, Format, with_coding};
use crate::isa::Isa;

/// Numbers that look random, between -1 and 1.
pub(super) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Rows of a format whose codes are random and whose scales are small.
pub(super) fn rows(format: Format, output: usize, columns: usize, seed: u64) -> Vec<u8> {
    let stride = format.row_bytes(columns).expect("whole rows");
    if matches!(format, Format::Int8 | Format::Int4) {
        let numbers = numbers(output * columns, seed);
        let rows = numbers
            .chunks(columns)
            .map(|row| format.quantise(row).expect("whole rows"));
        return rows.flatten().collect();
    }
    let mut bytes: Vec<u8> = numbers(output * stride, seed)
        .iter()
        .map(|x| ((x + 1.0) * 127.9) as u8)
        .collect();
    let (block, halves): (usize, &[usize]) = match format {
        Format::Q8_0 => (34, &[0]),
        Format::Q4_0 => (18, &[0]),
        Format::Q4_1 => (20, &[0, 2]),
        Format::Q4K => (144, &[0, 2]),
        _ => (210, &[208]),
    };
    for (index, block) in bytes.chunks_exact_mut(block).enumerate() {
        for &at in halves {
            let scale = f16::from_f32((index % 7) as f32 * 0.01 - 0.02);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}

/// The next number of columns that a row of the format may have.
pub(super) fn whole_blocks(format: Format, features: usize) -> usize {
    match format {
        Format::Int8 | Format::Int4 => features,
        Format::Q4K | Format::Q6K => features.next_multiple_of(256),
        _ => features.next_multiple_of(32),
    }
}

/// `W · X` in f64, and for every sum the sum of its terms' magnitudes.
pub(super) fn exact(weight: &[f32], x: &[f32], features: usize) -> Vec<(f64, f64)> {
    let rows = x.len() / features;
    let at = |output: &[f32], row: usize| {
        let terms = (output.iter().enumerate())
            .map(|(feature, w)| f64::from(*w) * f64::from(x[feature * rows + row]));
        terms.fold((0.0, 0.0), |(sum, size), term| {
            (sum + term, size + term.abs())
        })
    };
    let all = weight.chunks(features);
    all.flat_map(|output| (0..rows).map(move |row| (output, row)))
        .map(|(output, row)| at(output, row))
        .collect()
}

/// `W · X` in f64, and how far off a sum may be whose inputs are rounded to 8 bits, each by half a step of
/// 127 of the largest beside it, or with the weight to bf16.
fn of_bytes(weight: &[f32], x: &[f32], features: usize) -> Vec<(f64, f64)> {
    let rows = x.len() / features;
    let largest = |row: usize| {
        x.iter()
            .skip(row)
            .step_by(rows)
            .fold(0.0, |a: f32, x| a.max(x.abs()))
    };
    let largest: Vec<f32> = (0..rows).map(largest).collect();
    let steps = exact(weight, &largest.repeat(features), features);
    let sums = exact(weight, x, features).into_iter().zip(steps);
    sums.map(|((sum, size), (_, steps))| (sum, steps / 254.0 + size * 4e-3))
        .collect()
}

#[track_caller]
pub(super) fn assert_close(actual: &[f32], exact: &[(f64, f64)], share: f64, what: &str) {
    assert_eq!(actual.len(), exact.len(), "{what}");
    for (at, (actual, (exact, size))) in actual.iter().zip(exact).enumerate() {
        let error = (f64::from(*actual) - exact).abs();
        assert!(
            error <= share * size + 1e-30,
            "{what}, {at}: {actual}, {exact} of {size}"
        );
    }
}

/// Sizes around those of tiles, panels, chunks and blocks.
pub(super) fn sizes() -> impl Strategy<Value = [usize; 3]> {
    let output = prop_oneof![4 => 1..70usize, 1 => Just(300)];
    let features = prop_oneof![4 => 1..140usize, 1 => Just(512), 1 => Just(1030), 1 => Just(2050)];
    let rows = prop_oneof![8 => 1..70usize, 1 => Just(128), 1 => Just(800)];
    (output, features, rows).prop_map(|(output, features, rows)| [output, features, rows])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn halves_meet_inputs_of_their_own_type([output, features, rows] in sizes(), seed in 0..1000u64) {
        let weight = numbers(output * features, seed);
        let x = numbers(features * rows, seed + 1);
        let (upper, x_upper): (Vec<bf16>, Vec<bf16>) = (
            weight.iter().map(|x| bf16::from_f32(*x)).collect(),
            x.iter().map(|x| bf16::from_f32(*x)).collect(),
        );
        let half: Vec<f16> = weight.iter().map(|x| f16::from_f32(*x)).collect();
        let single = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let of_upper = exact(&single(&upper), &single(&x_upper), features);
        let of_half: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
        let of_half = exact(&of_half, &x, features);
        let of_single = exact(&weight, &x, features);
        for isa in Isa::all() {
            let what = format!("{isa:?} {output} {features} {rows}");
            let inputs = Inputs::on(isa, &x_upper, features).expect("whole rows");
            assert_close(&inputs.of_many(Weight::BF16(&upper), output), &of_upper, 1e-6, &what);
            let rounded: Vec<bf16> = inputs.of_many(Weight::BF16(&upper), output);
            assert_close(&single(&rounded), &of_upper, 5e-3, &what);
            let inputs = Inputs::on(isa, &x, features).expect("whole rows");
            assert_close(&inputs.of_many(Weight::F16(&half), output), &of_half, 1e-6, &what);
            assert_close(&inputs.of_many(Weight::F32(&weight), output), &of_single, 1e-6, &what);
            // Other inputs are rounded to bf16 first, unless f32 is faster.
            assert_close(&inputs.of_many(Weight::BF16(&upper), output), &exact(&single(&upper), &x, features), 4e-3, &what);
        }
    }

    #[test]
    fn codes_are_what_they_stand_for(
        [output, features, rows] in sizes(),
        format in proptest::sample::select(Format::ALL.to_vec()),
        seed in 0..1000u64,
    ) {
        let features = whole_blocks(format, features);
        let bytes = self::rows(format, output, features, seed);
        let stride = format.row_bytes(features).expect("whole rows");
        let blocks = Blocks::new(format, features, stride, &bytes).expect("whole rows");
        let mut weight = vec![0.0; output * features];
        for (row, numbers) in weight.chunks_mut(features).enumerate() {
            blocks.widen(row, numbers);
        }
        let x = numbers(features * rows, seed + 1);
        let exact_products = of_bytes(&weight, &x, features);
        let column: Vec<f32> = x.iter().step_by(rows).copied().collect();
        let exact_column = of_bytes(&weight, &column, features);
        for isa in Isa::all() {
            let what = format!("{format:?} {isa:?} {output} {features} {rows}");
            let inputs = Inputs::on(isa, &x, features).expect("whole rows");
            assert_close(&inputs.of_many(Weight::Blocks(blocks), output), &exact_products, 1.0, &what);
            let y = of_few(isa, Weight::Blocks(blocks), &[&column], output);
            assert_close(&y, &exact_column, 1.0, &what);
        }
        // However many rows there are beside it, and whatever they are: the same to the last bit.
        for isa in Isa::all() {
            let one = Inputs::on(isa, &column, features).expect("whole rows");
            let one: Vec<f32> = one.of_many(Weight::Blocks(blocks), output);
            let all = Inputs::on(isa, &x, features).expect("whole rows");
            let all: Vec<f32> = all.of_many(Weight::Blocks(blocks), output);
            if isa.quads_of(with_coding!(format, C => C::LARGEST)).is_some() {
                prop_assert!(one.iter().eq(all.iter().step_by(rows)), "{format:?} {isa:?}");
            }
        }
    }

    /// A few rows are computed as each alone, to the bit, in whatever order they come.
    #[test]
    fn a_few_rows_are_each_as_alone(
        [output, features, _] in sizes(),
        rows in 1..=FEW,
        format in proptest::sample::select(Format::ALL.to_vec()),
        seed in 0..1000u64,
    ) {
        let features = whole_blocks(format, features);
        let bytes = self::rows(format, output, features, seed);
        let stride = format.row_bytes(features).expect("whole rows");
        let blocks = Blocks::new(format, features, stride, &bytes).expect("whole rows");
        let numbers = numbers(output * features, seed);
        let upper: Vec<bf16> = numbers.iter().map(|x| bf16::from_f32(*x)).collect();
        let half: Vec<f16> = numbers.iter().map(|x| f16::from_f32(*x)).collect();
        let x = self::numbers(features * rows, seed + 1);
        for isa in Isa::all() {
            for weight in [Weight::Blocks(blocks), Weight::BF16(&upper), Weight::F16(&half)] {
                let all = Inputs::on(isa, &x, features).expect("whole rows");
                let all: Vec<f32> = all.product(weight);
                for row in 0..rows {
                    let column: Vec<f32> = x.iter().skip(row).step_by(rows).copied().collect();
                    let alone = of_few(isa, weight, &[&column], output);
                    prop_assert!(alone.iter().eq(all.iter().skip(row).step_by(rows)), "{isa:?} {row}");
                }
            }
        }
    }

    /// All ways of one row meet the same rounded inputs.
    #[test]
    fn instructions_for_one_row_agree(
        features in 1..700usize,
        format in proptest::sample::select(Format::ALL.to_vec()),
        seed in 0..1000u64,
    ) {
        let features = whole_blocks(format, features);
        let bytes = rows(format, 5, features, seed);
        let stride = format.row_bytes(features).expect("whole rows");
        let blocks = Blocks::new(format, features, stride, &bytes).expect("whole rows");
        let x = numbers(features, seed + 1);
        let mut weight = vec![0.0; 5 * features];
        blocks.widen_all(&mut weight);
        let plain = of_few(Isa::default(), Weight::Blocks(blocks), &[&x], 5);
        let sizes = exact(&weight, &x, features);
        let plain: Vec<(f64, f64)> = plain.iter().zip(sizes).map(|(y, (_, size))| (f64::from(*y), size)).collect();
        for isa in Isa::all() {
            let y = of_few(isa, Weight::Blocks(blocks), &[&x], 5);
            assert_close(&y, &plain, 2e-6, &format!("{format:?} {isa:?}"));
            // Nor does it matter how many rows are read at a time.
            for (y, row) in y.iter().zip(bytes.chunks(stride)) {
                let alone = Blocks::new(format, features, stride, row).expect("whole rows");
                prop_assert_eq!(of_few(isa, Weight::Blocks(alone), &[&x], 1), [*y]);
            }
        }
    }
}

/// What is not finite stays so, for the rows that have it and no other.
#[test]
fn what_is_undefined_is_not_lost() {
    let (output, features, rows) = (40, 300, 70);
    let weight: Vec<bf16> = numbers(output * features, 1)
        .iter()
        .map(|x| bf16::from_f32(*x))
        .collect();
    let coded: Vec<u8> = self::rows(Format::Int8, output, features, 2);
    let stride = Format::Int8.row_bytes(features).expect("whole rows");
    let blocks = Blocks::new(Format::Int8, features, stride, &coded).expect("whole rows");
    for strange in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = numbers(features * rows, 3);
        x[7 * rows + 33] = strange;
        for isa in Isa::all() {
            for weight in [Weight::BF16(&weight), Weight::Blocks(blocks)] {
                let y: Vec<f32> = Inputs::on(isa, &x, features)
                    .expect("whole rows")
                    .product(weight);
                for (at, y) in y.iter().enumerate() {
                    assert_eq!(y.is_finite(), at % rows != 33, "{isa:?} {at}: {y}");
                }
            }
            let column: Vec<f32> = x.iter().skip(33).step_by(rows).copied().collect();
            let y = of_few(isa, Weight::Blocks(blocks), &[&column], output);
            assert!(y.iter().all(|y| !y.is_finite()), "{isa:?}");
        }
    }
}

/// A scale that is undefined, whatever its digits, makes the products of its row so, and no other's.
#[test]
fn an_undefined_scale_is_not_lost() {
    let (output, features, rows) = (20, 64, 35);
    for bits in [0x7fff_u16, 0xffff, 0x7e00, 0x7c00] {
        let mut bytes = self::rows(Format::Q4_0, output, features, 5);
        let stride = bytes.len() / output;
        bytes[13 * stride..][..2].copy_from_slice(&bits.to_le_bytes());
        let blocks = Blocks::new(Format::Q4_0, features, stride, &bytes).expect("whole rows");
        let x = numbers(features * rows, 6);
        let column: Vec<f32> = x.iter().step_by(rows).copied().collect();
        for isa in Isa::all() {
            let inputs = Inputs::on(isa, &x, features).expect("whole rows");
            let y: Vec<f32> = inputs.product(Weight::Blocks(blocks));
            for (row, y) in y.chunks(rows).enumerate() {
                assert_eq!(
                    y.iter().all(|y| y.is_finite()),
                    row != 13,
                    "{isa:?} {bits:x}"
                );
                assert_eq!(
                    y.iter().any(|y| y.is_finite()),
                    row != 13,
                    "{isa:?} {bits:x}"
                );
            }
            let y = of_few(isa, Weight::Blocks(blocks), &[&column], output);
            for (row, y) in y.iter().enumerate() {
                assert_eq!(y.is_finite(), row != 13, "{isa:?} {bits:x}");
            }
        }
    }
}

/// Groups of nothing but zeros, the largest numbers, subnormal ones.
#[test]
fn extremes_are_kept_or_rounded_to_zero() {
    for scale in [0.0, 1e-44, 1e-38, 1e-30, 1e30] {
        let (output, features, rows) = (3, 130, 35);
        let weight: Vec<bf16> = numbers(output * features, 1)
            .iter()
            .map(|x| bf16::from_f32(*x))
            .collect();
        let x: Vec<f32> = numbers(features * rows, 2)
            .iter()
            .map(|x| x * scale)
            .collect();
        let single: Vec<f32> = weight.iter().map(|x| x.to_f32()).collect();
        let exact = exact(&single, &x, features);
        let most = exact.iter().fold(0f64, |most, (_, size)| most.max(*size));
        let coded: Vec<u8> = single
            .chunks(features)
            .flat_map(|row| Format::Int8.quantise(row).expect("whole rows"))
            .collect();
        let stride = Format::Int8.row_bytes(features).expect("whole rows");
        let blocks = Blocks::new(Format::Int8, features, stride, &coded).expect("whole rows");
        for isa in Isa::all() {
            for weight in [Weight::BF16(&weight), Weight::Blocks(blocks)] {
                let y: Vec<f32> = Inputs::on(isa, &x, features)
                    .expect("whole rows")
                    .product(weight);
                for (y, (exact, _)) in y.iter().zip(&exact) {
                    let error = (f64::from(*y) - exact).abs();
                    assert!(
                        error <= 2e-2 * most + 1e-36,
                        "{isa:?} {scale}: {y}, {exact}"
                    );
                }
            }
        }
    }
}

#[test]
fn nothing_is_computed_of_nothing() {
    assert!(Inputs::<f32>::new(&[], 4).is_none());
    assert!(Inputs::new(&[1.0], 0).is_none());
    assert!(Inputs::new(&[1.0; 5], 2).is_none());
    let x = [1.0; 4];
    let inputs = Inputs::new(&x, 2).expect("whole rows");
    assert!(inputs.product::<f32>(Weight::BF16(&[])).is_empty());
    assert!(Blocks::new(Format::Q4_0, 31, 18, &[]).is_none());
    assert!(Blocks::new(Format::Q4_0, 32, 17, &[0; 17]).is_none());
    assert!(Blocks::new(Format::Q4_0, 32, 18, &[0; 17]).is_none());
    assert!(Format::Int4.quantise(&[1e9]).is_none());
    assert!(Format::Int8.quantise(&[f32::NAN]).is_none());
}
