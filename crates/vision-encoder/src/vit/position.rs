//! Learned positions of one grid for another.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

/// Sharpness of PyTorch's bicubic.
const A: f64 = -0.75;

/// Bicubic interpolation as PyTorch does it (half-pixel centres, no antialiasing, edges repeated),
/// in f32.
///
/// # Shapes
/// - `table`: `[features, from · from]`, row by row
/// - returns `[features, to · to]`
pub(super) fn resized<B: Backend>(table: Tensor<B, 2>, from: usize, to: usize) -> Tensor<B, 2> {
    let (features, dtype) = (table.dims()[0], table.dtype());
    let weights = TensorData::new(weights(from, to), [from, to]);
    let weights = Tensor::<B, 2>::from_data(weights, (&table.device(), DType::F32));
    let along_last = |x: Tensor<B, 3>| {
        let [a, b, c] = x.dims();
        let y = x.reshape([a * b, c]).matmul(weights.clone());
        y.reshape([a, b, to])
    };
    let rows = along_last(table.cast(DType::F32).reshape([features, from, from]));
    let columns = along_last(rows.swap_dims(1, 2)).swap_dims(1, 2);
    columns.reshape([features, to * to]).cast(dtype)
}

/// `[from, to]`: what each old position gives to each new one, along a side.
fn weights(from: usize, to: usize) -> Vec<f32> {
    let mut weights = vec![0.0; from * to];
    for new in 0..to {
        let at = (new as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        for tap in -1..=2 {
            let old = at.floor() + f64::from(tap);
            let weight = cubic((at - old).abs());
            let old = old.clamp(0.0, (from - 1) as f64) as usize;
            weights[old * to + new] += weight as f32;
        }
    }
    weights
}

fn cubic(x: f64) -> f64 {
    match x {
        _ if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        _ if x < 2.0 => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;
    use burn_flex::Flex;

    use super::resized;

    /// `torch.nn.functional.interpolate(…, mode="bicubic")` of three by three to more and to fewer; it
    /// takes its weights in f32.
    #[test]
    fn a_table_of_another_size_is_pytorch_s() {
        let device = Default::default();
        let table: [[f32; 9]; 1] = [[1.0, -2.0, 3.0, 0.0, 5.0, -1.0, 2.0, 4.0, -3.0]];
        let table = Tensor::<Flex, 2>::from_floats(table, &device);
        for (to, expected) in [EXPECTED_5, EXPECTED_2] {
            let found = resized(table.clone(), 3, to).into_data();
            let found: Vec<f32> = found.to_vec().expect("f32");
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
            }
        }
        let found = resized(table.clone(), 3, 3).into_data();
        assert_eq!(found, table.into_data());
    }

    const EXPECTED_5: (usize, &[f32]) = (
        5,
        &[
            1.457728, -0.802016, -2.672, 0.762977, 3.965376, 0.43728, 0.534273, 0.788002, 1.303088,
            1.669182, -0.48, 2.372, 5.0, 1.687999, -1.576, 0.792961, 3.136207, 4.891999, 0.630031,
            -3.222783, 2.027648, 3.367167, 3.904001, -0.315489, -3.873217,
        ],
    );
    const EXPECTED_2: (usize, &[f32]) = (2, &[0.368576, 1.549881, 2.43428, -0.961182]);
}
