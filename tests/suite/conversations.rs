//! A turn that continues an earlier one.

use proptest::prelude::*;
use reducers::{Action, Schedule, Stage};
use reroute::{Decoder, Prefill, PrefillOptions};

use crate::reference::Reference;
use crate::support::{
    Backend, Case, Sample, VOCAB, any_action, are_clear, batch, case, cases, decode, distance, gap,
    layout, pack, prefill, selections, values,
};

/// Logits of a continued and of a fresh prefill may differ by the order of a sum.
const TOLERANCE: f64 = 1e-4;

/// A first turn that can be continued.
fn first_turn(
    decoder: &Decoder<Backend>,
    samples: &[Sample],
    schedule: &Schedule,
) -> Prefill<Backend> {
    let options = PrefillOptions {
        keep_pool: true,
        ..Default::default()
    };
    decoder.prefill(&pack(samples), schedule, options).unwrap()
}

/// The turn after it: `samples` are whole conversations.
fn next_turn(
    decoder: &Decoder<Backend>,
    first: Prefill<Backend>,
    samples: &[Sample],
    schedule: &Schedule,
) -> Prefill<Backend> {
    let options = PrefillOptions {
        hidden_states: true,
        keep_pool: true,
    };
    let prompt = pack(samples);
    decoder
        .resume(first.cache, &prompt, schedule, options)
        .unwrap()
}

/// Each sample up to one of its text rows; `cut` says which.
fn heads(samples: &[Sample], cut: usize) -> Vec<Sample> {
    let head = |(index, sample): (usize, &Sample)| {
        let text = sample.text();
        sample.head(text[(cut + 3 * index) % text.len()] + 1)
    };
    samples.iter().enumerate().map(head).collect()
}

fn samples() -> BoxedStrategy<Vec<Vec<bool>>> {
    prop::collection::vec(layout(), 1..=3).boxed()
}

fn assert_equal_turns(case: &Case, continued: &Prefill<Backend>, fresh: &Prefill<Backend>) {
    let decisions = &fresh.trace.decisions;
    assert_eq!(
        selections(&continued.trace.decisions),
        selections(decisions)
    );
    for (continued, fresh) in continued.trace.decisions.iter().zip(decisions) {
        assert_eq!(continued.candidates, fresh.candidates);
        let difference = gap(&continued.scores, &fresh.scores);
        // Rounding of one head: a score by the highest head averages nothing away.
        assert!(difference < 4e-6, "scores: {difference}");
    }
    let logits = [continued, fresh].map(|turn| values(turn.logits.clone()));
    let difference = gap(&logits[0], &logits[1]);
    assert!(difference < TOLERANCE, "{difference}");
    for sample in 0..case.layouts.len() {
        let caches = [continued, fresh].map(|turn| &turn.cache);
        assert_eq!(caches[0].lengths(sample), caches[1].lengths(sample));
        assert_eq!(caches[0].bytes(sample), caches[1].bytes(sample));
        assert_eq!(
            caches[0].next_position(sample),
            caches[1].next_position(sample)
        );
    }
}

