//! Random schedules.

use proptest::prelude::*;
use proptest::sample::subsequence;
use reducers::{
    Action, Attention, Duplication, HeadReduce, Heads, HiddenLayout, Keep, Positions, Query,
    Schedule, Score, ScoreDtype, ScoreLayer, ScoreMemory, SoftmaxKeys, Stage, Waiting,
};

use super::{Case, case};

/// Schedules for a decoder of `layers` layers with one to four decisions, scored in every way that a
/// conversation can continue with.
pub fn schedule(
    layers: usize,
    action: impl Strategy<Value = Action>,
) -> impl Strategy<Value = Schedule> {
    let keep = prop_oneof![
        (0.05..1.0f64).prop_map(Keep::Ratio),
        (0.05..1.0f64).prop_map(Keep::Rounded),
        (0.05..1.0f64).prop_map(Keep::Truncated),
        (1..12usize).prop_map(Keep::Count),
    ];
    let stages = subsequence((0..layers).collect::<Vec<_>>(), 1..=layers.min(4));
    let rules = prop::collection::vec((keep, attention()), 4);
    let memory = prop_oneof![
        3 => Just(ScoreMemory::Off),
        1 => Just(ScoreMemory::Sum),
        1 => Just(ScoreMemory::Max),
        1 => (0.1..0.9f32).prop_map(ScoreMemory::Decay),
    ];
    let waiting = prop_oneof![
        2 => Just(Waiting::Untouched),
        1 => Just(Waiting::RideAlong),
        1 => Just(Waiting::Shortcut),
    ];
    let drawn = (action, any::<bool>(), waiting, memory, stages, rules);
    drawn.prop_map(|(action, monotonic, waiting, memory, layers, rules)| {
        let waiting = match action {
            Action::Reroute => waiting,
            Action::Remove => Waiting::Untouched,
        };
        let stage = |(index, (layer, (keep, attention))): (usize, (usize, _))| {
            let attention: Attention = attention;
            let impossible = layer == 0 || (index > 0 && action == Action::Reroute);
            let layer_of_score = match impossible {
                true => ScoreLayer::This,
                false => attention.layer,
            };
            Stage::new(layer, keep).by(Score::Attention(Attention {
                layer: layer_of_score,
                ..attention
            }))
        };
        let stages = layers.into_iter().zip(rules).enumerate().map(stage);
        let schedule = Schedule::new(action, monotonic, stages.collect());
        schedule
            .and_then(|schedule| schedule.with_memory(memory))
            .and_then(|schedule| schedule.with_waiting(waiting))
            .unwrap()
    })
}

fn attention() -> impl Strategy<Value = Attention> {
    let layer = prop_oneof![Just(ScoreLayer::This), Just(ScoreLayer::Previous)];
    let query = prop_oneof![
        2 => Just(Query::Last),
        1 => (1..5usize).prop_map(Query::LastMean),
        1 => Just(Query::Raters),
    ];
    // Every decoder here has four of them.
    let only = subsequence(vec![0, 1, 2, 3], 1..=4);
    let heads = prop_oneof![
        2 => Just(HeadReduce::Mean),
        2 => Just(HeadReduce::Max),
        1 => only.prop_map(|heads| HeadReduce::Only(Heads::new(heads).unwrap())),
    ];
    let dtype = prop_oneof![Just(ScoreDtype::F32), Just(ScoreDtype::Model)];
    let keys = prop_oneof![Just(SoftmaxKeys::All), Just(SoftmaxKeys::Candidates)];
    (layer, query, heads, dtype, keys).prop_map(|(layer, query, heads, dtype, keys)| Attention {
        layer,
        query,
        heads,
        dtype,
        rope: true,
        keys,
    })
}

/// Cases whose schedules also do what no conversation can continue with: scores without rotary
/// positions, scores given by the encoder side, positions numbered anew, hidden states at full length.
pub fn unusual(action: impl Strategy<Value = Action> + Clone + 'static) -> BoxedStrategy<Case> {
    let stride = prop::option::of(1..4usize);
    let pivots = prop::option::weighted(0.2, (0..3usize, 1..3usize));
    (case(action), any::<[bool; 4]>(), stride, pivots)
        .prop_map(
            |(case, [unrotated, salience, renumber, per_layer], stride, pivots)| {
                let score = |(index, stage): (usize, &Stage)| {
                    let score = match (stage.score, pivots) {
                        _ if salience && index == 0 => Score::Encoder,
                        (Score::Attention(attention), Some((visual_pivots, text_pivots))) => {
                            Score::Duplication(Duplication {
                                layer: attention.layer,
                                visual_pivots,
                                text_pivots,
                            })
                        }
                        (Score::Attention(attention), None) => Score::Attention(Attention {
                            rope: !unrotated,
                            ..attention
                        }),
                        (score, _) => score,
                    };
                    Stage {
                        stride,
                        ..stage.by(score)
                    }
                };
                let (action, monotonic) = (case.schedule.action(), case.schedule.monotonic());
                let stages = case.schedule.stages().iter().enumerate().map(score);
                let (memory, waiting) = (case.schedule.memory(), case.schedule.waiting());
                let schedule = Schedule::new(action, monotonic, stages.collect())
                    .and_then(|schedule| schedule.with_memory(memory))
                    .and_then(|schedule| schedule.with_waiting(waiting))
                    .unwrap();
                let schedule = match per_layer {
                    true => schedule.with_layout(HiddenLayout::PerLayer),
                    false => schedule,
                };
                let possible = action == Action::Remove && case.config.rope.axes() == 1;
                Case {
                    schedule: match renumber && possible {
                        true => schedule.with_positions(Positions::Renumber).unwrap(),
                        false => schedule,
                    },
                    ..case
                }
            },
        )
        .boxed()
}
