//! Nüwa's first stage by hand, on a picture of 4 × 4 tokens, and on awkward grids.

use std::collections::BTreeMap;

use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::Flex;
use proptest::prelude::*;
use reducers::ReducerError;
use reducers::encoder::{
    EncoderShape, Nuwa, Pillars, Reduction, Salience, Seen, Tap, Tower, Weights, reduce,
};

const CLIP: EncoderShape = EncoderShape {
    num_layers: 24,
    feature_layer: 23,
    num_heads: 1,
    class_token: true,
    position_axes: 1,
    tower: Tower::Clip,
};
const QWEN: EncoderShape = EncoderShape {
    num_layers: 32,
    feature_layer: 32,
    num_heads: 1,
    class_token: false,
    position_axes: 3,
    tower: Tower::QwenVl,
};

fn tensor(rows: &[Vec<f32>]) -> Tensor<Flex, 2> {
    let data = TensorData::new(rows.concat(), [rows.len(), rows[0].len()]);
    Tensor::from_data(data, (&Default::default(), DType::F32))
}

/// A picture with this attention, these keys' lengths and mid-layer states `[features][tokens]`.
fn seen(
    encoder: EncoderShape,
    grid: [usize; 2],
    attention: Vec<f32>,
    states: &[Vec<f32>],
    key_lengths: Vec<f32>,
) -> Seen<Flex> {
    let (attended, mean) = match encoder.class_token {
        true => (
            Tap::ClassAttention { layer: 22 },
            Tap::MeanHidden {
                first: 16,
                last: 24,
            },
        ),
        false => (
            Tap::ReceivedAttention { layer: 31 },
            Tap::MeanHidden { first: 8, last: 24 },
        ),
    };
    let keys = Tap::Keys {
        layer: encoder.feature_layer - 1,
    };
    let taps = [
        (attended, tensor(&[attention])),
        (mean, tensor(states)),
        (keys, tensor(&[key_lengths])),
    ];
    Seen {
        grid,
        taps: BTreeMap::from(taps),
        encoder,
    }
}

fn by_hand(encoder: EncoderShape, quantile: Option<f64>) -> Reduction<Flex> {
    let attention: Vec<f32> = (0..16).map(|i| (7 * i % 16) as f32 / 100.0).collect();
    let of = |f: &dyn Fn(f32) -> f32| (0..16).map(|i| f(i as f32)).collect::<Vec<f32>>();
    let states = [of(&f32::cos), of(&f32::sin), of(&|i| 0.1 * i)];
    let seen = seen(encoder, [4, 4], attention, &states, vec![1.0; 16]);
    let nuwa = Nuwa {
        candidates: Some(1),
        near: Some(8.0 / 18.0),
        quantile,
        ..Nuwa::default()
    };
    reduce(&nuwa, &seen, 3).unwrap()
}

fn weights(reduced: Reduction<Flex>) -> Vec<f32> {
    match reduced.weights {
        Weights::Dense(weights) => weights.into_data().to_vec().unwrap(),
        other => panic!("{other:?}"),
    }
}

fn assert_tokens(reduced: Reduction<Flex>, expected: [[f32; 3]; 3]) {
    assert_eq!(reduced.places, [2, 9, 11].map(Some));
    let of = |f: &dyn Fn(f32) -> f32| (0..16).map(|i| f(i as f32)).collect::<Vec<f32>>();
    let features = tensor(&[of(&|i| i), of(&|i| 10.0 - i), of(&|_| 1.0)]);
    let tokens = reduced.apply(features, None).unwrap().transpose();
    let found: Vec<f32> = tokens.into_data().to_vec().unwrap();
    for (found, expected) in found.iter().zip(expected.concat()) {
        assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
    }
}

#[test]
fn the_rule_behind_clip() {
    let expected = [
        [3.974703, 11.127373, 1.510208],
        [9.0, 1.0, 1.0],
        [16.863012, -0.766127, 1.609689],
    ];
    assert_tokens(by_hand(CLIP, None), expected);
}

#[test]
fn the_rule_behind_qwen() {
    let expected = [
        [2.954288, 7.045712, 1.0],
        [9.0, 1.0, 1.0],
        [10.15644, -0.156439, 1.0],
    ];
    assert_tokens(by_hand(QWEN, Some(0.55)), expected);
}

/// The paper's rules: a long key makes a token salient, and the longest quarter are pillars.
#[test]
fn keys_decide_if_asked_to() {
    let mut lengths = vec![1.0; 16];
    (lengths[0], lengths[15]) = (100.0, 50.0);
    let states = [vec![1.0; 16], (0..16).map(|i| i as f32).collect()];
    let seen = seen(CLIP, [4, 4], vec![0.01; 16], &states, lengths);
    let nuwa = Nuwa {
        salience: Salience::AttentionTimesKeyNorm,
        pillars: Pillars::KeyNorm,
        ..Nuwa::default()
    };
    let reduced = reduce::<Flex>(&nuwa, &seen, 2).unwrap();
    assert_eq!(reduced.places, [Some(0), Some(15)]);
    let weights: Vec<f32> = weights(reduced);
    // Of two benchmark tokens the longer key is a pillar: token 0 takes nothing in.
    let of_first: Vec<f32> = weights.iter().step_by(2).copied().collect();
    assert_eq!(of_first[0], 1.0);
    assert!(of_first[1..].iter().all(|weight| *weight == 0.0));
    assert!(weights.iter().skip(1).step_by(2).sum::<f32>() > 1.5);
}

#[test]
fn what_is_not_a_number_is_refused() {
    let mut attention = vec![0.1; 16];
    attention[5] = f32::NAN;
    let seen = seen(CLIP, [4, 4], attention, &[vec![1.0; 16]], vec![1.0; 16]);
    let error = reduce::<Flex>(&Nuwa::default(), &seen, 4).unwrap_err();
    assert!(
        matches!(error, ReducerError::NanScore { index: 5 }),
        "{error}"
    );
}

proptest! {
    /// Any grid, any budget: places of the picture, as many as asked for (behind Qwen perhaps
    /// fewer), weights finite, never negative; behind Qwen they sum to 1, behind CLIP to 1 or more.
    #[test]
    fn weights_and_places_are_sound(
        rows in 1..9usize,
        columns in 1..9usize,
        share in 0.0..1.0f64,
        clip in any::<bool>(),
        values in prop::collection::vec(0.01f32..1.0, 256),
    ) {
        let tokens = rows * columns;
        let keep = ((tokens as f64 * share) as usize).max(1);
        let encoder = if clip { CLIP } else { QWEN };
        let attention = values[..tokens].to_vec();
        let states = [values[64..64 + tokens].to_vec(), values[128..128 + tokens].to_vec()];
        let seen = seen(encoder, [rows, columns], attention, &states, vec![1.0; tokens]);
        let reduced = match reduce::<Flex>(&Nuwa::default(), &seen, keep) {
            Ok(reduced) => reduced,
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        };
        prop_assert!(reduced.places.len() <= keep);
        prop_assert!(reduced.places.iter().all(|place| place.is_some_and(|p| p < tokens)));
        let kept = reduced.places.len();
        let weights: Vec<f32> = weights(reduced);
        for column in 0..kept {
            let weights = weights.iter().skip(column).step_by(kept);
            let sum: f32 = weights.clone().sum();
            prop_assert!(weights.clone().all(|w| w.is_finite() && *w >= 0.0));
            prop_assert!(sum > 0.999 && (clip || sum < 1.001), "{}", sum);
        }
    }
}
