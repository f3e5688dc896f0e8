//! Half precision: stored and moved in two bytes, computed with in four.

use half::slice::HalfFloatSliceExt;

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

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

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
