//! Our own formats, made of f32.

use half::f16;
use pulp::Arch;
use rayon::prelude::*;

use super::Format;

/// Parts of the range that the codes of 4 bits are tried on: what lies outside is moved to its ends, what
/// lies inside comes nearer.
const RANGES: [f32; 5] = [1.0, 0.95, 0.9, 0.85, 0.8];

impl Format {
    /// A row in this format, which is [`Format::Int8`] or [`Format::Int4`]; `None` for others, and for
    /// numbers that are not finite or too large for the format's scales.
    pub fn quantise(self, numbers: &[f32]) -> Option<Vec<u8>> {
        Arch::new().dispatch(
            #[inline(always)]
            || self.quantised(numbers),
        )
    }

    #[inline(always)]
    fn quantised(self, numbers: &[f32]) -> Option<Vec<u8>> {
        let mut row = Vec::with_capacity(self.row_bytes(numbers.len())?);
        if !numbers.iter().all(|x| x.is_finite()) {
            return None;
        }
        match self {
            Self::Int8 => int8(numbers, &mut row),
            Self::Int4 => {
                for group in numbers.chunks(64) {
                    int4(group, &mut row)?;
                }
            }
            _ => return None,
        }
        Some(row)
    }
}

impl Format {
    /// Rows of so many numbers, on all threads; `None` as for one of them.
    pub fn quantise_rows(self, numbers: &[f32], columns: usize) -> Option<Vec<u8>> {
        let rows = numbers.par_chunks(columns.max(1));
        let rows: Option<Vec<_>> = rows.map(|row| self.quantise(row)).collect();
        Some(rows?.concat())
    }
}

#[inline(always)]
fn int8(numbers: &[f32], row: &mut Vec<u8>) {
    let largest = numbers.iter().fold(0f32, |most, x| most.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    // Of a subnormal scale there is no inverse.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    row.extend(scale.to_le_bytes());
    row.extend(
        numbers
            .iter()
            .map(|x| (x * inverse).round_ties_even() as i8 as u8),
    );
    row.resize(4 + numbers.len().next_multiple_of(4), 0);
}

#[inline(always)]
fn int4(group: &[f32], row: &mut Vec<u8>) -> Option<()> {
    let least = group.iter().copied().fold(f32::INFINITY, f32::min);
    let most = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut best: Option<(f64, f16, f16)> = None;
    for part in RANGES {
        let (centre, reach) = (least.midpoint(most), (most - least) * 0.5 * part);
        let (scale, low) = (
            f16::from_f32(reach * 2.0 / 15.0),
            f16::from_f32(centre - reach),
        );
        if !scale.is_finite() || !low.is_finite() {
            return None;
        }
        let error = square_error(group, scale.to_f32(), low.to_f32());
        if best.is_none_or(|(least, ..)| error < least) {
            best = Some((error, scale, low));
        }
    }
    let (_, scale, low) = best?;
    row.extend(scale.to_le_bytes());
    row.extend(low.to_le_bytes());
    let (scale, low) = (scale.to_f32(), low.to_f32());
    let code = |at: usize| group.get(at).map_or(0, |&x| level(x, scale, low) as u8);
    row.extend((0..32).map(
        #[inline(always)]
        |at| code(at) | code(at + 32) << 4,
    ));
    Some(())
}

/// The squares of what codes are off by, in sums side by side.
#[inline(always)]
fn square_error(group: &[f32], scale: f32, least: f32) -> f64 {
    let mut sums = [0.0; 8];
    for numbers in group.chunks(sums.len()) {
        for (sum, &x) in sums.iter_mut().zip(numbers) {
            let error = f64::from(x - (level(x, scale, least) * scale + least));
            *sum += error * error;
        }
    }
    sums.iter().sum()
}

/// The nearest of 16 codes.
#[inline(always)]
fn level(x: f32, scale: f32, least: f32) -> f32 {
    match scale > 0.0 {
        true => ((x - least) / scale).round_ties_even().clamp(0.0, 15.0),
        false => 0.0,
    }
}
