//! The last-row score against numbers worked out by hand, and against plain loops.

use burn::tensor::{FloatDType, Tensor, TensorData, Tolerance};
use burn_flex::Flex;
use half::f16;
use proptest::prelude::*;
use reducers::{
    Attention, DecisionView, Embedded, Query, ScoreDtype, ScoreLayer, Scorer, last_row_scores,
    top_k,
};

fn scores(query: TensorData, keys: TensorData) -> Vec<f32> {
    let device = Default::default();
    let query = Tensor::<Flex, 2>::from_data(query, &device);
    let keys = Tensor::<Flex, 3>::from_data(keys, &device);
    last_row_scores(query, keys).into_data().to_vec().unwrap()
}

/// Two heads, five rows (text, three visual, the last), no rotation.
#[test]
fn two_heads_by_hand() {
    let rows = [
        [0.5_f32, 0.5],
        [1.0, 0.0],
        [0.0, 1.0],
        [1.0, 1.0],
        [0.2, 0.2],
    ];
    let found = scores(
        TensorData::from([[1.0_f32, 0.0], [0.0, 1.0]]),
        TensorData::from([rows, rows]),
    );
    let expected = [0.186592_f32, 0.198376, 0.198376, 0.265729, 0.150926];
    TensorData::from(found.as_slice())
        .assert_approx_eq::<f32>(&expected.into(), Tolerance::absolute(1e-6));

    // The two tied tokens compare equal to the last bit, and the first wins.
    assert_eq!(top_k(&found[1..4], 2).unwrap(), [0, 2]);
}

#[test]
fn half_precision_inputs_are_scored_in_f32() {
    let device = Default::default();
    let query = Tensor::<Flex, 2>::from_data([[1.0_f32, 0.5], [0.25, 2.0]], &device);
    let keys = Tensor::<Flex, 3>::from_data([[[0.5_f32, 1.0], [2.0, 0.125], [1.0, 1.0]]], &device);
    let exact = last_row_scores(query.clone(), keys.clone()).into_data();
    // These numbers are the same in half precision, so the scores must be too.
    let half = last_row_scores(query.cast(FloatDType::F16), keys.cast(FloatDType::F16));
    assert_eq!(half.into_data(), exact);
}

/// Rows of a decision, with queries and keys of one head in f16.
struct Half {
    queries: Tensor<Flex, 2>,
    keys: Tensor<Flex, 2>,
}

impl DecisionView<Flex> for Half {
    fn rows(&self) -> usize {
        self.keys.dims()[1]
    }
    fn candidates(&self) -> &[usize] {
        &[1, 2, 3]
    }
    fn layer(&self) -> usize {
        1
    }
    fn salience(&self) -> Option<Vec<f32>> {
        None
    }
    fn hidden_states(&self) -> Tensor<Flex, 2> {
        self.keys.clone()
    }
    fn output_normed(&self) -> Tensor<Flex, 2> {
        self.keys.clone()
    }
    fn prompt(&self) -> Embedded<Flex> {
        Embedded {
            embeddings: self.keys.clone(),
            visual: vec![1, 2, 3],
        }
    }
    fn rows_in_prompt(&self) -> Vec<usize> {
        (0..self.rows()).collect()
    }
    fn keep_count(&self) -> usize {
        1
    }
    fn queries(
        &self,
        _: ScoreLayer,
        rows: &[usize],
        _: bool,
    ) -> Result<Tensor<Flex, 3>, reducers::ReducerError> {
        let first = self.rows() - self.queries.dims()[1];
        let columns: Vec<i64> = rows.iter().map(|&row| (row - first) as i64).collect();
        let columns = Tensor::from_data(columns.as_slice(), &Default::default());
        Ok(self.queries.clone().select(1, columns).unsqueeze_dim(0))
    }
    fn keys(&self, _: ScoreLayer, _: bool) -> Tensor<Flex, 3> {
        self.keys.clone().unsqueeze_dim(0)
    }
}

