//! Keys and values in every type that caches keep them in.

use burn::tensor::DType;
use reducers::{Action, Cost, KvType, Schedule};
use reroute::{Decoder, KvCache, Place, PrefillOptions, RerouteError};

use crate::support::*;

/// Of a number, the largest share that rounding takes; logits are off by a few of them.
fn step(kv: KvType) -> f32 {
    match kv {
        KvType::F32 => 1e-6,
        KvType::F16 => 5e-4,
        KvType::BF16 => 4e-3,
        _ => 8e-3,
    }
}

fn decoder_in(kv: KvType, seed: u64) -> Decoder<B> {
    let mut decoder = decoder(seed);
    decoder.set_kv_type(Some(kv)).unwrap();
    decoder
}

/// The largest difference, as a share of the largest number.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let most = b.iter().fold(0f32, |most, x| most.max(x.abs()));
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0f32, f32::max) / most
}

/// Whether what two ways compute is the same. Another order of a sum may round a number to the other side, but
/// seldom: then it is a step away.
fn assert_same(kv: KvType, shares: &[f32]) {
    let same = shares.iter().filter(|&&share| share < 1e-5).count();
    assert!(4 * same >= 3 * shares.len(), "{kv}: {shares:?}");
    let most = shares.iter().copied().fold(0f32, f32::max);
    assert!(most < 4.0 * step(kv) + 1e-5, "{kv}: {most}");
}

fn routed() -> Schedule {
    schedule(Action::Reroute, &[(1, 6), (3, 3)])
}

/// Logits behind a prompt and behind four tokens.
fn logits(decoder: &Decoder<B>, seed: u64, schedule: &Schedule) -> Vec<f32> {
    let mut prefill = observed(decoder, &prompt(&[12], seed), schedule).unwrap();
    let mut logits = values(prefill.logits);
    for token in 0..4 {
        let next = decoder.decode(&[(0, token)], &mut prefill.cache).unwrap();
        logits.extend(values(next));
    }
    logits
}

/// Near the cache in f32 by what the type loses, and not by less: it is really in use. In f32 to the bit.
#[test]
fn logits_are_off_by_what_the_type_loses() {
    for kv in KvType::ALL {
        for seed in 0..6 {
            let schedule = Schedule::dense();
            let [found, expected] = [decoder_in(kv, seed), decoder(seed)]
                .map(|decoder| logits(&decoder, seed, &schedule));
            let share = apart(&found, &expected);
            match kv {
                KvType::F32 => assert_eq!(found, expected),
                _ => assert!(
                    share < 4.0 * step(kv) && share > step(kv) / 100.0,
                    "{kv}: {share}"
                ),
            }
        }
    }
}

/// A prompt read at once, in two turns, and token by token; a sample of a batch and the same alone.
#[test]
fn every_way_reads_what_the_cache_holds() {
    let options = PrefillOptions {
        keep_pool: true,
        ..Default::default()
    };
    for kv in KvType::ALL {
        let (mut turns, mut in_turn, mut together) = (Vec::new(), Vec::new(), Vec::new());
        for seed in 0..8 {
            let decoder = decoder_in(kv, seed);
            let whole = prompt(&[12], seed);
            for schedule in [Schedule::dense(), routed()] {
                let fresh = observed(&decoder, &whole, &schedule).unwrap();
                let mut cache = fresh.cache.clone();
                cache.truncate(0, 16).unwrap();
                let resumed = decoder.resume(cache, &whole, &schedule, options).unwrap();
                let selected = |trace: &reroute::RoutingTrace| {
                    let decisions = trace.decisions.iter();
                    decisions.map(|d| d.selected.clone()).collect::<Vec<_>>()
                };
                assert_eq!(selected(&resumed.trace), selected(&fresh.trace));
                assert_eq!(resumed.cache.bytes(0), fresh.cache.bytes(0));
                turns.push(apart(&values(resumed.logits), &values(fresh.logits)));
            }
            let cache = || observed(&decoder, &whole, &routed()).unwrap().cache;
            let (mut one, mut other) = (cache(), cache());
            let tokens: Vec<(usize, u32)> = (0..12).map(|id| (0, id)).collect();
            let at_once = decoder.decode(&tokens, &mut one).unwrap();
            let singly = tokens.iter().map(|&token| {
                let next = decoder.decode(&[token], &mut other).unwrap();
                values(next)
            });
            in_turn.push(apart(
                &singly.collect::<Vec<_>>().concat(),
                &values(at_once),
            ));

            let batch = prompt(&[12, 5], seed);
            let mut all = observed(&decoder, &batch, &routed()).unwrap();
            let fed = [(1, 3), (0, 4)];
            let next = values(decoder.decode(&fed, &mut all.cache).unwrap());
            for ((sample, token), next) in fed.into_iter().zip(next.chunks(VOCAB)) {
                let mut own = observed(&decoder, &alone(&batch, sample), &routed()).unwrap();
                let own = decoder.decode(&[(0, token)], &mut own.cache).unwrap();
                together.push(apart(next, &values(own)));
            }
        }
        assert_same(kv, &turns);
        assert_same(kv, &in_turn);
        assert_same(kv, &together);
    }
}

