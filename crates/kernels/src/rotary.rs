use crate::precision::Number;
use crate::split::pieces;

/// Rotates every head in place: `x · cos + turned(x) · sin`, where `turned` swaps the two halves of
/// the channels and the first half of `sin` is negated already (RoFormer, arXiv 2104.09864).
///
/// # Shapes
/// - `x`: `[heads, head_dim, rows]`
/// - `cos`, `sin`: `[head_dim, rows]`
pub fn rotate<T: Number>(x: &mut [T], cos: &[f32], sin: &[f32]) {
    turn(x, cos, sin, 1.0);
}

/// The transpose of [`rotate`]: rotates back, and gives gradients back.
pub fn rotate_back(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    turn(x, cos, sin, -1.0);
}

#[inline(always)]
fn turn<T: Number>(x: &mut [T], cos: &[f32], sin: &[f32], direction: f32) {
    let half = cos.len() / 2;
    let (cos, sin) = (cos.split_at(half), sin.split_at(half));
    pieces(
        x,
        2 * half,
        #[inline(always)]
        |_, head| {
            let (first, second) = head.split_at_mut(half);
            let first_table = cos.0.iter().zip(sin.0);
            let second_table = cos.1.iter().zip(sin.1);
            let table = first_table.zip(second_table);
            for ((a, b), (first, second)) in first.iter_mut().zip(second).zip(table) {
                let (x, y) = (a.to_f32(), b.to_f32());
                *a = T::of(x * first.0 + y * (first.1 * direction));
                *b = T::of(y * second.0 + x * (second.1 * direction));
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_formula_for_every_head() {
        let (heads, head_dim, rows) = (3, 4, 19);
        let value = |i: usize| (i as f32 * 0.9).sin();
        let x: Vec<f32> = (0..heads * head_dim * rows).map(value).collect();
        let cos: Vec<f32> = (0..head_dim * rows).map(|i| value(i + 5)).collect();
        let sin: Vec<f32> = (0..head_dim * rows).map(|i| value(i + 9)).collect();
        let mut rotated = x.clone();
        rotate(&mut rotated, &cos, &sin);
        for head in 0..heads {
            for channel in 0..head_dim {
                let partner = (channel + head_dim / 2) % head_dim;
                for row in 0..rows {
                    let at = |channel: usize| (head * head_dim + channel) * rows + row;
                    let table = channel * rows + row;
                    let exact = x[at(channel)] * cos[table] + x[at(partner)] * sin[table];
                    assert_eq!(rotated[at(channel)], exact);
                }
            }
        }
    }

    /// `⟨g, R x⟩ = ⟨Rᵀ g, x⟩`, for a table of angles.
    #[test]
    fn back_is_the_transpose_and_the_inverse() {
        let (heads, head_dim, rows) = (3, 6, 19);
        let angle = |i: usize| (i % (head_dim / 2 * rows)) as f32 * 0.3;
        let cos: Vec<f32> = (0..head_dim * rows).map(|i| angle(i).cos()).collect();
        let mut sin: Vec<f32> = (0..head_dim * rows).map(|i| angle(i).sin()).collect();
        sin[..head_dim / 2 * rows]
            .iter_mut()
            .for_each(|sin| *sin = -*sin);
        let value = |i: usize| (i as f32 * 0.9).sin();
        let x: Vec<f32> = (0..heads * head_dim * rows).map(value).collect();
        let g: Vec<f32> = x.iter().map(|x| x * x - 0.3).collect();
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.sum()
        };
        let [mut turned, mut back] = [x.clone(), g.clone()];
        rotate(&mut turned, &cos, &sin);
        rotate_back(&mut back, &cos, &sin);
        assert!((dot(&g, &turned) - dot(&back, &x)).abs() < 1e-4);
        rotate_back(&mut turned, &cos, &sin);
        assert!(turned.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
