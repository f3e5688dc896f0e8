//! What must hold for every schedule, score and budget, not only for the ones that were published.

use proptest::prelude::*;
use reducers::{Action, Keep, Profile, Schedule, Stage, budget, top_k};

const PROFILES: [Profile; 3] = [Profile::Uniform, Profile::Geometric, Profile::Pyramid];

/// Scores with many ties, zeros of both signs and infinities.
fn scores() -> impl Strategy<Value = Vec<f32>> {
    let few_values = prop::sample::select(vec![f32::NEG_INFINITY, -1.0, -0.0, 0.0, 0.25, 0.5, 1.0]);
    prop::collection::vec(prop_oneof![few_values, -1.0_f32..1.0], 0..200)
}

fn keep() -> impl Strategy<Value = Keep> {
    prop_oneof![
        (f64::MIN_POSITIVE..=1.0).prop_map(Keep::Ratio),
        Just(Keep::Ratio(1.0)),
        (1_usize..2000).prop_map(Keep::Count),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop::sample::select(vec![Action::Remove, Action::Reroute])
}

fn schedule() -> impl Strategy<Value = Schedule> {
    let stages = prop::collection::btree_map(0_usize..40, keep(), 0..6);
    (action(), any::<bool>(), stages).prop_map(|(action, monotonic, stages)| {
        let stages = stages
            .into_iter()
            .map(|(layer, keep)| Stage::new(layer, keep));
        Schedule::new(action, monotonic, stages.collect()).unwrap()
    })
}

/// Depth and decision layers of a decoder.
fn decisions() -> impl Strategy<Value = (usize, Vec<usize>)> {
    (1_usize..80).prop_flat_map(|num_layers| {
        let layers = prop::collection::btree_set(0..num_layers, 1..=num_layers.min(6));
        (
            Just(num_layers),
            layers.prop_map(|layers| layers.into_iter().collect()),
        )
    })
}

/// JSON that is nearly a schedule: right keys and wrong values, wrong keys and right values.
fn nearly_a_schedule() -> impl Strategy<Value = String> {
    let value = prop::sample::select(vec![
        "0",
        "-1",
        "2",
        "0.5",
        "1e308",
        "-0.0",
        "18446744073709551616",
        "null",
        "true",
        "\"remove\"",
        "\"reroute\"",
        "[]",
        "{}",
        "[{}]",
    ]);
    let key = prop::sample::select(vec![
        "action",
        "monotonic",
        "stages",
        "layer",
        "keep_ratio",
        "keep_count",
        "x",
    ]);
    let object = |value: BoxedStrategy<String>| {
        prop::collection::vec((key.clone(), value), 0..5).prop_map(|fields| {
            let fields: Vec<String> = fields
                .iter()
                .map(|(key, value)| format!("\"{key}\": {value}"))
                .collect();
            format!("{{{}}}", fields.join(", "))
        })
    };
    let value = value.prop_map(str::to_owned).boxed();
    let stages = prop::collection::vec(object(value.clone()), 0..4)
        .prop_map(|list| format!("[{}]", list.join(", ")));
    prop_oneof![
        object(prop_oneof![value, stages.clone()].boxed()),
        stages.prop_map(|stages| format!("{{\"action\": \"remove\", \"stages\": {stages}}}")),
    ]
}

proptest! {
    #[test]
    fn top_k_agrees_with_a_stable_sort(scores in scores(), k in 0_usize..220) {
        let mut expected: Vec<usize> = (0..scores.len()).collect();
        expected.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap());
        expected.truncate(k);
        expected.sort();
        prop_assert_eq!(top_k(&scores, k).unwrap(), expected);
    }

    #[test]
    fn one_nan_anywhere_is_an_error(
        mut scores in scores(),
        at in any::<prop::sample::Index>(),
        k in 0_usize..9,
    ) {
        prop_assume!(!scores.is_empty());
        let at = at.index(scores.len());
        scores[at] = f32::NAN;
        prop_assert!(top_k(&scores, k).is_err());
    }

    #[test]
    fn keep_counts_are_in_range(keep in keep(), visual_tokens in 0_usize..5000) {
        let count = keep.count(visual_tokens);
        prop_assert!(count <= visual_tokens);
        prop_assert!(count >= visual_tokens.min(1));
        if keep == Keep::Ratio(1.0) {
            prop_assert_eq!(count, visual_tokens);
        }
    }

    #[test]
    fn schedules_keep_in_range_and_removal_only_shrinks(
        schedule in schedule(),
        visual_tokens in 1_usize..3000,
    ) {
        let layers = schedule.visual_tokens_per_layer(40, visual_tokens);
        let layers: Vec<usize> = layers.collect();
        prop_assert!(layers.iter().all(|count| (1..=visual_tokens).contains(count)));
        if schedule.action() == Action::Remove {
            prop_assert!(layers.is_sorted_by(|before, after| before >= after));
        }
        for (stage, count) in schedule.stages().iter().zip(schedule.keep_counts(visual_tokens)) {
            prop_assert_eq!(layers[stage.layer], count);
        }
        let average = layers.iter().sum::<usize>() as f64 / 40.0;
        prop_assert_eq!(schedule.average_tokens(40, visual_tokens), average);
    }

    #[test]
    fn json_round_trips_to_the_last_bit(schedule in schedule()) {
        let text = serde_json::to_string(&schedule).unwrap();
        prop_assert_eq!(Schedule::from_json(&text).unwrap(), schedule.clone());
        prop_assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), schedule);
    }

    #[test]
    fn solved_schedules_hit_the_target(
        profile in prop::sample::select(PROFILES.to_vec()),
        (num_layers, layers) in decisions(),
        share in 0.001_f64..=1.0,
        action in action(),
        visual_tokens in 1_usize..3000,
    ) {
        let Ok(ratios) = budget::solve(profile, &layers, num_layers, share) else {
            let head = layers[0] as f64 / num_layers as f64;
            prop_assert!(share <= head || profile == Profile::Pyramid);
            return Ok(());
        };
        let stages = layers.iter().zip(&ratios).map(|(&layer, &ratio)| Stage::ratio(layer, ratio));
        let schedule = Schedule::new(action, false, stages.collect()).unwrap();
        // Each stage truncates less than one token, or adds less than one where it must keep at
        // least one.
        let target = share * visual_tokens as f64;
        let average = schedule.average_tokens(num_layers, visual_tokens);
        prop_assert!((average - target).abs() < 1.0, "{average} {target} {ratios:?}");
    }

    #[test]
    fn solver_never_panics(
        layers in prop::collection::vec(any::<usize>(), 0..5),
        num_layers in any::<usize>(),
        share in any::<f64>(),
    ) {
        for profile in PROFILES {
            let _ = budget::solve(profile, &layers, num_layers, share);
        }
    }

    #[test]
    fn arbitrary_json_never_panics(text in prop_oneof![nearly_a_schedule(), ".{0,80}"]) {
        if let Ok(schedule) = Schedule::from_json(&text) {
            schedule.keep_counts(576);
            schedule.average_tokens(32, 576);
        }
    }
}
