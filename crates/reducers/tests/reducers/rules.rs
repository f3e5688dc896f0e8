//! What must hold for every rule that ranks at a decision, whatever pool it meets.

use burn::tensor::{Distribution, Tensor};
use burn_flex::Flex;
use proptest::prelude::*;
use reducers::{
    Attention, DecisionView, Duplication, Embedded, HeadReduce, Query, Random, Score, ScoreDtype,
    ScoreLayer, Scorer, SoftmaxKeys,
};

/// A sample at a decision with random numbers: text, the candidates, text.
#[derive(Debug)]
struct View {
    before: usize,
    candidates: Vec<usize>,
    behind: usize,
    keep: usize,
    /// Visual rows of the prompt that are no candidates any more.
    gone: usize,
}

const HIDDEN: usize = 6;

impl View {
    fn random<const D: usize>(&self, shape: [usize; D]) -> Tensor<Flex, D> {
        Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), &Default::default())
    }
}

impl DecisionView<Flex> for View {
    fn rows(&self) -> usize {
        self.before + self.candidates.len() + self.behind
    }
    fn candidates(&self) -> &[usize] {
        &self.candidates
    }
    fn layer(&self) -> usize {
        1
    }
    fn salience(&self) -> Option<Vec<f32>> {
        Some(vec![1.0; self.candidates.len()])
    }
    fn hidden_states(&self) -> Tensor<Flex, 2> {
        self.random([HIDDEN, self.rows()])
    }
    fn output_normed(&self) -> Tensor<Flex, 2> {
        self.hidden_states()
    }
    fn prompt(&self) -> Embedded<Flex> {
        let visual = self.candidates.len() + self.gone;
        Embedded {
            embeddings: self.random([HIDDEN, self.before + visual + self.behind]),
            visual: (self.before..self.before + visual).collect(),
        }
    }
    fn rows_in_prompt(&self) -> Vec<usize> {
        let moved = |row| match row < self.before + self.candidates.len() {
            true => row,
            false => row + self.gone,
        };
        (0..self.rows()).map(moved).collect()
    }
    fn keep_count(&self) -> usize {
        self.keep
    }
    fn queries(
        &self,
        _: ScoreLayer,
        rows: &[usize],
        _: bool,
    ) -> Result<Tensor<Flex, 3>, reducers::ReducerError> {
        Ok(self.random([2, 3, rows.len()]))
    }
    fn keys(&self, _: ScoreLayer, _: bool) -> Tensor<Flex, 3> {
        self.random([1, 3, self.rows()])
    }
}

/// Pools of all kinds, empty ones and prompts that end with the picture too.
fn views() -> impl Strategy<Value = View> {
    let counts = (0..3_usize, 0..6_usize, 0..4_usize, 0..3_usize);
    (counts, 0..7_usize).prop_map(|((before, candidates, behind, gone), keep)| View {
        before: before.max(usize::from(candidates + behind == 0)),
        candidates: (before..before + candidates).collect(),
        behind,
        keep,
        gone,
    })
}

fn rules() -> impl Strategy<Value = Score> {
    let queries = prop_oneof![
        Just(Query::Last),
        Just(Query::Raters),
        prop::sample::select(vec![1, 2, 7, usize::MAX]).prop_map(Query::LastMean),
    ];
    let keys = prop::sample::select(vec![SoftmaxKeys::All, SoftmaxKeys::Candidates]);
    let attention = (queries, keys, any::<bool>()).prop_map(|(query, keys, max)| {
        Score::Attention(Attention {
            query,
            keys,
            heads: if max {
                HeadReduce::Max
            } else {
                HeadReduce::Mean
            },
            dtype: ScoreDtype::Model,
            ..Attention::default()
        })
    });
    let pivots = prop::sample::select(vec![0, 1, 4, usize::MAX]);
    let duplication = (pivots.clone(), pivots).prop_map(|(visual_pivots, text_pivots)| {
        Score::Duplication(Duplication {
            layer: ScoreLayer::This,
            visual_pivots,
            text_pivots,
        })
    });
    prop_oneof![
        attention,
        duplication,
        Just(Score::Encoder),
        any::<u64>().prop_map(|seed| Score::Random(Random { seed })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// One number a row, none of them NaN, for any pool.
    #[test]
    fn every_rule_ranks_any_pool(view in views(), rule in rules()) {
        let scores: Tensor<Flex, 1> = rule.score(&view).unwrap();
        let scores: Vec<f32> = scores.into_data().to_vec().unwrap();
        prop_assert_eq!(scores.len(), view.rows());
        prop_assert!(scores.iter().all(|score| score.is_finite()), "{:?}", scores);
    }

    /// What ranking costs is a number, whatever is asked for.
    #[test]
    fn every_rule_has_a_price(rule in rules(), rows in prop::array::uniform3(any::<usize>())) {
        let [visual, text, candidates] = rows;
        let shape = reducers::DecoderShape {
            num_layers: 2,
            hidden_size: 8,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 4,
            intermediate_size: 16,
        };
        let rows = reducers::DecisionRows { visual, text, candidates };
        let flops = rule.flops(&shape, rows);
        prop_assert!(flops >= 0.0 && flops.is_finite());
    }
}

/// The rules themselves too, not only through a schedule.
#[test]
fn rules_alone_meet_empty_pools() {
    let view = View {
        before: 2,
        candidates: Vec::new(),
        behind: 1,
        keep: 0,
        gone: 3,
    };
    let rules: [&dyn Scorer<Flex>; 3] = [
        &Attention::default(),
        &Duplication::default(),
        &Random::default(),
    ];
    for rule in rules {
        assert_eq!(rule.score(&view).unwrap().dims(), [3]);
    }
}
