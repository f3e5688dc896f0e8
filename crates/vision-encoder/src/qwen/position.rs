use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};
use reroute_layers::Embedding;

use super::QwenTowerConfig;
use crate::Grid;

/// Angles of the 2-D rotary positions: half of the channel pairs turn with the row of a patch,
/// half with its column (arXiv 2409.12191, §2.1).
///
/// # Shapes
/// - returns `[head_dim / 2, patches]`, f32, patches in the order of the grids
pub(super) fn rotary_angles<B: Backend>(
    config: &QwenTowerConfig,
    grids: &[Grid],
    device: &B::Device,
) -> Tensor<B, 2> {
    let quarter = config.hidden_size / config.num_heads / 4;
    let theta = config.rope_theta as f32;
    let frequencies: Vec<f32> = (0..quarter)
        .map(|i| 1.0 / theta.powf(i as f32 / quarter as f32))
        .collect();
    let frequencies = floats::<B>(frequencies, device).unsqueeze_dim::<2>(1);
    let angles = |axis: usize| {
        let places = grids
            .iter()
            .flat_map(|grid| grid.places(config.spatial_merge_size));
        let places = places.map(|place| place[axis] as f32).collect();
        floats::<B>(places, device).unsqueeze_dim::<2>(0) * frequencies.clone()
    };
    Tensor::cat(vec![angles(0), angles(1)], 0)
}

/// Learned positions, made for a square of patches and stretched to every grid, corner to corner,
/// by bilinear interpolation.
///
/// # Shapes
/// - `table`: one vector per patch of the square, row by row
/// - returns `[hidden_size, patches]`, f32, patches in the order of the grids
pub(super) fn interpolate<B: Backend>(
    table: &Embedding<B>,
    grids: &[Grid],
    merge: usize,
) -> Tensor<B, 2> {
    let weight = table.weight.val();
    let (device, side) = (weight.device(), weight.dims()[0].isqrt());
    let corner = |bottom: usize, right: usize| {
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for grid in grids {
            for [row, column] in grid.places(merge) {
                let (y, y_weight) = neighbours(row, grid.h, side)[bottom];
                let (x, x_weight) = neighbours(column, grid.w, side)[right];
                ids.push((y * side + x) as i64);
                weights.push(y_weight * x_weight);
            }
        }
        let ids = Tensor::<B, 1, Int>::from_data(&ids[..], &device);
        let weights = floats::<B>(weights, &device).unsqueeze_dim::<2>(0);
        table.forward(ids).cast(DType::F32) * weights
    };
    corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1)
}

/// The two of `side` entries between which place `at` of `count` falls, with their weights.
fn neighbours(at: usize, count: usize, side: usize) -> [(usize, f32); 2] {
    let position = at as f32 * (side - 1) as f32 / (count - 1).max(1) as f32;
    let before = (position as usize).min(side - 1);
    let fraction = position - before as f32;
    [
        (before, 1.0 - fraction),
        ((before + 1).min(side - 1), fraction),
    ]
}

fn floats<B: Backend>(values: Vec<f32>, device: &B::Device) -> Tensor<B, 1> {
    Tensor::from_data(&values[..], (device, DType::F32))
}
