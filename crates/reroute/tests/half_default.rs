//! On a device whose default type is half precision. Alone in its process: a device's default is set
//! once, before its first tensor.

use burn::tensor::{DType, FloatDType, Int, Tensor, set_default_dtypes};
use burn_flex::{Flex, FlexDevice};
use reroute::RopeConfig;

/// Positions above 256 are not whole numbers in bf16, nor above 2048 in f16.
#[test]
fn positions_stay_whole_numbers() {
    set_default_dtypes::<Flex>(&FlexDevice, DType::BF16, DType::I64).unwrap();
    let positions = [0, 255, 257, 1001, 2049, 4095, 32_767];
    let tensor = Tensor::<Flex, 1, Int>::from_data(positions, &FlexDevice);
    // The default really is what it was set to.
    assert_eq!(tensor.clone().float().dtype(), DType::BF16);

    let rope = RopeConfig::one_axis(1e4, 8);
    let table = rope.table::<Flex>(tensor.unsqueeze(), DType::F32);
    // A head whose first half is 1 and whose second is 0 turns into cos and sin.
    let (one, zero) = (
        Tensor::<Flex, 2>::ones([4, positions.len()], &FlexDevice),
        Tensor::<Flex, 2>::zeros([4, positions.len()], &FlexDevice),
    );
    let head = Tensor::cat(vec![one, zero], 0).cast(FloatDType::F32);
    let turned: Vec<f32> = table.apply(head).into_data().into_vec().unwrap();
    for (i, frequency) in rope.frequencies().into_iter().enumerate() {
        for (row, &position) in positions.iter().enumerate() {
            let angle = position as f32 * frequency;
            let actual = [turned[i * 7 + row], turned[(i + 4) * 7 + row]];
            for (actual, expected) in actual.into_iter().zip([angle.cos(), angle.sin()]) {
                assert!(
                    (actual - expected).abs() < 1e-4,
                    "{position}: {actual} {expected}"
                );
            }
        }
    }
}
