//! What a prefill under a schedule promises.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use reducers::{Action, Positions, Schedule, Stage};
use reroute::{DecoderLayer, KvCache, Prefill, RerouteError};

use crate::support::{B, LAYERS, alone, columns, decoder, observed, prompt, schedule, values};

const VISUAL: usize = 12;

/// Logits, hidden states, cache lengths and a decoded token are the same to the bit.
fn assert_identical(mut a: Prefill<B>, mut b: Prefill<B>, seed: u64) {
    assert_eq!(a.trace.rows, b.trace.rows);
    assert_eq!(a.cache.lengths(0), b.cache.lengths(0));
    for (a, b) in a.hidden_states.iter().zip(&b.hidden_states) {
        assert_eq!(columns(&a.values), columns(&b.values));
    }
    assert_eq!(values(a.logits.clone()), values(b.logits.clone()));
    let decoder = decoder(seed);
    let [a, b] = [&mut a, &mut b].map(|p| values(decoder.decode(&[(0, 1)], &mut p.cache).unwrap()));
    assert_eq!(a, b);
}

#[test]
fn everything_kept_is_the_plain_model() {
    for seed in 0..4 {
        let (decoder, prompt) = (decoder(seed), prompt(&[VISUAL], seed));
        for action in [Action::Remove, Action::Reroute] {
            let stages = vec![Stage::ratio(1, 1.0), Stage::ratio(3, 1.0)];
            let all = Schedule::new(action, false, stages).unwrap();
            let kept = observed(&decoder, &prompt, &all).unwrap();
            let plain = observed(&decoder, &prompt, &Schedule::dense()).unwrap();
            assert_identical(kept, plain, seed);
        }
    }
}

#[test]
fn with_one_decision_removing_is_rerouting() {
    for seed in 0..4 {
        let (decoder, prompt) = (decoder(seed), prompt(&[VISUAL], seed));
        let [remove, reroute] = [Action::Remove, Action::Reroute]
            .map(|action| observed(&decoder, &prompt, &schedule(action, &[(1, 5)])).unwrap());
        assert_eq!(remove.trace, reroute.trace);
        assert_identical(remove, reroute, seed);
    }
}

#[test]
fn text_is_never_deferred_and_caches_hold_text_and_kept_tokens() {
    for action in [Action::Remove, Action::Reroute] {
        let prompt = prompt(&[VISUAL], 1);
        let routed = schedule(action, &[(1, 6), (3, 2)]);
        let routed = observed(&decoder(1), &prompt, &routed).unwrap();
        let text = [0, 1, VISUAL + 2, VISUAL + 3, VISUAL + 4];
        for output in &routed.hidden_states {
            assert!(text.iter().all(|row| output.rows.contains(row)));
        }
        assert_eq!(routed.cache.lengths(0), [17, 11, 11, 7]);
        assert_eq!(routed.cache.next_position(0), 17);
    }
}

/// The layer of the second decision is made an identity, so that its output is its input.
#[test]
fn deferred_rows_are_untouched_until_they_are_kept_again() {
    struct Zero;
    impl ModuleMapper<B> for Zero {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            param.map(|values| values.zeros_like())
        }
    }
    let mut came_back = 0;
    for seed in 0..4 {
        let decoder = decoder(seed);
        let mut layers: Vec<DecoderLayer<B>> = decoder.layers().to_vec();
        layers[3] = layers[3].clone().map(&mut Zero);
        let decoder = decoder.with_layers(layers).unwrap();
        let routed = schedule(Action::Reroute, &[(1, 3), (3, VISUAL)]);
        let routed = observed(&decoder, &prompt(&[VISUAL], seed), &routed).unwrap();
        let before = columns(&routed.hidden_states[0].values);
        let after = columns(&routed.hidden_states[3].values);
        for token in &routed.trace.decisions[1].returned {
            assert_eq!(before[2 + token], after[2 + token]);
            came_back += 1;
        }
    }
    assert_eq!(came_back, 4 * (VISUAL - 3));
}

