//! Rows of keys and values in bytes: symmetric codes, with a scale for each head and row.

use crate::attention::Cached;
use crate::product::inputs::{code, inverse, scale_of};
use crate::split::{PIECE, pieces};

/// The nearest codes of numbers, -127 to 127, and what they are multiplied with. The scale of a head and row
/// with a number that is not finite is not finite.
///
/// # Shapes
/// - `numbers`: `[heads, head_dim, rows]`, as is the first result
/// - the second: `[heads, rows]`
pub fn to_bytes(numbers: &[f32], head_dim: usize, rows: usize) -> (Vec<i8>, Vec<f32>) {
    let of_head = (head_dim * rows).max(1);
    let heads = numbers.len() / of_head;
    let at_once = (PIECE / of_head).max(1);
    let mut scales = vec![0.0; heads * rows];
    pieces(
        &mut scales,
        at_once * rows,
        #[inline(always)]
        |piece, scales| {
            let numbers = numbers[piece * at_once * of_head..].chunks_exact(of_head);
            for (scales, numbers) in scales.chunks_exact_mut(rows.max(1)).zip(numbers) {
                let mut largest = vec![0; rows];
                for channel in numbers.chunks_exact(rows) {
                    for (largest, x) in largest.iter_mut().zip(channel) {
                        *largest = (x.to_bits() & 0x7fff_ffff).max(*largest);
                    }
                }
                for (scale, largest) in scales.iter_mut().zip(largest) {
                    *scale = scale_of(largest);
                }
            }
        },
    );
    let mut codes = vec![0; numbers.len()];
    pieces(
        &mut codes,
        at_once * of_head,
        #[inline(always)]
        |piece, codes| {
            let numbers = numbers[piece * at_once * of_head..].chunks_exact(of_head);
            let scales = scales[piece * at_once * rows..].chunks_exact(rows.max(1));
            let heads = codes.chunks_exact_mut(of_head).zip(numbers).zip(scales);
            for ((codes, numbers), scales) in heads {
                let inverses: Vec<f32> = scales.iter().map(|&scale| inverse(scale)).collect();
                let channels = codes.chunks_exact_mut(rows).zip(numbers.chunks_exact(rows));
                for (codes, numbers) in channels {
                    for ((to, &x), &inverse) in codes.iter_mut().zip(numbers).zip(&inverses) {
                        *to = code(x, inverse);
                    }
                }
            }
        },
    );
    (codes, scales)
}

/// The numbers that codes stand for.
///
/// # Shapes
/// - `coded`: `[heads, head_dim, rows]`, which may have room for more
/// - returns the same, without
pub fn of_bytes(coded: Cached<i8>, [heads, head_dim, rows]: [usize; 3]) -> Vec<f32> {
    let mut numbers = vec![0.0; heads * head_dim * rows];
    let at_once = (PIECE / rows.max(1)).max(1);
    pieces(
        &mut numbers,
        at_once * rows,
        #[inline(always)]
        |piece, numbers| {
            for (at, numbers) in numbers.chunks_exact_mut(rows.max(1)).enumerate() {
                let channel = piece * at_once + at;
                let codes = &coded.numbers[channel * coded.capacity..][..rows];
                let scales = coded.scales_of(channel / head_dim, rows);
                for ((x, &code), &scale) in numbers.iter_mut().zip(codes).zip(scales) {
                    *x = f32::from(code) * scale;
                }
            }
        },
    );
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f32 {
        (i as f32 * 0.731).sin() * 2.0
    }

    /// Across pieces, with room and without: every number within half a step, the largest exactly.
    #[test]
    fn codes_are_the_nearest() {
        for (heads, head_dim, rows) in [(1, 1, 1), (3, 8, 5), (2, 128, 300), (40, 64, 1), (2, 4, 0)]
        {
            let numbers: Vec<f32> = (0..heads * head_dim * rows).map(value).collect();
            let (codes, scales) = to_bytes(&numbers, head_dim, rows);
            assert_eq!([codes.len(), scales.len()], [numbers.len(), heads * rows]);
            let capacity = rows + 3;
            let room = |of: &[i8]| of.iter().copied().chain([99; 3]).collect::<Vec<_>>();
            let roomy: Vec<i8> = codes.chunks(rows.max(1)).flat_map(room).collect();
            let room = |of: &[f32]| of.iter().copied().chain([9e9; 3]).collect::<Vec<_>>();
            let roomy_scales: Vec<f32> = scales.chunks(rows.max(1)).flat_map(room).collect();
            let tight = Cached::coded(&codes, &scales, rows);
            let roomy = Cached::coded(&roomy, &roomy_scales, capacity);
            let wide = of_bytes(tight, [heads, head_dim, rows]);
            assert_eq!(wide, of_bytes(roomy, [heads, head_dim, rows]));
            for (at, (x, wide)) in numbers.iter().zip(&wide).enumerate() {
                let (head, row) = (at / rows / head_dim, at % rows);
                let channels = numbers[head * head_dim * rows..].iter().skip(row);
                let channels = channels.step_by(rows).take(head_dim);
                let largest = channels.fold(0f32, |most, x| most.max(x.abs()));
                assert_eq!(scales[head * rows + row], largest / 127.0);
                let step = scales[head * rows + row];
                assert!((x - wide).abs() <= 0.501 * step, "{x}, {wide} by {step}");
            }
        }
    }

    /// Zeros stay so; what is not finite does not come back as a number.
    #[test]
    fn what_has_no_scale_is_nothing_or_not_finite() {
        // `[1, 2, 5]`: all zero, subnormal, infinite, NaN, large.
        let x = [
            [0.0, 1e-40, f32::INFINITY, 1.0, 1e38],
            [-0.0, 0.0, 1.0, f32::NAN, -1e38],
        ];
        let (codes, scales) = to_bytes(x.as_flattened(), 2, 5);
        let wide = of_bytes(Cached::coded(&codes, &scales, 5), [1, 2, 5]);
        let [first, second] = [&wide[..5], &wide[5..]];
        assert_eq!([first[0], second[0]], [0.0; 2]);
        assert!(first[1].abs() <= 1e-40 && second[1] == 0.0);
        assert!(
            first[2..4]
                .iter()
                .chain(&second[2..4])
                .all(|x| !x.is_finite())
        );
        assert!((first[4] / 1e38 - 1.0).abs() < 1e-6 && second[4] == -first[4]);
    }
}
