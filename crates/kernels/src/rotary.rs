use crate::split::pieces;

/// Rotates every head in place: `x · cos + turned(x) · sin`, where `turned` swaps the two halves of
/// the channels and the first half of `sin` is negated already (RoFormer, arXiv 2104.09864).
///
/// # Shapes
/// - `x`: `[heads, head_dim, rows]`
/// - `cos`, `sin`: `[head_dim, rows]`
pub fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32]) {
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
                let turned = *a * first.0 + *b * first.1;
                *b = *b * second.0 + *a * second.1;
                *a = turned;
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
}
