//! The library against the slow reference, over schedules, group sizes, biases, norms, positions.

use proptest::prelude::*;
use reducers::{Action, Schedule};

use crate::reference::Reference;
use crate::support::{
    Backend, VOCAB, any_action, case, cases, columns, decode, distance, pack, prefill_one, unusual,
    values,
};

/// Largest difference allowed between f32 and f64, as a share of the largest magnitude.
const TOLERANCE: f64 = 1e-4;

/// Scores this close may be ranked the other way round in f32.
const CLOSE: f64 = 1e-6;

proptest! {
    #![proptest_config(cases(128))]

    /// Compacted stages, keys computed once, one query row, per-layer caches: all of it is the
    /// full-length scatter form with whole attention matrices (equivalences 9.3(a) and (d)). Scores,
    /// selections, rows per layer, every hidden state and the logits.
    #[test]
    fn routed_prefill_equals_the_slow_reference(case in unusual(any_action())) {
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let expected = Reference::of(&decoder).prefill(&sample, &case.schedule);
        prop_assume!(expected.decisions.iter().all(|decision| decision.margin > CLOSE));

        let actual = prefill_one(&decoder, &sample, &case.schedule);
        assert_eq!(actual.trace.decisions.len(), expected.decisions.len());
        for (actual, expected) in actual.trace.decisions.iter().zip(&expected.decisions) {
            let difference = distance(&actual.scores, &expected.scores);
            assert!(difference < 1e-5, "scores at layer {}: {difference}", actual.layer);
            if let Some(remembered) = &actual.remembered {
                let difference = distance(remembered, &expected.ranked);
                assert!(difference < 1e-4, "shares at layer {}: {difference}", actual.layer);
            }
            assert_eq!(actual.selected, expected.selected, "layer {}", actual.layer);
        }
        let lengths: Vec<usize> = expected.active.iter().map(Vec::len).collect();
        assert_eq!(actual.cache.lengths(0), lengths);
        for (layer, actual) in actual.hidden_states.iter().enumerate() {
            // Under the per-layer layout deferred rows are there too, as they wait.
            let is_active = |row: &&usize| expected.active[layer].contains(row);
            let active: Vec<usize> = actual.rows.iter().filter(is_active).copied().collect();
            assert_eq!(active, expected.active[layer]);
            for (&row, actual) in actual.rows.iter().zip(columns(&actual.values)) {
                let difference = distance(&actual, &expected.hidden_states[layer][row]);
                assert!(difference < TOLERANCE, "layer {layer}, row {row}: {difference}");
            }
        }
        let difference = distance(&values(actual.logits), &expected.logits);
        assert!(difference < TOLERANCE, "logits: {difference}");
    }

    /// What shortcuts are fitted to: visual rows as the plain model leaves them before the layers of a stage, with
    /// DeepStack features that they receive meanwhile, and as it leaves them behind.
    #[test]
    fn rows_that_would_wait_equal_the_slow_reference(case in case(Just(Action::Reroute))) {
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let dense = Reference::of(&decoder).prefill(&sample, &Schedule::dense());
        let waits = decoder.waits(&pack(std::slice::from_ref(&sample)), &case.schedule).unwrap();
        let stages: Vec<usize> = case.schedule.stages().iter().map(|stage| stage.layer).collect();
        assert!(waits.iter().map(|waited| waited.layers.clone()).eq(stages.windows(2).map(|pair| pair[0]..pair[1])));
        for waited in waits {
            let (start, end) = (waited.layers.start, waited.layers.end);
            let both = columns(&waited.before).into_iter().zip(columns(&waited.after));
            assert_eq!(both.len(), sample.layout.visual.len());
            for ((token, &row), (before, after)) in sample.layout.visual.iter().enumerate().zip(both) {
                let mut expected: Vec<f64> = match start.checked_sub(1) {
                    Some(layer) => dense.hidden_states[layer][row].clone(),
                    None => sample.embeddings[row].iter().map(|&x| x.into()).collect(),
                };
                for layer in start.saturating_sub(1)..end - 1 {
                    let features = sample.deepstack.get(layer).map(|features| &features[token]);
                    for (sum, x) in expected.iter_mut().zip(features.into_iter().flatten()) {
                        *sum += f64::from(*x);
                    }
                }
                let off = distance(&before, &expected);
                assert!(off < TOLERANCE, "row {row} before layer {start}: {off}");
                let off = distance(&after, &dense.hidden_states[end - 1][row]);
                assert!(off < TOLERANCE, "row {row} behind layer {}: {off}", end - 1);
            }
        }
    }

    /// A generated token sees, per layer, what that layer worked on, from the position it has in
    /// the plain model; its own row goes through every layer (9.3(i): the mask form).
    #[test]
    fn decode_after_routed_prefill_equals_the_slow_reference(
        case in unusual(any_action()),
        tokens in prop::collection::vec(0..VOCAB as u32, 1..5),
    ) {
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let reference = Reference::of(&decoder);
        let prefilled = reference.prefill(&sample, &case.schedule);
        prop_assume!(prefilled.decisions.iter().all(|decision| decision.margin > CLOSE));
        let expected = reference.decode(&sample, &prefilled, &tokens);

        let mut actual = prefill_one(&decoder, &sample, &case.schedule);
        let actual = decode(&decoder, &mut actual, &tokens);
        for (step, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
            let difference = distance(actual, expected);
            assert!(difference < TOLERANCE, "token {step}: {difference}");
        }
    }
}

/// The plain model, so that an error above can be told from an error of routing.
#[test]
fn the_plain_model_equals_the_slow_reference() {
    proptest!(cases(64), |(case in case(any_action()))| {
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let expected = Reference::of(&decoder).prefill(&sample, &Schedule::dense());
        let actual = prefill_one(&decoder, &sample, &Schedule::dense());
        let difference = distance(&values(actual.logits), &expected.logits);
        assert!(difference < TOLERANCE, "{difference}");
    });
}