proptest! {
    #![proptest_config(cases(96))]

    /// Under *reroute* a later turn chooses among all visual tokens, as if the whole conversation
    /// had been one prompt: its logits, decisions, caches, and what it generates. The first turn
    /// may have generated (and the new prompt replaced) some tokens, and the third continues the
    /// second.
    #[test]
    fn a_rerouted_turn_equals_a_prefill_of_the_whole_conversation(
        case in batch(Just(Action::Reroute), samples()),
        cuts in (0..20usize, 0..20usize),
        tokens in prop::collection::vec(0..VOCAB as u32, 0..4),
    ) {
        let (decoder, samples) = (case.decoder::<Backend>(), case.samples());
        let fresh = prefill(&decoder, &samples, &case.schedule);
        prop_assume!((0..samples.len()).all(|sample| {
            let decisions: Vec<_> = fresh.trace.of_sample(sample).cloned().collect();
            are_clear(&decisions, case.schedule.monotonic())
        }));
        let second = heads(&samples, cuts.1);
        let first = heads(&second, cuts.0);
        let mut turn = first_turn(&decoder, &first, &case.schedule);
        for (earlier, samples) in [(&first, &second), (&second, &samples)] {
            decode(&decoder, &mut turn, &tokens);
            for (index, earlier) in earlier.iter().enumerate() {
                // What was generated is not what the next prompt says.
                turn.cache.truncate(index, earlier.layout.rows).unwrap();
            }
            turn = next_turn(&decoder, turn, samples, &case.schedule);
        }
        assert_equal_turns(&case, &turn, &fresh);
        let mut fresh = fresh;
        let generated = [&mut turn, &mut fresh].map(|turn| decode(&decoder, turn, &tokens));
        for (continued, fresh) in generated[0].iter().zip(&generated[1]) {
            assert!(gap(continued, fresh) < TOLERANCE);
        }
    }

    /// Without decisions nothing is computed twice and nothing is different.
    #[test]
    fn a_dense_turn_equals_a_prefill_of_the_whole_conversation(
        case in batch(any_action(), samples()),
        cut in 0..20usize,
    ) {
        let (decoder, samples) = (case.decoder::<Backend>(), case.samples());
        let dense = Schedule::dense();
        let earlier = heads(&samples, cut);
        let continued = first_turn(&decoder, &earlier, &dense);
        let continued = next_turn(&decoder, continued, &samples, &dense);
        assert_equal_turns(&case, &continued, &prefill(&decoder, &samples, &dense));
        for rows in &continued.trace.rows {
            for (sample, &rows) in rows.iter().enumerate() {
                let known = earlier[sample].layout.rows.min(samples[sample].layout.rows - 1);
                assert_eq!(rows, samples[sample].layout.rows - known);
            }
        }
    }

    /// Of some last rows that are asked for, the last has the logits of a prefill.
    #[test]
    fn rows_that_are_asked_for_are_those_of_a_prefill(
        case in batch(any_action(), samples()),
        most in 1..6usize,
    ) {
        let (decoder, samples) = (case.decoder::<Backend>(), case.samples());
        let prompt = pack(&samples);
        let asked: Vec<usize> = samples.iter().map(|sample| most.min(sample.layout.rows)).collect();
        let rows = decoder.forward(&prompt, &asked).unwrap();
        assert_eq!(rows.dims()[1], asked.iter().sum::<usize>());
        let expected = prefill(&decoder, &samples, &Schedule::dense()).logits;
        let mut end = 0;
        for (sample, count) in asked.iter().enumerate() {
            end += count;
            let found = decoder.logits(rows.clone().narrow(1, end - 1, 1)).unwrap();
            let expected = expected.clone().narrow(0, sample, 1);
            let apart = (found - expected).abs().max().into_scalar();
            assert!(f64::from(apart) < TOLERANCE, "{apart}");
        }
        for wrong in [vec![], vec![0; asked.len()], vec![usize::MAX; asked.len()]] {
            assert!(decoder.forward(&prompt, &wrong).is_err());
        }
    }

    /// Under *remove* a later turn sees, in each layer, what the earlier one kept there, and no more:
    /// the slow reference with the first turn's active rows as masks.
    #[test]
    fn a_turn_after_removal_sees_only_what_was_kept(
        case in case(Just(Action::Remove)),
        tokens in prop::collection::vec(0..VOCAB as u32, 1..6),
    ) {
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let reference = Reference::of(&decoder);
        let first = reference.prefill(&sample, &case.schedule);
        prop_assume!(first.decisions.iter().all(|decision| decision.margin > 1e-6));
        let expected = reference.decode(&sample, &first, &tokens);

        let mut whole = sample.clone();
        whole.embeddings.extend(crate::support::columns(&decoder.embed(&tokens).unwrap()));
        for step in 0..tokens.len() {
            let next = sample.layout.next_position + step as i64;
            whole.positions.push(vec![next; case.config.rope.axes()]);
        }
        whole.layout.rows += tokens.len();
        whole.layout.next_position += tokens.len() as i64;
        let continued = first_turn(&decoder, std::slice::from_ref(&sample), &case.schedule);
        let continued = next_turn(&decoder, continued, &[whole], &case.schedule);

        assert!(continued.trace.decisions.is_empty(), "there is no new image");
        let difference = distance(&values(continued.logits), &expected[tokens.len() - 1]);
        assert!(difference < TOLERANCE, "{difference}");
        let held = first.active.iter().map(|active| active.len() + tokens.len());
        assert_eq!(continued.cache.lengths(0), held.collect::<Vec<_>>());
    }

    /// Under *remove* a new image is decided on, and what earlier turns kept stays out of it.
    #[test]
    fn a_turn_after_removal_decides_on_new_images_only(case in case(Just(Action::Remove))) {
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let visual = &sample.layout.visual;
        let is_text = |row: &usize| !visual.contains(row);
        // Between the two runs of visual rows, if text separates them.
        let gap = (visual[0]..*visual.last().unwrap()).find(is_text);
        prop_assume!(gap.is_some());
        let cut = gap.unwrap() + 1;
        let earlier = visual.partition_point(|&row| row < cut);
        let first = first_turn(&decoder, &[sample.head(cut)], &case.schedule);
        let before = first.cache.lengths(0);
        let second = next_turn(&decoder, first, std::slice::from_ref(&sample), &case.schedule);
        let counts = case.schedule.keep_counts(visual.len() - earlier);
        assert_eq!(second.trace.decisions.len(), counts.len());
        for (decision, count) in second.trace.decisions.iter().zip(counts) {
            assert_eq!(decision.selected.len(), count);
            assert!(decision.candidates.iter().all(|&token| token >= earlier));
        }
        for (layer, rows) in second.cache.lengths(0).into_iter().enumerate() {
            assert_eq!(rows, before[layer] + second.trace.rows[layer][0]);
        }
    }
}