#[test]
fn a_sample_of_a_batch_is_the_same_alone() {
    let (decoder, batch) = (decoder(2), prompt(&[VISUAL, 0, 5], 3));
    for action in [Action::Remove, Action::Reroute] {
        let routed = schedule(action, &[(1, 4), (2, 3)]);
        let mut together = observed(&decoder, &batch, &routed).unwrap();
        let logits = columns(&together.logits.clone().transpose());
        let fed = [(0, 3), (2, 5), (1, 4)];
        let next = decoder.decode(&fed, &mut together.cache).unwrap();
        let next = columns(&next.transpose());
        for (at, &(sample, token)) in fed.iter().enumerate() {
            let mut one = observed(&decoder, &alone(&batch, sample), &routed).unwrap();
            close(&logits[sample], &values(one.logits));
            assert_eq!(together.cache.bytes(sample).len(), LAYERS);
            let own = decoder.decode(&[(0, token)], &mut one.cache).unwrap();
            close(&next[at], &values(own));
            assert_eq!(together.cache.lengths(sample), one.cache.lengths(0));
            let of_sample = together.trace.of_sample(sample);
            let selected: Vec<_> = of_sample.map(|d| &d.selected).collect();
            let own: Vec<_> = one.trace.decisions.iter().map(|d| &d.selected).collect();
            assert_eq!(selected, own);
        }
    }
}

fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    assert!(
        a.iter()
            .zip(b)
            .all(|(a, b)| (a - b).abs() < 1e-5 * a.abs().max(1.0))
    );
}

/// Rows that one turn renumbered cannot stand beside rows that the next does not.
#[test]
fn a_turn_with_gaps_after_a_renumbered_one_is_refused() {
    let (decoder, prompt) = (decoder(1), prompt(&[VISUAL], 1));
    let gaps = schedule(Action::Remove, &[(1, 4)]);
    let renumbered = gaps.clone().with_positions(Positions::Renumber).unwrap();
    let turn = || {
        let mut turn = observed(&decoder, &prompt, &renumbered).unwrap();
        decoder.decode(&[(0, 3)], &mut turn.cache).unwrap();
        turn.cache
    };
    let resume = |cache: KvCache<B>, schedule: &Schedule| {
        decoder.resume(cache, &prompt, schedule, Default::default())
    };
    for schedule in [&gaps, &Schedule::dense()] {
        let error = resume(turn(), schedule).unwrap_err();
        let mixed = matches!(
            error,
            RerouteError::MixedPositions {
                sample: 0,
                layer: 1
            }
        );
        assert!(mixed, "{error}");
        // Rows before the image have the same position either way.
        let mut cache = turn();
        cache.truncate(0, 2).unwrap();
        let resumed = resume(cache, schedule).unwrap();
        let fresh = resume(KvCache::new(LAYERS, 1).unwrap(), schedule).unwrap();
        close(&values(resumed.logits), &values(fresh.logits));
    }
    let again = resume(turn(), &renumbered).unwrap();
    let fresh = resume(KvCache::new(LAYERS, 1).unwrap(), &renumbered).unwrap();
    assert_eq!(values(again.logits), values(fresh.logits));
    // Rerouting computes what a decision chose anew, and keeps nothing that was renumbered.
    let rerouted = schedule(Action::Reroute, &[(1, 4)]);
    let resumed = resume(turn(), &rerouted).unwrap();
    let fresh = resume(KvCache::new(LAYERS, 1).unwrap(), &rerouted).unwrap();
    close(&values(resumed.logits), &values(fresh.logits));
}

/// Without decisions a turn is the plain model's, whatever earlier turns kept from a layer.
#[test]
fn a_dense_turn_after_a_routed_one_is_the_plain_model() {
    let (decoder, prompt) = (decoder(1), prompt(&[VISUAL], 1));
    let dense = Schedule::dense();
    let fresh = observed(&decoder, &prompt, &dense).unwrap();
    let expected = values(fresh.logits);
    for action in [Action::Reroute, Action::Remove] {
        let turn = observed(&decoder, &prompt, &schedule(action, &[(1, 4)])).unwrap();
        let resumed = decoder.resume(turn.cache, &prompt, &dense, Default::default());
        close(&values(resumed.unwrap().logits), &expected);
    }
}

/// One more token costs what it costs, however the cache has grown; tokens at once are tokens in turn.
#[test]
fn tokens_at_once_are_tokens_in_turn() {
    let (decoder, prompt) = (decoder(5), prompt(&[VISUAL], 2));
    let routed = schedule(Action::Reroute, &[(1, 4), (3, 2)]);
    let cache = || observed(&decoder, &prompt, &routed).unwrap().cache;
    let (mut at_once, mut in_turn) = (cache(), cache());
    let tokens: Vec<(usize, u32)> = (0..20).map(|id| (0, id)).collect();
    let together = decoder.decode(&tokens, &mut at_once).unwrap();
    let together = columns(&together.transpose());
    for (token, expected) in tokens.iter().zip(together) {
        close(
            &values(decoder.decode(&[*token], &mut in_turn).unwrap()),
            &expected,
        );
    }
    assert_eq!(at_once.lengths(0), in_turn.lengths(0));
    assert_eq!(at_once.bytes(0), in_turn.bytes(0));
}