/// What becomes of samples and rows changes no number of those that stay.
#[test]
fn caches_of_every_type_are_kept_whole() {
    for kv in KvType::ALL {
        let decoder = decoder_in(kv, 3);
        let filled = |seed: u64| {
            observed(&decoder, &prompt(&[12], seed), &routed())
                .unwrap()
                .cache
        };
        let next =
            |cache: &mut KvCache<B>, sample| values(decoder.decode(&[(sample, 5)], cache).unwrap());
        let expected = [1, 2].map(|seed| next(&mut filled(seed), 0));

        let mut both = filled(1);
        both.extend(filled(2)).unwrap();
        both.reserve(1, 30).unwrap();
        both.compact(0).unwrap();
        assert_eq!(
            both.allocated_bytes(0),
            both.bytes(0).iter().sum::<u64>() + pool()
        );
        assert_eq!(next(&mut both, 0), expected[0]);
        assert_eq!(next(&mut both, 1), expected[1]);
        let used = both.bytes(1).iter().sum::<u64>();
        assert!(both.allocated_bytes(1) > used + pool());
        both.compact(1).unwrap();
        let mut second = both.remove(1).unwrap();
        assert_eq!((both.samples(), second.samples()), (1, 1));
        assert_eq!(second.bytes(0).iter().sum::<u64>(), used);
        let mut once_more = filled(2);
        next(&mut once_more, 0);
        assert_eq!(next(&mut second, 0), next(&mut once_more, 0));

        let cost = Cost::of(&config().shape(), &routed(), 12, 5, kv);
        assert_eq!(filled(1).bytes(0), cost.kv_bytes, "{kv}");
    }
}

/// Bytes of the hidden states that a later turn chooses from.
fn pool() -> u64 {
    (HIDDEN * 17 * 4) as u64
}

#[test]
fn a_cache_of_another_type_is_refused() {
    let whole = prompt(&[12], 1);
    for kv in KvType::ALL {
        for other in KvType::ALL.into_iter().filter(|&other| other != kv) {
            let (decoder, stranger) = (decoder_in(kv, 1), decoder_in(other, 1));
            let cache = || observed(&stranger, &whole, &routed()).unwrap().cache;
            let fed = decoder.decode(&[(0, 1)], &mut cache()).unwrap_err();
            let resumed = decoder.resume(cache(), &whole, &routed(), Default::default());
            for error in [fed, resumed.map(drop).unwrap_err()] {
                let RerouteError::Cache { given, expected } = error else {
                    panic!("{error}");
                };
                assert!(given.ends_with(&format!(" in {other}")), "{given}");
                assert!(expected.ends_with(&format!(" in {kv}")), "{expected}");
            }
        }
    }
}

/// A number that is none is found where it comes in, in whatever type it would be kept.
#[test]
fn what_is_not_finite_is_found_in_every_type() {
    for kv in KvType::ALL {
        let mut decoder = decoder_in(kv, 1);
        let mut layers = decoder.layers().to_vec();
        let weight = &mut layers[2].self_attn.v_proj.weight;
        *weight = (weight.val() * f32::MAX).into();
        decoder = decoder.with_layers(layers).unwrap();
        let whole = prompt(&[12], 1);
        let prefill = observed(&decoder, &whole, &Schedule::dense()).unwrap();
        let mut cache = prefill.cache;
        let answers = reroute::generate(
            &decoder,
            prefill.logits,
            &mut cache,
            &[vec![1]],
            &Default::default(),
            &mut |_, _| std::ops::ControlFlow::Continue(()),
        );
        match answers.unwrap().remove(0).unwrap_err() {
            RerouteError::NotANumber {
                place, kv: told, ..
            } => {
                assert_eq!((place, told), (Place::Layer(2), kv));
            }
            other => panic!("{other}"),
        }
    }
}

/// Keys and values beyond the range of f16 have a remedy of their own.
#[test]
fn an_overflow_of_f16_names_the_flag() {
    let mut decoder = decoder_in(KvType::F16, 1);
    let mut layers = decoder.layers().to_vec();
    let weight = &mut layers[1].self_attn.v_proj.weight;
    *weight = (weight.val() * 1e6).into();
    decoder = decoder.with_layers(layers).unwrap();
    let error = |decoder: &Decoder<B>| {
        let prefill = observed(decoder, &prompt(&[12], 1), &Schedule::dense()).unwrap();
        let mut cache = prefill.cache;
        let go_on = &mut |_, _| std::ops::ControlFlow::Continue(());
        let options = Default::default();
        let logits = prefill.logits;
        let answers = reroute::generate(decoder, logits, &mut cache, &[vec![1]], &options, go_on);
        answers.unwrap().remove(0)
    };
    let told = error(&decoder).unwrap_err().to_string();
    assert!(
        told.contains("decoder layer 1") && told.contains("--kv bf16"),
        "{told}"
    );
    decoder.set_kv_type(None).unwrap();
    assert!(error(&decoder).is_ok());
}

/// A type that is none of keys and values, and one that a backend does not have.
#[test]
fn other_types_are_refused() {
    for dtype in [DType::I32, DType::U8] {
        let error = decoder(1).set_kv_type(Some(dtype.into())).unwrap_err();
        assert!(matches!(error, RerouteError::KvType { .. }), "{error}");
    }
    assert_eq!(KvType::from(DType::I8), KvType::Int8);
}

/// What a type changes is told: nothing in the weights' own, little in others.
#[test]
fn the_error_of_a_type_is_told() {
    let answer = [3, 1, 4, 1, 5];
    for kv in KvType::ALL {
        let decoder = decoder_in(kv, 2);
        let told = decoder
            .kv_error(None, &prompt(&[12], 2), &routed(), &answer)
            .unwrap();
        assert_eq!((told.kv, told.against), (kv, KvType::F32));
        assert_eq!((told.tokens, told.selected), (6, 9));
        match kv {
            KvType::F32 => {
                assert_eq!(
                    (told.largest, told.same, told.selected_in_both),
                    (0.0, 6, 9)
                );
            }
            _ => {
                assert!(
                    told.largest > 0.0 && told.largest < 4.0 * step(kv),
                    "{told:?}"
                );
                assert!(told.same >= 5 && told.selected_in_both >= 7, "{told:?}");
            }
        }
    }
}