/// The point of it: the second question wants what the first one had deferred. Rerouting brings it
/// back, removal cannot.
#[test]
fn a_second_question_gets_back_what_the_first_one_deferred() {
    let config = proptest::strategy::Strategy::new_tree(
        &crate::support::model(),
        &mut proptest::test_runner::TestRunner::deterministic(),
    );
    let config = proptest::strategy::ValueTree::current(&config.unwrap());
    let layout = [vec![false; 3], vec![true; 12], vec![false; 9]].concat();
    let mut came_back = 0;
    for seed in 0..16 {
        let case = |action| Case {
            config: config.clone(),
            layouts: vec![layout.clone()],
            schedule: Schedule::new(action, false, vec![Stage::count(1, 3)]).unwrap(),
            deepstack: 0,
            seed,
        };
        let [reroute, remove] = [Action::Reroute, Action::Remove].map(|action| {
            let case = case(action);
            let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
            let first = first_turn(&decoder, &[sample.head(18)], &case.schedule);
            let selected = first.trace.decisions[0].selected.clone();
            (
                selected,
                next_turn(&decoder, first, &[sample], &case.schedule),
            )
        });
        // One decision: the first turns are the same.
        assert_eq!(reroute.0, remove.0);
        let (selected, second) = reroute;
        let again = &second.trace.decisions[0];
        assert_eq!(again.candidates.len(), 12);
        came_back += again
            .selected
            .iter()
            .filter(|token| !selected.contains(token))
            .count();
        assert_eq!(
            second.cache.lengths(0)[1..],
            vec![12 + 3; config.num_layers - 1]
        );

        let (_, second) = remove;
        assert!(second.trace.decisions.is_empty());
        assert_eq!(
            second.cache.lengths(0)[1..],
            vec![12 + 3; config.num_layers - 1]
        );
    }
    assert!(
        came_back > 0,
        "no token that was deferred at first came back"
    );
}

/// A cache of another model is refused, not read beyond its end.
#[test]
fn a_cache_that_does_not_fit_is_refused() {
    proptest!(cases(8), |(case in case(any_action()))| {
        let (decoder, sample) = (case.decoder::<Backend>(), case.sample());
        let cache = reroute::KvCache::new(case.config.num_layers + 1, 1).unwrap();
        let prompt = pack(std::slice::from_ref(&sample));
        let options = PrefillOptions::default();
        let refused = decoder.resume(cache, &prompt, &case.schedule, options);
        assert!(refused.unwrap_err().to_string().contains("the cache has"));
        // An empty one is a fresh start.
        let cache = reroute::KvCache::new(case.config.num_layers, 1).unwrap();
        let fresh = decoder.resume(cache, &prompt, &case.schedule, options).unwrap();
        let expected = decoder.prefill(&prompt, &case.schedule, options).unwrap();
        assert_eq!(values(fresh.logits), values(expected.logits));
    });
}