/// In the model's type probabilities are rounded after the softmax, and their mean again: ties that
/// f32 would tell apart.
#[test]
fn the_models_type_rounds_probabilities_and_their_mean() {
    let half = |rows: [[f32; 5]; 2]| {
        Tensor::<Flex, 2>::from_data(rows, &Default::default()).cast(FloatDType::F16)
    };
    let view = Half {
        queries: half([[0.0, 0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.25, 1.0]]),
        keys: half([[0.5, 1.0, 1.0, 0.75, 0.2], [0.5, 0.0, 0.0001, 0.75, 0.2]]),
    };
    let score = |dtype| {
        let attention = Attention {
            query: Query::LastMean(2),
            dtype,
            ..Attention::default()
        };
        let scores: Tensor<Flex, 1> = attention.score(&view).unwrap();
        let scores: Vec<f32> = scores.into_data().to_vec().unwrap();
        scores
    };
    let (exact, rounded) = (score(ScoreDtype::F32), score(ScoreDtype::Model));
    // What each of the two rows gives, rounded, then the mean, rounded.
    let round = |x: f32| f16::from_f32(x).to_f32();
    let of_row = |query: [f32; 2], seen: usize| {
        let keys = view.keys.clone().cast(FloatDType::F32).into_data();
        let keys: Vec<f32> = keys.to_vec().unwrap();
        let logit =
            |key: usize| (query[0] * keys[key] + query[1] * keys[5 + key]) * 2f32.powf(-0.5);
        let exponentials: Vec<f32> = (0..seen).map(|key| logit(key).exp()).collect();
        let sum: f32 = exponentials.iter().sum();
        let mut row: Vec<f32> = exponentials.iter().map(|e| round(e / sum)).collect();
        row.resize(5, 0.0);
        row
    };
    let (first, last) = (of_row([1.0, 0.25], 4), of_row([0.5, 1.0], 5));
    for (row, (rounded, exact)) in rounded.iter().zip(&exact).enumerate() {
        assert_eq!(*rounded, round((first[row] + last[row]) / 2.0));
        assert!((rounded - exact).abs() < 1e-3);
    }
    assert_ne!(exact[1], exact[2]);
    assert_eq!(rounded[1], rounded[2]);
}

/// Scores as nested loops in f64: query head `j` reads key head `j / group`.
fn oracle(query: &[Vec<f32>], keys: &[Vec<Vec<f32>>]) -> Vec<f64> {
    let (group, rows) = (query.len() / keys.len(), keys[0].len());
    let heads = query.len() as f64;
    let mut mean = vec![0.0; rows];
    for (head, query) in query.iter().enumerate() {
        let dot = |key: &Vec<f32>| {
            query
                .iter()
                .zip(key)
                .map(|(q, k)| f64::from(*q) * f64::from(*k))
                .sum::<f64>()
        };
        let weights: Vec<f64> = keys[head / group]
            .iter()
            .map(|key| (dot(key) / (query.len() as f64).sqrt()).exp())
            .collect();
        let total: f64 = weights.iter().sum();
        for (mean, weight) in mean.iter_mut().zip(weights) {
            *mean += weight / total / heads;
        }
    }
    mean
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn grouped_heads_agree_with_plain_loops(
        (query, keys) in (1_usize..4, 1_usize..4, 1_usize..9, 1_usize..40).prop_flat_map(
            |(kv_heads, group, head_dim, rows)| {
                let vector = prop::collection::vec(-3.0_f32..3.0, head_dim);
                (
                    prop::collection::vec(vector.clone(), kv_heads * group),
                    prop::collection::vec(prop::collection::vec(vector, rows), kv_heads),
                )
            },
        ),
    ) {
        let (heads, head_dim) = (query.len(), query[0].len());
        let (kv_heads, rows) = (keys.len(), keys[0].len());
        let found = scores(
            TensorData::new(query.concat(), [heads, head_dim]),
            TensorData::new(keys.concat().concat(), [kv_heads, rows, head_dim]),
        );
        for (found, expected) in found.iter().zip(oracle(&query, &keys)) {
            prop_assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
        }
        prop_assert!((found.iter().sum::<f32>() - 1.0).abs() < 1e-4);
    }
}
