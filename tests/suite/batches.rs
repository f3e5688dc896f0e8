//! A batch is its samples, side by side: none sees another.

use proptest::prelude::*;
use reroute::PrefillOptions;

use crate::support::{
    Backend, Sample, VOCAB, any_action, are_clear, batch, cases, decode, gap, layout, pack,
    prefill, prefill_one, values,
};

/// Logits of a batch and of a sample alone may differ by the order of a sum.
const TOLERANCE: f64 = 1e-5;

/// Two to four samples of different lengths, with and without visual tokens.
fn samples() -> BoxedStrategy<Vec<Vec<bool>>> {
    let text = (1..9usize).prop_map(|rows| vec![false; rows]);
    prop::collection::vec(prop_oneof![3 => layout().boxed(), 1 => text.boxed()], 2..=4).boxed()
}

proptest! {
    #![proptest_config(cases(48))]

    /// Selections, scores, cache and logits of each sample of a batch are those of the sample
    /// alone, whatever stands beside it; so is everything it decodes to.
    #[test]
    fn every_sample_is_routed_by_its_own_scores(
        case in batch(any_action(), samples()),
        tokens in prop::collection::vec(0..VOCAB as u32, 0..4),
    ) {
        let (decoder, samples) = (case.decoder::<Backend>(), case.samples());
        let mut together = prefill(&decoder, &samples, &case.schedule);
        let together_logits = values(together.logits.clone());
        let together_decoded = decode(&decoder, &mut together, &tokens);
        for (index, sample) in samples.iter().enumerate() {
            let mut alone = prefill_one(&decoder, sample, &case.schedule);
            prop_assume!(are_clear(&alone.trace.decisions, case.schedule.monotonic()));
            let decisions: Vec<_> = together.trace.of_sample(index).collect();
            assert_eq!(decisions.len(), alone.trace.decisions.len());
            for (together, alone) in decisions.iter().zip(&alone.trace.decisions) {
                assert_eq!(together.selected, alone.selected);
                assert_eq!(together.candidates, alone.candidates);
                assert_eq!(together.returned, alone.returned);
                assert!(gap(&together.scores, &alone.scores) < 1e-6);
            }
            let rows: Vec<usize> = together.trace.rows.iter().map(|rows| rows[index]).collect();
            let alone_rows: Vec<usize> = alone.trace.rows.iter().map(|rows| rows[0]).collect();
            assert_eq!(rows, alone_rows);

            let of_sample = index * VOCAB..(index + 1) * VOCAB;
            let difference = gap(&together_logits[of_sample.clone()], &values(alone.logits.clone()));
            assert!(difference < TOLERANCE, "sample {index}: {difference}");
            let decoded = decode(&decoder, &mut alone, &tokens);
            assert_eq!(together.cache.lengths(index), alone.cache.lengths(0));
            assert_eq!(together.cache.bytes(index), alone.cache.bytes(0));
            for (together, alone) in together_decoded.iter().zip(&decoded) {
                let difference = gap(&together[of_sample.clone()], alone);
                assert!(difference < TOLERANCE, "sample {index}, decoding: {difference}");
            }
        }
    }

    /// Rows that nobody asks for go no further than keys and values in the last layer, which changes
    /// nothing but the order of sums.
    #[test]
    fn the_last_layer_takes_only_asked_rows_all_the_way(
        case in batch(any_action(), samples()),
        tokens in prop::collection::vec(0..VOCAB as u32, 0..4),
    ) {
        let (decoder, samples) = (case.decoder::<Backend>(), case.samples());
        let mut all = prefill(&decoder, &samples, &case.schedule);
        assert_eq!(all.trace.queries, all.trace.rows);
        let options = PrefillOptions::default();
        let mut asked = decoder.prefill(&pack(&samples), &case.schedule, options).unwrap();
        assert_eq!(asked.trace.rows, all.trace.rows);
        assert_eq!(asked.trace.decisions, all.trace.decisions);
        let (last, others) = asked.trace.queries.split_last().unwrap();
        assert_eq!(others, &asked.trace.rows[..others.len()]);
        assert_eq!(last, &vec![1; samples.len()]);
        for sample in 0..samples.len() {
            assert_eq!(asked.cache.lengths(sample), all.cache.lengths(sample));
        }
        assert!(gap(&values(asked.logits.clone()), &values(all.logits.clone())) < TOLERANCE);
        let decoded = decode(&decoder, &mut asked, &tokens);
        let expected = decode(&decoder, &mut all, &tokens);
        for (decoded, expected) in decoded.iter().zip(&expected) {
            assert!(gap(decoded, expected) < TOLERANCE);
        }
    }

    /// Samples need not be fed together, nor in order.
    #[test]
    fn samples_decode_at_their_own_pace(case in batch(any_action(), samples())) {
        let (decoder, samples) = (case.decoder::<Backend>(), case.samples());
        let prompt = pack(&samples);
        let prefill = || decoder.prefill(&prompt, &case.schedule, Default::default()).unwrap();
        let (mut together, mut apart) = (prefill(), prefill());
        let last = samples.len() - 1;
        decoder.decode(&[(0, 5), (last, 9)], &mut together.cache).unwrap();
        let together = decoder.decode(&[(0, 6), (last, 8)], &mut together.cache).unwrap();

        let mut feed = |tokens: &[(usize, u32)]| values(decoder.decode(tokens, &mut apart.cache).unwrap());
        feed(&[(last, 9)]);
        feed(&[(0, 5)]);
        let [last, first] = [feed(&[(last, 8)]), feed(&[(0, 6)])];
        let difference = gap(&[first, last].concat(), &values(together));
        assert!(difference < TOLERANCE, "{difference}");
    }

    /// A known answer fed at once is the answer fed token by token.
    #[test]
    fn tokens_fed_at_once_follow_each_other(
        case in batch(any_action(), samples()),
        tokens in prop::collection::vec(0..VOCAB as u32, 2..5),
    ) {
        let (decoder, samples) = (case.decoder::<Backend>(), case.samples());
        let mut at_once = prefill(&decoder, &samples, &case.schedule);
        let mut one_by_one = prefill(&decoder, &samples, &case.schedule);
        let fed = |sample: usize| tokens.iter().map(move |&token| (sample, token));
        let all: Vec<(usize, u32)> = (0..samples.len()).flat_map(fed).collect();
        let logits = values(decoder.decode(&all, &mut at_once.cache).unwrap());
        let expected = decode(&decoder, &mut one_by_one, &tokens);
        for (row, logits) in logits.chunks(VOCAB).enumerate() {
            let (sample, step) = (row / tokens.len(), row % tokens.len());
            let expected = &expected[step][sample * VOCAB..][..VOCAB];
            let difference = gap(logits, expected);
            assert!(difference < TOLERANCE, "sample {sample}, token {step}: {difference}");
        }
        for sample in 0..samples.len() {
            let [a, b] = [&at_once.cache, &one_by_one.cache];
            assert_eq!(a.lengths(sample), b.lengths(sample));
            assert_eq!(a.next_position(sample), b.next_position(sample));
        }
    }

    /// The same prompt twice in a batch is answered twice the same.
    #[test]
    fn a_batch_of_equal_samples_has_equal_answers(case in batch(any_action(), samples())) {
        let sample: Sample = case.sample();
        let twice = prefill(&case.decoder::<Backend>(), &[sample.clone(), sample], &case.schedule);
        let logits = values(twice.logits);
        let (first, second) = logits.split_at(VOCAB);
        prop_assume!(are_clear(
            &twice.trace.of_sample(0).cloned().collect::<Vec<_>>(),
            case.schedule.monotonic(),
        ));
        assert!(gap(first, second) < TOLERANCE);
    }
}
